"""What `make bench DEVICE=cuda` measures: our ops, and beside each flash-linear-attention's op of the same name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from ttr import ops

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

RIDGE = 0.5
SOLVER_STEPS = 8  # of local linear attention
CG_STEPS = 30  # of least squares whose ridge stays, as flash-linear-attention's


class Shape(NamedTuple):
    batch: int
    time: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.time} H{self.heads} D{self.dim}"


# Those at which flash-linear-attention publishes its figures.
SHAPES = (
    Shape(1, 8192, 96, 128),
    Shape(2, 16384, 16, 128),
    Shape(4, 2048, 16, 128),
    Shape(4, 4096, 64, 128),
    Shape(8, 1024, 8, 64),
)
QUADRATIC_SHAPES = (Shape(1, 8192, 16, 64),)


class Tensors(NamedTuple):
    """The inputs of all ops; each takes what it needs. The axis of heads is the third, or the only one."""

    q: Tensor
    k: Tensor
    v: Tensor
    probe: Tensor
    step_size: Tensor
    log_decay: Tensor
    log_channel_decay: Tensor
    ridge: Tensor

    def of_heads(self, count: int) -> Tensors:
        return Tensors(*(of_heads(x, count) for x in self))

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors(*map(function, self))


def of_heads(x: Tensor, count: int) -> Tensor:
    return x[:count] if x.ndim == 1 else x[:, :, :count]


def tensors(shape: Shape, dtype: torch.dtype, device: str) -> Tensors:
    """Seeded inputs; keys of norm one, decays and ridges in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    rows = (shape.batch, shape.time, shape.heads)
    return Tensors(
        q=normal(*rows, shape.dim).to(dtype),
        k=normalize(normal(*rows, shape.dim), dim=-1).to(dtype),
        v=normal(*rows, shape.dim).to(dtype),
        probe=(0.1 * normal(*rows, shape.dim)).to(dtype),
        step_size=uniform(*rows).to(dtype),
        log_decay=-0.1 * uniform(*rows),
        log_channel_decay=-0.1 * uniform(*rows, shape.dim),
        ridge=torch.full((shape.heads,), RIDGE, device=device),
    )


Call = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: what tables call it; as in tests/kernels/cases.py, where its kernels are compiled and estimated.
        needs: the tensors that it reads, all of which it is differentiated in.
        ours: the outputs.
        exact: the outputs in float64, from inputs in float64 and any number of heads.
        rival: who else computes it, "module.function" of flash-linear-attention or "torch".
        theirs: the outputs by that function.
        bound: the largest relative error with which an op has a speed.
        shapes: at which it is measured.
        directions: in which it is measured.
    """

    name: str
    needs: tuple[str, ...]
    ours: Call
    exact: Call
    rival: str | None = None
    theirs: Callable[[Any, Tensors], Tensor] | None = None
    bound: float = 2e-2
    shapes: tuple[Shape, ...] = SHAPES
    directions: tuple[Direction, ...] = DIRECTIONS

    def rival_call(self) -> Call | None:
        """Their outputs; None where flash-linear-attention is not installed, or has no such op."""
        if self.rival is None or self.theirs is None:
            return None
        if self.rival == "torch":
            function: Any = scaled_dot_product_attention
        else:
            module, _, name = self.rival.rpartition(".")
            try:
                function = getattr(import_module(f"fla.ops.{module}"), name)
            except (ImportError, AttributeError):
                return None
        theirs = self.theirs
        return lambda x: theirs(function, x)


def compute(op: Op, call: Call, x: Tensors, direction: Direction) -> tuple[Tensor, ...]:
    """The outputs; or the gradients of all that the op needs, for a cotangent that differs from token to token."""
    if direction == "forward":
        with torch.no_grad():
            return (call(x),)
    x = x._replace(**{name: getattr(x, name).detach().requires_grad_() for name in op.needs})
    y = call(x)
    return torch.autograd.grad(y, [getattr(x, name) for name in op.needs], x.v.detach().to(y.dtype))


def error(op: Op, call: Call, x: Tensors, direction: Direction, heads: int = 1) -> float:
    """The largest relative error of the first heads' answers against float64; infinite where one is not finite."""
    wide = x.of_heads(heads).map(Tensor.double)
    worst = 0.0
    for found, exact in zip(compute(op, call, x, direction), compute(op, op.exact, wide, direction), strict=True):
        difference = (of_heads(found, heads).double() - exact).norm() / exact.norm()
        worst = max(worst, difference.item() if difference.isfinite() else math.inf)
    return worst


def quietly(function: Callable[[], Tensor]) -> Tensor:
    """Without the warning that so many steps were too few: their number is what is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def gain(x: Tensors) -> Tensor:
    return ops.gains.lms(x.k, x.step_size)


def pair(name: str, needs: tuple[str, ...], call: Callable[[Tensors, Any], Tensor], **others: Any) -> Op:
    """An op whose exact form is the same call of PyTorch's rung."""
    return Op(name, needs, lambda x: call(x, "triton"), lambda x: call(x, "torch"), **others)


def linear(x: Tensors, log_decay: Tensor | None, backend: Any) -> Tensor:
    return ops.linear_attention(x.q, x.k, x.v, log_decay, backend=backend)[0]


def delta(x: Tensors, log_decay: Tensor | None, backend: Any) -> Tensor:
    return ops.delta_rule(x.q, x.k, x.v, gain(x), log_decay, backend=backend)[0]


def squares(x: Tensors, backend: Any, *, ridge_decays: bool) -> Tensor:
    exact = x.v.dtype == torch.float64
    return quietly(
        lambda: ops.least_squares(
            x.q, x.k, x.v, x.ridge, x.log_decay,
            weight=x.step_size if exact else x.step_size.float(),
            ridge_decays=ridge_decays, steps=200 if exact else CG_STEPS, tolerance=1e-10 if exact else 1e-4,
            backend=backend,
        )[0]
    )  # fmt: skip


def local_linear(x: Tensors, backend: Any) -> Tensor:
    exact = x.v.dtype == torch.float64
    return quietly(
        lambda: ops.local_polynomial(
            x.q, x.k, x.v, 1, x.q.shape[-1] ** 0.25, 2 * x.ridge, solver="conjugate_gradients",
            steps=200 if exact else SOLVER_STEPS, tolerance=1e-10 if exact else 1e-6, backend=backend,
        )[0]
    )  # fmt: skip


def parallax(x: Tensors, backend: Any) -> Tensor:
    return ops.local_polynomial(x.q, x.k, x.v, 1, x.q.shape[-1] ** 0.25, probe=x.probe, backend=backend)[0]


def attention(function: Any, x: Tensors) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return function(q, k, v, is_causal=True).transpose(1, 2)


def mesa_net(function: Any, x: Tensors) -> Tensor:
    ridge = x.ridge[:, None].expand(-1, x.k.shape[-1]).contiguous()
    return function(x.q, x.k, x.v, g=x.log_decay, beta=x.step_size, lamb=ridge, max_CG_iteration=CG_STEPS)[0]


QKV = ("q", "k", "v")

OPS = (
    pair(
        "linear_attention, no decay",
        QKV,
        lambda x, backend: linear(x, None, backend),
        rival="linear_attn.chunk_linear_attn",
        theirs=lambda f, x: f(x.q, x.k, x.v, scale=1.0, normalize=False)[0],
    ),
    pair(
        "linear_attention, decay per head",
        (*QKV, "log_decay"),
        lambda x, backend: linear(x, x.log_decay, backend),
        rival="simple_gla.chunk_simple_gla",
        theirs=lambda f, x: f(x.q, x.k, x.v, g=x.log_decay, scale=1.0)[0],
    ),
    pair(
        "linear_attention, decay per channel",
        (*QKV, "log_channel_decay"),
        lambda x, backend: linear(x, x.log_channel_decay, backend),
        rival="gla.chunk_gla",
        theirs=lambda f, x: f(x.q, x.k, x.v, g=x.log_channel_decay, scale=1.0)[0],
    ),
    pair(
        "delta_rule, no decay",
        (*QKV, "step_size"),
        lambda x, backend: delta(x, None, backend),
        rival="delta_rule.chunk_delta_rule",
        theirs=lambda f, x: f(x.q, x.k, x.v, beta=x.step_size, scale=1.0)[0],
    ),
    pair(
        "delta_rule, decay per head",
        (*QKV, "step_size", "log_decay"),
        lambda x, backend: delta(x, x.log_decay, backend),
        rival="gated_delta_rule.chunk_gated_delta_rule",
        theirs=lambda f, x: f(x.q, x.k, x.v, g=x.log_decay, beta=x.step_size, scale=1.0)[0],
    ),
    pair(
        "delta_rule, decay per channel",
        (*QKV, "step_size", "log_channel_decay"),
        lambda x, backend: delta(x, x.log_channel_decay, backend),
        rival="kda.chunk_kda",
        theirs=lambda f, x: f(x.q, x.k, x.v, g=x.log_channel_decay, beta=x.step_size, scale=1.0)[0],
    ),
    pair(
        "momentum_delta_rule, decay per head",
        (*QKV, "step_size", "log_decay"),
        # Shorter steps than the delta rule's, since they go on: full ones diverge.
        lambda x, backend: ops.momentum_delta_rule(
            x.q, x.k, x.v, gain(x) / 4, x.log_decay, x.log_decay, backend=backend
        )[0],
    ),
    pair(
        "least_squares, decay per head",
        (*QKV, "log_decay", "step_size", "ridge"),
        lambda x, backend: squares(x, backend, ridge_decays=True),
    ),
    pair(
        "least_squares, decay per head, a ridge that stays",
        (*QKV, "log_decay", "step_size", "ridge"),
        lambda x, backend: squares(x, backend, ridge_decays=False),
        rival="mesa_net.chunk_mesa_net",
        theirs=mesa_net,
    ),
    pair(
        "local_linear, no decay",
        (*QKV, "ridge"),
        local_linear,
        rival="torch",
        theirs=attention,
        shapes=QUADRATIC_SHAPES,
        bound=5e-2,  # of eight steps, not of the arithmetic
    ),
    pair(
        "local_linear, a probe",
        (*QKV, "probe"),
        parallax,
        rival="torch",
        theirs=attention,
        shapes=QUADRATIC_SHAPES,
    ),
)
