"""Mixtures of linear maps, learned by online expectation–maximisation: one token after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttr.ops._check import check_chunk_size, check_range, check_shapes
from ttr.ops._chunks import state_dtype, without_autocast

Logits = Float[Tensor, "batch time heads maps value"]


def online_em(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    key_logits: Logits,
    query_logits: Logits,
    step_size: Float[Tensor, "batch time heads"],
    log_decay: Float[Tensor, "batch time heads"] | None = None,
    *,
    initial_state: Float[Tensor, "batch heads maps key value"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "batch time heads value"], Float[Tensor, "batch heads maps key value"]]:
    r"""The delta rule of several maps, each taking the share of an error that it explains (SwiLA).

    .. math::
        W_j &= \bar W_j + \beta_t\, k_t (r_j \odot \delta_j)^\top, \qquad
            \delta_j = v_t - \bar W_j^\top k_t, \qquad \bar W_j = e^{\ell_t} W_j \\
        r_j &= \operatorname{softmax}_j\bigl(\text{key logits} - \delta_j^2 / 2\bigr), \qquad
            y_t = \sum_j \operatorname{softmax}_j(\text{query logits}) \odot W_j^\top q_t

    The shares depend on the maps, so there is no chunk form; each token takes about 6·maps·key·value operations a head.
    One map is the delta rule. All maps begin at zero: only the logits tell them apart.

    Args:
        q: queries; no scaling is applied.
        k: keys.
        v: values.
        key_logits: log-probabilities of the maps for a pair, a channel of the value at a time, up to a constant.
        query_logits: the same where the memory is read.
        step_size: :math:`\beta_t \ge 0`.
        log_decay: :math:`\ell_t \le 0`, one a head; None keeps everything.
        initial_state: the maps to go on from; None is zero.
        chunk_size: tokens between two states that are stored for the backward pass; changes no result.

    Returns:
        The outputs in the dtype of v, and the final maps in at least float32.

    Raises:
        ValueError: for a wrong shape, dtype or device, a negative step size, a positive log_decay, chunk_size < 1.

    Lee et al. (2026), eq. 3.4, 3.5 and 3.8.
    """
    pairs = "batch time heads"
    check_shapes(
        q=(q, f"{pairs} key"),
        k=(k, f"{pairs} key"),
        v=(v, f"{pairs} value"),
        key_logits=(key_logits, f"{pairs} maps value"),
        query_logits=(query_logits, f"{pairs} maps value"),
        step_size=(step_size, pairs),
        log_decay=(log_decay, pairs),
        initial_state=(initial_state, "batch heads maps key value"),
    )
    check_range("key_logits", key_logits)
    check_range("query_logits", query_logits)
    check_range("step_size", step_size, low=0.0)
    check_range("log_decay", log_decay, high=0.0)
    check_chunk_size(chunk_size)

    dtype = state_dtype(v)
    state = k.new_zeros(k.shape[0], *key_logits.shape[2:4], k.shape[-1], v.shape[-1], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    if log_decay is None:
        log_decay = torch.zeros_like(step_size)
    chunks = zip(
        *(x.to(dtype).split(chunk_size, dim=1) for x in (q, k, v, key_logits, query_logits, step_size, log_decay)),
        strict=True,
    )
    outputs = []
    with without_autocast(v):
        for chunk in chunks:
            if torch.is_grad_enabled() and v.shape[1] > chunk_size:
                y, state = checkpoint(_steps, chunk, state, use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = _steps(chunk, state)
            outputs.append(y)
    return torch.cat(outputs, dim=1).to(v.dtype), state


def _steps(chunk: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, key_logits, query_logits, step_size, log_decay = chunk
    if v.shape[1] == 0:
        return v, maps
    outputs = []
    decay, prior, chosen = log_decay.exp()[..., None, None, None], key_logits, query_logits.softmax(-2)
    tokens = (x.unbind(1) for x in (q, k, v, prior, chosen, step_size, decay))
    for query, key, value, logits, share, size, factor in zip(*tokens, strict=True):
        maps = factor * maps
        error = value.unsqueeze(2) - _read(maps, key)
        responsibility = (logits - error.square() / 2).softmax(-2)
        write = (size[..., None, None] * responsibility * error).unsqueeze(-2)
        maps = maps + key[..., None, :, None] * write
        outputs.append((share * _read(maps, query)).sum(-2))
    return torch.stack(outputs, dim=1), maps


def _read(maps: Tensor, x: Tensor) -> Tensor:
    """Each map's answer, (batch, heads, maps, value)."""
    return (x[:, :, None, None, :] @ maps).squeeze(-2)
