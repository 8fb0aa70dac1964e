r"""Family (e): memories that are networks, written by gradient steps while they read.

Decay and steps act on an accumulator of the shape of each weight matrix; the weights are a fixed function of it, the
identity but for unusual retentions. Within a mini-batch all gradients are taken at what is left of the weights with
which the batch began, and each is an outer product, so the weights of every token are

    W_t = κ_t W_0 + Σ_{j≤t} P_tj h_j u_jᵀ

with κ_t the decay since the batch began, h_j what enters the layer and u_j what comes back to it. Without momentum
P_tj is the decay from j to t times the step size; with it, a product of two decay matrices as in `momentum_delta_rule`.
Then W_tᵀx = κ_t W_0ᵀx + Σ_j P_tj (h_jᵀx) u_j: layer after layer, masked products as in linear attention read every
token's own network, and none of these networks is ever formed. That is the dual form of Sun et al. (2024), section 2.5.

Where the weights are not linear in the steps (a retention other than the squared distance, an orthogonal step) or a
step sees several pairs, the weights of one mini-batch are formed, token by token, and no more than that.

A mini-batch changes the answers, so its tokens are counted from the beginning of the sequence: the state is the memory
with which the started batch began, and that batch's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttr.ops import _networks
from ttr.ops._check import check_chunk_size, check_range, check_shapes
from ttr.ops._chunks import ChunkDecay, state_dtype, without_autocast

Tokens = dict[str, Tensor]
# What a pair's loss depends on.
PAIR = ("k", "v", "weight", "threshold")
PerToken = Float[Tensor, "batch time heads"]


class _Rule(NamedTuple):
    """How a memory learns: what all mini-batches share."""

    norm: _networks.Norm | None
    influence: Callable[[Tensor, Tensor | None], Tensor]
    mirror: Callable[[Tensor], Tensor] | None
    average: bool
    window: int
    orthogonalize: int


class _Memory(NamedTuple):
    """What one mini-batch hands to the next: a tensor a layer, and the pairs just before, by name."""

    accumulated: Sequence[Tensor]
    momentum: Sequence[Tensor]
    before: Tokens


def neural_memory(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    weights: Sequence[Float[Tensor, "heads _in _out"]],
    step_size: PerToken,
    *,
    norm: tuple[Float[Tensor, "heads value"], Float[Tensor, "heads value"]] | None = None,
    log_decay: PerToken | None = None,
    log_momentum: PerToken | None = None,
    weight: PerToken | None = None,
    loss: str = "squared",
    threshold: PerToken | None = None,
    power: float = 2.0,
    retention: str = "l2",
    retention_norm: float = 4.0,
    batch: int = 1,
    average: bool = False,
    window: int = 1,
    orthogonalize: int = 0,
    initial_state: Mapping[str, Tensor] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "batch time heads value"], dict[str, Tensor]]:
    r"""Descend a network's loss on each new pair, then read the network.

    .. math::
        Z_t = e^{\mu_t} Z_{t-1} - \beta_t w_t \nabla\ell\bigl(v_t - m(k_t; \bar W_t)\bigr), \qquad
        A_t = e^{\ell_t} A_{t-1} + Z_t, \qquad W_t = \nabla\Phi(A_t), \qquad y_t = m(q_t; W_t)

    :math:`\bar W_t` is what decay has left, at t, of the weights with which t's mini-batch began; of
    :math:`W_{t-1}` where batch = 1. The network m is a chain of the weights with gelu between (its tanh form) and,
    with `norm`, a layer norm at its end. A network around which the key is carried (TTT, Titans, Miras) is this one at
    values v − k, with q added to the answers.

    Args:
        q: queries; no scaling is applied.
        k: keys.
        v: values.
        weights: :math:`A_0` of each layer, first layer first; the last one's outputs are values.
        step_size: :math:`\beta_t \ge 0`.
        norm: scale and shift of the layer norm; no token updates them.
        log_decay: :math:`\ell_t \le 0`; None keeps everything.
        log_momentum: :math:`\mu_t \le 0`; None is plain gradient descent, Z_t the newest step alone.
        weight: :math:`w_t \ge 0`, of the pair's loss; None is one.
        loss: of each channel's error e: "squared", e²/2; "huber", with its `threshold`; "power", :math:`|e|^p/p`.
        threshold: :math:`\delta_t \ge 0` of the Huber loss: an error pulls no harder than δ. That makes the memory
            robust to outliers.
        power: p ≥ 1. Above 2 the memory is less robust to outliers than under the squared error.
        retention: what the weights are of A. "l2": A itself; "lq": the mirror map of half the squared q-norm,
            :math:`\operatorname{sgn}(A)|A|^{p-1}/\lVert A\rVert_p^{p-2}` with p = q/(q−1); "lq_printed":
            :math:`A/\lVert A\rVert_q^{q-2}`, as Behrouz et al. (2025, Miras) print it, which for q > 3 grows as A
            shrinks and has no value at A = 0; "kl": the softmax of each column, so that no weight is negative.
        retention_norm: q > 1 of the retentions "lq" and "lq_printed".
        batch: tokens whose gradients are taken at the weights with which their mini-batch begins, counted from the
            start of the sequence. 1 is the exact online rule. It changes the result.
        average: read (and end the batch with) the mean of the batch's steps so far in place of their sum.
        window: the gradient at t is that of the losses of the last `window` pairs, all at :math:`\bar W_t`.
        orthogonalize: iterations of Newton–Schulz on :math:`Z_t`, which then holds gradients, before it enters
            :math:`A_t` times :math:`\beta_t`; 0 for none.
        initial_state: what an earlier call returned; None begins afresh.
        chunk_size: tokens between two states that are stored for the backward pass, which computes the others again;
            changes speed and memory, not the result.

    Returns:
        The outputs in the dtype of v, and the state in at least float32, batch first. It holds A as "w1", "w2", …, Z
        as "momentum.w1", …, where there is one, the tokens of a mini-batch that has not ended as "started.k", …, and
        the pairs before it that the window still sees as "window.k", ….

    Raises:
        ValueError: for a wrong shape, dtype or device, weights that do not chain from keys to values, a value out of
            range, an unknown loss or retention, sizes below 1, an average with momentum, a state of other names.

    Sun et al. (2024), eq. 1 and section 2.4–2.5; Behrouz et al. (2025, Titans), eq. 13–14 (there the gradient is taken
    before the decay); Behrouz et al. (2025, Miras), eq. 24–27; Behrouz et al. (2025, ATLAS), eq. 32–33.
    """
    _check_choices(
        loss=loss,
        power=power,
        threshold=threshold,
        retention=retention,
        retention_norm=retention_norm,
        batch=batch,
        average=average,
        window=window,
        orthogonalize=orthogonalize,
        log_momentum=log_momentum,
    )
    check_chunk_size(chunk_size)
    if not weights:
        raise ValueError("weights: expected at least one matrix, got none")
    if window > 1 and weight is None:
        weight = torch.ones_like(step_size)  # the pairs before the first are there, and weigh nothing
    given = {"q": q, "k": k, "v": v, "step_size": step_size, "log_decay": log_decay, "log_momentum": log_momentum}
    given |= {"weight": weight, "threshold": threshold}
    tokens = {name: x for name, x in given.items() if x is not None}
    may_vanish = retention != "lq_printed" or retention_norm <= 2
    _check_tensors(tokens, weights, norm, initial_state, batch=batch, window=window, may_vanish=may_vanish)

    dtype = state_dtype(v)
    tokens = {name: x.movedim(1, 2).to(dtype) for name, x in tokens.items()}
    q = tokens.pop("q")
    memory, started = _begin(tokens, weights, window, initial_state, momentum=log_momentum is not None)
    waiting = started["k"].shape[2]
    if waiting:
        tokens = {name: torch.cat([started[name], x], dim=2) for name, x in tokens.items()}
        q = torch.cat([q.new_zeros(*q.shape[:2], waiting, q.shape[-1]), q], dim=2)
    rule = _Rule(
        norm=None if norm is None else _networks.Norm(*(x.to(dtype)[:, None, None, :] for x in norm)),
        influence=lambda error, threshold: _networks.INFLUENCES[loss](error, threshold, power),
        mirror=None if retention == "l2" else lambda x: _networks.MIRRORS[retention](x, retention_norm),
        average=average,
        window=window,
        orthogonalize=orthogonalize,
    )
    with without_autocast(v):
        y, memory, started = _run(rule, tokens | {"q": q}, memory, batch, chunk_size)
    return y[:, :, waiting:].movedim(2, 1).to(v.dtype), _end(memory, started, batch)


def _run(rule: _Rule, tokens: Tokens, memory: _Memory, batch: int, chunk_size: int) -> tuple[Tensor, _Memory, Tokens]:
    """The outputs, the memory with which the last, started batch begins, and that batch's tokens."""
    time = tokens["k"].shape[2]
    whole = time - time % batch
    pieces = {name: x[:, :, :whole].split(batch, dim=2) for name, x in tokens.items()} if whole else {}
    batches = [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
    stride = max(1, chunk_size // batch)
    outputs = []
    for start in range(0, len(batches), stride):
        chunk = batches[start : start + stride]
        if torch.is_grad_enabled() and len(batches) > stride:
            y, memory = checkpoint(_steps, rule, chunk, memory, use_reentrant=False, preserve_rng_state=False)
        else:
            y, memory = _steps(rule, chunk, memory)
        outputs.append(y)
    rest = {name: x[:, :, whole:] for name, x in tokens.items()}
    if whole < time:
        outputs.append(_step(rule, rest, memory)[0])
    y = torch.cat(outputs, dim=2) if outputs else tokens["v"][:, :, :0]
    del rest["q"]
    return y, memory, rest


def _steps(rule: _Rule, batches: Sequence[Tokens], memory: _Memory) -> tuple[Tensor, _Memory]:
    outputs = []
    for tokens in batches:
        y, memory = _step(rule, tokens, memory)
        outputs.append(y)
    return torch.cat(outputs, dim=2), memory


class _Coefficients:
    """How much of everything that came before in a mini-batch is left at each of its tokens, (batch, heads, token, …).

    `kept` is of the accumulator, `reads` of each token's step in the accumulator; with momentum, `pushes` is of each
    token's step in the momentum, `old_push` of the momentum that the batch began with in itself, and `reach` in the
    accumulator.
    """

    def __init__(self, tokens: Tokens, average: bool):
        step_size = tokens["step_size"]
        one = torch.ones_like(step_size).unsqueeze(-1)
        decay = ChunkDecay(tokens.get("log_decay", torch.zeros_like(step_size)))
        self.kept, self.reads = decay.since_start(one), decay.matrix
        if "log_momentum" in tokens:
            momentum = ChunkDecay(tokens["log_momentum"])
            self.pushes, self.old_push = momentum.matrix, momentum.since_start(one)
            self.reach = self.reads @ self.old_push
        if average:
            self.reads = self.reads / torch.arange(1, step_size.shape[-1] + 1, device=step_size.device).unsqueeze(-1)


def _step(rule: _Rule, tokens: Tokens, memory: _Memory) -> tuple[Tensor, _Memory]:
    """One mini-batch: every token's answer, and the memory after the last of them."""
    coefficients = _Coefficients(tokens, rule.average)
    if rule.mirror is None and rule.window == 1 and not rule.orthogonalize:
        return _by_products(rule, coefficients, tokens, memory)
    return _by_weights(rule, coefficients, tokens, memory)


def _by_products(rule: _Rule, c: _Coefficients, tokens: Tokens, memory: _Memory) -> tuple[Tensor, _Memory]:
    """The dual form: no token's weights are formed but the last one's."""
    step_size = tokens["step_size"].unsqueeze(-2)
    reads = c.reads
    if memory.momentum:
        pushes = step_size * c.pushes
        reads = reads @ pushes
    else:
        reads = step_size * reads
    one_group = {name: x.unsqueeze(2) for name, x in tokens.items()}
    sides = _networks.descent(
        one_group["k"],
        one_group["v"],
        [x.unsqueeze(2) for x in memory.accumulated],
        c.kept.unsqueeze(2),
        rule.norm,
        _influence(rule, one_group),
    )
    sides = [(entering.squeeze(2), back.squeeze(2)) for entering, back in sides]

    layers: list[Callable[[Tensor], Tensor]] = []
    accumulated, momentum = [], []
    for depth, (old, (entering, back)) in enumerate(zip(memory.accumulated, sides, strict=True)):
        push = memory.momentum[depth] if memory.momentum else None

        def layer(
            x: Tensor, old: Tensor = old, push: Tensor | None = push, entering: Tensor = entering, back: Tensor = back
        ) -> Tensor:
            y = (c.kept * x) @ old + (reads * (x @ entering.mT)) @ back
            return y if push is None else y + (c.reach * x) @ push

        layers.append(layer)
        new = c.kept[..., -1:, :] * old + (reads[..., -1:, :] * entering.mT) @ back
        if push is not None:
            new = new + c.reach[..., -1:, :] * push
            momentum.append(c.old_push[..., -1:, :] * push + (pushes[..., -1:, :] * entering.mT) @ back)
        accumulated.append(new)
    norm = None if rule.norm is None else _networks.Norm(*(x.squeeze(1) for x in rule.norm))
    return _networks.answer(tokens["q"], layers, norm), _Memory(accumulated, momentum, memory.before)


def _by_weights(rule: _Rule, c: _Coefficients, tokens: Tokens, memory: _Memory) -> tuple[Tensor, _Memory]:
    """The weights of every token of the batch, one after the other from the gradients of all."""

    def mirrored(accumulated: Sequence[Tensor]) -> list[Tensor]:
        return list(accumulated) if rule.mirror is None else [rule.mirror(x) for x in accumulated]

    def over_time(matrix: Tensor, x: Tensor) -> Tensor:
        return (matrix @ x.flatten(3)).unflatten(3, x.shape[3:])

    pairs, before = _windows(rule.window, tokens, memory.before)
    kept = c.kept.unsqueeze(-1)
    old = [kept * x.unsqueeze(2) for x in memory.accumulated]
    sides = _networks.descent(pairs["k"], pairs["v"], mirrored(old), 1.0, rule.norm, _influence(rule, pairs))
    step_size = tokens["step_size"][..., None, None]

    weights, accumulated, momentum = [], [], []
    for depth, (left, (entering, back)) in enumerate(zip(old, sides, strict=True)):
        step = entering.mT @ back
        if not rule.orthogonalize:
            step = step_size * step
        if memory.momentum:
            step = over_time(c.pushes, step) + c.old_push.unsqueeze(-1) * memory.momentum[depth].unsqueeze(2)
            momentum.append(step[:, :, -1])
        if rule.orthogonalize:
            step = step_size * _networks.orthogonalized(step, rule.orthogonalize)
        weights.append(left + over_time(c.reads, step))
        accumulated.append(weights[-1][:, :, -1])
    layers = [partial(torch.matmul, other=x) for x in mirrored(weights)]
    y = _networks.answer(tokens["q"].unsqueeze(3), layers, rule.norm)
    return y.squeeze(3), _Memory(accumulated, momentum, before)


def _windows(window: int, tokens: Tokens, before: Tokens) -> tuple[Tokens, Tokens]:
    """The pairs that each token's gradient sees, (batch, heads, token, pair, …), and those to hand on."""
    names = [name for name in PAIR if name in tokens]
    if window == 1:
        return {name: tokens[name].unsqueeze(3) for name in names}, before
    rows = {name: torch.cat([before[name], tokens[name]], dim=2) for name in names}
    windows = {name: x.unfold(2, window, 1) for name, x in rows.items()}
    windows = {name: x.movedim(-1, 3) for name, x in windows.items()}
    return windows, {name: x[:, :, 1 - window :] for name, x in rows.items()}


def _influence(rule: _Rule, pairs: Tokens) -> Callable[[Tensor], Tensor]:
    """The derivative of these pairs' weighted losses."""
    threshold, weight = (pairs[name].unsqueeze(-1) if name in pairs else None for name in ("threshold", "weight"))

    def influence(error: Tensor) -> Tensor:
        pull = rule.influence(error, threshold)
        return pull if weight is None else weight * pull

    return influence


def _begin(
    tokens: Tokens, weights: Sequence[Tensor], window: int, state: Mapping[str, Tensor] | None, *, momentum: bool
) -> tuple[_Memory, Tokens]:
    """The memory with which the started mini-batch began, and that batch's tokens."""
    v = tokens["v"]
    state = {} if state is None else {name: x.to(v.dtype) for name, x in state.items()}
    accumulated, pushes = [], []
    for depth, x in enumerate(weights, 1):
        accumulated.append(state.get(f"w{depth}", x.to(v.dtype).expand(v.shape[0], *x.shape)))
        pushes.append(state.get(f"momentum.w{depth}", torch.zeros_like(accumulated[-1])))

    def earlier(prefix: str, name: str, length: int) -> Tensor:
        if f"{prefix}.{name}" in state:
            return state[f"{prefix}.{name}"].movedim(1, 2)
        x = tokens[name]
        return x.new_zeros(*x.shape[:2], length, *x.shape[3:])

    before = {name: earlier("window", name, window - 1) for name in PAIR if name in tokens} if window > 1 else {}
    started = {name: earlier("started", name, 0) for name in tokens}
    return _Memory(accumulated, pushes if momentum else [], before), started


def _end(memory: _Memory, started: Tokens, batch: int) -> dict[str, Tensor]:
    """The state, laid out as the arguments are."""
    state = {f"w{depth}": x for depth, x in enumerate(memory.accumulated, 1)}
    state |= {f"momentum.w{depth}": x for depth, x in enumerate(memory.momentum, 1)}
    state |= {f"window.{name}": x.movedim(2, 1) for name, x in memory.before.items()}
    return state | ({f"started.{name}": x.movedim(2, 1) for name, x in started.items()} if batch > 1 else {})


def _check_choices(
    *,
    loss: str,
    power: float,
    threshold: Tensor | None,
    retention: str,
    retention_norm: float,
    batch: int,
    average: bool,
    window: int,
    orthogonalize: int,
    log_momentum: Tensor | None,
) -> None:
    for name, value, known in (("loss", loss, _networks.INFLUENCES), ("retention", retention, _networks.MIRRORS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if (loss == "huber") != (threshold is not None):
        raise ValueError(f"threshold: expected with the Huber loss and no other, got loss={loss!r}")
    for name, number, valid, wanted in (
        ("power", power, 1 <= power < math.inf, "a finite number of at least 1"),
        ("retention_norm", retention_norm, 1 < retention_norm < math.inf, "a finite number above 1"),
        ("batch", batch, batch >= 1, "at least 1"),
        ("window", window, window >= 1, "at least 1"),
        ("orthogonalize", orthogonalize, orthogonalize >= 0, "at least 0"),
        ("average", average, not average or log_momentum is None, "False with a log_momentum"),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {wanted}, got {number}")


def _check_tensors(
    tokens: Tokens,
    weights: Sequence[Tensor],
    norm: tuple[Tensor, Tensor] | None,
    state: Mapping[str, Tensor] | None,
    *,
    batch: int,
    window: int,
    may_vanish: bool,
) -> None:
    sides = ["key", *(f"hidden_{depth}" for depth in range(1, len(weights))), "value"]
    layers = {f"w{depth}": f"heads {sides[depth - 1]} {sides[depth]}" for depth, _ in enumerate(weights, 1)}
    axes = dict.fromkeys(tokens, "batch time heads") | dict.fromkeys("qk", "batch time heads key")
    axes["v"] = "batch time heads value"
    scale, shift = norm or (None, None)
    own = {name: f"batch {shape}" for name, shape in layers.items()}
    if "log_momentum" in tokens:
        own |= {f"momentum.{name}": shape for name, shape in own.items()}
    if window > 1:
        own |= {f"window.{name}": axes[name].replace("time", "earlier") for name in PAIR if name in tokens}
    if batch > 1:
        own |= {f"started.{name}": axes[name].replace("time", "started") for name in tokens if name != "q"}
    if state is not None and set(state) != set(own):
        raise ValueError(f"initial_state: expected {', '.join(own)}, got {', '.join(state)}")
    sizes = check_shapes(
        **{name: (x, axes[name]) for name, x in tokens.items()},
        **{name: (x, layers[name]) for name, x in zip(layers, weights, strict=True)},
        norm_scale=(scale, "heads value"),
        norm_shift=(shift, "heads value"),
        **{f"initial_state[{name!r}]": (x, own[name]) for name, x in (state or {}).items()},
    )
    for axis, least, most in (("earlier", window - 1, window - 1), ("started", 0, batch - 1)):
        if not least <= (size := sizes.get(axis, least)) <= most:
            raise ValueError(f"initial_state: expected from {least} to {most} {axis} tokens, got {size}")
    for name in ("step_size", "weight", "threshold"):
        check_range(name, tokens.get(name), low=0.0)
    for name in ("log_decay", "log_momentum"):
        check_range(name, tokens.get(name), high=0.0)
    if not may_vanish:
        for name, x in zip(layers, weights, strict=True):
            check_range(f"norm of {name}", x.detach().norm(dim=(-2, -1)), low=0.0, open_low=True)
