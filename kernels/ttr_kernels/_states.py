"""States between chunks: decayed sums of key–value products, forwards in time or back.

    S ← exp(c_end) S + Σ_j exp(c_end − c_j) k_j v_jᵀ           the state that enters each chunk
    R ← exp(c_end) R + Σ_t exp(c_t) q_t ∂y_tᵀ                  back in time: the gradient of the state that leaves it

A program carries one block of one head's state along a span of chunks and keeps it in registers. A span is a whole
sequence where there are programs enough to fill the GPU; else sequences are cut into segments, a first pass finds what
each segment adds to a state, a scan over segments finds the states between them, and a second pass starts from those.

Cost per token and head: 2KV FLOPs, twice that with segments. Bytes, with e an element's: e(K + V), and 4KV/C for the
float32 states.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import NO_DECAY, PER_CHANNEL, decay_of_chunk, load_log_decay, load_rows, write
from ttr_kernels._launch import block, decay_kind, precision
from ttr_kernels._packing import Packing, Spans

ENOUGH_PROGRAMS = 512  # to fill a GPU
FEWEST_SEGMENTS = 4  # of a sequence: two passes over half of it are no faster than one over all
SHORTEST_SEGMENT = 8  # chunks


@triton.jit
def state_kernel(
    p_keys, p_values, p_log_decay, p_initial, p_states, p_final, p_factor, p_spans, H,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry a block of a state over the chunks of a span; write it where each chunk takes it up, and at the end."""
    i_span = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    BLOCKS_V: tl.constexpr = tl.cdiv(V, BLOCK_V)
    o_k = tl.program_id(1) // BLOCKS_V * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = tl.program_id(1) % BLOCKS_V * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tl.arange(0, CHUNK)
    m_state = (o_k[:, None] < K) & (o_v[None, :] < V)
    o_state = o_k[:, None] * V + o_v[None, :]
    i_first = tl.load(p_spans + i_span * 4)
    i_stop = tl.load(p_spans + i_span * 4 + 1)
    i_chunk = tl.load(p_spans + i_span * 4 + 2).to(tl.int64)
    i_state = tl.program_id(0).to(tl.int64) * (K * V)

    if p_initial is None:
        b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    else:
        b_state = tl.load(p_initial + i_state + o_state, mask=m_state, other=0.0)
    FACTORS: tl.constexpr = BLOCK_K if DECAY == PER_CHANNEL else 1
    b_factor = tl.full([FACTORS, 1], 1.0, tl.float32)
    chunks = tl.cdiv(i_stop - i_first, CHUNK)
    for step in range(0, chunks):
        i_step = chunks - 1 - step if BACKWARDS else step
        o_time = i_first + i_step * CHUNK + o_t
        m_t = o_time < i_stop
        o_row = o_time.to(tl.int64) * H + i_h
        b_k = load_rows(p_keys, o_row, m_t, o_k, K)
        b_v = load_rows(p_values, o_row, m_t, o_v, V)
        if p_states is not None:
            p_chunk = p_states + ((i_chunk + i_step) * H + i_h) * (K * V)
            tl.store(p_chunk + o_state, b_state, mask=m_state)
        b_decay = 1.0
        if DECAY != NO_DECAY:
            b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, DECAY)
            b_since, b_until, b_all = decay_of_chunk(b_coarse, b_fine)
            b_left = tl.trans(b_all)
            b_state *= b_left
            b_factor *= b_left
            b_decay = b_since if BACKWARDS else b_until
        b_state = write(b_state, b_k, b_v, b_decay, DECAY, PRECISION)
    tl.store(p_final + i_state + o_state, b_state, mask=m_state)
    if p_factor is not None:
        # The blocks of values write the same numbers.
        if DECAY == PER_CHANNEL:
            p_factors = p_factor + tl.program_id(0).to(tl.int64) * K + o_k[:, None]
            tl.store(p_factors, b_factor, mask=o_k[:, None] < K)
        else:
            tl.store(p_factor + tl.program_id(0) + tl.arange(0, 1)[:, None], b_factor)


@triton.jit
def segment_scan_kernel(
    p_totals, p_factor, p_initial, p_starts, p_final, p_offsets, H,
    FACTORS: tl.constexpr, SIZE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """S ← factor · S + total over the segments of a sequence; keeps the S that each segment starts from."""
    i_sequence = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    o_state = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_state = o_state < SIZE
    if p_initial is None:
        b_state = tl.zeros([BLOCK], tl.float32)
    else:
        b_state = tl.load(p_initial + tl.program_id(0).to(tl.int64) * SIZE + o_state, mask=m_state, other=0.0)
    i_first = tl.load(p_offsets + i_sequence)
    segments = tl.load(p_offsets + i_sequence + 1) - i_first
    for step in range(0, segments):
        i_segment = i_first + (segments - 1 - step if BACKWARDS else step)
        i_head = (i_segment.to(tl.int64) * H + i_h) * SIZE
        tl.store(p_starts + i_head + o_state, b_state, mask=m_state)
        b_total = tl.load(p_totals + i_head + o_state, mask=m_state, other=0.0)
        if p_factor is not None:
            # One factor a head, or one a row of the state.
            o_factor = (i_segment * H + i_h) * FACTORS + (o_state // V if FACTORS > 1 else o_state * 0)
            b_state *= tl.load(p_factor + o_factor, mask=m_state, other=0.0)
        b_state += b_total
    tl.store(p_final + tl.program_id(0).to(tl.int64) * SIZE + o_state, b_state, mask=m_state)


def segments(packing: Packing, programs: int) -> Spans:
    """Spans long enough to be worth a program each, and enough of them, at so many programs a sequence."""
    chunks = triton.cdiv(packing.rows, packing.chunk)
    too_few = FEWEST_SEGMENTS * packing.sequences
    if too_few * programs > ENOUGH_PROGRAMS or chunks < too_few * SHORTEST_SEGMENT:
        return packing.whole
    return packing.cut(packing.chunk, max(SHORTEST_SEGMENT, triton.cdiv(chunks * programs, ENOUGH_PROGRAMS)))


def chunk_states(
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    packing: Packing,
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """The state of every chunk, (chunks, heads, key, value), and the last, (sequences, heads, key, value).

    Forwards, a chunk's state is the one that enters it; backwards, the one that comes to its end from later ones.
    """
    heads, key, value = keys.shape[-2], keys.shape[-1], values.shape[-1]
    decay = decay_kind(log_decay)
    block_k, block_v = block(key, 64), block(value, 32 if keys.dtype == torch.float32 else 64)
    blocks = triton.cdiv(key, block_k) * triton.cdiv(value, block_v)
    sizes = {
        "K": key, "V": value, "CHUNK": packing.chunk, "BLOCK_K": block_k, "BLOCK_V": block_v, "DECAY": decay,
        "BACKWARDS": backwards, "PRECISION": precision(keys.dtype, keys.device), "num_warps": 8, "num_stages": 2,
    }  # fmt: skip

    def new(count: int, *shape: int) -> Tensor:
        return keys.new_empty((count, heads, *shape), dtype=torch.float32)

    def carry(spans: Spans, *tensors: Tensor | None) -> None:
        state_kernel[(spans.number * heads, blocks)](
            keys, values, log_decay, *tensors, spans.table, heads, **sizes
        )  # fmt: skip

    states = new(packing.chunks.number, key, value)
    final = new(packing.sequences, key, value)
    spans = segments(packing, heads * blocks)
    if spans.number == packing.sequences:
        carry(spans, initial, states, final, None)
        return states, final

    totals, starts = new(spans.number, key, value), new(spans.number, key, value)
    factors = {0: 0, 1: 1, 2: key}[decay]
    factor = new(spans.number, factors) if factors else None
    carry(spans, None, None, totals, factor)
    segment_scan_kernel[(packing.sequences * heads, triton.cdiv(key * value, 1024))](
        totals, factor, initial, starts, final, spans.offsets, heads,
        FACTORS=factors, SIZE=key * value, V=value, BLOCK=1024, BACKWARDS=backwards,
    )  # fmt: skip
    carry(spans, starts, states, totals, None)
    return states, final
