"""The delta rule whose corrections go on: a second state, the momentum, pushes the first.

    M_t = η_t M_{t−1} + g_t u_tᵀ ,    S_t = S̄_t + M_t ,    u_t = v_t − S̄_tᵀ k_t ,    S̄_t = α_t S_{t−1}

A write at j reaches S_t along every split of the way into a stretch of momentum and a stretch of decay. With the decay
matrices D of α and E of η, and their lower triangles, its factor is F = D E, and on S̄_t, before the push of token t, it
is F̄ = (D − I) E. The momentum at the chunk's start reaches them by p = D e and p̄ = (D − I) e, e_t = η_1 ⋯ η_t. So with
Z = [S; M] for the state, what is read, written and asked has two halves, each a multiple of the key, gain or query, and
the chunk is the delta rule's:

    U = (I + K Gᵀ ∘ F̄)⁻¹ (V − [d∘K, p̄∘K] Z),    Y = [d∘Q, p∘Q] Z + (Q Gᵀ ∘ F) U,
    Z ← [[d_C, p_C], [0, e_C]] Z + [F_C∘G, E_C∘G]ᵀ U

The factors are numbers a head: PyTorch makes them and differentiates them. Kernels do the rest.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ttr_kernels._corrections import carried
from ttr_kernels._gradients import gradients
from ttr_kernels._launch import block, check
from ttr_kernels._outputs import outputs
from ttr_kernels._packing import CHUNK, packing
from ttr_kernels._recurrence import FEW_TOKENS, recur
from ttr_kernels._scores import scores
from ttr_kernels._triangle import unit_triangular_inverse
from ttr_kernels.linear_attention import arranged

# Twice as many rows of a state stand in a program, with as many channels of what is read and written.
LARGEST_KEYS = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}


def momentum_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_momentum: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Correct the memory's error on each new pair with momentum, then read it.

    M_t = exp(log_momentum_t) M_{t−1} + g_t (v_t − S̄_tᵀ k_t)ᵀ,  S_t = S̄_t + M_t,  S̄_t = exp(log_decay_t) S_{t−1},
    y_t = S_tᵀ q_t.

    `log_momentum` and `log_decay` are ≤ 0, float32, (batch, time, heads); `initial_momentum` is laid out as the state;
    the other arguments, and what is raised, are those of `delta_rule`. Returns the outputs and the final state and
    momentum.

    Behrouz et al. 2025 (Titans, arXiv 2501.00663), the linear case with the error of the decayed memory.
    """
    sizes = check(
        "q",
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        gain=(gain, "batch time heads key"),
        log_momentum=(log_momentum, "batch time heads"),
        log_decay=(log_decay, "batch time heads"),
        initial_state=(initial_state, "sequences heads key value"),
        initial_momentum=(initial_momentum, "sequences heads key value"),
    )
    key, largest = sizes["key"], LARGEST_KEYS[q.dtype]
    if key > largest:
        raise ValueError(f'key: expected a head size from 1 to {largest} in {q.dtype}, got {key}; use backend="torch"')
    if log_decay is None:
        log_decay = torch.zeros_like(log_momentum)
    nothing = q.new_zeros(sizes["sequences"], sizes["heads"], key, sizes["value"], dtype=torch.float32)
    start = [nothing if x is None else x for x in (initial_state, initial_momentum)]
    tensors = (q, k, v, gain, log_momentum, log_decay, *start)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if cu_seqlens is None and q.shape[1] <= FEW_TOKENS and not differentiated:
        y, final_state, final_momentum = _few_tokens(*tensors)
        return y, (final_state, final_momentum)
    # Halves of a power of two, so that a kernel can take a state apart.
    more = max(8, block(key)) - key
    q, k, gain = (pad(x, (0, more)) for x in (q, k, gain))
    state = torch.cat([pad(x, (0, 0, 0, more)) for x in start], dim=-2)

    index = _chunk_index(q, cu_seqlens)
    decay, momentum = (_log_sums(x, index) for x in (log_decay, log_momentum))
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    across, push = (torch.where(lower, (x.mT - x).float().mT, -torch.inf).exp() for x in (decay, momentum))
    pushes = momentum.float().exp()
    before = across.tril(-1)
    old_before, old_after = before @ pushes, across @ pushes
    writes_before, writes_after = before @ push, across @ push
    left = decay.float().exp()

    def rows(x: Tensor) -> Tensor:
        """(chunks, heads, CHUNK, …) as (batch, time, heads, …)."""
        packed = x.new_zeros(q.shape[0] * q.shape[1] + 1, x.shape[1], x.shape[3])
        return packed.index_put((index,), x.movedim(1, 2))[:-1].unflatten(0, q.shape[:2])

    # Past the end of a sequence a momentum would push on: what leaves a chunk leaves it at its last token.
    last = (index < q.shape[0] * q.shape[1]).sum(-1).sub(1).clamp_min(0)[:, None, None, None]

    def at_end(x: Tensor) -> Tensor:
        return x.gather(2, last.expand(-1, x.shape[1], 1, x.shape[3]))

    def halves(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([x * rows(first), x * rows(second)], dim=-1).to(v.dtype)

    y, final = _chunks(
        halves(q, left, old_after),
        halves(k, left, old_before),
        halves(gain, at_end(writes_after).mT, at_end(push).mT),
        v,
        _scores(k, gain, True, cu_seqlens) * rows(writes_before),
        _scores(q, gain, False, cu_seqlens) * rows(writes_after),
        torch.cat([at_end(x)[..., 0] for x in (left, old_after, pushes)], dim=-1),
        state,
        cu_seqlens,
    )
    final_state, final_momentum = final.unflatten(-2, (2, -1)).unbind(-3)
    return y, (final_state[..., :key, :], final_momentum[..., :key, :])


@torch.library.custom_op("ttr_kernels::momentum_delta_rule_few", mutates_args=())
def _few_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor,
    state: Tensor,
    momentum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v, gain, log_momentum, log_decay, state, momentum), packed = arranged(
        None, q, k, v, gain, log_momentum, log_decay, state, momentum
    )
    y, final_momentum = v.new_empty(v.shape), momentum.new_empty(momentum.shape)
    with torch.cuda.device_of(q):
        final = recur(q, k, v, gain, log_decay, state, y, packed, (log_momentum, momentum, final_momentum))
    return y, final, final_momentum


@_few_tokens.register_fake
def _(q, k, v, gain, log_momentum, log_decay, state, momentum):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(state.shape)


def _log_sums(x: Tensor, index: Tensor) -> Tensor:
    """Sums since each chunk began, (chunks, heads, CHUNK, 1), in float64: their differences keep small terms."""
    x = pad(x.flatten(0, 1), (0, 0, 0, 1))[index]
    return x.movedim(2, 1).double().clamp_min(-1e4).cumsum(-1).unsqueeze(-1)


@torch.library.custom_op("ttr_kernels::chunk_index", mutates_args=())
def _chunk_index(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The row of each token of each chunk, (chunks, CHUNK); places that no token has get the row after the last."""
    packed = packing(like.shape[0], like.shape[1], cu_seqlens, like.device)
    table = packed.chunks.table.long()
    row = table[:, :1] + torch.arange(CHUNK, device=like.device)
    return torch.where(row < table[:, 1:2], row, packed.rows)


@_chunk_index.register_fake
def _(like, cu_seqlens):  # type: ignore[no-untyped-def]
    batch, time = like.shape[:2]
    chunks = batch * max(1, -(-time // CHUNK)) if cu_seqlens is None else time // CHUNK + cu_seqlens.shape[0] - 1
    return like.new_empty(chunks, CHUNK, dtype=torch.int64)


@torch.library.custom_op("ttr_kernels::scores", mutates_args=())
def _scores(row: Tensor, column: Tensor, strict: bool, cu_seqlens: Tensor | None) -> Tensor:
    (row, column), packed = arranged(cu_seqlens, row, column)
    with torch.cuda.device_of(row):
        return scores(row, column, None, packed, strict=strict)


@torch.library.custom_op("ttr_kernels::scores_backward", mutates_args=())
def _scores_backward(
    to_scores: Tensor, row: Tensor, column: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    (row, column, to_scores), packed = arranged(cu_seqlens, row, column, to_scores)
    with torch.cuda.device_of(row):
        to_row = outputs(row, column, to_scores, column, None, None, row.new_empty(row.shape), packed)
        to_column = outputs(column, row, to_scores, row, None, None, row.new_empty(row.shape), packed, transposed=True)
    return to_row, to_column


@torch.library.custom_op("ttr_kernels::corrected_chunks", mutates_args=())
def _chunks(
    queries: Tensor,
    reads: Tensor,
    writes: Tensor,
    v: Tensor,
    a: Tensor,
    p: Tensor,
    transition: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (queries, reads, writes, v, a, p, transition, state), packed = arranged(
        cu_seqlens, queries, reads, writes, v, a, p, transition, state
    )
    with torch.cuda.device_of(v):
        inverse = unit_triangular_inverse(a, packed)
        states, errors, final = carried(reads, writes, v, inverse, None, *_kept(transition, reads), state, packed, None)
        y = outputs(queries, writes, p, errors, None, states, v.new_empty(v.shape), packed)
    return y, final


def _kept(transition: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of each row of a state, and how much of its second half goes into its first."""
    state, reach, momentum = transition.unbind(-1)
    left = torch.stack([state, momentum], dim=-1).repeat_interleave(like.shape[-1] // 2, dim=-1)
    return left.contiguous(), reach.contiguous()


@torch.library.custom_op("ttr_kernels::corrected_chunks_backward", mutates_args=())
def _chunks_backward(
    to_y: Tensor,
    to_final: Tensor,
    queries: Tensor,
    reads: Tensor,
    writes: Tensor,
    v: Tensor,
    a: Tensor,
    p: Tensor,
    transition: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (queries, reads, writes, v, a, p, transition, state, to_y, to_final), packed = arranged(
        cu_seqlens, queries, reads, writes, v, a, p, transition, state, to_y, to_final
    )
    kept = _kept(transition, reads)
    with torch.cuda.device_of(v):
        inverse = unit_triangular_inverse(a, packed)
        states, errors, _ = carried(reads, writes, v, inverse, None, *kept, state, packed, None)
        within = outputs(
            writes, queries, p, to_y, None, None, v.new_empty(v.shape, dtype=torch.float32), packed, transposed=True
        )
        to_states, z, to_state = carried(reads, writes, within, inverse, None, *kept, to_final, packed, (queries, to_y))
        to_queries, to_writes, _ = gradients(
            queries, writes, errors, to_y, None, states, to_states, packed, within=False
        )
        to_reads, _, _ = gradients(reads, writes, errors, z, None, states, None, packed, within=False)
        to_a, to_p = scores(z, errors, None, packed, strict=True), scores(to_y, errors, None, packed)
    # Places of the table that no chunk has are not written.
    used = (packed.chunks.table[:, 1] > packed.chunks.table[:, 0])[:, None, None]
    (s, m), (to_s, to_m) = (x.unflatten(-2, (2, -1)).unbind(-3) for x in (states, to_states))
    pairs = [(x * y).sum((-2, -1)) for x, y in ((s, to_s), (m, to_s), (m, to_m))]
    to_transition = torch.where(used, torch.stack(pairs, dim=-1), 0)
    return to_queries, to_reads, to_writes, -z, to_a, to_p, to_transition, to_state


@_scores.register_fake
def _(row, column, strict, cu_seqlens):  # type: ignore[no-untyped-def]
    return row.new_empty((*row.shape[:-1], CHUNK), dtype=torch.float32)


@_scores_backward.register_fake
def _(to_scores, row, column, cu_seqlens):  # type: ignore[no-untyped-def]
    return row.new_empty(row.shape), column.new_empty(column.shape)


@_chunks.register_fake
def _(queries, reads, writes, v, a, p, transition, state, cu_seqlens):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape), state.new_empty(state.shape)


@_chunks_backward.register_fake
def _(to_y, to_final, *inputs):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in inputs[:-1])


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    row, column, _, cu_seqlens = inputs
    ctx.save_for_backward(row, column, cu_seqlens)


def _differentiate_scores(ctx: Any, to_scores: Tensor) -> tuple[Tensor | None, ...]:
    to_row, to_column = _scores_backward(to_scores, *ctx.saved_tensors)
    return to_row, to_column, None, None


def _setup_chunks(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_chunks(ctx: Any, to_y: Tensor, to_final: Tensor) -> tuple[Tensor | None, ...]:
    return *_chunks_backward(to_y, to_final, *ctx.saved_tensors), None


_scores.register_autograd(_differentiate_scores, setup_context=_setup_scores)
_chunks.register_autograd(_differentiate_chunks, setup_context=_setup_chunks)
