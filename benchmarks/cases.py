"""What `make bench` measures: a row an op, with the call, its operations counted by hand, and the lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from ttr import ops

Direction = Literal["forward", "forward+backward"]

HEADS, DIM, CHUNK, MINI_BATCH = 4, 64, 64, 16
HIDDEN = 4 * DIM
MEAN_LOG_DECAY = -0.05
DOUBLINGS = tuple(2**power for power in range(10, 17))
UP_TO_2048, UP_TO_8192, UP_TO_16384 = DOUBLINGS[:2], DOUBLINGS[:4], DOUBLINGS[:5]


class Tensors(NamedTuple):
    """The inputs of all ops; each takes what it needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    probe: Tensor
    step_size: Tensor
    log_decay: Tensor
    log_channel_decay: Tensor
    square: Tensor
    into_hidden: Tensor
    out_of_hidden: Tensor

    @property
    def tolerance(self) -> float:
        """Of iterative solvers: what the answers are asked for, and in float64 what they are held to."""
        return 3e-5 if self.q.dtype == torch.float32 else 1e-10

    def per_head(self, value: float) -> Tensor:
        return self.q.new_full((HEADS,), value)

    def norm(self) -> tuple[Tensor, Tensor]:
        return self.q.new_ones(HEADS, DIM), self.q.new_zeros(HEADS, DIM)


def tensors(batch: int, time: int, *, unit_keys: bool = True, gradients: bool = False) -> Tensors:
    """Seeded inputs in float32, made in place: no peak of memory is above what stays."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale)

    def uniform(*shape: int, scale: float) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(scale)

    sequence = (batch, time, HEADS)
    x = Tensors(
        q=normal(*sequence, DIM),
        k=normal(*sequence, DIM),
        v=normal(*sequence, DIM),
        probe=normal(*sequence, DIM, scale=0.1),
        step_size=uniform(*sequence, scale=1.0),
        log_decay=uniform(*sequence, scale=2 * MEAN_LOG_DECAY),
        log_channel_decay=uniform(*sequence, DIM, scale=2 * MEAN_LOG_DECAY),
        square=normal(HEADS, DIM, DIM, scale=DIM**-0.5),
        into_hidden=normal(HEADS, DIM, HIDDEN, scale=DIM**-0.5),
        out_of_hidden=normal(HEADS, HIDDEN, DIM, scale=HIDDEN**-0.5),
    )
    if unit_keys:
        normalize(x.k, dim=-1, out=x.k)
    for tensor in x:
        tensor.requires_grad_(gradients)
    return x


@dataclass(frozen=True)
class Op:
    """One op at one setting.

    Attributes:
        name: what tables and figures call it.
        cost: how its time grows with the number of tokens.
        call: the outputs from the inputs.
        flops: floating-point operations a head of a forward over so many tokens, causal halves of products counted
            as halves; None where the number of solver steps depends on the data.
        forward: the lengths at which its forward is measured.
        backward: the lengths at which forward and backward together are.
        batch: sequences at once.
        unit_keys: keys of norm one, as recurrent memories need them; else standard normal ones.
    """

    name: str
    cost: Literal["linear", "quadratic"]
    call: Callable[[Tensors], Tensor]
    flops: Callable[[int], float] | None
    forward: tuple[int, ...] = DOUBLINGS
    backward: tuple[int, ...] = UP_TO_8192
    batch: int = 2
    unit_keys: bool = True


class Case(NamedTuple):
    """An op, in one direction, at one length."""

    op: Op
    direction: Direction
    time: int

    def __str__(self) -> str:
        sequences = "" if self.op.batch == 2 else f" B{self.op.batch}"
        return f"{self.op.name}{sequences}, {self.direction}, T{self.time}"

    def tensors(self) -> Tensors:
        gradients = self.direction == "forward+backward"
        return tensors(self.op.batch, self.time, unit_keys=self.op.unit_keys, gradients=gradients)

    def compute(self, x: Tensors) -> tuple[Tensor, ...]:
        """The outputs, or the gradients of every input that has one."""
        if self.direction == "forward":
            with torch.no_grad():
                return (self.op.call(x),)
        y = self.op.call(x)
        # Weights of the answers that differ, so that no gradient vanishes by symmetry.
        gradients = torch.autograd.grad(y, x, x.v.detach(), allow_unused=True)
        return tuple(gradient for gradient in gradients if gradient is not None)

    def error(self) -> float:
        """The largest relative error of the answers in float32 against the same call in float64."""
        x = self.tensors()
        wide = Tensors(*(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in x))
        pairs = zip(self.compute(x), self.compute(wide), strict=True)
        errors = [(single - double).norm() / double.norm() for single, double in pairs]
        return torch.stack(errors).max().item()  # NaN where one is


def attention(x: Tensors) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def local_linear(x: Tensors, solver: Literal["auto", "conjugate_gradients", "direct"]) -> Tensor:
    return ops.local_polynomial(x.q, x.k, x.v, 1, BANDWIDTH, x.per_head(0.5), solver=solver, tolerance=x.tolerance)[0]


def preconditioned(x: Tensors) -> Tensor:
    gain, _ = ops.gains.diagonal_newton(x.k, x.step_size, x.q.new_ones(HEADS, DIM), x.log_decay)
    return ops.delta_rule(x.q, x.k, x.v, gain, x.log_decay)[0]


def momentum(x: Tensors) -> Tensor:
    """Shorter steps than the delta rule's, since they go on: full ones diverge."""
    gain = ops.gains.lms(x.k, x.step_size / 4)
    return ops.momentum_delta_rule(x.q, x.k, x.v, gain, x.log_decay, x.log_decay)[0]


def decayed_least_squares(x: Tensors, *, ridge_decays: bool) -> Tensor:
    return ops.least_squares(
        x.q, x.k, x.v, x.per_head(0.25), x.log_decay, ridge_decays=ridge_decays, tolerance=x.tolerance
    )[0]


def network(x: Tensors, *weights: Tensor) -> Tensor:
    """A network around which the key is carried, with a layer norm, in the mini-batches of TTT."""
    y, _ = ops.neural_memory(
        x.q, x.k, x.v - x.k, weights, x.step_size / DIM, norm=x.norm(), batch=MINI_BATCH, average=True
    )
    return y


def titans(x: Tensors) -> Tensor:
    y, _ = ops.neural_memory(
        x.q,
        x.k,
        x.v - x.k,
        (x.into_hidden, x.out_of_hidden),
        x.step_size / DIM,
        log_decay=x.log_decay,
        log_momentum=x.log_decay,
        batch=MINI_BATCH,
    )
    return y


BANDWIDTH = DIM**0.25  # softmax attention's 1/√d

# Operations a token and head: a causal half of (chunk × chunk) by (chunk × dim), a product with a state, and the
# factorisation and inversion of a symmetric matrix a chunk.
WITHIN = CHUNK * DIM
ACROSS = 2 * DIM * DIM
FACTORS = 2 * (DIM**3 / CHUNK + CHUNK**2) / 3


def each_token(flops: float) -> Callable[[int], float]:
    return lambda time: time * flops


def each_pair(flops: float) -> Callable[[int], float]:
    return lambda time: time * time / 2 * flops


def of_network(*layers: tuple[int, int]) -> Callable[[int], float]:
    """Forward and backward at the key, a write, and the answer at the query in dual form within a mini-batch."""
    entries = sum(into * out for into, out in layers)
    first = layers[0][0] * layers[0][1]  # what enters the network needs no derivative
    sides = sum(into + out for into, out in layers)
    return each_token(2 * (4 * entries - first) + MINI_BATCH * sides)


OPS = (
    Op(
        "scaled_dot_product_attention",
        "quadratic",
        attention,
        each_pair(4 * DIM),
        forward=UP_TO_8192,
    ),
    Op(
        "linear_attention",
        "linear",
        lambda x: ops.linear_attention(x.q, x.k, x.v)[0],
        each_token(2 * WITHIN + 2 * ACROSS),
    ),
    Op(
        "linear_attention, decay per head",
        "linear",
        lambda x: ops.linear_attention(x.q, x.k, x.v, x.log_decay)[0],
        each_token(2 * WITHIN + 2 * ACROSS),
    ),
    Op(
        "linear_attention, decay per channel",
        "linear",
        lambda x: ops.linear_attention(x.q, x.k, x.v, x.log_channel_decay)[0],
        each_token(2 * WITHIN + 2 * ACROSS),
    ),
    Op(
        "delta_rule, decay per head",
        "linear",
        lambda x: ops.delta_rule(x.q, x.k, x.v, ops.gains.lms(x.k, x.step_size), x.log_decay)[0],
        each_token(5 * WITHIN + 3 * ACROSS),
    ),
    Op(
        "delta_rule, decay per channel",
        "linear",
        lambda x: ops.delta_rule(x.q, x.k, x.v, ops.gains.lms(x.k, x.step_size), x.log_channel_decay)[0],
        each_token(5 * WITHIN + 3 * ACROSS),
    ),
    Op(
        "delta_rule, preconditioned",
        "linear",
        preconditioned,
        each_token(5 * WITHIN + 3 * ACROSS),
    ),
    Op(
        "momentum_delta_rule",
        "linear",
        momentum,
        each_token(6 * WITHIN + CHUNK**2 / 3 + 6 * ACROSS),
    ),
    Op(
        "least_squares, ridge decays",
        "linear",
        partial(decayed_least_squares, ridge_decays=True),
        each_token(6 * WITHIN + 3 * ACROSS + 3 * DIM**2 + FACTORS),
    ),
    Op(
        "least_squares, ridge stays",
        "linear",
        partial(decayed_least_squares, ridge_decays=False),
        None,
    ),
    Op(
        "neural_memory, TTT-Linear",
        "linear",
        lambda x: network(x, x.square),
        of_network((DIM, DIM)),
    ),
    Op(
        "neural_memory, TTT-MLP",
        "linear",
        lambda x: network(x, x.into_hidden, x.out_of_hidden),
        of_network((DIM, HIDDEN), (HIDDEN, DIM)),
        forward=UP_TO_16384,
    ),
    Op(
        "neural_memory, Titans",
        "linear",
        titans,
        of_network((DIM, HIDDEN), (HIDDEN, DIM)),
        forward=UP_TO_16384,
    ),
    Op(
        "scaled_dot_product_attention",
        "quadratic",
        attention,
        each_pair(4 * DIM),
        forward=UP_TO_8192,
        batch=1,
        unit_keys=False,
    ),
    Op(
        "local_polynomial, degree 0",
        "quadratic",
        lambda x: ops.local_polynomial(x.q, x.k, x.v, 0, BANDWIDTH)[0],
        each_pair(4 * DIM),
        forward=UP_TO_8192,
        batch=1,
        unit_keys=False,
    ),
    Op(
        "local_polynomial, Parallax",
        "quadratic",
        lambda x: ops.local_polynomial(x.q, x.k, x.v, 1, BANDWIDTH, probe=x.probe)[0],
        each_pair(6 * DIM),
        forward=UP_TO_8192,
        batch=1,
        unit_keys=False,
    ),
    Op(
        "local_polynomial, degree 1",
        "quadratic",
        partial(local_linear, solver="conjugate_gradients"),
        None,
        forward=UP_TO_8192,
        backward=UP_TO_2048,
        batch=1,
        unit_keys=False,
    ),
    Op(
        "local_polynomial, degree 1, direct",
        "quadratic",
        partial(local_linear, solver="direct"),
        each_pair(DIM**2 + 6 * DIM),
        forward=UP_TO_2048,
        backward=(),
        batch=1,
        unit_keys=False,
    ),
)
