"""What a chunk reads, and by transposition what its writes are worth.

    Y  = exp(c) ∘ (Q S) + (Q Kᵀ ∘ D) V                     S entered the chunk
    ∂V = exp(c_end − c) ∘ (K R) + (Q Kᵀ ∘ D)ᵀ ∂Y           R comes back to the chunk's end

D_tj = exp(c_t − c_j) for j ≤ t. The scores Q Kᵀ ∘ D are made on the way, unless they are given.

Cost per token and head: 2V(K + C) + 2CK FLOPs; bytes, with e an element's: e(2K + 2V) + 4KV/C.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import (
    PER_CHANNEL,
    PER_HEAD,
    decay_matrix,
    decay_of_chunk,
    load_log_decay,
    load_rows,
    product,
    store_rows,
)
from ttr_kernels._launch import block, decay_kind, precision
from ttr_kernels._packing import Packing


@triton.jit
def output_kernel(
    p_rows, p_columns, p_scores, p_values, p_log_decay, p_states, p_y, p_chunks, H,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y or ∂V of one chunk and block of values; without states only the part within the chunk."""
    i_chunk = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    o_t = tl.arange(0, CHUNK)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + i_h
    p_state = p_states
    if p_states is not None:
        p_state += (i_chunk * H + i_h) * (K * V)
    b_y = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    b_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_rows = load_rows(p_rows, o_row, m_t, o_k, K)
        if p_scores is None:
            b_columns = load_rows(p_columns, o_row, m_t, o_k, K)
            b_scores = product(b_rows, tl.trans(b_columns), b_scores, PRECISION)
        if p_states is not None:
            if DECAY == PER_CHANNEL:
                b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, DECAY)
                b_since, b_until, _ = decay_of_chunk(b_coarse, b_fine)
                b_rows = b_rows * (b_until if TRANSPOSED else b_since)
            b_state = load_rows(p_state, o_k, o_k < K, o_v, V)
            b_y = product(b_rows, b_state, b_y, PRECISION)
    if p_scores is not None:
        b_scores = load_rows(p_scores, o_row, m_t, o_t, CHUNK)
        if TRANSPOSED:
            b_scores = tl.trans(b_scores)
    if DECAY == PER_HEAD:
        b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_t, K, DECAY)
        b_since, b_until, _ = decay_of_chunk(b_coarse, b_fine)
        b_y *= b_until if TRANSPOSED else b_since
        if p_scores is None:
            b_scores *= decay_matrix(b_coarse, b_fine, TRANSPOSED)
    elif p_scores is None:
        m_past = (o_t[:, None] <= o_t[None, :]) if TRANSPOSED else (o_t[:, None] >= o_t[None, :])
        b_scores = tl.where(m_past, b_scores, 0.0)
    b_y = product(b_scores, load_rows(p_values, o_row, m_t, o_v, V), b_y, PRECISION)
    store_rows(p_y, b_y, o_row, m_t, o_v, V)


def outputs(
    rows: Tensor,
    columns: Tensor,
    scores: Tensor | None,
    values: Tensor,
    log_decay: Tensor | None,
    states: Tensor | None,
    y: Tensor,
    packing: Packing,
    *,
    transposed: bool = False,
) -> Tensor:
    """Y, or ∂V from rows K, columns Q and values ∂Y, written to y (batch, time, heads, value).

    Without `scores`, those of rows and columns are made; they must be given with a decay per channel.
    """
    heads, key, value = rows.shape[-2], rows.shape[-1], values.shape[-1]
    block_k = block(key, 32 if rows.dtype == torch.float32 else 64)
    block_v = block(value, 64 if rows.dtype == torch.float32 else 128)
    output_kernel[(packing.chunks.number * heads, triton.cdiv(value, block_v))](
        rows, columns, scores, values, log_decay, states, y, packing.chunks.table, heads,
        K=key, V=value, CHUNK=packing.chunk, BLOCK_K=block_k, BLOCK_V=block_v, DECAY=decay_kind(log_decay),
        TRANSPOSED=transposed, PRECISION=precision(rows.dtype, rows.device),
        num_warps=4 if packing.chunk * block_v <= 4096 else 8, num_stages=2,
    )  # fmt: skip
    return y
