"""Gradients of what a chunk reads, with respect to its queries, keys and decays.

With S the state that enters the chunk, R the gradient of the one that leaves it, B = tril(∂Y Vᵀ) those of the scores::

    ∂Q = exp(c) ∘ (∂Y Sᵀ) + (B ∘ D) K,     ∂K = exp(c_end − c) ∘ (V Rᵀ) + (B ∘ D)ᵀ Q

The sum c_t of the log-decays is reached by all that token t reads and by all that is read of its write, with opposite
signs; c_end by all that leaves the chunk. A pair of a token with itself has no decay: it is left out, not subtracted.

    ∂c_t = q_t·∂q_t − k_t·∂k_t,     ∂ℓ_t = Σ_{s ≥ t} ∂c_s + ⟨S_end, R⟩

The sums are taken from the float32 products, before ∂q and ∂k are rounded.

Cost per token and head: 4K(V + C) FLOPs.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import (
    NO_DECAY,
    PER_CHANNEL,
    PER_HEAD,
    decay_matrix,
    decay_of_chunk,
    load_log_decay,
    load_rows,
    product,
    store_rows,
)  # fmt: skip
from ttr_kernels._launch import block, decay_kind, precision
from ttr_kernels._packing import Packing
from ttr_kernels._scores import channel_gradients, scores


@triton.jit
def gradient_kernel(
    p_q, p_k, p_v, p_to_y, p_log_decay, p_to_scores, p_states, p_to_states,
    p_to_q, p_to_k, p_to_log_decay, p_chunks, H, ROWS,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, WITHIN: tl.constexpr, STRICT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂q, ∂k and ∂log_decay of one chunk and block of channels.

    With a decay per channel, p_to_q and p_to_k hold what the scores of different tokens give, and are added to. One per
    head gets (blocks of channels, rows, heads), to be summed.
    """
    i_chunk = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    o_t = tl.arange(0, CHUNK)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + i_h
    i_state = (i_chunk * H + i_h) * (K * V)
    # Whether the scores of a chunk, and their gradients, are made here.
    MADE: tl.constexpr = WITHIN and DECAY != PER_CHANNEL

    b_to_q = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    b_to_k = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    b_to_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_overlap = tl.zeros([BLOCK_K], tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_state = load_rows(p_states + i_state, o_k, o_k < K, o_v, V)
        b_to_y = load_rows(p_to_y, o_row, m_t, o_v, V)
        b_to_q = product(b_to_y, tl.trans(b_state), b_to_q, PRECISION)
        if MADE or p_to_states is not None:
            b_v = load_rows(p_v, o_row, m_t, o_v, V)
            if MADE:
                b_to_scores = product(b_to_y, tl.trans(b_v), b_to_scores, PRECISION)
            if p_to_states is not None:
                b_to_state = load_rows(p_to_states + i_state, o_k, o_k < K, o_v, V)
                b_to_k = product(b_v, tl.trans(b_to_state), b_to_k, PRECISION)
                b_overlap += tl.sum(b_state * b_to_state, axis=1)

    b_q = load_rows(p_q, o_row, m_t, o_k, K)
    b_k = load_rows(p_k, o_row, m_t, o_k, K)
    m_past = (o_t[:, None] > o_t[None, :]) if STRICT else (o_t[:, None] >= o_t[None, :])
    if DECAY != NO_DECAY:
        b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, DECAY)
        b_since, b_until, b_all = decay_of_chunk(b_coarse, b_fine)
        b_to_q *= b_since
        b_to_k *= b_until
    if DECAY == PER_CHANNEL:
        b_left = tl.sum(b_k * b_to_k, axis=0, keep_dims=True) + b_all * b_overlap[None, :]
        b_to_q += load_rows(p_to_q, o_row, m_t, o_k, K)
        b_to_k += load_rows(p_to_k, o_row, m_t, o_k, K)
        b_to_sums = b_q * b_to_q - b_k * b_to_k
        store_rows(p_to_log_decay, tl.cumsum(b_to_sums, axis=0, reverse=True) + b_left, o_row, m_t, o_k, K)
        if not STRICT:
            b_self = tl.load(p_to_scores + o_row * CHUNK + o_t, mask=m_t, other=0.0)[:, None]
            b_to_q += b_self * b_k
            b_to_k += b_self * b_q
    elif WITHIN:
        b_to_scores = tl.where(m_past, b_to_scores, 0.0)
        if DECAY == PER_HEAD:
            b_to_scores *= decay_matrix(b_coarse, b_fine, False)
            # The scores of these channels alone: sums over the blocks of channels are sums over all.
            b_pairs = product(b_q, tl.trans(b_k), tl.zeros([CHUNK, CHUNK], tl.float32), PRECISION) * b_to_scores
            b_pairs = tl.where(o_t[:, None] > o_t[None, :], b_pairs, 0.0)
            b_to_sums = tl.sum(b_q * b_to_q, axis=1) + tl.sum(b_pairs, axis=1) - tl.sum(b_pairs, axis=0)
            b_to_log_decay = tl.cumsum(b_to_sums, axis=0, reverse=True) + tl.sum(b_all * b_overlap[None, :])
            # What is written at t and later leaves undecayed by ℓ_t. To subtract it from all that leaves would cost the
            # digits of what a strong decay has left of the rest.
            b_leaving = tl.sum(b_k * b_to_k, axis=1)
            b_to_log_decay += tl.sum(tl.where(o_t[:, None] > o_t[None, :], b_leaving[None, :], 0.0), axis=1)
            tl.store(p_to_log_decay + tl.program_id(1).to(tl.int64) * ROWS * H + o_row, b_to_log_decay, mask=m_t)
        b_to_q = product(b_to_scores, b_k, b_to_q, PRECISION)
        b_to_k = product(tl.trans(b_to_scores), b_q, b_to_k, PRECISION)
    store_rows(p_to_q, b_to_q, o_row, m_t, o_k, K)
    store_rows(p_to_k, b_to_k, o_row, m_t, o_k, K)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    to_y: Tensor,
    log_decay: Tensor | None,
    states: Tensor,
    to_states: Tensor | None,
    packing: Packing,
    *,
    within: bool = True,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k (float32 with a decay per channel, else as q) and log_decay.

    Without `to_states`, nothing that the chunk writes leaves it; where not `within`, it reads only what entered it;
    where `strict`, not what it writes at the same token.
    """
    heads, key, value = q.shape[-2], q.shape[-1], v.shape[-1]
    decay = decay_kind(log_decay)
    block_k = block(key, 32 if q.dtype == torch.float32 else 64)
    block_v = block(value, 32 if q.dtype == torch.float32 else 64)
    blocks = triton.cdiv(key, block_k)
    to_scores = None
    if log_decay is not None and decay == 2:
        to_scores = scores(to_y, v, None, packing, strict=strict)
        to_q, to_k = channel_gradients(q, k, log_decay, to_scores, packing)
        to_log_decay: Tensor | None = log_decay.new_empty(log_decay.shape)
    else:
        to_q, to_k = q.new_empty(q.shape), k.new_empty(k.shape)
        to_log_decay = None if log_decay is None else log_decay.new_empty((blocks, *log_decay.shape))
    gradient_kernel[(packing.chunks.number * heads, blocks)](
        q, k, v, to_y, log_decay, to_scores, states, to_states,
        to_q, to_k, to_log_decay, packing.chunks.table, heads, packing.rows,
        K=key, V=value, CHUNK=packing.chunk, BLOCK_K=block_k, BLOCK_V=block_v, DECAY=decay,
        WITHIN=within, STRICT=strict, PRECISION=precision(q.dtype, q.device), num_warps=8, num_stages=2,
    )  # fmt: skip
    return to_q, to_k, to_log_decay.sum(0) if to_log_decay is not None and decay == 1 else to_log_decay
