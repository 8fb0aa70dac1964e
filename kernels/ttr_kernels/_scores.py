"""Scores within a chunk, how much the pair of token j counts at token t, and their gradients by channel.

    A_tj = Σ_d rows_td · columns_jd · exp(c_td − c_jd)       for j ≤ t, or j < t, else 0

With one decay a head the exponential stands outside the sum, and a product of tiles remains. With one a channel a chunk
is cut into blocks of 16 tokens. Between two blocks the decay is a factor of the row, since its block began, one of the
column, until its block ends, and one of the blocks between, none above one. Inside a block every channel is summed with
its own exponential.

Scores are (rows, heads, CHUNK) in float32. Cost per token and head: 2CK FLOPs; 4C bytes written beside the rows read.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import NO_DECAY, PER_CHANNEL, decay_matrix, load_log_decay, load_rows, product, store_rows
from ttr_kernels._launch import block, decay_kind, precision
from ttr_kernels._packing import Packing

BLOCK_T = 16  # tokens whose exponentials are taken pair by pair


@triton.jit
def scores_kernel(
    p_rows, p_columns, p_log_decay, p_scores, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    DECAY: tl.constexpr, STRICT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores of one chunk, with at most one decay a head."""
    i_chunk = tl.program_id(0) // H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    o_t = tl.arange(0, CHUNK)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + tl.program_id(0) % H
    b_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_rows = load_rows(p_rows, o_row, m_t, o_k, K)
        b_columns = load_rows(p_columns, o_row, m_t, o_k, K)
        b_scores = product(b_rows, tl.trans(b_columns), b_scores, PRECISION)
    if DECAY != NO_DECAY:
        b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_t, K, DECAY)
        b_scores *= decay_matrix(b_coarse, b_fine, False)
    m_past = (o_t[:, None] > o_t[None, :]) if STRICT else (o_t[:, None] >= o_t[None, :])
    store_rows(p_scores, tl.where(m_past, b_scores, 0.0), o_row, m_t, o_t, CHUNK)


@triton.jit
def sums_since(b_coarse, b_fine):
    """exp(c_t) since the tile began, and the two sums."""
    b_coarse_sum = tl.cumsum(b_coarse, axis=0)
    b_fine_sum = tl.cumsum(b_fine, axis=0)
    return tl.exp(b_coarse_sum + b_fine_sum), b_coarse_sum, b_fine_sum


@triton.jit
def pairwise_decay(b_coarse_sum, b_fine_sum, STRICT: tl.constexpr):
    """exp(c_td − c_jd) for j ≤ t, or j < t, else 0: (t, j, channels)."""
    b_exponent = (b_coarse_sum[:, None, :] - b_coarse_sum[None, :, :]) + (
        b_fine_sum[:, None, :] - b_fine_sum[None, :, :]
    )
    o_t = tl.arange(0, b_coarse_sum.shape[0])
    m_past = (o_t[:, None] > o_t[None, :]) if STRICT else (o_t[:, None] >= o_t[None, :])
    return tl.exp(tl.where(m_past[:, :, None], b_exponent, float("-inf")))


@triton.jit
def channel_scores_kernel(
    p_rows, p_columns, p_log_decay, p_scores, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    STRICT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of a chunk's scores, with a decay per channel."""
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    BLOCKS: tl.constexpr = CHUNK // BLOCK_T
    i_row, i_column = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    i_first = tl.load(p_chunks + i_chunk * 4)
    if i_first + i_row * BLOCK_T >= i_stop:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_rows = i_first + i_row * BLOCK_T + o_t
    o_columns = i_first + i_column * BLOCK_T + o_t
    m_rows, m_columns = o_rows < i_stop, o_columns < i_stop
    b_scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    if i_column <= i_row:
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            o_row = o_rows.to(tl.int64) * H + i_h
            o_column = o_columns.to(tl.int64) * H + i_h
            b_rows = load_rows(p_rows, o_row, m_rows, o_k, K).to(tl.float32)
            b_columns = load_rows(p_columns, o_column, m_columns, o_k, K).to(tl.float32)
            b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_rows, o_k, K, PER_CHANNEL)
            b_since, b_coarse_sum, b_fine_sum = sums_since(b_coarse, b_fine)
            if i_column == i_row:
                b_decay = pairwise_decay(b_coarse_sum, b_fine_sum, STRICT)
                b_scores += tl.sum(b_rows[:, None, :] * b_columns[None, :, :] * b_decay, axis=2)
            else:
                b_until = until_block(
                    p_log_decay, i_first, i_column * BLOCK_T, i_row * BLOCK_T, i_stop, H, i_h, o_k, K, BLOCK_T
                )
                b_scores = product(b_rows * b_since, tl.trans(b_columns * b_until), b_scores, PRECISION)
    p_block = p_scores + (o_rows.to(tl.int64) * H + i_h)[:, None] * CHUNK + (i_column * BLOCK_T + o_t)[None, :]
    tl.store(p_block, b_scores, mask=m_rows[:, None])


@triton.jit
def until_block(
    p_log_decay, i_first, i_column, i_row, i_stop, H, i_h, o_k, K: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """exp(c_row − c_j) for the tokens j of the block at i_column, c_row the sum up to the block at i_row."""
    o_j = i_first + i_column + tl.arange(0, BLOCK_T)
    b_coarse, b_fine = load_log_decay(p_log_decay, o_j.to(tl.int64) * H + i_h, o_j < i_stop, o_k, K, PER_CHANNEL)
    b_coarse_until = tl.sum(b_coarse, axis=0, keep_dims=True) - tl.cumsum(b_coarse, axis=0)
    b_fine_until = tl.sum(b_fine, axis=0, keep_dims=True) - tl.cumsum(b_fine, axis=0)
    for i_between in range(i_column + BLOCK_T, i_row, BLOCK_T):
        o_t = i_first + i_between + tl.arange(0, BLOCK_T)
        b_coarse, b_fine = load_log_decay(p_log_decay, o_t.to(tl.int64) * H + i_h, o_t < i_stop, o_k, K, PER_CHANNEL)
        b_coarse_until += tl.sum(b_coarse, axis=0, keep_dims=True)
        b_fine_until += tl.sum(b_fine, axis=0, keep_dims=True)
    return tl.exp(b_coarse_until + b_fine_until)


@triton.jit
def channel_gradient_kernel(
    p_rows, p_columns, p_log_decay, p_to_scores, p_to_rows, p_to_columns, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk's scores at j < t give to a block of rows and of columns, with a decay per channel."""
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_block = tl.program_id(1) * BLOCK_T
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first + i_block >= i_stop:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t = i_first + i_block + o_t < i_stop
    o_row = (i_first + i_block + o_t).to(tl.int64) * H + i_h
    b_rows = load_rows(p_rows, o_row, m_t, o_k, K).to(tl.float32)
    b_columns = load_rows(p_columns, o_row, m_t, o_k, K).to(tl.float32)
    b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, PER_CHANNEL)
    b_since, b_coarse_sum, b_fine_sum = sums_since(b_coarse, b_fine)

    b_to_rows = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i_column in range(0, i_block, BLOCK_T):
        o_j = i_first + i_column + o_t
        b_earlier = load_rows(p_columns, o_j.to(tl.int64) * H + i_h, o_j < i_stop, o_k, K).to(tl.float32)
        b_earlier *= until_block(p_log_decay, i_first, i_column, i_block, i_stop, H, i_h, o_k, K, BLOCK_T)
        b_to_scores = load_rows(p_to_scores, o_row, m_t, i_column + o_t, CHUNK)
        b_to_rows = product(b_to_scores, b_earlier, b_to_rows, PRECISION)
    b_to_rows *= b_since

    b_to_columns = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    b_coarse_between = tl.sum(b_coarse, axis=0, keep_dims=True) - b_coarse_sum
    b_fine_between = tl.sum(b_fine, axis=0, keep_dims=True) - b_fine_sum
    for i_row in range(i_block + BLOCK_T, CHUNK, BLOCK_T):
        o_i = i_first + i_row + o_t
        o_later = o_i.to(tl.int64) * H + i_h
        b_later_coarse, b_later_fine = load_log_decay(p_log_decay, o_later, o_i < i_stop, o_k, K, PER_CHANNEL)
        b_later_since, _, _ = sums_since(b_later_coarse, b_later_fine)
        b_later = load_rows(p_rows, o_later, o_i < i_stop, o_k, K).to(tl.float32) * b_later_since
        b_to_scores = load_rows(p_to_scores, o_later, o_i < i_stop, i_block + o_t, CHUNK)
        b_part = product(tl.trans(b_to_scores), b_later, tl.zeros([BLOCK_T, BLOCK_K], tl.float32), PRECISION)
        b_to_columns += tl.exp(b_coarse_between + b_fine_between) * b_part
        b_coarse_between += tl.sum(b_later_coarse, axis=0, keep_dims=True)
        b_fine_between += tl.sum(b_later_fine, axis=0, keep_dims=True)

    b_to_scores = load_rows(p_to_scores, o_row, m_t, i_block + o_t, CHUNK)
    b_pairs = b_to_scores[:, :, None] * pairwise_decay(b_coarse_sum, b_fine_sum, True)
    b_to_rows += tl.sum(b_pairs * b_columns[None, :, :], axis=1)
    b_to_columns += tl.sum(b_pairs * b_rows[:, None, :], axis=0)
    store_rows(p_to_rows, b_to_rows, o_row, m_t, o_k, K)
    store_rows(p_to_columns, b_to_columns, o_row, m_t, o_k, K)


def scores(
    rows: Tensor, columns: Tensor, log_decay: Tensor | None, packing: Packing, *, strict: bool = False
) -> Tensor:
    """A, (batch, time, heads, CHUNK), of rows and columns (batch, time, heads, key)."""
    heads, key = rows.shape[-2:]
    chunks, chunk = packing.chunks, packing.chunk
    found = rows.new_empty((*rows.shape[:-1], chunk), dtype=torch.float32)
    decay = decay_kind(log_decay)
    sizes = {"K": key, "CHUNK": chunk, "STRICT": strict, "PRECISION": precision(rows.dtype, rows.device)}
    if decay == 2:
        channel_scores_kernel[(chunks.number * heads, (chunk // BLOCK_T) ** 2)](
            rows, columns, log_decay, found, chunks.table, heads,
            BLOCK_T=BLOCK_T, BLOCK_K=block(key, 16), **sizes, num_warps=4,
        )  # fmt: skip
    else:
        scores_kernel[(chunks.number * heads,)](
            rows, columns, log_decay, found, chunks.table, heads,
            DECAY=decay, BLOCK_K=block(key, 64), **sizes, num_warps=8 if rows.dtype == torch.float32 else 4,
        )  # fmt: skip
    return found


def channel_gradients(
    rows: Tensor, columns: Tensor, log_decay: Tensor, to_scores: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """What scores at j < t give to rows and columns, with a decay per channel; float32."""
    heads, key = rows.shape[-2:]
    chunks, chunk = packing.chunks, packing.chunk
    to_rows, to_columns = (rows.new_empty(rows.shape, dtype=torch.float32) for _ in range(2))
    block_k = block(key, 32)
    channel_gradient_kernel[(chunks.number * heads, chunk // BLOCK_T, triton.cdiv(key, block_k))](
        rows, columns, log_decay, to_scores, to_rows, to_columns, chunks.table, heads,
        K=key, CHUNK=chunk, BLOCK_T=BLOCK_T, BLOCK_K=block_k, PRECISION=precision(rows.dtype, rows.device), num_warps=4,
    )  # fmt: skip
    return to_rows, to_columns
