"""(I + A)⁻¹ of every chunk, A the scores strictly below the diagonal.

From the blocks on the diagonal outwards, [[P, 0], [Q, R]]⁻¹ = [[P⁻¹, 0], [−R⁻¹ Q P⁻¹, R⁻¹]]: with X the inverse of all
blocks of one size and B the squares between neighbours, X − X B X is that of all blocks of twice the size. Products
of tiles do everything, and unlike a sum of powers of A it keeps its digits where keys are alike.

Cost per token and head: 4C log₂ C FLOPs times C; 8C bytes.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import product, store_rows
from ttr_kernels._launch import precision
from ttr_kernels._packing import Packing


@triton.jit
def inverse_kernel(p_scores, p_inverse, p_chunks, H, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of one chunk."""
    i_first = tl.load(p_chunks + tl.program_id(0) // H * 4)
    i_stop = tl.load(p_chunks + tl.program_id(0) // H * 4 + 1)
    if i_first == i_stop:
        return
    o_t = tl.arange(0, CHUNK)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + tl.program_id(0) % H
    p_scores_block = p_scores + o_row[:, None] * CHUNK + o_t[None, :]
    b_inverse = tl.where(o_t[:, None] == o_t[None, :], 1.0, 0.0)
    b_none = tl.zeros([CHUNK, CHUNK], tl.float32)
    size = 1
    while size < CHUNK:
        # The rows of the second block and the columns of the first, of two that become one.
        m_square = (o_t[:, None] // (2 * size) == o_t[None, :] // (2 * size)) & (
            o_t[:, None] // size > o_t[None, :] // size
        )
        # Loaded anew for every size: all of them would not fit into registers beside the products.
        b_square = tl.load(p_scores_block, mask=m_square & m_t[:, None], other=0.0)
        b_square = product(b_inverse, b_square, b_none, PRECISION)
        b_inverse -= product(b_square, b_inverse, b_none, PRECISION)
        size *= 2
    store_rows(p_inverse, b_inverse, o_row, m_t, o_t, CHUNK)


def unit_triangular_inverse(scores: Tensor, packing: Packing) -> Tensor:
    """(I + A)⁻¹, laid out as the scores; in the precision of float32, whatever the inputs have."""
    heads = scores.shape[-2]
    chunks = packing.chunks
    inverse = scores.new_empty(scores.shape)
    inverse_kernel[(chunks.number * heads,)](
        scores, inverse, chunks.table, heads,
        CHUNK=packing.chunk, PRECISION=precision(scores.dtype, scores.device), num_warps=4,
    )  # fmt: skip
    return inverse
