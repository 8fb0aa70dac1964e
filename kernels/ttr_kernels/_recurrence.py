"""A few tokens, one after the other: decoding, where a chunk would be mostly empty.

    S̄ = Diag(α) S ,    S ← S̄ + g (v − S̄ᵀ k)ᵀ  or  S̄ + k vᵀ ,    y = Sᵀ q

A program holds a block of values of one head's state in registers. Cost per token and head: 6KV FLOPs; the state is
read and written once, 8KV bytes, which bounds a single token.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import NO_DECAY, PER_CHANNEL
from ttr_kernels._launch import block, decay_kind
from ttr_kernels._packing import Packing

FEW_TOKENS = 8


@triton.jit
def load_column(p_x, i_row, o_d, SIZE: tl.constexpr):
    """One row of (rows, heads, SIZE) as a column."""
    return tl.load(p_x + i_row * SIZE + o_d[:, None], mask=o_d[:, None] < SIZE, other=0.0).to(tl.float32)


@triton.jit
def recurrence_kernel(
    p_q, p_k, p_v, p_gain, p_log_decay, p_log_momentum, p_initial, p_initial_momentum,
    p_y, p_final, p_final_momentum, p_spans, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """All tokens of one head of one sequence, for a block of values."""
    i_sequence = tl.program_id(0) // H
    i_first = tl.load(p_spans + i_sequence * 4)
    i_stop = tl.load(p_spans + i_sequence * 4 + 1)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v[None, :] < V
    m_state = (o_k[:, None] < K) & m_v
    o_state = tl.program_id(0).to(tl.int64) * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    b_push = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if p_initial is not None:
        b_state = tl.load(p_initial + o_state, mask=m_state, other=0.0)
    if p_initial_momentum is not None:
        b_push = tl.load(p_initial_momentum + o_state, mask=m_state, other=0.0)
    for i_t in range(i_first, i_stop):
        i_row = tl.cast(i_t, tl.int64) * H + tl.program_id(0) % H
        b_k = load_column(p_k, i_row, o_k, K)
        b_v = tl.load(p_v + i_row * V + o_v[None, :], mask=m_v, other=0.0).to(tl.float32)
        if DECAY == PER_CHANNEL:
            b_state *= tl.exp(load_column(p_log_decay, i_row, o_k, K))
        elif DECAY != NO_DECAY:
            b_state *= tl.exp(tl.load(p_log_decay + i_row))
        if p_gain is None:
            b_write = b_k * b_v
        else:
            b_error = b_v - tl.sum(b_k * b_state, axis=0, keep_dims=True)
            b_write = load_column(p_gain, i_row, o_k, K) * b_error
        if p_log_momentum is not None:
            b_push = tl.exp(tl.load(p_log_momentum + i_row)) * b_push + b_write
            b_write = b_push
        b_state += b_write
        b_y = tl.sum(load_column(p_q, i_row, o_k, K) * b_state, axis=0, keep_dims=True)
        tl.store(p_y + i_row * V + o_v[None, :], b_y.to(p_y.dtype.element_ty), mask=m_v)
    tl.store(p_final + o_state, b_state, mask=m_state)
    if p_final_momentum is not None:
        tl.store(p_final_momentum + o_state, b_push, mask=m_state)


def is_short(packing: Packing) -> bool:
    """Whether token after token is faster than chunks."""
    return packing.longest is not None and packing.longest <= FEW_TOKENS


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    packing: Packing,
    momentum: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Write y and return the final state. `momentum`: its logarithm, its first state, and where the last one goes."""
    heads, key, value = q.shape[-2], q.shape[-1], v.shape[-1]
    final = q.new_empty((packing.sequences, heads, key, value), dtype=torch.float32)
    log_momentum, initial_momentum, final_momentum = momentum or (None, None, None)
    block_v = block(value, 32)
    recurrence_kernel[(packing.sequences * heads, triton.cdiv(value, block_v))](
        q, k, v, gain, log_decay, log_momentum, initial, initial_momentum,
        y, final, final_momentum, packing.whole.table, heads,
        K=key, V=value, BLOCK_K=block(key), BLOCK_V=block_v, DECAY=decay_kind(log_decay), num_warps=4,
    )  # fmt: skip
    return final
