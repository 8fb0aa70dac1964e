"""Local linear attention, backwards: one more solve with the same matrix, then sums over keys and over queries.

With a_i = u·(k_i − μ), g_i = ∂y·v_i, ḡ = Σ p g and the solution w of (C + λI) w = −Σ p (g − ḡ) k, and with
s_i = g_i − ḡ + w·(k_i − μ), the gradients are

    of the target     −w          of λ   Σ w·u         of a probe, where w is 0,   Σ p (g − ḡ) k
    of the log-weight  e_i = p_i ((1 + a_i) s_i − ρ) ,    ρ = Σ p (1 + a) s
    of q               scale Σ e k
    of k               scale Σ e q + Σ p s u + Σ p (1 + a) w          summed over the queries that see it
    of v               Σ p (1 + a) ∂y .

    local_pulls_kernel              3 products          ḡ and the right side, for a block of queries
    local_solve_kernel              3 a step            w
    local_query_gradient_kernel     5                   of q, and ρ
    local_key_gradient_kernel       8                   of k, v and the log-weight, for a block of keys

Every sum has one program: no atomics, the same bits every time. u and w are rounded to the dtype of the keys here.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from ttr_kernels._blocks import load_rows, store_rows
from ttr_kernels._local_linear_forward import keys_and_log_weights, load_fade, only_seen, queries_of_block

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def local_pulls_kernel(
    p_q, p_k, p_v, p_y, p_to_y, p_mean, p_norm, p_fade, p_bias, p_pull, p_right,
    p_spans, p_bounds, spans, past, H, scale, window,
    K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ḡ and −Σ p (g − ḡ) k of a block of queries."""
    i_span = spans - 1 - tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_begin, i_end, i_first, i_stop, i_low = queries_of_block(p_spans, p_bounds, i_span, past, window)
    if i_begin == i_end:
        return
    o_m = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    m_t = i_begin + o_m < i_end
    i_row = tl.cast(i_begin, tl.int64) * H + i_h
    b_q = load_rows(p_q + i_row * K, o_m * H, m_t, o_k, K)
    b_to_y = load_rows(p_to_y + i_row * V, o_m * H, m_t, o_v, V)
    b_norm = tl.load(p_norm + i_row + o_m * H, mask=m_t, other=float("inf"))
    b_fade = load_fade(p_fade, tl.cast(i_first, tl.int64) * H + i_h + o_m * H, m_t)
    # A fit is near the mean of the values. With it the g lose what they have in common before they are rounded.
    b_guess = tl.zeros([BLOCK_T], tl.float32)
    if p_y is not None:
        b_y = load_rows(p_y + i_row * V, o_m * H, m_t, o_v, V)
        b_guess = tl.sum(b_y.to(tl.float32) * b_to_y.to(tl.float32), axis=1)
    b_pull = tl.zeros([BLOCK_T], tl.float32)
    b_sum = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i_pair in range(i_low, i_stop, BLOCK_N):
        b_k, b_log = keys_and_log_weights(
            i_pair, b_q, b_norm, b_fade, p_k, p_fade, p_bias, i_first, i_stop, H, i_h, scale, window,
            K, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        i_key = tl.cast(i_pair, tl.int64) * H + i_h
        b_v = load_rows(p_v + i_key * V, o_n * H, i_pair + o_n < i_stop, o_v, V)
        b_g = tl.dot(b_to_y, tl.trans(b_v), input_precision=PRECISION)
        b_pulled = tl.exp2(b_log) * (b_g - b_guess[:, None])
        b_pull += tl.sum(b_pulled, axis=1)
        b_sum = tl.dot(b_pulled.to(b_k.dtype), b_k, b_sum, input_precision=PRECISION)
    b_mean = load_rows(p_mean + i_row * K, o_m * H, m_t, o_k, K)
    store_rows(p_right + i_row * K, b_pull[:, None] * b_mean - b_sum, o_m * H, m_t, o_k, K)
    tl.store(p_pull + i_row + o_m * H, b_guess + b_pull, mask=m_t)


@triton.jit
def local_query_gradient_kernel(
    p_q, p_k, p_v, p_u, p_w, p_to_y, p_mean, p_norm, p_pull, p_fade, p_bias, p_to_q, p_rows,
    p_spans, p_bounds, spans, past, H, scale, window,
    K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries; of each 1 − u·μ, −ḡ − w·μ and ρ."""
    i_span = spans - 1 - tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_begin, i_end, i_first, i_stop, i_low = queries_of_block(p_spans, p_bounds, i_span, past, window)
    if i_begin == i_end:
        return
    o_m = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    m_t = i_begin + o_m < i_end
    i_row = tl.cast(i_begin, tl.int64) * H + i_h
    b_q = load_rows(p_q + i_row * K, o_m * H, m_t, o_k, K)
    b_u = load_rows(p_u + i_row * K, o_m * H, m_t, o_k, K)
    b_to_y = load_rows(p_to_y + i_row * V, o_m * H, m_t, o_v, V)
    b_norm = tl.load(p_norm + i_row + o_m * H, mask=m_t, other=float("inf"))
    b_fade = load_fade(p_fade, tl.cast(i_first, tl.int64) * H + i_h + o_m * H, m_t)
    b_mean = load_rows(p_mean + i_row * K, o_m * H, m_t, o_k, K)
    b_lift = 1.0 - tl.sum(b_u.to(tl.float32) * b_mean, axis=1)
    b_pull = -tl.load(p_pull + i_row + o_m * H, mask=m_t, other=0.0)
    if p_w is not None:
        b_w = load_rows(p_w + i_row * K, o_m * H, m_t, o_k, K)
        b_pull -= tl.sum(b_w.to(tl.float32) * b_mean, axis=1)
    b_rho = tl.zeros([BLOCK_T], tl.float32)
    b_sum = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i_pair in range(i_low, i_stop, BLOCK_N):
        b_k, b_log = keys_and_log_weights(
            i_pair, b_q, b_norm, b_fade, p_k, p_fade, p_bias, i_first, i_stop, H, i_h, scale, window,
            K, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        b_weights = tl.exp2(b_log) * (tl.dot(b_u, tl.trans(b_k), input_precision=PRECISION) + b_lift[:, None])
        i_key = tl.cast(i_pair, tl.int64) * H + i_h
        b_v = load_rows(p_v + i_key * V, o_n * H, i_pair + o_n < i_stop, o_v, V)
        b_s = tl.dot(b_to_y, tl.trans(b_v), input_precision=PRECISION)
        if p_w is not None:
            b_s = tl.dot(b_w, tl.trans(b_k), b_s, input_precision=PRECISION)
        b_weights *= b_s + b_pull[:, None]
        b_rho += tl.sum(b_weights, axis=1)
        b_sum = tl.dot(b_weights.to(b_k.dtype), b_k, b_sum, input_precision=PRECISION)
    b_mean = load_rows(p_mean + i_row * K, o_m * H, m_t, o_k, K)
    store_rows(p_to_q + i_row * K, (b_sum - b_rho[:, None] * b_mean) * (scale * LN2), o_m * H, m_t, o_k, K)
    p_rows += i_row * 3
    tl.store(p_rows + o_m * (3 * H), b_lift, mask=m_t)
    tl.store(p_rows + o_m * (3 * H) + 1, b_pull, mask=m_t)
    tl.store(p_rows + o_m * (3 * H) + 2, b_rho, mask=m_t)


@triton.jit
def local_key_gradient_kernel(
    p_q, p_k, p_v, p_u, p_w, p_to_y, p_norm, p_rows, p_fade, p_bias, p_to_k, p_to_v, p_to_bias,
    p_spans, p_bounds, past, H, scale, window,
    K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of pairs, summed over the queries that see them. Tiles are (pairs, queries)."""
    i_span = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_begin = tl.load(p_spans + i_span * 4)
    i_end = tl.load(p_spans + i_span * 4 + 1)
    i_sequence = tl.load(p_spans + i_span * 4 + 3)
    if i_begin == i_end:
        return
    # A query's row is that of its pair less the offset.
    offset = (i_sequence + 1) * past
    i_low = tl.maximum(tl.load(p_bounds + i_sequence), i_begin - offset)
    i_high = tl.load(p_bounds + i_sequence + 1)
    if window is not None:
        i_high = tl.minimum(i_high, i_end - offset + window - 1)
    o_m = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, BLOCK_V)
    m_i = i_begin + o_n < i_end
    i_key = tl.cast(i_begin, tl.int64) * H + i_h
    b_k = load_rows(p_k + i_key * K, o_n * H, m_i, o_k, K)
    b_v = load_rows(p_v + i_key * V, o_n * H, m_i, o_v, V)
    b_fade_i = load_fade(p_fade, i_key + o_n * H, m_i)
    b_to_k = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_to_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    b_to_bias = tl.zeros([BLOCK_N], tl.float32)
    for i_query in range(i_low, i_high, BLOCK_T):
        m_t = i_query + o_m < i_high
        i_row = tl.cast(i_query, tl.int64) * H + i_h
        b_q = load_rows(p_q + i_row * K, o_m * H, m_t, o_k, K)
        b_norm = tl.load(p_norm + i_row + o_m * H, mask=m_t, other=float("inf"))
        b_log = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale - b_norm[None, :]
        if p_bias is not None:
            b_log += tl.load(p_bias + i_key + o_n * H, mask=m_i, other=0.0)[:, None]
        if p_fade is not None:
            b_fade_t = tl.load(p_fade + i_row + tl.cast(offset, tl.int64) * H + o_m * H, mask=m_t, other=0.0)
            b_log += b_fade_t[None, :] - b_fade_i[:, None]
        i_pair = i_query + offset
        at_edge = i_begin + BLOCK_N > i_pair + 1
        if window is not None:
            at_edge = at_edge | (i_pair + BLOCK_T > i_begin + window)
        if at_edge:
            b_log = only_seen(b_log, (i_pair + o_m)[None, :], (i_begin + o_n)[:, None], window)
        b_p = tl.exp2(b_log)

        b_rows = p_rows + i_row * 3 + o_m * (3 * H)
        b_lift = tl.load(b_rows, mask=m_t, other=0.0)
        b_u = load_rows(p_u + i_row * K, o_m * H, m_t, o_k, K)
        b_lifted = b_p * (tl.dot(b_k, tl.trans(b_u), input_precision=PRECISION) + b_lift[None, :])
        b_to_y = load_rows(p_to_y + i_row * V, o_m * H, m_t, o_v, V)
        b_to_v = tl.dot(b_lifted.to(b_k.dtype), b_to_y, b_to_v, input_precision=PRECISION)
        b_s = tl.dot(b_v, tl.trans(b_to_y), input_precision=PRECISION)
        if p_w is not None:
            b_w = load_rows(p_w + i_row * K, o_m * H, m_t, o_k, K)
            b_to_k = tl.dot(b_lifted.to(b_k.dtype), b_w, b_to_k, input_precision=PRECISION)
            b_s = tl.dot(b_k, tl.trans(b_w), b_s, input_precision=PRECISION)
        b_s += tl.load(b_rows + 1, mask=m_t, other=0.0)[None, :]
        b_to_k = tl.dot((b_p * b_s).to(b_k.dtype), b_u, b_to_k, input_precision=PRECISION)
        b_e = b_lifted * b_s - b_p * tl.load(b_rows + 2, mask=m_t, other=0.0)[None, :]
        b_to_bias += tl.sum(b_e, axis=1)
        b_to_k = tl.dot((b_e * (scale * LN2)).to(b_k.dtype), b_q, b_to_k, input_precision=PRECISION)
    store_rows(p_to_k + i_key * K, b_to_k, o_n * H, m_i, o_k, K)
    store_rows(p_to_v + i_key * V, b_to_v, o_n * H, m_i, o_v, V)
    tl.store(p_to_bias + i_key + o_n * H, b_to_bias, mask=m_i)
