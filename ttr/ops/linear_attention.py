"""Family (a): Hebbian sums, the regression that takes the keys' second moment for the identity.

Within a chunk the outputs are (Q Kᵀ ∘ D) V with D_tj = exp(c_t − c_j); between chunks a state is carried. With
chunk C the forward costs about 2·T·C·(K + V) + 4·T·K·V floating-point operations a head, not 2·T²·(K + V).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ttr.ops._backend import Backend, in_kernel, uses_triton
from ttr.ops._check import check_chunk_size, check_range, check_shapes, decay_axes
from ttr.ops._chunks import ChunkDecay, fade, map_chunks, state_dtype, zero_state
from ttr.ops._packed import Bounds, each_sequence


def linear_attention(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key"] | None = None,
    *,
    initial_state: Float[Tensor, "sequences heads key value"] | None = None,
    cu_seqlens: Bounds | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch time heads value"], Float[Tensor, "sequences heads key value"]]:
    r"""Read decayed sums of key–value outer products.

    .. math:: S_t = \operatorname{Diag}(e^{\ell_t})\, S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t

    Args:
        q: queries; no scaling is applied.
        k: keys.
        v: values.
        log_decay: :math:`\ell_t \le 0`, the natural log of the factor on the old state, one a head or one a
            channel of the key; None keeps everything.
        initial_state: :math:`S_0`; None is zero.
        cu_seqlens: packed sequences of different lengths, in a batch of one: where each begins and the last one ends,
            int32 or int64. States have one row a sequence. None is a batch of sequences, all equally long.
        chunk_size: tokens treated in one matrix product (of a power of two); changes the speed, not the result. The
            kernel has its own.
        backend: "auto" is Triton for CUDA tensors that the kernel takes and PyTorch otherwise; "torch" and
            "triton" force one.

    Returns:
        The outputs in the dtype of v, and the final state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for a wrong shape, dtype or device, a positive or non-finite log_decay, chunk_size < 1,
            bounds that do not rise from 0 to time, or backend "triton" where no kernel takes these arguments.
        ImportError: for backend "triton" without a triton that is new enough.

    Warns:
        KernelFallbackWarning: once a reason, where PyTorch computes with CUDA tensors that no kernel takes.

    Katharopoulos et al. (2020), eq. 18; with a decay per head Dao & Gu (2024), per channel Yang et al. (2023).
    """
    check_shapes(
        None,
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        log_decay=(log_decay, decay_axes(log_decay)),
        initial_state=(initial_state, "sequences heads key value"),
    )
    check_range("log_decay", log_decay, high=0.0)
    check_chunk_size(chunk_size)
    if uses_triton(backend, q, v):
        return in_kernel("linear_attention", v, cu_seqlens, q, k, v, log_decay=log_decay, initial_state=initial_state)
    state = zero_state(k, v, cu_seqlens) if initial_state is None else initial_state.to(state_dtype(v))
    return each_sequence(cu_seqlens, _in_torch, (q, k, v, log_decay), state, chunk_size)


def _in_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return map_chunks(_step, (q, k, v, log_decay), state, like=v, chunk_size=chunk_size, token=_token)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = ChunkDecay(log_decay)
    writes = decay.until_end(k).mT @ v
    starts = []
    for factor, write in zip(decay.over_chunks(k.shape[2], k.dtype), writes.unbind(2), strict=True):
        starts.append(state)
        state = factor * state + write
    y = decay.between(q, k) @ v + decay.since_start(q) @ torch.stack(starts, dim=2)
    return y, state


def _token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.addcmul(fade(state, log_decay), k.unsqueeze(-1), v.unsqueeze(-2))
    return (q.unsqueeze(-2) @ state).squeeze(-2), state
