"""Family (b): error-correcting updates, one op for every gain.

With u_t = v_t − S̄_tᵀ k_t, the error of the decayed memory on the new pair, all states in a chunk are sums of
g_j u_jᵀ with decays between. So the errors solve a unit-triangular system, (I + A) U = V − K̄ S, where
A_tj = k_tᵀ Diag(decay from j to t) g_j for j < t: the WY (or UT) form with key and gain kept apart. Its
inverse, formed for all chunks at once by products of blocks, is applied to V − K̄ S chunk after chunk. The forward
costs about 4·T·C·(K + V) + 2·T·C²/3 + 6·T·K·V floating-point operations a head.

Momentum adds a second state, M_t = η_t M_{t−1} + g_t u_tᵀ and S_t = S̄_t + M_t. A write then reaches S_t along every
split of the way into a stretch of momentum and a stretch of decay: its factor is the product of the two decay
matrices, and nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ttr.ops._backend import Backend, in_kernel, uses_triton
from ttr.ops._check import check_chunk_size, check_range, check_shapes, decay_axes
from ttr.ops._chunks import ChunkDecay, fade, map_chunks, state_dtype, zero_state
from ttr.ops._packed import Bounds, each_sequence


def delta_rule(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    gain: Float[Tensor, "batch time heads key"],
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key"] | None = None,
    *,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Bounds | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch time heads value"], Float[Tensor, "sequences heads key value"]]:
    r"""Correct the memory's error on each new pair along a gain vector, then read it.

    .. math::
        S_t = \bar S_t + g_t \bigl(v_t - \bar S_t^\top k_t\bigr)^\top, \qquad
        \bar S_t = \operatorname{Diag}(e^{\ell_t})\, S_{t-1}, \qquad y_t = S_t^\top q_t

    Args:
        q: queries; no scaling is applied.
        k: keys.
        v: values.
        gain: :math:`g_t`, for instance :math:`\beta_t k_t`; `ttr.ops.gains` has the gains of the field. The
            recursion is stable where the eigenvalue :math:`1 - k_t^\top g_t` lies in [−1, 1].
        log_decay: :math:`\ell_t \le 0`, one a head or one a channel of the key; None keeps everything.
        initial_state: :math:`S_0`; None is zero.
        cu_seqlens: packed sequences of different lengths, in a batch of one: where each begins and the last one ends,
            int32 or int64. States have one row a sequence. None is a batch of sequences, all equally long.
        chunk_size: tokens treated in one matrix product (of a power of two); changes the speed, not the result.
        backend: "auto" is Triton for CUDA tensors that the kernel takes and PyTorch otherwise; "torch" and
            "triton" force one. The kernel has its own chunk_size.

    Returns:
        The outputs in the dtype of v, and the final state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for a wrong shape, dtype or device, a positive or non-finite log_decay, chunk_size < 1, bounds that
            do not rise from 0 to time, or backend "triton" where no kernel takes these arguments.
        ImportError: for backend "triton" without a triton that is new enough.

    Warns:
        KernelFallbackWarning: once a reason, where PyTorch computes with CUDA tensors that no kernel takes.

    Schlag et al. (2021), eq. 24; chunkwise Yang et al. (2024), eq. 8–11; decay Yang et al. (2024, gated), eq. 10.
    """
    _check(q, k, v, gain, log_decay, cu_seqlens, chunk_size, initial_state=initial_state)
    if uses_triton(backend, q, v):
        return in_kernel("delta_rule", v, cu_seqlens, q, k, v, gain, log_decay=log_decay, initial_state=initial_state)
    state = zero_state(k, v, cu_seqlens) if initial_state is None else initial_state.to(state_dtype(v))
    return each_sequence(cu_seqlens, _in_torch, (q, k, v, gain, log_decay), state, chunk_size)


def momentum_delta_rule(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    gain: Float[Tensor, "batch time heads key"],
    log_momentum: Float[Tensor, "batch time heads"],
    log_decay: Float[Tensor, "batch time heads"] | None = None,
    *,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    initial_momentum: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Bounds | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[
    Float[Tensor, "batch time heads value"],
    tuple[Float[Tensor, "sequences heads key value"], Float[Tensor, "sequences heads key value"]],
]:
    r"""The delta rule whose corrections go on: gradient descent with (heavy-ball) momentum.

    .. math::
        M_t = e^{\mu_t} M_{t-1} + g_t \bigl(v_t - \bar S_t^\top k_t\bigr)^\top, \qquad
        S_t = \bar S_t + M_t, \qquad \bar S_t = e^{\ell_t} S_{t-1}, \qquad y_t = S_t^\top q_t

    Args:
        q: queries; no scaling is applied.
        k: keys.
        v: values.
        gain: :math:`g_t`, as in `delta_rule`.
        log_momentum: :math:`\mu_t \le 0`, the natural log of the factor on the old momentum.
        log_decay: :math:`\ell_t \le 0`, one a head; None keeps everything.
        initial_state: :math:`S_0`; None is zero.
        initial_momentum: :math:`M_0`; None is zero.
        cu_seqlens: packed sequences, as in `delta_rule`.
        chunk_size: tokens treated in one matrix product (of a power of two); changes the speed, not the result.
        backend: as in `delta_rule`; the kernel takes up to 128 channels of the key (32 in float32).

    Returns:
        The outputs in the dtype of v, and the final pair (state, momentum) in at least float32.

    Raises:
        ValueError: as `delta_rule`, and for a positive or non-finite log_momentum.

    The linear case of Behrouz et al. (2025, Titans), eq. 13–14, but for the error: theirs is that of S_{t−1}, this one
    that of S̄_t. Huang et al. (2026) take the same error, and scale M_t by a second gate where S_t takes it in.
    """
    states = {"initial_state": initial_state, "initial_momentum": initial_momentum}
    _check(q, k, v, gain, log_decay, cu_seqlens, chunk_size, log_momentum=log_momentum, **states)
    if uses_triton(backend, q, v, _without_momentum_kernel(q, v)):
        return in_kernel(
            "momentum_delta_rule",
            v,
            cu_seqlens,
            q,
            k,
            v,
            gain,
            log_momentum=log_momentum,
            log_decay=log_decay,
            **states,
        )
    state, momentum = (
        zero_state(k, v, cu_seqlens) if x is None else x.to(state_dtype(v)) for x in (initial_state, initial_momentum)
    )
    tensors = (q, k, v, gain, log_momentum, log_decay)
    return each_sequence(cu_seqlens, _momentum_in_torch, tensors, (state, momentum), chunk_size)


def _without_momentum_kernel(q: Tensor, v: Tensor) -> str | None:
    """What about these arguments the kernel does not compute."""
    largest = 32 if v.dtype == torch.float32 else 128
    return f"momentum with keys of more than {largest} channels in {v.dtype}" if q.shape[-1] > largest else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    *,
    log_momentum: Tensor | None = None,
    **states: Tensor | None,
) -> None:
    check_shapes(
        None,
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        gain=(gain, "batch time heads key"),
        log_decay=(log_decay, decay_axes(log_decay) if log_momentum is None else "batch time heads"),
        log_momentum=(log_momentum, "batch time heads"),
        **{name: (state, "sequences heads key value") for name, state in states.items()},
    )
    check_range("log_decay", log_decay, high=0.0)
    check_range("log_momentum", log_momentum, high=0.0)
    check_chunk_size(chunk_size)


def _in_torch(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, log_decay: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return map_chunks(_step, (q, k, v, gain, log_decay), state, like=v, chunk_size=chunk_size, token=_token)


def _momentum_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor | None,
    states: tuple[Tensor, Tensor],
    chunk_size: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    if log_decay is None:
        log_decay = torch.zeros_like(log_momentum)
    tensors = (q, k, v, gain, log_momentum, log_decay)
    return map_chunks(_momentum_step, tensors, states, like=v, chunk_size=chunk_size, token=_momentum_token)


def _step(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = ChunkDecay(log_decay)
    inverse = _UnitTriangularInverse.apply(decay.between(k, gain))
    chunks = v, decay.since_start(k), inverse, decay.until_end(gain).mT
    starts, errors = [], []
    for factor, v_n, k_n, inverse_n, write_n in zip(
        decay.over_chunks(k.shape[2], k.dtype), *(x.unbind(2) for x in chunks), strict=True
    ):
        starts.append(state)
        errors.append(inverse_n @ (v_n - k_n @ state))
        state = factor * state + write_n @ errors[-1]
    y = decay.between(q, gain) @ torch.stack(errors, 2) + decay.since_start(q) @ torch.stack(starts, 2)
    return y, state


def _momentum_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor,
    states: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    state, pushed = states
    decay, momentum = ChunkDecay(log_decay), ChunkDecay(log_momentum)
    # What a write at j, or the momentum that the chunk began with, adds to S̄_t (before token t's own push) and to S_t.
    before = decay.matrix.tril(-1)
    push = momentum.matrix
    old_push = momentum.since_start(torch.ones_like(k[..., :1]))
    after_writes, after_push = before @ push + push, before @ old_push + old_push

    inverse = _UnitTriangularInverse.apply((k @ gain.mT) * (before @ push))
    into_state = (after_writes[..., -1:, :].mT * gain).mT
    chunks = v, decay.since_start(k), (before @ old_push) * k, inverse, into_state, momentum.until_end(gain).mT
    factors = [x.over_chunks(k.shape[2], k.dtype) for x in (decay, momentum)]
    starts, pushes, errors = [], [], []
    for factor, damping, reach, v_n, k_n, pushed_k_n, inverse_n, into_state_n, into_push_n in zip(
        *factors, after_push[..., -1:, :].unbind(2), *(x.unbind(2) for x in chunks), strict=True
    ):
        starts.append(state)
        pushes.append(pushed)
        errors.append(inverse_n @ (v_n - k_n @ state - pushed_k_n @ pushed))
        state = factor * state + reach * pushed + into_state_n @ errors[-1]
        pushed = damping * pushed + into_push_n @ errors[-1]
    y = ((q @ gain.mT) * after_writes) @ torch.stack(errors, 2)
    y = y + decay.since_start(q) @ torch.stack(starts, 2) + (after_push * q) @ torch.stack(pushes, 2)
    return y, (state, pushed)


def _token(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    state = fade(state, log_decay)
    state = torch.addcmul(state, gain.unsqueeze(-1), _error(k, v, state))
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def _momentum_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    log_momentum: Tensor,
    log_decay: Tensor,
    states: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    state, pushed = fade(states[0], log_decay), fade(states[1], log_momentum)
    pushed = torch.addcmul(pushed, gain.unsqueeze(-1), _error(k, v, state))
    state = state + pushed
    return (q.unsqueeze(-2) @ state).squeeze(-2), (state, pushed)


def _error(k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    return v.unsqueeze(-2) - k.unsqueeze(-2) @ state


class _UnitTriangularInverse(torch.autograd.Function):
    """(I + A)⁻¹, with A the part of `overlap` strictly below the diagonal.

    Forward substitution inverts the blocks of 8 on the diagonal, each step for all of them: as matrices they are too
    small for a batched product. Larger ones follow by [[P, 0], [Q, R]]⁻¹ = [[P⁻¹, 0], [−R⁻¹ Q P⁻¹, R⁻¹]]. Unlike sums
    of powers of A it keeps its digits where keys are alike, and products are several times faster than batched solves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(overlap: Tensor) -> Tensor:
        size = overlap.shape[-1]
        block = min(8, size)
        entries = _on_diagonal(overlap, block).movedim((-2, -1), (0, 1)).contiguous()
        solved = torch.zeros_like(entries)
        for t in range(block):
            solved[t, t] = 1
            solved[t, :t] = -(entries[t, :t, None] * solved[:t, :t]).sum(0)
        inverse = torch.zeros_like(overlap)
        _on_diagonal(inverse, block).copy_(solved.movedim((0, 1), (-2, -1)))
        while block < size:
            pairs = _on_diagonal(inverse, 2 * block)
            below = _on_diagonal(overlap, 2 * block)[..., block:, :block]
            product = pairs[..., block:, block:] @ below @ pairs[..., :block, :block]
            pairs[..., block:, :block] = -product
            block *= 2
        return inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ gradient @ inverse.mT).tril(-1)


def _on_diagonal(x: Tensor, block: int) -> Tensor:
    """The blocks on the diagonal of square matrices, (…, blocks, block, block), as a view."""
    return x.unflatten(-2, (-1, block)).unflatten(-1, (-1, block)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
