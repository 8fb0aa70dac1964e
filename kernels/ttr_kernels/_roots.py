"""Inverse roots of positive definite matrices: J lower triangular with J A Jᵀ = I, J = L⁻¹ for A = L Lᵀ.

Elimination in blocks of 16 rows. What is done to the rows of A is done to an identity beside it, whose zeros and ones
need no place: block b of the rows, [A_b | I_b], loses what the rows above explain of it, and is scaled by the inverse
root E of what is left of its block on the diagonal. So R_b = E [J_b's columns before b | I | those of A after b], and

    R_b = E_b ([0 | I | A_b] − Σ_{a<b} R_a[:, b]ᵀ R_a)

needs a tile of 16 rows only. J is the lower triangle of R, and Lᵀ the upper one. A block on the diagonal is eliminated
column by column, in place. Rows go through memory, where a barrier makes them seen by the whole program.

The loss of digits is the largest ratio of a diagonal entry of A to the pivot left of it, infinite where none is.

Cost of a matrix of K rows: K³ FLOPs; it is read and written once, and 1/32 K³ numbers are read of the cache.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import product
from ttr_kernels._launch import block, precision
from ttr_kernels._packing import Spans

ROOT = tl.constexpr(16)  # rows that are eliminated together
ROUNDING = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def inverse_root_of_tile(b_a, b_diagonal, rows):
    """The inverse root of a tile, an identity from `rows` on, and the loss of digits; of A, `b_diagonal` is (rows, 1).

    A pivot that is nothing but rounding counts as infinite: its row is zero, and nothing grows.
    """
    o_row = tl.arange(0, b_a.shape[0])[:, None]
    o_column = tl.arange(0, b_a.shape[0])[None, :]
    # In units in which A has ones on its diagonal.
    b_unit = tl.where(b_diagonal > 0.0, 1.0 / tl.sqrt(tl.where(b_diagonal > 0.0, b_diagonal, 1.0)), 0.0)
    b_a *= b_unit * tl.trans(b_unit)
    for j in range(0, rows):
        b_row = tl.sum(tl.where(o_row == j, b_a, 0.0), axis=0, keep_dims=True)
        b_pivot = tl.sum(tl.where(o_column == j, b_row, 0.0), axis=1, keep_dims=True)
        # What is left of A is symmetric, so its row is also its column.
        b_factor = tl.where(o_row > j, tl.trans(b_row) / tl.where(b_pivot > ROUNDING, b_pivot, float("inf")), 0.0)
        # Column j of A has been used up; its place takes column j of what began as the identity.
        b_a = tl.where((o_column == j) & (o_row > j), 0.0, b_a) - b_factor * tl.where(o_column == j, 1.0, b_row)
    b_pivot = tl.sum(tl.where(o_row == o_column, b_a, 0.0), axis=1, keep_dims=True)
    b_pivot = tl.where(b_pivot <= ROUNDING, float("inf"), b_pivot)
    b_root = tl.where(o_row > o_column, b_a, tl.where(o_row == o_column, 1.0, 0.0)) / tl.sqrt(b_pivot)
    b_loss = tl.where(b_pivot < float("inf"), 1.0 / b_pivot, float("inf"))
    return b_root * tl.trans(b_unit), tl.max(tl.max(b_loss, axis=1), axis=0)


@triton.jit
def inverse_root(p_a, p_root, K: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """Write R of the K × K matrix at p_a to p_root, which may be the same; returns the loss of digits."""
    o_b = tl.arange(0, ROOT)
    m_diagonal = o_b[:, None] == o_b[None, :]
    loss = 1.0
    for i_row in range(0, K, ROOT):
        o_row = i_row + o_b
        m_square = (o_row[:, None] < K) & (o_row[None, :] < K)
        b_a = tl.load(p_a + o_row[:, None] * K + o_row[None, :], mask=m_square, other=0.0)
        b_a = tl.where(m_diagonal & (o_row[:, None] >= K), 1.0, b_a)
        b_diagonal = tl.sum(tl.where(m_diagonal, b_a, 0.0), axis=1, keep_dims=True)
        for i_above in range(0, i_row, ROOT):
            p_above = p_root + (i_above + o_b)[:, None] * K
            b_above = tl.load(p_above + o_row[None, :], mask=o_row[None, :] < K, other=0.0)
            b_a = product(-tl.trans(b_above), b_above, b_a, PRECISION)
        b_scale, loss_here = inverse_root_of_tile(b_a, b_diagonal, tl.minimum(ROOT, K - i_row))
        loss = tl.maximum(loss, loss_here)
        for i_column in range(0, K, BLOCK_K):
            o_column = i_column + tl.arange(0, BLOCK_K)
            m_column = o_column[None, :] < K
            o_tile = o_row[:, None] * K + o_column[None, :]
            m_tile = (o_row[:, None] < K) & m_column
            m_after = o_column[None, :] >= i_row + ROOT
            b_rows = tl.load(p_a + o_tile, mask=m_tile & m_after, other=0.0)
            for i_above in range(0, i_row, ROOT):
                p_above = p_root + (i_above + o_b)[:, None] * K
                b_above = tl.load(p_above + o_row[None, :], mask=o_row[None, :] < K, other=0.0)
                # Of the columns between, A's are gone.
                m_done = (o_column[None, :] < i_above + ROOT) | (o_column[None, :] >= i_row)
                b_done = tl.load(p_above + o_column[None, :], mask=m_done & m_column, other=0.0)
                b_rows = product(-tl.trans(b_above), b_done, b_rows, PRECISION)
            m_own = (o_column[None, :] >= i_row) & (o_column[None, :] < i_row + ROOT)
            b_rows = tl.where(m_own, tl.where(o_row[:, None] == o_column[None, :], 1.0, 0.0), b_rows)
            b_rows = product(b_scale, b_rows, tl.zeros([ROOT, BLOCK_K], tl.float32), PRECISION)
            tl.debug_barrier()
            tl.store(p_root + o_tile, b_rows, mask=m_tile)
        tl.debug_barrier()
    return loss


@triton.jit
def inverse_root_kernel(
    p_matrices, p_roots, p_loss, p_chunks, H, limit,
    K: tl.constexpr, BLOCK_K: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R of the matrix of one chunk and head. Its loss is counted in units of the limit; past one, nothing follows."""
    i_chunk = tl.program_id(0) // H
    if tl.load(p_chunks + i_chunk * 4) == tl.load(p_chunks + i_chunk * 4 + 1):
        return
    before = 0.0
    if not FIRST:
        before = tl.load(p_loss + tl.program_id(0))
        if before > 1.0:
            return
    o_matrix = tl.program_id(0).to(tl.int64) * (K * K)
    loss = inverse_root(p_matrices + o_matrix, p_roots + o_matrix, K, BLOCK_K, PRECISION)
    tl.store(p_loss + tl.program_id(0), tl.maximum(before, loss / limit))


def inverse_roots(matrices: Tensor, loss: Tensor, chunks: Spans, *, limit: float, first: bool) -> Tensor:
    """R of (chunks, heads, size, size), and the loss (chunks, heads) brought up to date."""
    heads, size = matrices.shape[1:3]
    roots = matrices.new_empty(matrices.shape)
    inverse_root_kernel[(chunks.number * heads,)](
        matrices, roots, loss, chunks.table, heads, limit,
        K=size, BLOCK_K=block(size, 32), FIRST=first, PRECISION=precision(torch.float32, matrices.device),
        num_warps=1, num_stages=1,
    )  # fmt: skip
    return roots
