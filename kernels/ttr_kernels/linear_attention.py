"""Decayed linear attention, forward, for all chunks of a sequence in parallel.

Equation, per batch element and head, with a scalar log-decay g_t ≤ 0::

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        S is (K, V)
    y_t = S_tᵀ q_t

Algorithm, with chunks of C tokens, c_i = g_1 + … + g_i counted from the chunk's own start, and S the
state that enters the chunk::

    chunk_state    U = Σ_j exp(c_C - c_j) k_j v_jᵀ            every chunk at once
    state_scan     S ← exp(c_C) S + U, keeping each S         chunk after chunk, elementwise
    chunk_output   Y = exp(c) ∘ (Q S) + (Q Kᵀ ∘ D) V          every chunk at once
                   D_ij = exp(c_i - c_j) where i ≥ j, else 0

The matrix products run on batch · heads · T/C independent programs, so few heads and a long sequence still
fill a GPU. Only the scan is serial, and it costs two operations an element.

Cost per token and head: 2C(K + V) + 4KV FLOPs in products, counting the masked half of Q Kᵀ ∘ D. Bytes, with
e an element's: 3e(K + V), since q and y move once, k and v twice; and 16KV/C for the float32 states, which
are written, scanned in place and read. Blocks of a chunk that need the same keys share them in the cache.
At C = K = V = 64 in bfloat16 that is 33 kFLOP for 1.8 kB: bound by memory on every recent GPU.

Digits: the differences of one float32 cumulative sum lose the small decays that follow a large one. Each
log-decay is therefore split into a multiple of 2⁻¹⁰, whose sums are exact, and a remainder below 2⁻¹⁰, whose
sums are small. c_i - c_j is then right to about 1e-7, and no exponent exceeds zero by more than that.

Names: p_ pointer, b_ block of values, o_ offsets, m_ mask, i_ index.
"""
# Triton reads the annotations of a kernel's arguments, so they are left out:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

# Block of keys, block of values, and precision of a product that has a float32 operand. IEEE products use no
# tensor core and hold their operands in registers; these are the largest blocks that do not spill.
PRODUCTS = {
    torch.float32: (16, 32, "ieee"),
    torch.float16: (64, 64, "tf32"),
    torch.bfloat16: (64, 64, "tf32"),
}
CHUNK_SIZES = (16, 32, 64)
MAX_HEAD_SIZE = 256
OPTIONS = {"num_warps": 8, "num_stages": 2}
SCAN = {"BLOCK": 256, "STAGES": 8}


@triton.jit
def first_token(i_chunk, T, H, N, CHUNK: tl.constexpr):
    """Time of a chunk's first token, and its row in (batch, time, heads); chunks count over all heads."""
    i_head = i_chunk // N
    i_t = i_chunk % N * CHUNK
    return i_t, (i_head // H * T + i_t) * H + i_head % H


@triton.jit
def split_log_decay(p_log_decay, o_row, m_row, CHUNK: tl.constexpr):
    """A chunk's log-decays as multiples of 2⁻¹⁰ plus remainders, zero past the end of the sequence."""
    if p_log_decay is None:
        b_coarse = tl.zeros([CHUNK], tl.float32)
        b_fine = tl.zeros([CHUNK], tl.float32)
    else:
        b_log_decay = tl.load(p_log_decay + o_row, mask=m_row, other=0.0)
        # exp(-128) is zero in float32. The bound makes -inf a plain reset and keeps the sum of 64 multiples
        # of 2⁻¹⁰ within 24 bits. A comparison, unlike a maximum, lets NaN through.
        b_log_decay = tl.where(b_log_decay < -128.0, -128.0, b_log_decay)
        b_coarse = tl.ceil(b_log_decay * 1024.0) * 0.0009765625
        b_fine = b_log_decay - b_coarse
    return b_coarse, b_fine


@triton.jit
def chunk_state_fwd_kernel(
    p_k, p_v, p_log_decay, p_states, p_chunk_decay, T, H, N,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U = Σ_j exp(c_C - c_j) k_j v_jᵀ and exp(c_C) of one chunk."""
    # Blocks of one chunk are neighbours, so that they find each other's keys and values in the cache.
    BLOCKS_V: tl.constexpr = tl.cdiv(V, BLOCK_V)
    BLOCKS: tl.constexpr = tl.cdiv(K, BLOCK_K) * BLOCKS_V
    i_block = tl.program_id(0) % BLOCKS
    i_chunk = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_t, i_row = first_token(i_chunk, T, H, N, CHUNK)
    o_t = tl.arange(0, CHUNK)
    o_k = i_block // BLOCKS_V * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = i_block % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t = i_t + o_t < T
    m_k = o_k < K
    m_v = o_v < V

    b_coarse, b_fine = split_log_decay(p_log_decay, i_row + o_t * H, m_t, CHUNK)
    b_coarse_sum = tl.sum(b_coarse, axis=0)
    b_fine_sum = tl.sum(b_fine, axis=0)
    b_decay = tl.exp((b_coarse_sum - tl.cumsum(b_coarse, axis=0)) + (b_fine_sum - tl.cumsum(b_fine, axis=0)))
    # Every block of the chunk writes the same number.
    tl.store(p_chunk_decay + i_chunk, tl.exp(b_coarse_sum + b_fine_sum))

    p_k_block = p_k + i_row * K + o_k[:, None] + o_t[None, :] * (H * K)
    p_v_block = p_v + i_row * V + o_t[:, None] * (H * V) + o_v[None, :]
    b_k = tl.load(p_k_block, mask=m_k[:, None] & m_t[None, :], other=0.0)
    b_v = tl.load(p_v_block, mask=m_t[:, None] & m_v[None, :], other=0.0)
    b_update = tl.dot((b_k * b_decay[None, :]).to(b_k.dtype), b_v, input_precision=PRECISION)

    p_update = p_states + i_chunk * (K * V) + o_k[:, None] * V + o_v[None, :]
    tl.store(p_update, b_update, mask=m_k[:, None] & m_v[None, :])


@triton.jit
def state_scan_fwd_kernel(
    p_states, p_chunk_decay, p_initial_state, p_final_state, N,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S ← exp(c_C) S + U over the chunks of one head, writing the S that enters each chunk over its U."""
    i_head = tl.program_id(0).to(tl.int64)
    o_state = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_state = o_state < SIZE
    if p_initial_state is None:
        b_state = tl.zeros([BLOCK], tl.float32)
    else:
        b_state = tl.load(p_initial_state + i_head * SIZE + o_state, mask=m_state, other=0.0)
    p_chunk_decay += i_head * N
    p_states += i_head * N * SIZE + o_state
    # The stages load later chunks ahead of the recurrence; a place is never read again once written.
    for _ in tl.range(0, N, num_stages=STAGES):
        b_decay = tl.load(p_chunk_decay)
        b_update = tl.load(p_states, mask=m_state, other=0.0)
        tl.store(p_states, b_state, mask=m_state)
        b_state = b_decay * b_state + b_update
        p_chunk_decay += 1
        p_states += SIZE
    tl.store(p_final_state + i_head * SIZE + o_state, b_state, mask=m_state)


@triton.jit
def chunk_output_fwd_kernel(
    p_q, p_k, p_v, p_log_decay, p_states, p_y, T, H, N,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = exp(c) ∘ (Q S) + (Q Kᵀ ∘ D) V of one chunk."""
    BLOCKS: tl.constexpr = tl.cdiv(V, BLOCK_V)
    i_chunk = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_t, i_row = first_token(i_chunk, T, H, N, CHUNK)
    o_t = tl.arange(0, CHUNK)
    o_v = tl.program_id(0) % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t = i_t + o_t < T
    m_v = o_v < V
    p_states += i_chunk * (K * V)

    b_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_y = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        p_q_block = p_q + i_row * K + o_t[:, None] * (H * K) + o_k[None, :]
        p_k_block = p_k + i_row * K + o_k[:, None] + o_t[None, :] * (H * K)
        p_state_block = p_states + o_k[:, None] * V + o_v[None, :]
        b_q = tl.load(p_q_block, mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_k = tl.load(p_k_block, mask=m_k[:, None] & m_t[None, :], other=0.0)
        b_state = tl.load(p_state_block, mask=m_k[:, None] & m_v[None, :], other=0.0)
        b_scores = tl.dot(b_q, b_k, b_scores, input_precision=PRECISION)
        # In float32 (tensor cores: TF32), because a long undecayed sum outgrows float16.
        b_y = tl.dot(b_q.to(tl.float32), b_state, b_y, input_precision=PRECISION)

    b_coarse, b_fine = split_log_decay(p_log_decay, i_row + o_t * H, m_t, CHUNK)
    b_coarse = tl.cumsum(b_coarse, axis=0)
    b_fine = tl.cumsum(b_fine, axis=0)
    b_exponent = (b_coarse[:, None] - b_coarse[None, :]) + (b_fine[:, None] - b_fine[None, :])
    b_scores *= tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_exponent, float("-inf")))

    p_v_block = p_v + i_row * V + o_t[:, None] * (H * V) + o_v[None, :]
    m_v_block = m_t[:, None] & m_v[None, :]
    b_v = tl.load(p_v_block, mask=m_v_block, other=0.0)
    b_y *= tl.exp(b_coarse + b_fine)[:, None]
    b_y = tl.dot(b_scores.to(b_v.dtype), b_v, b_y, input_precision=PRECISION)
    p_y_block = p_y + i_row * V + o_t[:, None] * (H * V) + o_v[None, :]
    tl.store(p_y_block, b_y.to(p_y.dtype.element_ty), mask=m_v_block)


def sizes(key_size: int, value_size: int, dtype: torch.dtype, chunk_size: int) -> dict:
    """Compile-time arguments of the two chunk kernels."""
    block_k, block_v, precision = PRODUCTS[dtype]
    return {
        "K": key_size,
        "V": value_size,
        "CHUNK": chunk_size,
        "BLOCK_K": min(block_k, max(16, triton.next_power_of_2(key_size))),
        "BLOCK_V": min(block_v, max(16, triton.next_power_of_2(value_size))),
        "PRECISION": precision,
    }


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, chunk_size: int
) -> None:
    for name, tensor in {"q": q, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected (batch, time, heads, size), got shape {tuple(tensor.shape)}")
    batch, time, heads, key_size = q.shape
    value_size = v.shape[-1]
    if q.dtype not in PRODUCTS:
        raise ValueError(f"q: expected dtype torch.float32, float16 or bfloat16, got {q.dtype}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "q": (q, (batch, time, heads, key_size), q.dtype),
        "k": (k, (batch, time, heads, key_size), q.dtype),
        "v": (v, (batch, time, heads, value_size), q.dtype),
        "log_decay": (log_decay, (batch, time, heads), torch.float32),
        "initial_state": (initial_state, (batch, heads, key_size, value_size), torch.float32),
    }
    for name, (given, shape, dtype) in expected.items():
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
        if given.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype}, got {given.dtype}")
        if given.device != q.device:
            raise ValueError(f"{name}: expected device {q.device}, that of q, got {given.device}")
        if given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradient, got requires_grad; there is no backward here")
    for name, size in {"q": key_size, "v": value_size}.items():
        if not 1 <= size <= MAX_HEAD_SIZE:
            raise ValueError(f"{name}: expected a head size from 1 to {MAX_HEAD_SIZE}, got {size}")
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size: expected one of {CHUNK_SIZES}, got {chunk_size}")
    interpreted = not isinstance(chunk_state_fwd_kernel, triton.JITFunction)
    if q.device.type == "cpu" and not interpreted:
        raise ValueError(
            "q: expected a GPU tensor, got one on the CPU; set TRITON_INTERPRET=1 before triton is imported, "
            'or use backend="torch"'
        )
    if q.dtype == torch.bfloat16 and interpreted:
        raise ValueError("q: expected no bfloat16 under Triton's interpreter, which computes it wrongly")


def linear_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention over a whole sequence, and its last state.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ,  y_t = S_tᵀ q_t.

    q, k are (batch, time, heads, key), v is (batch, time, heads, value), all of one dtype; log_decay ≤ 0 is
    (batch, time, heads) in float32, None for no decay; initial_state is (batch, heads, key, value) in
    float32, None for zeros. y has the shape and dtype of v, the last state those of initial_state.

    Raises ValueError where a shape, dtype, device, head size or chunk size is not supported, for tensors on
    the CPU without Triton's interpreter, and where a gradient would be needed: there is no backward.

    Source: Yang et al. 2024 (arXiv 2312.06635) for the chunkwise form; Dao and Gu 2024 (arXiv 2405.21060)
    for a decay per head and the scan of chunk states.
    """
    _check(q, k, v, log_decay, initial_state, chunk_size)
    batch, time, heads, key_size = q.shape
    value_size = v.shape[-1]
    y = v.new_empty(v.shape)
    final_state = q.new_empty((batch, heads, key_size, value_size), dtype=torch.float32)
    if y.numel() == 0:
        return y, final_state.zero_() if initial_state is None else final_state.copy_(initial_state)

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    log_decay = None if log_decay is None else log_decay.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    chunks = triton.cdiv(time, chunk_size)
    states = q.new_empty((batch, heads, chunks, key_size, value_size), dtype=torch.float32)
    chunk_decay = q.new_empty((batch, heads, chunks), dtype=torch.float32)
    product = sizes(key_size, value_size, q.dtype, chunk_size)
    blocks_k = triton.cdiv(key_size, product["BLOCK_K"])
    blocks_v = triton.cdiv(value_size, product["BLOCK_V"])
    all_chunks = batch * heads * chunks
    state_size = key_size * value_size
    with torch.cuda.device_of(q):
        chunk_state_fwd_kernel[(all_chunks * blocks_k * blocks_v,)](
            k, v, log_decay, states, chunk_decay, time, heads, chunks, **product, **OPTIONS
        )
        state_scan_fwd_kernel[(batch * heads, triton.cdiv(state_size, SCAN["BLOCK"]))](
            states, chunk_decay, initial_state, final_state, chunks, SIZE=state_size, **SCAN
        )
        chunk_output_fwd_kernel[(all_chunks * blocks_v,)](
            q, k, v, log_decay, states, y, time, heads, chunks, **product, **OPTIONS
        )
    return y, final_state
