"""Error-correcting states between chunks, and the errors: forwards in time, and back.

    U = T (V − exp(c) ∘ (K S)),        S ← exp(c_end) S + (exp(c_end − c) ∘ G)ᵀ U
    Z = −Tᵀ (E + exp(c_end − c) ∘ (G R)),   R ← exp(c_end) R + (exp(c) ∘ K)ᵀ Z + (exp(c) ∘ Q)ᵀ ∂Y

T = (I + A)⁻¹ with the scores A of keys against gains. Backwards, E = Pᵀ ∂Y is what the chunk itself reads of an error,
P the scores of queries against gains, and −Z is the gradient of the values. Both are one kernel, in which keys and gains
change places.

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

from ttr_kernels._blocks import NO_DECAY, decay_of_chunk, load_log_decay, load_rows, product, store_rows
from ttr_kernels._launch import CHUNK, block, decay_kind, precision
from ttr_kernels._packing import Packing, Spans

STATE_TILE = 4096  # numbers of a state that a program carries


@triton.jit
def correction_kernel(
    p_reads, p_writes, p_values, p_inverse, p_q, p_to_y, p_log_decay, p_initial, p_states, p_errors, p_final,
    p_spans, H,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry some columns of a state over the chunks of a span; write it where each chunk takes it up, and the errors."""
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

    if p_initial is None:
        b_state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    else:
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
        b_reads = load_rows(p_reads, o_row, m_t, o_k, K)
        b_writes = load_rows(p_writes, o_row, m_t, o_k, K)
        b_since, b_left = 1.0, 1.0
        if DECAY != NO_DECAY:
            b_coarse, b_fine = load_log_decay(p_log_decay, o_row, m_t, o_k, K, DECAY)
            b_since, b_until, b_all = decay_of_chunk(b_coarse, b_fine)
            b_left = tl.trans(b_all)
            b_reads = b_reads * (b_until if BACKWARDS else b_since)
            b_writes = b_writes * (b_since if BACKWARDS else b_until)
        b_read = product(b_reads, b_state, b_none, PRECISION)
        b_inverse = load_rows(p_inverse, o_row, m_t, o_t, CHUNK)
        if BACKWARDS:
            b_read = -(load_rows(p_values, o_row, m_t, o_v, V) + b_read)
            b_inverse = tl.trans(b_inverse)
        elif p_values is not None:
            b_read = load_rows(p_values, o_row, m_t, o_v, V) - b_read
        else:
            b_read = -b_read
        b_error = product(b_inverse, b_read, b_none, PRECISION)
        if p_errors is not None:
            store_rows(p_errors, b_error, o_row, m_t, o_v, V)
        b_state = product(tl.trans(b_writes), b_error, b_state * b_left, PRECISION)
        if BACKWARDS:
            b_q = load_rows(p_q, o_row, m_t, o_k, K) * b_since
            b_state = product(tl.trans(b_q), load_rows(p_to_y, o_row, m_t, o_v, V), b_state, PRECISION)
    tl.store(p_final + i_state + o_state, b_state, mask=m_state)


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
    """The state of every chunk, the errors, (batch, time, heads, value), and the last state; all float32.

    With `queries`, q and ∂y, back in time: `values` are E, `initial` is the gradient of the final state, and the errors
    are Z. A chunk's state is then the one that comes to its end from later ones.
    """
    heads, key, value = k.shape[-2], k.shape[-1], values.shape[-1]
    backwards = queries is not None
    q, to_y = queries or (None, None)
    block_k = block(key)
    block_v = block(value, max(16, STATE_TILE // block_k))
    sizes = {
        "K": key, "V": value, "CHUNK": CHUNK, "BLOCK_K": block_k, "BLOCK_V": block_v, "DECAY": decay_kind(log_decay),
        "BACKWARDS": backwards, "PRECISION": precision(k.dtype, k.device), "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    reads, writes = (gain, k) if backwards else (k, gain)
    states = k.new_empty((packing.cut(CHUNK).count, heads, key, value), dtype=torch.float32)
    errors = values.new_empty(values.shape, dtype=torch.float32)
    final = k.new_empty((packing.sequences, heads, key, value), dtype=torch.float32)
    spans = packing.whole(CHUNK)
    correction_kernel[(spans.count * heads, triton.cdiv(value, block_v))](
        reads, writes, values, inverse, q, to_y, log_decay, initial, states, errors, final, spans.table, heads, **sizes
    )
    return states, errors, final
