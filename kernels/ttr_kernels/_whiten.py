"""Whitened queries: x_t with (G_t + Λ) x_t = q_t, for all chunks at once and without the matrices G_t.

With G the curvature that enters a chunk, J its inverse root, K̂ = K Jᵀ and Q̂ = Q Jᵀ, and Λ = 0,

    L Lᵀ = Diag(e^c) + K̂ K̂ᵀ,   W = L⁻¹ K̂,   X = Diag(e^{−c}) (Q̂ − tril(Q̂ Wᵀ) W) J

is Woodbury's identity at every token: a leading block of L is the factor of the leading block. What is subtracted costs
digits where a chunk knows much that its start did not: the more, the stronger the decay. The pivots of both roots and
the lengths of the rows of Q̂ tell how many. Nothing is read back, so three levels always run, and a program has nothing
to do where the one before was accurate:

    a chunk of 64 tokens, by five kernels: J, then K̂ and Q̂ and K̂ K̂ᵀ, then L⁻¹, then Q̂ − tril(Q̂ Wᵀ) W, then X;
    16 tokens of it, from the curvature before them, e^c G and products of the keys since;
    one token: the root of its own matrix, which may have a ridge. Where rounding has eaten a pivot, again with a
    little added to the diagonal.

The last two are one kernel. It has a fixed number of programs, each with room for one matrix, that share the work.

Cost per token and head, at the first level: 6K² + 10CK + (K³ + C³)/C FLOPs, and 48K + 20K²/C + 16C bytes. At
K = 128 that is 217 kFLOP, three times as many on tensor cores, for 12 kB. At the last: K³ + CK² FLOPs in the cache.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import NO_DECAY, load_log_decay, load_rows, product, store_rows
from ttr_kernels._launch import block, decay_kind, precision
from ttr_kernels._packing import CHUNK, Packing
from ttr_kernels._roots import ROOT, ROUNDING, inverse_root, inverse_root_of_tile, inverse_roots

EPS = torch.finfo(torch.float32).eps
# What may cancel. With more, answers blow up where float32 resolves little; with less, chunks are solved again that
# are accurate.
MOST_LOST = tl.constexpr(EPS**-0.375)
MOST_LOST_TO_KEYS = tl.constexpr(EPS**-0.25)
TINY_ROOT = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)

PROGRAMS = 1024  # that solve again, each with a matrix of its own


@triton.jit
def times_root(
    p_rows, o_row, m_row, p_root,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows times J or Jᵀ, J the lower triangle of the matrix at p_root."""
    o_k = tl.arange(0, BLOCK_K)[None, :]
    b_sum = tl.zeros([o_row.shape[0], BLOCK_K], tl.float32)
    for i_d in range(0, K, BLOCK):
        o_d = i_d + tl.arange(0, BLOCK)
        b_rows = load_rows(p_rows, o_row, m_row, o_d, K)
        o_d = o_d[:, None]
        if TRANSPOSED:
            b_root = tl.load(p_root + o_k * K + o_d, mask=(o_k < K) & (o_d <= o_k), other=0.0)
        else:
            b_root = tl.load(p_root + o_d * K + o_k, mask=(o_d < K) & (o_k <= o_d), other=0.0)
        b_sum = product(b_rows, b_root, b_sum, PRECISION)
    return b_sum


@triton.jit
def left_of_start(p_log_decay, o_row, m_row, DECAY: tl.constexpr):
    """exp(c_t)."""
    if DECAY == NO_DECAY:
        return tl.full([o_row.shape[0]], 1.0, tl.float32)
    else:
        b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_row, o_row, 1, DECAY)
        return tl.exp(tl.cumsum(b_coarse, axis=0) + tl.cumsum(b_fine, axis=0))


@triton.jit
def overlap_of_keys(p_keys, o_row, m_row, b_left, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Diag(e^c) + K̂ K̂ᵀ."""
    o_t = tl.arange(0, o_row.shape[0])
    b_overlap = tl.where(o_t[:, None] == o_t[None, :], b_left[:, None], 0.0)
    for i_d in range(0, K, BLOCK):
        b_keys = load_rows(p_keys, o_row, m_row, i_d + tl.arange(0, BLOCK), K)
        b_overlap = product(b_keys, tl.trans(b_keys), b_overlap, PRECISION)
    return b_overlap


@triton.jit
def subtract_learned(
    p_queries, p_keys, b_triangle, o_row, m_row, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Q̂ − tril(Q̂ Wᵀ) W in the place of Q̂; returns whether no row has lost more of its length than may cancel."""
    o_t = tl.arange(0, o_row.shape[0])
    b_none = tl.zeros([o_row.shape[0], BLOCK], tl.float32)
    b_scores = tl.zeros([o_row.shape[0], o_row.shape[0]], tl.float32)
    for i_d in range(0, K, BLOCK):
        o_d = i_d + tl.arange(0, BLOCK)
        b_gains = product(b_triangle, load_rows(p_keys, o_row, m_row, o_d, K), b_none, PRECISION)
        b_scores = product(load_rows(p_queries, o_row, m_row, o_d, K), tl.trans(b_gains), b_scores, PRECISION)
    b_scores = tl.where(o_t[:, None] >= o_t[None, :], -b_scores, 0.0)
    tl.debug_barrier()
    b_before = tl.zeros([o_row.shape[0]], tl.float32)
    b_after = tl.zeros([o_row.shape[0]], tl.float32)
    for i_d in range(0, K, BLOCK):
        o_d = i_d + tl.arange(0, BLOCK)
        b_gains = product(b_triangle, load_rows(p_keys, o_row, m_row, o_d, K), b_none, PRECISION)
        b_queries = load_rows(p_queries, o_row, m_row, o_d, K)
        b_rest = product(b_scores, b_gains, b_queries, PRECISION)
        b_before += tl.sum(b_queries * b_queries, axis=1)
        b_after += tl.sum(b_rest * b_rest, axis=1)
        store_rows(p_queries, b_rest, o_row, m_row, o_d, K)
    return tl.max(tl.where(b_before <= b_after * (MOST_LOST * MOST_LOST), 0, 1), axis=0) == 0


@triton.jit
def projection_kernel(
    p_q, p_k, p_log_decay, p_roots, p_loss, p_queries, p_keys, p_overlap, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q̂, or K̂ and Diag(e^c) + K̂ K̂ᵀ, of one chunk."""
    i_chunk = tl.program_id(0) // H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    if tl.load(p_loss + tl.program_id(0)) > 1.0:
        return
    o_t = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BLOCK_K)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + tl.program_id(0) % H
    p_root = p_roots + tl.program_id(0).to(tl.int64) * (K * K)
    if tl.program_id(1) == 0:
        b_queries = times_root(p_q, o_row, m_t, p_root, K, BLOCK_K, BLOCK, True, PRECISION)
        store_rows(p_queries, b_queries, o_row, m_t, o_k, K)
    else:
        b_keys = times_root(p_k, o_row, m_t, p_root, K, BLOCK_K, BLOCK, True, PRECISION)
        store_rows(p_keys, b_keys, o_row, m_t, o_k, K)
        tl.debug_barrier()
        b_left = left_of_start(p_log_decay, o_row, m_t, DECAY)
        b_overlap = overlap_of_keys(p_keys, o_row, m_t, b_left, K, BLOCK, PRECISION)
        p_matrix = p_overlap + tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK)
        tl.store(p_matrix + o_t[:, None] * CHUNK + o_t[None, :], b_overlap)


@triton.jit
def woodbury_kernel(
    p_queries, p_keys, p_log_decay, p_triangles, p_loss, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q̂ − tril(Q̂ Wᵀ) W of one chunk in the place of Q̂, or a loss beyond the limit."""
    i_chunk = tl.program_id(0) // H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    if tl.load(p_loss + tl.program_id(0)) > 1.0:
        return
    o_t = tl.arange(0, CHUNK)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + tl.program_id(0) % H
    p_triangle = p_triangles + tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK) + o_t[:, None] * CHUNK + o_t[None, :]
    b_triangle = tl.load(p_triangle, mask=o_t[:, None] >= o_t[None, :], other=0.0)
    accurate = subtract_learned(p_queries, p_keys, b_triangle, o_row, m_t, K, BLOCK, PRECISION)
    b_left = left_of_start(p_log_decay, o_row, m_t, DECAY)
    if not (accurate & (tl.min(b_left, axis=0) > ROUNDING)):
        tl.store(p_loss + tl.program_id(0), 2.0)


@triton.jit
def return_kernel(
    p_rest, p_log_decay, p_roots, p_loss, p_x, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X of one chunk, back from the coordinates of Q̂."""
    i_chunk = tl.program_id(0) // H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    if tl.load(p_loss + tl.program_id(0)) > 1.0:
        return
    o_t = tl.arange(0, CHUNK)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + tl.program_id(0) % H
    p_root = p_roots + tl.program_id(0).to(tl.int64) * (K * K)
    b_x = times_root(p_rest, o_row, m_t, p_root, K, BLOCK_K, BLOCK, False, PRECISION)
    b_x /= left_of_start(p_log_decay, o_row, m_t, DECAY)[:, None]
    store_rows(p_x, b_x, o_row, m_t, tl.arange(0, BLOCK_K), K)


@triton.jit
def curvature_before(
    p_k, p_log_decay, p_start, p_ridge, p_curvature, i_first, i_end, i_h, H, floor,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write G + Λ as it is before token i_end of the chunk that begins at i_first, with a floor under its diagonal."""
    o_t = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BLOCK_K)
    coarse_left, fine_left = 0.0, 0.0
    if DECAY != NO_DECAY:
        o_row = (i_first + o_t).to(tl.int64) * H + i_h
        b_coarse, b_fine = load_log_decay(p_log_decay, o_row, i_first + o_t < i_end, o_t, 1, DECAY)
        coarse_left = tl.sum(b_coarse, axis=0)
        fine_left = tl.sum(b_fine, axis=0)
    for i_row in range(0, K, ROOT):
        o_d = i_row + tl.arange(0, ROOT)
        b_g = load_rows(p_start, o_d, o_d < K, o_k, K)
        coarse, fine = coarse_left, fine_left
        if DECAY != NO_DECAY:
            b_g *= tl.exp(coarse + fine)
        for i_block in range(i_first, i_end, ROOT):
            o_time = i_block + tl.arange(0, ROOT)
            m_time = o_time < i_end
            o_place = o_time.to(tl.int64) * H + i_h
            b_earlier = load_rows(p_k, o_place, m_time, o_d, K)
            if DECAY != NO_DECAY:
                b_coarse_here, b_fine_here = load_log_decay(p_log_decay, o_place, m_time, o_d, 1, DECAY)
                b_until = (coarse - tl.cumsum(b_coarse_here, axis=0)) + (fine - tl.cumsum(b_fine_here, axis=0))
                b_earlier *= tl.exp(b_until)[:, None]
                coarse -= tl.sum(b_coarse_here, axis=0)
                fine -= tl.sum(b_fine_here, axis=0)
            b_g = product(tl.trans(b_earlier), load_rows(p_k, o_place, m_time, o_k, K), b_g, PRECISION)
        m_diagonal = o_d[:, None] == o_k[None, :]
        if p_ridge is not None:
            b_ridge = tl.load(p_ridge + i_h * K + o_d, mask=o_d < K, other=0.0)
            b_g += tl.where(m_diagonal, b_ridge[:, None], 0.0)
        b_g += tl.where(m_diagonal, floor * (tl.abs(b_g) * (ROUNDING * 4 * K) + TINY_ROOT), 0.0)
        store_rows(p_curvature, b_g, o_d, o_d < K, o_k, K)
    tl.debug_barrier()


@triton.jit
def few_tokens(
    p_q, p_k, p_log_decay, p_queries, p_keys, p_x, p_root, o_row, m_row,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write X of a few tokens by Woodbury's identity; returns whether that is accurate."""
    b_left = left_of_start(p_log_decay, o_row, m_row, DECAY)
    accurate = tl.min(b_left, axis=0) > ROUNDING
    if accurate:
        o_t = tl.arange(0, ROOT)
        o_k = tl.arange(0, BLOCK_K)
        b_keys = times_root(p_k, o_row, m_row, p_root, K, BLOCK_K, BLOCK, True, PRECISION)
        b_queries = times_root(p_q, o_row, m_row, p_root, K, BLOCK_K, BLOCK, True, PRECISION)
        store_rows(p_keys, b_keys, o_row, m_row, o_k, K)
        store_rows(p_queries, b_queries, o_row, m_row, o_k, K)
        tl.debug_barrier()
        b_overlap = overlap_of_keys(p_keys, o_row, m_row, b_left, K, BLOCK, PRECISION)
        b_diagonal = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_overlap, 0.0), axis=1, keep_dims=True)
        b_triangle, loss = inverse_root_of_tile(b_overlap, b_diagonal, ROOT)
        accurate = loss <= MOST_LOST_TO_KEYS
        if accurate:
            accurate = subtract_learned(p_queries, p_keys, b_triangle, o_row, m_row, K, BLOCK, PRECISION)
            tl.debug_barrier()
            b_x = times_root(p_queries, o_row, m_row, p_root, K, BLOCK_K, BLOCK, False, PRECISION)
            store_rows(p_x, b_x / b_left[:, None], o_row, m_row, o_k, K)
    return accurate


@triton.jit
def one_token(
    p_q, p_k, p_log_decay, p_start, p_ridge, p_x, p_root, i_first, i_t, i_h, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write x of token i_t by the root of its own matrix."""
    floor = 0.0
    lost = True
    while lost:
        curvature_before(
            p_k, p_log_decay, p_start, p_ridge, p_root, i_first, i_t + 1, i_h, H, floor,
            K, CHUNK, BLOCK_K, DECAY, PRECISION,
        )  # fmt: skip
        loss = inverse_root(p_root, p_root, K, BLOCK, PRECISION)
        lost = (floor == 0.0) & (loss * (ROUNDING * K) >= 1.0)
        floor = 1.0
    o_k = tl.arange(0, BLOCK_K)
    i_row = tl.cast(i_t, tl.int64) * H + i_h
    b_q = tl.load(p_q + i_row * K + o_k, mask=o_k < K, other=0.0)
    b_x = tl.zeros([BLOCK_K], tl.float32)
    for i_d in range(0, K, ROOT):
        o_d = i_d + tl.arange(0, ROOT)
        m_root = (o_d[:, None] < K) & (o_k[None, :] <= o_d[:, None])
        b_root = tl.load(p_root + o_d[:, None] * K + o_k[None, :], mask=m_root, other=0.0)
        b_x += tl.sum(tl.sum(b_root * b_q[None, :], axis=1, keep_dims=True) * b_root, axis=0)
    tl.store(p_x + i_row * K + o_k, b_x, mask=o_k < K)
    tl.debug_barrier()


@triton.jit
def token_kernel(
    p_q, p_k, p_log_decay, p_starts, p_ridge, p_loss, p_queries, p_keys, p_x, p_roots, p_chunks, H, parts,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X of parts of chunks, where p_loss says that it is still to be found; without p_loss, of all token by token."""
    PARTS: tl.constexpr = CHUNK // ROOT
    p_root = p_roots + tl.program_id(0).to(tl.int64) * (K * K)
    for i in range(tl.program_id(0), parts, tl.num_programs(0)):
        i_part = tl.cast(i, tl.int32)
        i_head = i_part // PARTS
        i_chunk = i_head // H
        i_h = i_head % H
        i_first = tl.load(p_chunks + i_chunk * 4)
        i_begin = i_first + i_part % PARTS * ROOT
        i_end = tl.minimum(i_begin + ROOT, tl.load(p_chunks + i_chunk * 4 + 1))
        inaccurate = i_begin < i_end
        p_start = p_starts + i_head.to(tl.int64) * (K * K)
        if p_loss is not None:
            if inaccurate:
                inaccurate = tl.load(p_loss + i_head) > 1.0
            if inaccurate:
                curvature_before(
                    p_k, p_log_decay, p_start, p_ridge, p_root, i_first, i_begin, i_h, H, 0.0,
                    K, CHUNK, BLOCK_K, DECAY, PRECISION,
                )  # fmt: skip
                accurate = inverse_root(p_root, p_root, K, BLOCK, PRECISION) <= MOST_LOST
                if accurate:
                    o_time = i_begin + tl.arange(0, ROOT)
                    o_row = o_time.to(tl.int64) * H + i_h
                    accurate = few_tokens(
                        p_q, p_k, p_log_decay, p_queries, p_keys, p_x, p_root, o_row, o_time < i_end,
                        K, BLOCK_K, BLOCK, DECAY, PRECISION,
                    )  # fmt: skip
                inaccurate = not accurate
                tl.debug_barrier()
        if inaccurate:
            for i_t in range(i_begin, i_end):
                one_token(
                    p_q, p_k, p_log_decay, p_start, p_ridge, p_x, p_root, i_first, i_t, i_h, H,
                    K, CHUNK, BLOCK_K, BLOCK, DECAY, PRECISION,
                )  # fmt: skip


def whiten_by_chunks(q: Tensor, k: Tensor, log_decay: Tensor | None, starts: Tensor, packing: Packing) -> Tensor:
    """x, like q; `k` is times √w, and `starts` are the curvatures that enter chunks, (chunks, heads, key, key)."""
    chunks = packing.chunks
    heads, key = q.shape[-2:]
    grid = (chunks.number * heads,)
    sizes = {"K": key, "CHUNK": CHUNK, "DECAY": decay_kind(log_decay), "PRECISION": precision(q.dtype, q.device)}
    sizes["num_stages"] = 1
    tile = {"BLOCK_K": block(key), "BLOCK": 16, "num_warps": 4}
    loss = q.new_empty((chunks.number, heads))
    queries, keys, x = (q.new_empty(q.shape) for _ in range(3))
    overlap = q.new_empty((chunks.number, heads, CHUNK, CHUNK))
    roots = inverse_roots(starts, loss, chunks, limit=MOST_LOST.value, first=True)
    projection_kernel[(*grid, 2)](
        q, k, log_decay, roots, loss, queries, keys, overlap, chunks.table, heads, **sizes, **tile
    )
    triangles = inverse_roots(overlap, loss, chunks, limit=MOST_LOST_TO_KEYS.value, first=False)
    woodbury_kernel[grid](
        queries, keys, log_decay, triangles, loss, chunks.table, heads, BLOCK=block(key, 32), **sizes, num_warps=8
    )
    return_kernel[grid](queries, log_decay, roots, loss, x, chunks.table, heads, **sizes, **tile)
    return _by_tokens(q, k, log_decay, starts, None, loss, queries, keys, x, packing)


def whiten_by_tokens(
    q: Tensor, k: Tensor, log_decay: Tensor | None, starts: Tensor, ridge: Tensor | None, packing: Packing
) -> Tensor:
    """The same with a root a token, and a ridge (heads, key) that stays."""
    return _by_tokens(q, k, log_decay, starts, ridge, None, None, None, q.new_empty(q.shape), packing)


def _by_tokens(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    starts: Tensor,
    ridge: Tensor | None,
    loss: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
    x: Tensor,
    packing: Packing,
) -> Tensor:
    chunks = packing.chunks
    heads, key = q.shape[-2:]
    parts = chunks.number * heads * (CHUNK // ROOT.value)
    programs = min(parts, PROGRAMS)
    roots = q.new_empty((programs, key, key))
    token_kernel[(programs,)](
        q, k, log_decay, starts, ridge, loss, queries, keys, x, roots, chunks.table, heads, parts,
        K=key, CHUNK=CHUNK, BLOCK_K=block(key), BLOCK=block(key, 32), DECAY=decay_kind(log_decay),
        PRECISION=precision(q.dtype, q.device), num_warps=4, num_stages=1,
    )  # fmt: skip
    return x
