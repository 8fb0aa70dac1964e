"""Decayed linear attention: sums of key–value products that fade, read by queries.

    S_t = Diag(α_t) S_{t−1} + k_t v_tᵀ ,    y_t = S_tᵀ q_t ,    α_t = exp(log_decay_t)

Three launches forwards (scores within chunks, states between them, outputs), six or seven backwards. All but the states
run on every chunk at once; see `_states` for how those fill a GPU.

Cost per token and head, forwards: 2C(K + V) + 4KV FLOPs. Bytes, with e an element's: 4eK + 3eV, 8C for the scores and
8KV/C for the states. At K = V = 128 in bfloat16 that is 98 kFLOP for 4.4 kB: bound by memory on every recent GPU.
"""

from typing import Any

import torch
from torch import Tensor

from ttr_kernels._gradients import gradients
from ttr_kernels._launch import check, decay_kind
from ttr_kernels._outputs import outputs
from ttr_kernels._packing import CHUNK, Packing, packing
from ttr_kernels._recurrence import is_short, recur
from ttr_kernels._scores import scores
from ttr_kernels._states import chunk_states


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read decayed sums of key–value products.

    S_t = Diag(exp(log_decay_t)) S_{t−1} + k_t v_tᵀ,  y_t = S_tᵀ q_t.

    Args:
        q: queries, (batch, time, heads, key); float32, float16 or bfloat16, as k and v.
        k: keys, (batch, time, heads, key).
        v: values, (batch, time, heads, value).
        log_decay: ≤ 0, float32, (batch, time, heads) or (batch, time, heads, key); None for no decay.
        initial_state: S_0, float32, (batch, heads, key, value); None for zeros.
        cu_seqlens: int32 (sequences + 1), where sequences packed into a batch of one begin and end. States then have
            the sequences in the place of the batch.

    Returns:
        The outputs, like v, and the final state, float32. Both are differentiable in all tensors.

    Raises:
        ValueError: for a shape, dtype, device or head size that the kernels do not take, and for tensors on the CPU
            without Triton's interpreter.

    Yang et al. 2024 (arXiv 2312.06635) for the chunkwise form and a decay per channel; Dao & Gu 2024 (arXiv 2405.21060)
    for one per head.
    """
    axes = "batch time heads key" if log_decay is not None and log_decay.ndim == 4 else "batch time heads"
    check(
        "q",
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        log_decay=(log_decay, axes),
        initial_state=(initial_state, "sequences heads key value"),
    )
    return _forward(q, k, v, log_decay, initial_state, cu_seqlens)


@torch.library.custom_op("ttr_kernels::linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (q, k, v, log_decay, initial_state), packed = arranged(
        cu_seqlens, q, k, v, log_decay, initial_state, chunk=_chunk(q, log_decay, 1)
    )
    y = v.new_empty(v.shape)
    with torch.cuda.device_of(q):
        if is_short(packed):
            return y, recur(q, k, v, None, log_decay, initial_state, y, packed)
        states, final_state = chunk_states(k, v, log_decay, initial_state, packed)
        outputs(q, k, of_channels(q, k, log_decay, packed), v, log_decay, states, y, packed)
    return y, final_state


@torch.library.custom_op("ttr_kernels::linear_attention_backward", mutates_args=())
def _backward(
    to_y: Tensor,
    to_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (q, k, v, log_decay, initial_state, to_y, to_final_state), packed = arranged(
        cu_seqlens, q, k, v, log_decay, initial_state, to_y, to_final_state, chunk=_chunk(q, log_decay, 0)
    )
    with torch.cuda.device_of(q):
        a = of_channels(q, k, log_decay, packed)
        states, _ = chunk_states(k, v, log_decay, initial_state, packed)
        to_states, to_initial = chunk_states(q, to_y, log_decay, to_final_state, packed, backwards=True)
        to_v = outputs(k, q, a, to_y, log_decay, to_states, v.new_empty(v.shape), packed, transposed=True)
        to_q, to_k, to_log_decay = gradients(q, k, v, to_y, log_decay, states, to_states, packed)
    return to_q.to(q.dtype), to_k.to(k.dtype), to_v, present(to_log_decay, q), to_initial


def _chunk(q: Tensor, log_decay: Tensor | None, largest_decay: int) -> int:
    """Half-precision tiles of 128 tokens halve the bytes of the states, and fit a program up to some kind of decay."""
    return CHUNK if q.dtype == torch.float32 or decay_kind(log_decay) > largest_decay else 2 * CHUNK


def of_channels(q: Tensor, k: Tensor, log_decay: Tensor | None, packed: Packing) -> Tensor | None:
    """Scores that cannot be made where they are used: those with a decay per channel."""
    return scores(q, k, log_decay, packed) if decay_kind(log_decay) == 2 else None


def arranged(cu_seqlens: Tensor | None, *tensors: Tensor | None, chunk: int = CHUNK) -> tuple[list[Any], Packing]:
    """The tensors laid out row by row, and where in them the sequences lie; the first is one of the sequences."""
    first = tensors[0]
    assert first is not None
    contiguous = [None if x is None else x.contiguous() for x in tensors]
    return contiguous, packing(first.shape[0], first.shape[1], cu_seqlens, first.device, chunk)


def present(x: Tensor | None, like: Tensor) -> Tensor:
    """What an op, which must return tensors, returns in the place of None."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


def like_states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """An uninitialised state of every sequence."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((sequences, *q.shape[2:], v.shape[-1]), dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, log_decay, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format), like_states(q, v, cu_seqlens)


@_backward.register_fake
def _(to_y, to_final_state, q, k, v, log_decay, initial_state, cu_seqlens):  # type: ignore[no-untyped-def]
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    to_log_decay = None if log_decay is None else torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    return *like, present(to_log_decay, q), like_states(q, v, cu_seqlens)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, to_y: Tensor, to_final_state: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(to_y, to_final_state, *ctx.saved_tensors)
    # A gradient that autograd did not ask for is dropped by it.
    return *(None if x is None else g for x, g in zip(ctx.saved_tensors[:5], found, strict=True)), None


_forward.register_autograd(_differentiate, setup_context=_setup)
