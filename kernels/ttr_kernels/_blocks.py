"""What the chunk kernels are made of: a chunk's rows, its decay, products of unlike dtypes.

Within a chunk, c_t is the sum of the log-decays up to and including token t. A pair written at j is seen at t through
exp(c_t − c_j). Differences of one float32 sum lose the small decays that follow a large one, so each log-decay is split
into a multiple of 2⁻¹⁰, whose sums are exact, and a remainder below 2⁻¹⁰, whose sums are small. c_t − c_j is then right
to about 1e-7, and no exponent exceeds zero by more than that.

A decay per head is a tile with one column, so that one line of code serves it and a decay per channel.

Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index.
"""
# Triton reads the annotations of a kernel's arguments, so they are left out:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

NO_DECAY, PER_HEAD, PER_CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(p_x, o_row, m_row, o_d, SIZE: tl.constexpr):
    """Rows of (rows, heads, SIZE) at flat places o_row, as a tile (rows, channels) that is zero outside."""
    return tl.load(p_x + o_row[:, None] * SIZE + o_d[None, :], mask=m_row[:, None] & (o_d[None, :] < SIZE), other=0.0)


@triton.jit
def store_rows(p_x, b_x, o_row, m_row, o_d, SIZE: tl.constexpr):
    """The inverse of `load_rows`."""
    p_rows = p_x + o_row[:, None] * SIZE + o_d[None, :]
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d[None, :] < SIZE))


@triton.jit
def load_log_decay(p_log_decay, o_row, m_row, o_k, K: tl.constexpr, DECAY: tl.constexpr):
    """Log-decays of rows, split in two: tiles (rows, channels), or (rows, 1) for one a head."""
    if DECAY == PER_CHANNEL:
        b_log_decay = load_rows(p_log_decay, o_row, m_row, o_k, K)
    else:
        b_log_decay = tl.load(p_log_decay + o_row, mask=m_row, other=0.0)
    # exp(-128) is zero in float32. The bound makes -inf a plain reset and keeps the sum of 128 multiples of 2⁻¹⁰
    # within 24 bits. A comparison, unlike a maximum, lets NaN through.
    b_log_decay = tl.where(b_log_decay < -128.0, -128.0, b_log_decay)
    b_coarse = tl.ceil(b_log_decay * 1024.0) * 0.0009765625
    return b_coarse, b_log_decay - b_coarse


@triton.jit
def decay_of_chunk(b_coarse, b_fine):
    """exp(c_t), exp(c_end − c_t) for every token, and exp(c_end)."""
    b_coarse_sum = tl.cumsum(b_coarse, axis=0)
    b_fine_sum = tl.cumsum(b_fine, axis=0)
    b_coarse_all = tl.sum(b_coarse, axis=0, keep_dims=True)
    b_fine_all = tl.sum(b_fine, axis=0, keep_dims=True)
    b_since = tl.exp(b_coarse_sum + b_fine_sum)
    b_until = tl.exp((b_coarse_all - b_coarse_sum) + (b_fine_all - b_fine_sum))
    b_all = tl.exp(b_coarse_all + b_fine_all)
    if len(b_coarse.shape) == 1:
        return b_since[:, None], b_until[:, None], b_all[:, None]
    else:
        return b_since, b_until, b_all


@triton.jit
def decay_matrix(b_coarse, b_fine, TRANSPOSED: tl.constexpr):
    """exp(c_t − c_j) for j ≤ t, else 0, of a decay per head; transposed, its rows are j."""
    b_coarse_sum = tl.cumsum(b_coarse, axis=0)
    b_fine_sum = tl.cumsum(b_fine, axis=0)
    o_t = tl.arange(0, b_coarse.shape[0])
    b_exponent = (b_coarse_sum[:, None] - b_coarse_sum[None, :]) + (b_fine_sum[:, None] - b_fine_sum[None, :])
    m_past = o_t[:, None] >= o_t[None, :]
    if TRANSPOSED:
        b_exponent = -b_exponent
        m_past = o_t[:, None] <= o_t[None, :]
    return tl.exp(tl.where(m_past, b_exponent, float("-inf")))


@triton.jit
def product(b_a, b_b, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_a b_b.

    Of a bfloat16 and a float32 operand, the second is cut into two bfloat16 parts, which hold 16 of its bits: more than
    TF32 would, at the same cost, and the first operand stays as it was loaded. (float16 has too small a range.)
    """
    if b_a.dtype == tl.bfloat16 and b_b.dtype == tl.float32:
        b_high = b_b.to(tl.bfloat16)
        b_sum = tl.dot(b_a, b_high, b_sum)
        return tl.dot(b_a, (b_b - b_high.to(tl.float32)).to(tl.bfloat16), b_sum)
    elif b_b.dtype == tl.bfloat16 and b_a.dtype == tl.float32:
        b_high = b_a.to(tl.bfloat16)
        b_sum = tl.dot(b_high, b_b, b_sum)
        return tl.dot((b_a - b_high.to(tl.float32)).to(tl.bfloat16), b_b, b_sum)
    else:
        if b_a.dtype != b_b.dtype:
            b_a = b_a.to(tl.float32)
            b_b = b_b.to(tl.float32)
        return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


@triton.jit
def write(b_state, b_keys, b_values, b_decay, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """The state after the decayed products of keys and values."""
    if DECAY == PER_CHANNEL:
        b_keys = b_keys * b_decay
    elif DECAY != NO_DECAY:
        b_values = b_values * b_decay
    return product(tl.trans(b_keys), b_values, b_state, PRECISION)
