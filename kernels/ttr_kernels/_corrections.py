"""Error-correcting states between chunks, and the errors: forwards in time, and back.

    U = T (V − exp(c) ∘ (K S)),        S ← exp(c_end) S + (exp(c_end − c) ∘ G)ᵀ U
    Z = −Tᵀ (E + exp(c_end − c) ∘ (G R)),   R ← exp(c_end) R + (exp(c) ∘ K)ᵀ Z + (exp(c) ∘ Q)ᵀ ∂Y

T = (I + A)⁻¹ with the scores A of keys against gains. Backwards, E = Pᵀ ∂Y is what the chunk itself reads of an error,
P the scores of queries against gains, and −Z is the gradient of the values. Both are one kernel, in which keys and
gains change places.

Unlike a sum, a state is multiplied by a matrix from chunk to chunk. So what a segment of chunks does to a state has two
parts, where a zero state ends, and where an identity ends that no value is written to. Where programs are few, a first
pass finds both for all segments at once, products of small matrices lead from segment to segment, and a second pass
starts from the states between them.

Cost per token and head: 4KV + 2CV FLOPs, backwards 6KV + 2CV.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttr_kernels._blocks import (
    PER_CHANNEL,
    PER_HEAD,
    decay_of_chunk,
    load_log_decay,
    load_rows,
    product,
    store_rows,
)  # fmt: skip
from ttr_kernels._launch import MAX_HEAD_SIZE, architecture, block, decay_kind, precision
from ttr_kernels._packing import Packing, Spans
from ttr_kernels._states import segments

# Numbers of a state that a program carries.
STATE_TILES = {torch.float32: 1024, torch.float16: 4096, torch.bfloat16: 4096}


@triton.jit
def decayed_kernel(
    p_rows, p_log_decay, p_since, p_until, p_left, p_chunks, H,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows times exp(c_t), or exp(c_end − c_t), and exp(c_end), with a decay per channel."""
    i_chunk = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_first = tl.load(p_chunks + i_chunk * 4)
    i_stop = tl.load(p_chunks + i_chunk * 4 + 1)
    if i_first == i_stop:
        return
    o_t = tl.arange(0, CHUNK)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t = i_first + o_t < i_stop
    o_row = (i_first + o_t).to(tl.int64) * H + i_h
    b_rows = load_rows(p_rows, o_row, m_t, o_k, K)
    b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, PER_CHANNEL)
    b_since, b_until, b_all = decay_of_chunk(b_coarse, b_fine)
    if p_since is not None:
        store_rows(p_since, b_rows * b_since, o_row, m_t, o_k, K)
    if p_until is not None:
        store_rows(p_until, b_rows * b_until, o_row, m_t, o_k, K)
    o_left = (i_chunk * H + i_h) * K + o_k[None, :]
    tl.store(p_left + o_left, b_all, mask=o_k[None, :] < K)


@triton.jit
def correction_kernel(
    p_reads, p_writes, p_values, p_inverse, p_q, p_to_y, p_log_decay, p_left, p_reach,
    p_initial, p_states, p_errors, p_final, p_spans, H,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry some columns of a state over the chunks of a span; write it where each chunk takes it up, and the errors.

    With a decay per channel, what is read, written and asked comes with its decay, and p_left is that of each chunk.
    With p_reach, a number a chunk, so much of the state's second half (its momentum) goes into the first; backwards the
    other way.
    """
    i_span = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = tl.arange(0, CHUNK)
    m_state = (o_k[:, None] < K) & (o_v[None, :] < V)
    o_state = o_k[:, None] * V + o_v[None, :]
    i_first = tl.load(p_spans + i_span * 4)
    i_stop = tl.load(p_spans + i_span * 4 + 1)
    i_chunk = tl.load(p_spans + i_span * 4 + 2).to(tl.int64)
    i_state = tl.program_id(0).to(tl.int64) * (K * V)

    b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if p_initial is not None:
        b_state = tl.load(p_initial + i_state + o_state, mask=m_state, other=0.0)
    b_none = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    chunks = tl.cdiv(i_stop - i_first, CHUNK)
    for step in range(0, chunks):
        i_step = chunks - 1 - step if BACKWARDS else step
        o_time = i_first + i_step * CHUNK + o_t
        m_t = o_time < i_stop
        o_row = o_time.to(tl.int64) * H + i_h
        if p_states is not None:
            p_chunk = p_states + ((i_chunk + i_step) * H + i_h) * (K * V)
            tl.store(p_chunk + o_state, b_state, mask=m_state)
        b_of_read, b_of_write, b_left = 1.0, 1.0, 1.0
        if DECAY == PER_HEAD:
            b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, DECAY)
            b_since, b_until, b_left = decay_of_chunk(b_coarse, b_fine)
            b_of_read, b_of_write = (b_until, b_since) if BACKWARDS else (b_since, b_until)
        elif DECAY == PER_CHANNEL:
            o_left = ((i_chunk + i_step) * H + i_h) * K + o_k[:, None]
            b_left = tl.load(p_left + o_left, mask=o_k[:, None] < K, other=0.0)
        b_read = product(load_rows(p_reads, o_row, m_t, o_k, K), b_state, b_none, PRECISION) * b_of_read
        b_inverse = load_rows(p_inverse, o_row, m_t, o_t, CHUNK)
        if p_values is not None:
            b_values = load_rows(p_values, o_row, m_t, o_v, V)
            b_read += -b_values if not BACKWARDS else b_values
        b_read = -b_read
        if BACKWARDS:
            b_inverse = tl.trans(b_inverse)
        b_error = product(b_inverse, b_read, b_none, PRECISION)
        if p_errors is not None:
            store_rows(p_errors, b_error, o_row, m_t, o_v, V)
        b_writes = load_rows(p_writes, o_row, m_t, o_k, K)
        b_kept = b_state * b_left
        if p_reach is not None:
            o_half = tl.arange(0, 2)[:, None, None]
            b_halves = tl.reshape(b_state, [2, BLOCK_K // 2, BLOCK_V])
            b_from = tl.sum(tl.where(o_half == (0 if BACKWARDS else 1), b_halves, 0.0), axis=0, keep_dims=True)
            b_into = tl.where(o_half == (1 if BACKWARDS else 0), b_from, 0.0)
            b_reach = tl.load(p_reach + (i_chunk + i_step) * H + i_h)
            b_kept += b_reach * tl.reshape(b_into, [BLOCK_K, BLOCK_V])
        b_state = product(tl.trans(b_writes), b_error * b_of_write, b_kept, PRECISION)
        if p_to_y is not None:
            b_to_y = load_rows(p_to_y, o_row, m_t, o_v, V)
            if DECAY == PER_HEAD:
                b_to_y = b_to_y * b_of_write
            b_state = product(tl.trans(load_rows(p_q, o_row, m_t, o_k, K)), b_to_y, b_state, PRECISION)
    tl.store(p_final + i_state + o_state, b_state, mask=m_state)


@triton.jit
def transition_scan_kernel(
    p_transitions, p_totals, p_initial, p_starts, p_final, p_offsets, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← transition · S + total over the segments of a sequence; keeps the S that each segment starts from."""
    i_sequence = tl.program_id(0) // H
    o_k = tl.arange(0, BLOCK_K)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    o_state = o_k[:, None] * V + o_v[None, :]
    m_state = (o_k[:, None] < K) & (o_v[None, :] < V)
    b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    i_state = tl.program_id(0).to(tl.int64) * (K * V)
    if p_initial is not None:
        b_state = tl.load(p_initial + i_state + o_state, mask=m_state, other=0.0)
    i_first = tl.load(p_offsets + i_sequence)
    segments = tl.load(p_offsets + i_sequence + 1) - i_first
    for step in range(0, segments):
        i_segment = i_first + (segments - 1 - step if BACKWARDS else step)
        i_head = i_segment.to(tl.int64) * H + tl.program_id(0) % H
        tl.store(p_starts + i_head * (K * V) + o_state, b_state, mask=m_state)
        b_transition = load_rows(p_transitions + i_head * (K * K), o_k, o_k < K, o_k, K)
        b_total = tl.load(p_totals + i_head * (K * V) + o_state, mask=m_state, other=0.0)
        b_state = product(b_transition, b_state, b_total, PRECISION)
    tl.store(p_final + i_state + o_state, b_state, mask=m_state)


def _decayed(
    k: Tensor, q: Tensor | None, gain: Tensor, log_decay: Tensor | None, packing: Packing
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Keys and queries since their chunk began, gains until it ends, and the decay of each chunk; in float32."""
    heads, key = k.shape[-2:]
    chunks = packing.chunks
    left = k.new_empty((chunks.number, heads, key), dtype=torch.float32)

    def scaled(rows: Tensor, until: bool) -> Tensor:
        found = rows.new_empty(rows.shape, dtype=torch.float32)
        block_k = block(key, 64)
        decayed_kernel[(chunks.number * heads, triton.cdiv(key, block_k))](
            rows, log_decay, None if until else found, found if until else None, left, chunks.table, heads,
            K=key, CHUNK=packing.chunk, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
        return found

    return scaled(k, False), None if q is None else scaled(q, False), scaled(gain, True), left


def corrected_states(
    k: Tensor,
    gain: Tensor,
    values: Tensor,
    inverse: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    packing: Packing,
    *,
    queries: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The state of every chunk, the errors, (batch, time, heads, value), as the values, and the last state.

    With `queries`, q and ∂y, back in time: `values` are E, `initial` is the gradient of the final state, and the errors
    are Z. A chunk's state is then the one that comes to its end from later ones.
    """
    left = None
    if decay_kind(log_decay) == 2:
        # All programs of a head would scale the same keys, one chunk after the other.
        q, to_y = queries or (None, None)
        k, q, gain, left = _decayed(k, q, gain, log_decay, packing)
        queries = None if q is None or to_y is None else (q, to_y)
    return carried(k, gain, values, inverse, log_decay if left is None else None, left, None, initial, packing, queries)


def carried(
    k: Tensor,
    gain: Tensor,
    values: Tensor,
    inverse: Tensor,
    log_decay: Tensor | None,
    left: Tensor | None,
    reach: Tensor | None,
    initial: Tensor | None,
    packing: Packing,
    queries: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `corrected_states` returns, for one decay a head, or what `left` and `reach` say of each chunk.

    left: (chunks, heads, key), what is left of each row of a state; k, gain and queries come with their decay. reach:
    (chunks, heads), how much of a state's second half goes into its first.
    """
    heads, key, value = k.shape[-2], k.shape[-1], values.shape[-1]
    q, to_y = queries or (None, None)
    block_k = block(key, 2 * MAX_HEAD_SIZE)
    dtype = values.dtype if to_y is None else to_y.dtype
    block_v = block(value, max(16, STATE_TILES[dtype] // block_k))
    # Two stages fit into shared memory: of larger tiles where there is more of it and a third stream, of the queries,
    # is absent or narrow; never on gfx942.
    target = architecture(k.device)
    wide = block_k <= 128 and target in ("sm_90", "sm_100") and (left is None or queries is None)
    staged = not target.startswith("gfx") and (block_k <= 64 or wide)
    sizes = {
        "K": key, "CHUNK": packing.chunk, "BLOCK_K": block_k, "BLOCK_V": block_v,
        "DECAY": decay_kind(log_decay) if left is None else 2, "BACKWARDS": queries is not None,
        "PRECISION": precision(dtype, k.device), "num_warps": 8, "num_stages": 2 if staged else 1,
    }  # fmt: skip
    reads, writes = (k, gain) if queries is None else (gain, k)

    def new(count: int, *shape: int) -> Tensor:
        return inverse.new_empty((count, heads, *shape))

    def carry(spans: Spans, columns: int, *tensors: Tensor | None, nothing: bool = False) -> None:
        given = (None, None) if nothing else (values, to_y)
        correction_kernel[(spans.number * heads, triton.cdiv(columns, block_v))](
            reads, writes, given[0], inverse, q, given[1], log_decay, left, reach, *tensors, spans.table, heads,
            V=columns, **sizes,
        )  # fmt: skip

    states, final = new(packing.chunks.number, key, value), new(packing.sequences, key, value)
    errors = values.new_empty(values.shape, dtype=dtype)
    spans = segments(packing, heads * triton.cdiv(value, block_v))
    # A larger matrix from segment to segment does not fit into shared memory.
    if spans.number == packing.sequences or key > (64 if target.startswith("gfx") else 128):
        carry(packing.whole, value, initial, states, errors, final)
        return states, errors, final

    totals, starts, transitions = (new(spans.number, key, columns) for columns in (value, value, key))
    carry(spans, value, None, None, None, totals)
    identity = torch.eye(key, device=k.device).expand(spans.number, heads, key, key).contiguous()
    carry(spans, key, identity, None, None, transitions, nothing=True)
    block_columns = block(value, 16)
    transition_scan_kernel[(packing.sequences * heads, triton.cdiv(value, block_columns))](
        transitions, totals, initial, starts, final, spans.offsets, heads,
        K=key, V=value, BLOCK_K=block_k, BLOCK_V=block_columns, BACKWARDS=queries is not None,
        PRECISION=precision(torch.float32, k.device), num_warps=8,
    )  # fmt: skip
    carry(spans, value, starts, states, errors, totals)
    return states, errors, final
