"""The delta rule with a gain of its own: what a memory answers wrongly is corrected along a vector.

    S_t = S̄_t + g_t (v_t − S̄_tᵀ k_t)ᵀ ,    S̄_t = Diag(α_t) S_{t−1} ,    y_t = S_tᵀ q_t

The errors u_t = v_t − S̄_tᵀ k_t of a chunk solve a unit-triangular system, (I + A) U = V − K̄ S: the WY or UT form, with
keys and gains kept apart. Given U, what is read is linear attention with gains for keys and errors for values. The same
holds for the gradients: with Z the solution of the transposed system, back in time,

    ∂V = −Z,   and (∂q, ∂g) of Y, (∂k, ∂g) of K̄S + AU with the cotangent Z, are those of linear attention.
"""

from typing import Any

import torch
from torch import Tensor

from ttr_kernels._corrections import corrected_states
from ttr_kernels._gradients import gradients
from ttr_kernels._launch import check
from ttr_kernels._outputs import outputs
from ttr_kernels._packing import Packing
from ttr_kernels._recurrence import is_short, recur
from ttr_kernels._scores import scores
from ttr_kernels._triangle import unit_triangular_inverse
from ttr_kernels.linear_attention import arranged, like_states, of_channels, present


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Correct the memory's error on each new pair along a gain vector, then read it.

    S_t = S̄_t + g_t (v_t − S̄_tᵀ k_t)ᵀ,  S̄_t = Diag(exp(log_decay_t)) S_{t−1},  y_t = S_tᵀ q_t.

    `gain` is laid out as k; the other arguments, what is returned and what is raised are those of `linear_attention`.

    Schlag et al. 2021 (arXiv 2102.11174); chunkwise Yang et al. 2024 (arXiv 2406.06484), with a decay Yang et al. 2024
    (arXiv 2412.06464).
    """
    axes = "batch time heads key" if log_decay is not None and log_decay.ndim == 4 else "batch time heads"
    check(
        "q",
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        gain=(gain, "batch time heads key"),
        log_decay=(log_decay, axes),
        initial_state=(initial_state, "sequences heads key value"),
    )
    return _forward(q, k, v, gain, log_decay, initial_state, cu_seqlens)


def _errors(
    k: Tensor, v: Tensor, gain: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, packed: Packing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of a chunk's triangle, states, errors, and the final state."""
    inverse = unit_triangular_inverse(scores(k, gain, log_decay, packed, strict=True), packed)
    return inverse, *corrected_states(k, gain, v, inverse, log_decay, initial_state, packed)


@torch.library.custom_op("ttr_kernels::delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (q, k, v, gain, log_decay, initial_state), packed = arranged(cu_seqlens, q, k, v, gain, log_decay, initial_state)
    y = v.new_empty(v.shape)
    with torch.cuda.device_of(q):
        if is_short(packed):
            return y, recur(q, k, v, gain, log_decay, initial_state, y, packed)
        _, states, errors, final_state = _errors(k, v, gain, log_decay, initial_state, packed)
        outputs(q, gain, of_channels(q, gain, log_decay, packed), errors, log_decay, states, y, packed)
    return y, final_state


@torch.library.custom_op("ttr_kernels::delta_rule_backward", mutates_args=())
def _backward(
    to_y: Tensor,
    to_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (q, k, v, gain, log_decay, initial_state, to_y, to_final_state), packed = arranged(
        cu_seqlens, q, k, v, gain, log_decay, initial_state, to_y, to_final_state
    )
    with torch.cuda.device_of(q):
        inverse, states, errors, _ = _errors(k, v, gain, log_decay, initial_state, packed)
        p = of_channels(q, gain, log_decay, packed)
        within = v.new_empty(v.shape, dtype=torch.float32)
        outputs(gain, q, p, to_y, log_decay, None, within, packed, transposed=True)
        to_states, z, to_initial = corrected_states(
            k, gain, within, inverse, log_decay, to_final_state, packed, queries=(q, to_y)
        )
        of_reading = gradients(q, gain, errors, to_y, log_decay, states, to_states, packed)
        of_correcting = gradients(k, gain, errors, z, log_decay, states, None, packed, strict=True)
    to_q, to_gain, to_log_decay = of_reading
    to_k, more_to_gain, more_to_log_decay = of_correcting
    if to_log_decay is not None and more_to_log_decay is not None:
        to_log_decay += more_to_log_decay
    return (
        to_q.to(q.dtype), to_k.to(k.dtype), -z, (to_gain + more_to_gain).to(gain.dtype),
        present(to_log_decay, q), to_initial,
    )  # fmt: skip


@_forward.register_fake
def _(q, k, v, gain, log_decay, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format), like_states(q, v, cu_seqlens)


@_backward.register_fake
def _(to_y, to_final_state, q, k, v, gain, log_decay, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gain)]
    to_log_decay = None if log_decay is None else torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    return *like, present(to_log_decay, q), like_states(q, v, cu_seqlens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, to_y: Tensor, to_final_state: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(to_y, to_final_state, *ctx.saved_tensors)
    return *(None if x is None else g for x, g in zip(ctx.saved_tensors[:6], found, strict=True)), None


_forward.register_autograd(_differentiate, setup_context=_setup)
