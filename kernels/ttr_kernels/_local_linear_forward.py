"""Local linear attention, forwards: moments of the keys, a solve and a weighted sum for every query.

With p the weights of a query over the pairs it sees, μ = Σ p k and C = Σ p (k − μ)(k − μ)ᵀ,

    (C + λI) u = target − μ ,    y = Σ p_i (1 + u·(k_i − μ)) v_i .

Neither p nor C is ever stored. A program has a block of queries of one head, streams the keys that they see, and takes
the weights anew from q·k and the log of their sum: C x = Σ p_i (x·(k_i − μ)) k_i is two more products of tiles.

    local_moments_kernel    2 products     online softmax: the log-sum and μ
    local_solve_kernel      3 a step       conjugate gradients, every query its own, until the last of the block is done
    local_output_kernel     3, or 4        (u in two parts where the inputs are half precision, lest its rounding shows)

A product of tiles is K·T² FLOPs a head, causal, where FlashAttention's forward has two: with 8 steps, (3·8 + 6)/2 = 15
times its FLOPs. But three products share an exponential where there two do, and at 64 channels it costs as much as two:
10 times its exponentials. Between 11 times its time, if nothing overlaps, and 15, if all does, is to be expected. Bytes
are O(T·K), since the keys come from the L2 cache.

Conjugate gradients in half precision: a direction is scaled to length one, then rounded, and the rounded one is the
direction. The step along it is exact and the next is conjugate to it. What remains is the rounding of p_i x·(k_i − μ),
as if the keys had been rounded once more: u is off by the rounding of the inputs times the condition of C + λI.

Log-weights are in base 2: scale·q·k + bias + fade_t − fade_i, where fade is the decay elapsed, in float32, and its
rounding is part of the bias. A query that no pair has weight for has the log-sum +inf, so that its weights are zero.

Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index. Pairs may precede the queries: row r of these is
row r + (sequence + 1)·past of the pairs.
"""
# Triton reads the annotations of a kernel's arguments, so they are left out:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from ttr_kernels._blocks import load_rows, store_rows


@triton.jit
def queries_of_block(p_spans, p_bounds, i_span, past, window):
    """First row and the one after the last; both as rows of pairs; the row of the first pair that the block sees."""
    i_begin = tl.load(p_spans + i_span * 4)
    i_end = tl.load(p_spans + i_span * 4 + 1)
    i_sequence = tl.load(p_spans + i_span * 4 + 3)
    i_first = i_begin + (i_sequence + 1) * past
    i_low = tl.load(p_bounds + i_sequence) + i_sequence * past
    if window is not None:
        i_low = tl.maximum(i_low, i_first - window + 1)
    return i_begin, i_end, i_first, i_end + (i_sequence + 1) * past, i_low


@triton.jit
def load_fade(p_fade, o_row, m_row):
    """The decay elapsed at these rows; without a decay zeros that nobody reads."""
    if p_fade is None:
        b_fade = tl.zeros([o_row.shape[0]], tl.float32)
    else:
        b_fade = tl.load(p_fade + o_row, mask=m_row, other=0.0)
    return b_fade


@triton.jit
def only_seen(b_log, o_t, o_i, window):
    """−inf for pairs that follow the query or precede its window."""
    m_seen = o_i <= o_t
    if window is not None:
        m_seen = m_seen & (o_i > o_t - window)
    return tl.where(m_seen, b_log, float("-inf"))


@triton.jit
def keys_and_log_weights(
    i_pair, b_q, b_norm, b_fade, p_k, p_fade, p_bias, i_first, i_stop, H, i_h, scale, window,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at i_pair, and the log-weights (queries, keys), less b_norm, of the block of queries i_first to i_stop."""
    o_n = tl.arange(0, BLOCK_N)
    o_i = i_pair + o_n
    m_i = o_i < i_stop
    i_row = tl.cast(i_pair, tl.int64) * H + i_h
    b_k = load_rows(p_k + i_row * K, o_n * H, m_i, tl.arange(0, BLOCK_K), K)
    b_log = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale - b_norm[:, None]
    if p_bias is not None:
        b_log += tl.load(p_bias + i_row + o_n * H, mask=m_i, other=0.0)[None, :]
    if p_fade is not None:
        b_log += b_fade[:, None] - tl.load(p_fade + i_row + o_n * H, mask=m_i, other=0.0)[None, :]
    at_edge = i_pair + BLOCK_N > i_first + 1
    if window is not None:
        at_edge = at_edge | (i_pair + window < i_stop)
    if at_edge:
        b_log = only_seen(b_log, i_first + tl.arange(0, b_q.shape[0])[:, None], o_i[None, :], window)
    return b_k, b_log


@triton.jit
def local_moments_kernel(
    p_q, p_k, p_target, p_fade, p_bias, p_mean, p_norm, p_right, p_spans, p_bounds, spans, past, H, scale, window,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """μ, the log-sum, and target − μ of a block of queries."""
    # The longest blocks come first, so that what starts last is short.
    i_span = spans - 1 - tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_begin, i_end, i_first, i_stop, i_low = queries_of_block(p_spans, p_bounds, i_span, past, window)
    if i_begin == i_end:
        return
    o_m = tl.arange(0, BLOCK_T)
    o_k = tl.arange(0, BLOCK_K)
    m_t = i_begin + o_m < i_end
    i_row = tl.cast(i_begin, tl.int64) * H + i_h
    b_q = load_rows(p_q + i_row * K, o_m * H, m_t, o_k, K)
    b_fade = load_fade(p_fade, tl.cast(i_first, tl.int64) * H + i_h + o_m * H, m_t)

    b_zero = tl.zeros([BLOCK_T], tl.float32)
    b_most = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_mean = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i_pair in range(i_low, i_stop, BLOCK_N):
        b_k, b_log = keys_and_log_weights(
            i_pair, b_q, b_zero, b_fade, p_k, p_fade, p_bias, i_first, i_stop, H, i_h, scale, window,
            K, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        b_more = tl.maximum(b_most, tl.max(b_log, axis=1))
        b_origin = tl.where(b_more == float("-inf"), 0.0, b_more)
        b_fall = tl.exp2(b_most - b_origin)
        b_weights = tl.exp2(b_log - b_origin[:, None])
        b_sum = b_sum * b_fall + tl.sum(b_weights, axis=1)
        b_mean = tl.dot(b_weights.to(b_k.dtype), b_k, b_mean * b_fall[:, None], input_precision=PRECISION)
        b_most = b_more
    m_any = b_sum > 0.0
    b_sum = tl.where(m_any, b_sum, 1.0)
    b_mean /= b_sum[:, None]
    store_rows(p_mean + i_row * K, b_mean, o_m * H, m_t, o_k, K)
    tl.store(p_norm + i_row + o_m * H, tl.where(m_any, b_most + tl.log2(b_sum), float("inf")), mask=m_t)
    if p_target is not None:
        b_right = load_rows(p_target + i_row * K, o_m * H, m_t, o_k, K).to(tl.float32) - b_mean
        store_rows(p_right + i_row * K, b_right, o_m * H, m_t, o_k, K)


@triton.jit
def local_solve_kernel(
    p_x, p_q, p_k, p_mean, p_norm, p_ridge, p_fade, p_bias, p_residual, p_spans, p_bounds,
    spans, past, H, scale, window, steps, tolerance,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x ← (C + λI)^{-1} x for a block of queries, and the largest relative residual."""
    i_span = spans - 1 - tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_begin, i_end, i_first, i_stop, i_low = queries_of_block(p_spans, p_bounds, i_span, past, window)
    if i_begin == i_end:
        tl.store(p_residual + i_span * H + i_h, 0.0)
        return
    o_m = tl.arange(0, BLOCK_T)
    o_k = tl.arange(0, BLOCK_K)
    m_t = i_begin + o_m < i_end
    i_row = tl.cast(i_begin, tl.int64) * H + i_h
    p_x += i_row * K
    p_mean += i_row * K
    b_q = load_rows(p_q + i_row * K, o_m * H, m_t, o_k, K)
    b_norm = tl.load(p_norm + i_row + o_m * H, mask=m_t, other=float("inf"))
    b_fade = load_fade(p_fade, tl.cast(i_first, tl.int64) * H + i_h + o_m * H, m_t)
    ridge = tl.load(p_ridge + i_h)

    b_left = load_rows(p_x, o_m * H, m_t, o_k, K)
    b_length = tl.sqrt(tl.sum(b_left * b_left, axis=1))
    b_left /= tl.where(b_length > 0.0, b_length, 1.0)[:, None]
    b_next = b_left
    b_energy = tl.sum(b_left * b_left, axis=1)
    goal = tolerance * tolerance
    tl.debug_barrier()  # between threads that read x and those that write it
    store_rows(p_x, tl.zeros_like(b_left), o_m * H, m_t, o_k, K)
    tl.debug_barrier()
    i_step = 0
    while (tl.max(b_energy, axis=0) > goal) & (i_step < steps):
        # Registers are short. x stays in memory, and the row is read anew, so that no address is kept for later.
        o_row = (tl.load(p_spans + i_span * 4, volatile=True) - i_begin + o_m) * H
        b_size = tl.sum(b_next * b_next, axis=1)
        b_unit = (b_next * tl.rsqrt(tl.where(b_size > 0.0, b_size, 1.0))[:, None]).to(b_q.dtype)
        b_shift = tl.sum(b_unit.to(tl.float32) * load_rows(p_mean, o_row, m_t, o_k, K), axis=1)
        b_image = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for i_pair in range(i_low, i_stop, BLOCK_N):
            b_k, b_log = keys_and_log_weights(
                i_pair, b_q, b_norm, b_fade, p_k, p_fade, p_bias, i_first, i_stop, H, i_h, scale, window,
                K, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            b_contrast = tl.dot(b_unit, tl.trans(b_k), input_precision=PRECISION) - b_shift[:, None]
            b_weights = tl.exp2(b_log) * b_contrast
            b_image = tl.dot(b_weights.to(b_k.dtype), b_k, b_image, input_precision=PRECISION)
        b_direction = b_unit.to(tl.float32)
        b_image += ridge * b_direction
        b_curvature = tl.sum(b_direction * b_image, axis=1)
        # A query that is done stays where it is: its next step might be 0/0.
        m_running = (b_energy > goal) & (b_curvature > 0.0)
        b_per_curvature = tl.where(m_running, 1.0 / tl.where(m_running, b_curvature, 1.0), 0.0)
        b_step = (tl.sum(b_left * b_direction, axis=1) * b_per_curvature)[:, None]
        o_row = (tl.load(p_spans + i_span * 4, volatile=True) - i_begin + o_m) * H
        b_x = load_rows(p_x, o_row, m_t, o_k, K) + (b_step * b_length[:, None]) * b_direction
        store_rows(p_x, b_x, o_row, m_t, o_k, K)
        b_left -= b_step * b_image
        b_next = b_left - (tl.sum(b_left * b_image, axis=1) * b_per_curvature)[:, None] * b_direction
        b_energy = tl.sum(b_left * b_left, axis=1)
        i_step += 1
        tl.debug_barrier()
    tl.store(p_residual + i_span * H + i_h, tl.sqrt(tl.max(b_energy, axis=0)))


@triton.jit
def local_output_kernel(
    p_q, p_k, p_v, p_u, p_mean, p_norm, p_fade, p_bias, p_y, p_spans, p_bounds, spans, past, H, scale, window,
    K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a block of queries."""
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
    b_norm = tl.load(p_norm + i_row + o_m * H, mask=m_t, other=float("inf"))
    b_fade = load_fade(p_fade, tl.cast(i_first, tl.int64) * H + i_h + o_m * H, m_t)
    b_u = load_rows(p_u + i_row * K, o_m * H, m_t, o_k, K)
    b_high = b_u.to(b_q.dtype)
    b_low = (b_u.to(tl.float32) - b_high.to(tl.float32)).to(b_q.dtype)
    b_lift = 1.0 - tl.sum(b_u.to(tl.float32) * load_rows(p_mean + i_row * K, o_m * H, m_t, o_k, K), axis=1)
    b_y = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for i_pair in range(i_low, i_stop, BLOCK_N):
        b_k, b_log = keys_and_log_weights(
            i_pair, b_q, b_norm, b_fade, p_k, p_fade, p_bias, i_first, i_stop, H, i_h, scale, window,
            K, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        b_contrast = tl.dot(b_high, tl.trans(b_k), input_precision=PRECISION)
        if b_u.dtype != b_q.dtype:
            b_contrast = tl.dot(b_low, tl.trans(b_k), b_contrast)
        b_weights = tl.exp2(b_log) * (b_contrast + b_lift[:, None])
        i_key = tl.cast(i_pair, tl.int64) * H + i_h
        b_v = load_rows(p_v + i_key * V, o_n * H, i_pair + o_n < i_stop, o_v, V)
        b_y = tl.dot(b_weights.to(b_v.dtype), b_v, b_y, input_precision=PRECISION)
    store_rows(p_y + i_row * V, b_y, o_m * H, m_t, o_v, V)
