"""Whitened queries by conjugate gradients: x_t with (G_t + Λ) x_t = q_t, Λ a ridge that stays.

Within a chunk, with G the curvature that enters it and D the decays between its tokens,

    X ↦ X Λ + exp(c) ∘ (X G) + ((X Kᵀ) ∘ D) K

applies to each row its own matrix, and forms none. Half a chunk's tokens take their steps together, until the residual
of each is small enough, and no more than `steps`. Jacobi's preconditioner, one for them all, is a change of units.

A product needs its left operand block by block, so directions go through memory, where X will lie in the end. More
tokens in a program would need G less often, but do not fit its registers.

Cost per token, head and step: 2K² + 3CK FLOPs. G and K are read again from the cache in every step.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import NO_DECAY, load_log_decay, load_rows, product, store_rows
from ttr_kernels._launch import block, decay_kind, precision
from ttr_kernels._packing import CHUNK, Packing

BLOCK_T = 32  # tokens of a program
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def conjugate_gradient_kernel(
    p_q, p_k, p_log_decay, p_starts, p_ridge, p_x, p_decay, p_residual, p_chunks, H, steps, tolerance,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X of a block of a chunk, and the largest residual of its tokens, relative to their right-hand sides.

    Zero stands for one that is small enough.
    """
    i_chunk = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_begin = tl.program_id(1) * BLOCK_T
    i_end = tl.minimum(i_begin + BLOCK_T, tl.load(p_chunks + i_chunk * 4 + 1) - i_first)
    p_residual += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if i_begin >= i_end:
        tl.store(p_residual, 0.0)
        return
    # Rows are counted from the chunk's first, in 32 bits: places of whole tiles in 64 would fill the registers.
    i_row = i_first.to(tl.int64) * H + i_h
    p_q += i_row * K
    p_k += i_row * K
    p_x += i_row * K
    p_decay += i_row * CHUNK
    p_start = p_starts + tl.program_id(0).to(tl.int64) * (K * K)
    o_t = i_begin + tl.arange(0, BLOCK_T)
    o_j = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BLOCK_K)
    o_row, m_row = o_t * H, o_t < i_end
    o_column, m_column = o_j * H, o_j < i_end

    b_exponent = tl.zeros([BLOCK_T, CHUNK], tl.float32)
    b_left = tl.full([BLOCK_T], 1.0, tl.float32)
    if DECAY != NO_DECAY:
        b_coarse, b_fine = load_log_decay(p_log_decay + i_row, o_column, m_column, o_j, 1, DECAY)
        b_coarse = tl.cumsum(b_coarse, axis=0)[None, :]
        b_fine = tl.cumsum(b_fine, axis=0)[None, :]
        m_same = o_t[:, None] == o_j[None, :]
        b_coarse_row = tl.sum(tl.where(m_same, b_coarse, 0.0), axis=1)
        b_fine_row = tl.sum(tl.where(m_same, b_fine, 0.0), axis=1)
        b_exponent = (b_coarse_row[:, None] - b_coarse) + (b_fine_row[:, None] - b_fine)
        b_left = tl.exp(b_coarse_row + b_fine_row)
    b_decay = tl.exp(tl.where(o_t[:, None] >= o_j[None, :], b_exponent, float("-inf")))
    store_rows(p_decay, b_decay, o_row, m_row, o_j, CHUNK)
    b_ridge = tl.zeros([BLOCK_K], tl.float32)
    if p_ridge is not None:
        b_ridge += tl.load(p_ridge + i_h * K + o_k, mask=o_k < K, other=0.0)

    # The mean of the diagonals of the matrices.
    b_k = load_rows(p_k, o_column, m_column, o_k, K)
    b_unit = tl.sum(tl.sum(tl.where(m_row[:, None], b_decay, 0.0), axis=0)[:, None] * b_k * b_k, axis=0)
    b_g = tl.load(p_start + o_k * (K + 1), mask=o_k < K, other=0.0)
    b_unit += tl.sum(tl.where(m_row, b_left, 0.0), axis=0) * b_g
    b_unit = 1.0 / tl.sqrt(tl.maximum(b_unit / (i_end - i_begin) + b_ridge, TINY))
    b_ridge *= b_unit * b_unit

    b_x = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    b_rest = load_rows(p_q, o_row, m_row, o_k, K) * b_unit[None, :]
    # Squares of a gradient that hardly matters would underflow, and the solution is in proportion to it.
    b_scale = tl.max(tl.abs(b_rest), axis=1)
    b_rest /= tl.where(b_scale > 0.0, b_scale, 1.0)[:, None]
    b_direction = b_rest
    b_energy = tl.sum(b_rest * b_rest, axis=1)
    b_size = b_energy
    m_running = b_energy > b_size * (tolerance * tolerance)
    running = tl.max(m_running.to(tl.int32), axis=0)
    step = 0
    while (step < steps) & (running > 0):
        store_rows(p_x, b_direction * b_unit[None, :], o_row, m_row, o_k, K)
        tl.debug_barrier()
        b_image = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for i_d in range(0, K, BLOCK):
            o_d = i_d + tl.arange(0, BLOCK)
            b_start = load_rows(p_start, o_d, o_d < K, o_k, K)
            b_image = product(load_rows(p_x, o_row, m_row, o_d, K), b_start, b_image, PRECISION)
        b_image *= b_left[:, None]
        for i_j in range(0, i_end, BLOCK):
            o_c = i_j + tl.arange(0, BLOCK)
            b_scores = tl.zeros([BLOCK_T, BLOCK], tl.float32)
            for i_d in range(0, K, BLOCK):
                o_d = i_d + tl.arange(0, BLOCK)
                b_columns = load_rows(p_k, o_c * H, o_c < i_end, o_d, K)
                b_scores = product(load_rows(p_x, o_row, m_row, o_d, K), tl.trans(b_columns), b_scores, PRECISION)
            b_scores *= load_rows(p_decay, o_row, m_row, o_c, CHUNK)
            b_image = product(b_scores, load_rows(p_k, o_c * H, o_c < i_end, o_k, K), b_image, PRECISION)
        tl.debug_barrier()
        b_image = b_image * b_unit[None, :] + b_direction * b_ridge[None, :]
        # A token that has converged stays where it is: its next step might be 0/0.
        b_curved = tl.sum(b_direction * b_image, axis=1)
        b_length = tl.where(m_running, b_energy / tl.where(m_running, b_curved, 1.0), 0.0)
        b_x += b_length[:, None] * b_direction
        b_rest -= b_length[:, None] * b_image
        b_before = tl.where(m_running, b_energy, 1.0)
        b_energy = tl.sum(b_rest * b_rest, axis=1)
        b_direction = tl.where(m_running, b_energy / b_before, 0.0)[:, None] * b_direction + b_rest
        m_running = b_energy > b_size * (tolerance * tolerance)
        running = tl.max(m_running.to(tl.int32), axis=0)
        step += 1
    b_relative = tl.where(m_running, b_energy / tl.maximum(b_size, TINY), 0.0)
    tl.store(p_residual, tl.sqrt(tl.max(b_relative, axis=0)))
    store_rows(p_x, b_x * b_scale[:, None] * b_unit[None, :], o_row, m_row, o_k, K)


def whiten_by_conjugate_gradients(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    starts: Tensor,
    ridge: Tensor | None,
    packing: Packing,
    *,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """x, like q, and the largest residual of every block of tokens and head.

    `k` is times √w, and `starts` are the curvatures that enter chunks, (chunks, heads, key, key).
    """
    chunks = packing.chunks
    heads, key = q.shape[-2:]
    x, decay = q.new_empty(q.shape), q.new_empty((*q.shape[:-1], CHUNK))
    residual = q.new_empty((chunks.number, heads, CHUNK // BLOCK_T))
    conjugate_gradient_kernel[(chunks.number * heads, CHUNK // BLOCK_T)](
        q, k, log_decay, starts, ridge, x, decay, residual, chunks.table, heads, steps, tolerance,
        K=key, CHUNK=CHUNK, BLOCK_T=BLOCK_T, BLOCK_K=block(key), BLOCK=16, DECAY=decay_kind(log_decay),
        PRECISION=precision(q.dtype, q.device), num_warps=8, num_stages=1,
    )  # fmt: skip
    return x, residual
