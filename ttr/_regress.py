"""One entry point for every design: its tensors checked, and computed by the op that its lowering knows.

A design that no op computes runs on its definition, `ttr.oracle`.
"""

from __future__ import annotations

import itertools
import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from ttr import oracle
from ttr._design import Design
from ttr._inputs import Prepared, check_state, each_packed, prepare
from ttr._lowerings import continued_axes, lowering_of
from ttr._state import State
from ttr.ops._backend import Backend, only_torch
from ttr.ops._check import check_chunk_size
from ttr.ops._packed import Bounds


class SlowPathWarning(UserWarning):
    """A design has no fast op and runs on its definition, one token after the other."""


def regress(
    design: Design,
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time *pairs key"],
    v: Float[Tensor, "batch time *pairs value"],
    *,
    state: State | None = None,
    cu_seqlens: Bounds | None = None,
    chunk_size: int | None = None,
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
        cu_seqlens: packed sequences of different lengths, in a batch of one: where each begins and the last one ends,
            int32 or int64. The state has them in the place of the batch, but for `State.lengths`. None is a batch of
            sequences, all equally long.
        chunk_size: tokens treated in one matrix product; changes the speed, not the result. None is the op's own.
        backend: "auto", "torch" or "triton", as in `ttr.ops`.
        inputs: the tensors that `design.inputs` names, with the axes it gives.

    Returns:
        The outputs in the dtype of v, and the state from which a next call goes on.

    Raises:
        ValueError: for a missing or unknown input, a wrong shape, dtype or device, a value out of range, bounds
            that do not rise from 0 to time.

    Warns:
        SlowPathWarning: once for a design that has no fast op.

    Wang, Shi & Fox (2025), section 3.
    """
    tensors = prepare(design, q, k, v, inputs, cu_seqlens)
    lowering = lowering_of(design)
    if chunk_size is not None:
        check_chunk_size(chunk_size)
    if lowering is None:
        only_torch(backend, f"{design}")
        if not torch.compiler.is_compiling():
            _warn_slow(str(design))
    how = {"backend": backend} if chunk_size is None else {"backend": backend, "chunk_size": chunk_size}

    def compute(tensors: Prepared, state: State | None) -> tuple[Tensor, State]:
        if lowering is None:
            return oracle.solve(design, tensors, state)
        return lowering(design, tensors, check_state(design, state, continued_axes(design), tensors), **how)

    if cu_seqlens is None:
        return compute(tensors, state)
    outputs, finals = zip(*itertools.starmap(compute, each_packed(design, tensors, state, cu_seqlens)), strict=True)
    return torch.cat(outputs, dim=1), State.join(finals)


@cache
def _warn_slow(design: str) -> None:
    message = f"{design} has no fast op: it runs on its definition, one token after the other"
    warnings.warn(message, SlowPathWarning, stacklevel=3)
