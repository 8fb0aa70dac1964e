"""One entry point for every design: which op computes it, and what its tensors are there.

A lowering maps a design's choices to an op's arguments. There is one for each family of memories; a design that none
takes runs on its definition, `ttr.oracle`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ttr import ops, oracle
from ttr._choices import (
    LMS,
    NLMS,
    Decay,
    DiagonalNewton,
    Exact,
    GradientDescent,
    Hebbian,
    Implicit,
    Linear,
    SquaredError,
)
from ttr._design import Design
from ttr._inputs import Prepared, check_state, forgetting, prepare, streaming_axes
from ttr._state import State
from ttr.ops._backend import Backend, uses_triton
from ttr.ops._check import check_chunk_size

Lowering = Callable[..., tuple[Tensor, State]]


class SlowPathWarning(UserWarning):
    """A design has no fast op and runs on its definition, one token after the other."""


def regress(
    design: Design,
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time *pairs key"],
    v: Float[Tensor, "batch time *pairs value"],
    *,
    state: State | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
    **inputs: Tensor,
) -> tuple[Float[Tensor, "batch time heads value"], State]:
    r"""Fit keys to values by regression at every step, and predict at the query.

    .. math::
        m_t = \operatorname*{arg\,min}_{m \in \mathcal M} \sum_{i \le t} \gamma_i^{(t)}\, \ell\bigl(v_i - m(k_i)\bigr),
        \qquad y_t = m_t(q_t)

    Args:
        design: the weights γ, the regressors, the optimizer and the loss.
        q: queries; no scaling is applied.
        k: keys, (batch, time, heads, key); with `GradientDescent(steps=n)` (batch, time, n, heads, key).
        v: values, laid out as the keys.
        state: where an earlier call ended; None begins afresh. A sequence and its pieces give the same numbers.
        chunk_size: tokens treated in one matrix product; changes the speed, not the result.
        backend: "auto", "torch" or "triton", as in `ttr.ops`.
        inputs: the tensors that `design.inputs` names, with the axes it gives.

    Returns:
        The outputs in the dtype of v, and the state from which a next call goes on.

    Raises:
        ValueError: for a missing or unknown input, a wrong shape, dtype or device, a value out of range.

    Warns:
        SlowPathWarning: once for a design that has no fast op.

    Wang, Shi & Fox (2025), section 3.
    """
    tensors = prepare(design, q, k, v, inputs)
    lowering = _lowering(design)
    if lowering is None:
        check_chunk_size(chunk_size)
        uses_triton(backend, q, missing=f"{design}")
        if not torch.compiler.is_compiling():
            _warn_slow(str(design))
        return oracle.solve(design, tensors, state)
    state = check_state(design, state, streaming_axes(design), tensors)
    return lowering(design, tensors, state, chunk_size=chunk_size, backend=backend)


@cache
def _warn_slow(design: str) -> None:
    message = f"{design} has no fast op: it runs on its definition, one token after the other"
    warnings.warn(message, SlowPathWarning, stacklevel=3)


def _lowering(design: Design) -> Lowering | None:
    optimizer = design.optimizer
    # Exact types: a choice of one's own that extends one of these means something else.
    linear = type(design.regressor) is Linear and type(design.loss) is SquaredError
    if not linear or not design.weights.recursive:
        return None
    if isinstance(optimizer, GradientDescent) and type(optimizer.gain) not in (LMS, NLMS, Implicit, DiagonalNewton):
        return None
    if isinstance(optimizer, Hebbian):
        return _hebbian_sum
    if isinstance(optimizer, GradientDescent):
        per_channel = any(isinstance(f, Decay) and f.per == "channel" for f in design.weights.factors)
        return None if optimizer.momentum and per_channel else _error_correction
    if isinstance(optimizer, Exact) and optimizer.ridge_decays:
        return _recursive_least_squares
    return None


def _hebbian_sum(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    log_decay, importance = forgetting(design.weights, inputs, k)
    if importance is not None:
        k = importance.unsqueeze(-1) * k
    normalize = design.optimizer.normalize  # type: ignore[attr-defined]
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    y, memory = ops.linear_attention(q, k, v, log_decay, initial_state=state.memory, **how)
    return (oracle.normalized(y) if normalize else y), State(memory=memory)


def _error_correction(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    optimizer: GradientDescent = design.optimizer  # type: ignore[assignment]
    log_decay, importance = forgetting(design.weights, inputs, q)
    step_size = inputs["step_size"]
    if optimizer.steps > 1:
        # Each step a token of its own: the memory forgets before a token's first step and is read after its last.
        q = q.repeat_interleave(optimizer.steps, dim=1)
        k, v, step_size = (x.flatten(1, 2) for x in (k, v, step_size))
        if log_decay is not None:
            rest = [torch.zeros_like(log_decay)] * (optimizer.steps - 1)
            log_decay = torch.stack([log_decay, *rest], dim=2).flatten(1, 2)
        if importance is not None:
            importance = importance.repeat_interleave(optimizer.steps, dim=1)
    if importance is not None:
        step_size = step_size * importance

    curvature = None
    if isinstance(optimizer.gain, DiagonalNewton):
        gain, curvature = ops.gains.diagonal_newton(
            k, step_size, inputs["ridge"], log_decay, weight=importance, initial_curvature=state.curvature
        )
    elif isinstance(optimizer.gain, NLMS):
        gain = ops.gains.nlms(k, step_size, optimizer.gain.epsilon)
    elif isinstance(optimizer.gain, Implicit):
        gain = ops.gains.implicit(k, step_size)
    else:
        gain = ops.gains.lms(k, step_size)

    if optimizer.momentum:
        y, (memory, momentum) = ops.momentum_delta_rule(
            q,
            k,
            v,
            gain,
            inputs["log_momentum"],
            log_decay,
            initial_state=state.memory,
            initial_momentum=state.momentum,
            **how,
        )
        return y, State(memory=memory, momentum=momentum, curvature=curvature)
    y, memory = ops.delta_rule(q, k, v, gain, log_decay, initial_state=state.memory, **how)
    return y[:, optimizer.steps - 1 :: optimizer.steps], State(memory=memory, curvature=curvature)


def _recursive_least_squares(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    log_decay, importance = forgetting(design.weights, inputs, k)
    gain, curvature = ops.gains.recursive_least_squares(
        k, inputs["ridge"], log_decay, weight=importance, initial_curvature=state.curvature
    )
    # Forgetting acts on both sides of the normal equations and cancels: the fitted map itself does not decay.
    y, memory = ops.delta_rule(q, k, v, gain, initial_state=state.memory, **how)
    return y, State(memory=memory, curvature=curvature)
