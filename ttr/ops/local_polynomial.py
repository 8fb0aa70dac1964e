r"""Family (d): local polynomials, fitted afresh for every query to its weighted past and read at the query.

Degree 0 is a weighted mean, softmax attention. Degree 1 (`ttr.ops._local_linear`) also follows the slope of the
values. Degree 2 adds curvature: with ψ the monomials of degree 1 and 2 of k − q, m their mean and C their
covariance, y = E[v] − Cov(v, ψ)(C + λI)^{-1} m, by a factorisation for every query. All go through blocks of queries
and see no pair that lies in a block's future or before its window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ttr.ops._backend import Backend, only_torch, uses_triton
from ttr.ops._check import check_chunk_size, check_range, check_shapes
from ttr.ops._chunks import state_dtype, without_autocast
from ttr.ops._convergence import warn_unless_all_converged
from ttr.ops._local_linear import LocalLinear, Settings, Solver, log_factors, spans
from ttr.ops._packed import Bounds, each_sequence

Similarity = Literal["exponential", "gaussian"]

KERNEL_SIZE = 128  # the most channels of a key or a value that the kernel takes
QUADRATIC_BYTES = 2**30  # of the normal matrices of a block of queries
QUADRATIC_FEATURES = 2**22  # numbers in the monomials of the pairs that some queries see


class PastPairs(NamedTuple):
    """The pairs from which a fit goes on; the decay and the weight where the call has them.

    With `cu_seqlens` they are those of packed sequences, end to end. These differ in number and make no batch, so no
    call goes on from them; each sequence does, from the pairs between its bounds.
    """

    k: Float[Tensor, "batch past heads key"]
    v: Float[Tensor, "batch past heads value"]
    log_decay: Float[Tensor, "batch past heads"] | None = None
    weight: Float[Tensor, "batch past heads"] | None = None
    cu_seqlens: Int[Tensor, " bounds"] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> PastPairs:
        """The pairs with the function applied to each tensor but the bounds."""
        log_decay, weight = (None if x is None else function(x) for x in (self.log_decay, self.weight))
        return PastPairs(function(self.k), function(self.v), log_decay, weight, self.cu_seqlens)


def local_polynomial(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    degree: int,
    bandwidth: float = 1.0,
    ridge: Float[Tensor, " heads"] | None = None,
    log_decay: Float[Tensor, "batch time heads"] | None = None,
    *,
    weight: Float[Tensor, "batch time heads"] | None = None,
    window: int | None = None,
    similarity: Similarity = "exponential",
    probe: Float[Tensor, "batch time heads key"] | None = None,
    solver: Solver = "auto",
    steps: int = 200,
    tolerance: float | None = None,
    initial_state: PastPairs | None = None,
    cu_seqlens: Bounds | None = None,
    chunk_size: int = 128,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch time heads value"], PastPairs]:
    r"""Fit a polynomial in k − q to each query's weighted past, and read it at the query.

    .. math::
        y_t = \beta_0, \qquad \beta = \arg\min \sum_{i \le t} p_{ti} \lVert v_i - \beta_0 - \beta_1^\top (k_i - q_t)
        - \dots \rVert^2 + \lambda \lVert \beta_1, \dots \rVert^2, \qquad
        p_{ti} \propto w_i\, e^{\ell_{i+1} + \dots + \ell_t}\, e^{q_t^\top k_i / h^2}

    With means and covariances over p, degree 0 is :math:`\mathbb E[v]` and degree 1

    .. math:: y_t = \mathbb E[v] + \operatorname{Cov}(v, k) (\operatorname{Cov}(k, k) + \lambda I)^{-1}
        (q_t - \mathbb E[k])

    Args:
        q: queries; the bandwidth does the scaling.
        k: keys.
        v: values.
        degree: 0, 1 or 2.
        bandwidth: h > 0.
        ridge: λ > 0, one a head, against weights that sum to one; on all coefficients but the constant, so needed
            from degree 1 on. The quadratic monomials are scaled to the norm of :math:`(k-q)(k-q)^\top`.
        log_decay: :math:`\ell_t \le 0`; None keeps everything.
        weight: :math:`w_i \ge 0`. A pair of weight 0 is left out and gets no gradient; a query that no pair has
            weight for gets 0.
        window: how many pairs, the newest included, a query sees; None is all of them.
        similarity: "exponential", or "gaussian" for :math:`e^{-\lVert q_t - k_i\rVert^2 / 2h^2}`.
        probe: what stands at degree 1 in the place of :math:`(\operatorname{Cov} + \lambda I)^{-1}(q - \mathbb E k)`,
            so that nothing is solved. Parallax's own probe is this one's negative.
        solver: of degree 1. "direct" factorises each query's covariance, "conjugate_gradients" only the mean of a
            block's; "auto" is direct for up to 8 channels, and elsewhere for the queries that K steps leave
            unsolved.
        steps: the most conjugate gradient steps; a direct solve also takes one or two, against rounding.
        tolerance: where they stop, the relative residual; None is ten units of rounding. The kernel computes with
            half-precision inputs as they are, and stops earlier with those.
        initial_state: the pairs before the first; None for no pair, and for packed sequences.
        cu_seqlens: packed sequences of different lengths, in a batch of one: where each begins and the last one ends,
            int32 or int64. None is a batch of sequences, all equally long.
        chunk_size: queries treated at once; changes speed and memory, and the result within the tolerance.
        backend: "auto" is Triton at degree 1 for CUDA tensors that the kernel takes (up to 128 channels; by conjugate
            gradients), and PyTorch otherwise; "torch" and "triton" force one.

    Returns:
        The outputs in the dtype of v, and the pairs that the next call needs (all, or the last window − 1). With
        cu_seqlens they are all pairs and their bounds, which no one call goes on from.

    Raises:
        ValueError: for a wrong shape, dtype, device or choice, a number outside its range, a ridge or probe missing
            or without a use, a state without the call's decay or weight, a state of or beside packed sequences, bounds
            that do not rise from 0 to time, degree 2 where the normal matrices of a block,
            chunk_size · (1 + K + K(K+1)/2)² numbers a head, exceed a GiB, and backend "triton" where no kernel takes
            these arguments.
        ImportError: for backend "triton" without a triton that is new enough.

    Warns:
        ConvergenceWarning: where conjugate gradients needed more steps; after a kernel on a GPU only under TTR_CHECK=1.
        KernelFallbackWarning: once a reason, where PyTorch computes with CUDA tensors that no kernel takes.

    Nadaraya (1964) and Watson (1964) for degree 0; Fan & Gijbels (1996) for local polynomials; Zuo et al. (2025)
    for degree 1 as attention, by conjugate gradients; Zuo et al. (2026, Parallax) for the probe.
    """
    _check_numbers(degree, bandwidth, window, similarity, solver, steps, tolerance, chunk_size)
    _check_tensors(q, k, v, degree, ridge, log_decay, weight, probe, initial_state, cu_seqlens)
    if degree != 1:
        only_torch(backend, f"local polynomials of degree {degree}")
    pairs = _joined(initial_state, PastPairs(k, v, log_decay, weight, cu_seqlens))
    if degree == 1 and uses_triton(backend, q, v, _without_kernel(q, v, None if probe is not None else solver)):
        y = _in_kernel(q, probe, pairs, bandwidth, similarity, ridge, window, steps, tolerance)
        return y, pairs if cu_seqlens is not None else _kept(pairs, window)

    # At degree 2 products of four channels cancel.
    dtype = torch.float64 if degree == 2 else state_dtype(v)
    tolerance = 10 * torch.finfo(dtype).eps if tolerance is None else tolerance
    how = Settings(chunk_size, window, solver, steps, tolerance)
    prepare = partial(_prepared, bandwidth=bandwidth, similarity=similarity, dtype=dtype)
    y, _ = each_sequence(cu_seqlens, _in_torch, (q, probe, *pairs[:4]), None, prepare, degree, ridge, how)
    return y.to(v.dtype), pairs if cu_seqlens is not None else _kept(pairs, window)


def _without_kernel(q: Tensor, v: Tensor, solver: Solver | None) -> str | None:
    """What about these arguments the kernel does not compute."""
    if solver == "direct":
        return "local polynomials by the direct solver"
    if max(q.shape[-1], v.shape[-1]) > KERNEL_SIZE:
        return f"local polynomials of more than {KERNEL_SIZE} channels"
    return None


def _in_kernel(
    q: Tensor,
    probe: Tensor | None,
    pairs: PastPairs,
    bandwidth: float,
    similarity: Similarity,
    ridge: Tensor | None,
    window: int | None,
    steps: int,
    tolerance: float | None,
) -> Tensor:
    from ttr_kernels.local_linear import TOLERANCES, local_linear

    tolerance = TOLERANCES[pairs.v.dtype] if tolerance is None else tolerance
    with without_autocast(pairs.v):
        q, k = (x.to(pairs.v.dtype) for x in (q, pairs.k))
        probe = None if probe is None else probe.to(pairs.v.dtype)
        target = q
        if pairs.v.dtype == torch.float32:  # as in `_prepared`; the kernel centres half-precision keys without rounding
            origin = k[:, :1].detach()
            k, target = k - origin, q - origin
        ridge, log_decay, weight = (None if x is None else x.float() for x in (ridge, pairs.log_decay, pairs.weight))
        y, residual = local_linear(
            target if similarity == "gaussian" else q, k, pairs.v, target if probe is None else None, ridge, probe,
            log_decay, _log_weight(k.float(), weight, bandwidth, similarity), scale=bandwidth**-2, window=window,
            steps=steps, tolerance=tolerance, cu_seqlens=None if pairs.cu_seqlens is None else pairs.cu_seqlens.int(),
        )  # fmt: skip
    warn_unless_all_converged(residual, tolerance, steps)
    return y


def _in_torch(
    q: Tensor,
    probe: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    weight: Tensor | None,
    state: None,
    prepare: Callable[[Tensor, PastPairs], _Fit],
    degree: int,
    ridge: Tensor | None,
    how: Settings,
) -> tuple[Tensor, None]:
    if q.shape[1] == 0:
        return v[:, :0], None
    with without_autocast(v):
        fit = prepare(q, PastPairs(k, v, log_decay, weight))
        if degree == 0:
            y = _constant(fit, how, only_kernel=log_decay is None and weight is None)
        elif degree == 1:
            y = _linear(fit, how, ridge, probe)
        else:
            y = _quadratic(fit, how, ridge)
    return y.transpose(1, 2), None


def _check_numbers(
    degree: int,
    bandwidth: float,
    window: int | None,
    similarity: str,
    solver: str,
    steps: int,
    tolerance: float | None,
    chunk_size: int,
) -> None:
    for name, value, valid, expected in (
        ("degree", degree, degree in (0, 1, 2), "0, 1 or 2"),
        ("bandwidth", bandwidth, 0 < bandwidth < math.inf, "a positive finite number"),
        ("window", window, window is None or window >= 1, "at least 1, or None"),
        ("similarity", similarity, similarity in ("exponential", "gaussian"), '"exponential" or "gaussian"'),
        (
            "solver",
            solver,
            solver in ("auto", "conjugate_gradients", "direct"),
            '"auto", "conjugate_gradients" or "direct"',
        ),
        ("steps", steps, steps >= 1, "at least 1"),
        ("tolerance", tolerance, tolerance is None or 0 < tolerance < math.inf, "a positive finite number, or None"),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    check_chunk_size(chunk_size)


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    degree: int,
    ridge: Tensor | None,
    log_decay: Tensor | None,
    weight: Tensor | None,
    probe: Tensor | None,
    past: PastPairs | None,
    cu_seqlens: Tensor | None,
) -> None:
    if probe is not None and degree != 1:
        raise ValueError(f"probe: expected None at degree {degree}, got a tensor")
    solved = degree > 0 and probe is None
    if (ridge is not None) != solved:
        where = f"at degree {degree}" + (" with a probe" if probe is not None else "")
        raise ValueError(f"ridge: expected {'a tensor (heads)' if solved else 'None'} {where}, got {ridge}")
    if past is not None and cu_seqlens is not None:
        raise ValueError(
            "initial_state: expected None with cu_seqlens, as past pairs of different number make no batch"
        )
    if past is not None and past.cu_seqlens is not None:
        raise ValueError(
            "initial_state: expected a batch of past pairs, got those of packed sequences; go on with one sequence, "
            "from the pairs between its bounds"
        )
    axes = {"k": "key", "v": "value", "log_decay": "", "weight": ""}
    sequences = {} if past is None else {name: getattr(past, name) for name in axes}
    check_shapes(
        None,
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        ridge=(ridge, "heads"),
        log_decay=(log_decay, "batch time heads"),
        weight=(weight, "batch time heads"),
        probe=(probe, "batch time heads key"),
        **{f"initial_state.{name}": (x, f"batch past heads {axes[name]}") for name, x in sequences.items()},
    )
    if past is not None:
        for name, new in (("log_decay", log_decay), ("weight", weight)):
            old = sequences[name]
            if (old is None) != (new is None):
                expected = "None" if new is None else "a tensor (batch, past, heads)"
                got = "None" if old is None else "a tensor"
                raise ValueError(f"initial_state.{name}: expected {expected}, as {name}, got {got}")
    check_range("ridge", ridge, low=0.0, open_low=True)
    check_range("log_decay", log_decay, high=0.0)
    check_range("weight", weight, low=0.0)


def _joined(past: PastPairs | None, new: PastPairs) -> PastPairs:
    if past is None:
        return new
    names = (name for name, x in new._asdict().items() if x is not None)
    return PastPairs(**{name: torch.cat([getattr(past, name), getattr(new, name)], dim=1) for name in names})


def _kept(pairs: PastPairs, window: int | None) -> PastPairs:
    first = 0 if window is None else max(0, pairs.k.shape[1] - window + 1)
    return pairs.map(lambda x: x[:, first:])


class _Fit(NamedTuple):
    """What all degrees see, (batch, heads, time or pairs, …).

    The log-weight of a pair is q_t·k_i + elapsed_t − elapsed_i + key_bias_i; the polynomial is read at the target.
    """

    q: Tensor
    target: Tensor
    k: Tensor
    v: Tensor
    elapsed: Tensor | None
    key_bias: Tensor | None


def _prepared(q: Tensor, pairs: PastPairs, bandwidth: float, similarity: Similarity, dtype: torch.dtype) -> _Fit:
    query, k, v = (x.to(dtype).transpose(1, 2) for x in (q, pairs.k, pairs.v))
    log_decay, weight = (None if x is None else x.to(dtype).transpose(1, 2) for x in (pairs.log_decay, pairs.weight))
    # Only differences of keys count; measured from one of them, large common parts cancel without rounding.
    origin = k[:, :, :1].detach()
    k, target = k - origin, query - origin
    if similarity == "gaussian":
        query = target
    elapsed = None if log_decay is None else log_decay.double().cumsum(-1)
    return _Fit(query / bandwidth**2, target, k, v, elapsed, _log_weight(k, weight, bandwidth, similarity))


def _log_weight(k: Tensor, weight: Tensor | None, bandwidth: float, similarity: Similarity) -> Tensor | None:
    """What of a pair's log-weight its key alone decides, and the weight it was given."""
    of_keys = -k.square().sum(-1) / (2 * bandwidth**2) if similarity == "gaussian" else None
    if weight is None:
        return of_keys
    given = weight > 0
    of_weights = torch.where(given, torch.where(given, weight, 1).log(), -torch.inf)
    return of_weights if of_keys is None else of_keys + of_weights


def _by_blocks(compute: Callable[..., Tensor], fit: _Fit, how: Settings, size: int) -> Tensor:
    """`compute(q, target, k, v, log_factors)` for blocks of queries; done again where a gradient needs it."""

    def block(
        rows: slice,
        columns: slice,
        q: Tensor,
        target: Tensor,
        k: Tensor,
        v: Tensor,
        elapsed: Tensor | None,
        key_bias: Tensor | None,
    ) -> Tensor:
        factors = log_factors(rows, columns, how.window, elapsed, key_bias, q)
        nothing = factors.isneginf().all(-1, keepdim=True)
        seen = k[..., columns, :], v[..., columns, :], factors.masked_fill(nothing, 0)
        return compute(q[..., rows, :], target[..., rows, :], *seen).masked_fill(nothing, 0)

    time = fit.q.shape[2]
    blocks = spans(fit.k.shape[2] - time, time, how.window, size)
    outputs = [checkpoint(block, *where, *fit, use_reentrant=False, preserve_rng_state=False) for where in blocks]
    return torch.cat(outputs, dim=2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """SDPA, whose fast form takes queries, keys and values of one size."""
    value, more = v.shape[-1], v.shape[-1] - k.shape[-1]
    if more > 0:
        q, k = pad(q, (0, more)), pad(k, (0, more))
    elif more < 0:
        v = pad(v, (0, -more))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=1.0)[..., :value]


def _constant(fit: _Fit, how: Settings, only_kernel: bool) -> Tensor:
    q, _, k, v, _, key_bias = fit
    time, pairs = q.shape[2], k.shape[2]
    all_seen = time == 1 and (how.window is None or pairs <= how.window)
    if only_kernel and (all_seen or (how.window is None and time == pairs)):
        if key_bias is not None:
            q, k = pad(q, (0, 1), value=1.0), torch.cat([k, key_bias.unsqueeze(-1)], dim=-1)
        return _attention(q, k, v, None, is_causal=not all_seen)

    def mean(q: Tensor, _: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
        return _attention(q, k, v, factors.expand(*q.shape[:2], *factors.shape[-2:]), is_causal=False)

    return _by_blocks(mean, fit, how, how.chunk_size)


def _linear(fit: _Fit, how: Settings, ridge: Tensor | None, probe: Tensor | None) -> Tensor:
    batch, heads = fit.q.shape[:2]
    probe = None if probe is None else probe.to(fit.k.dtype).transpose(1, 2)
    q, target, k, v = (x.flatten(0, 1) for x in fit[:4])
    elapsed, key_bias, probe = (None if x is None else x.flatten(0, 1) for x in (*fit[4:], probe))
    if q.shape[1] > 1:  # products with one query would not repay the copies
        k, v = k.contiguous(), v.contiguous()
    if ridge is not None:
        ridge = ridge.to(k.dtype).repeat(batch)[:, None, None]
    return LocalLinear.apply(q, k, v, target, ridge, probe, elapsed, key_bias, how).unflatten(0, (batch, heads))


def _quadratic(fit: _Fit, how: Settings, ridge: Tensor | None) -> Tensor:
    batch, heads, time, key = fit.q.shape
    monomials = key + key * (key + 1) // 2
    needed = fit.q.element_size() * batch * heads * min(how.chunk_size, time) * (1 + monomials) ** 2
    if needed > QUADRATIC_BYTES:
        raise ValueError(
            f"degree: expected 0 or 1 for {key} channels, {batch} × {heads} heads and chunk_size {how.chunk_size}; "
            f"degree 2 would need {needed / 2**30:.1f} GiB for the normal matrices of a block, more than "
            f"{QUADRATIC_BYTES / 2**30:.0f} GiB, got 2"
        )
    assert ridge is not None
    row, column = torch.triu_indices(key, key, device=ridge.device)
    norm = torch.full(row.shape, 2**0.5, dtype=fit.q.dtype, device=ridge.device).masked_fill_(row == column, 1)
    penalty = torch.diag_embed(ridge.to(norm.dtype)[:, None].expand(heads, monomials))[:, None]

    def intercept(q: Tensor, target: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
        weights = (q @ k.mT + factors).softmax(-1).unsqueeze(-1)
        offset = k.unsqueeze(2) - target.unsqueeze(3)
        features = torch.cat([offset, norm * offset[..., row] * offset[..., column]], dim=-1)
        mean = (weights * features).sum(-2, keepdim=True)
        features = features - mean
        weighted = weights * features
        factor = torch.linalg.cholesky(weighted.mT @ features + penalty)
        slope = torch.cholesky_solve(mean.mT, factor)
        return ((weights - weighted @ slope).mT @ v.unsqueeze(2)).squeeze(-2)

    pairs = fit.k.shape[2] if how.window is None else min(fit.k.shape[2], how.window)
    size = max(1, min(how.chunk_size, QUADRATIC_FEATURES // (batch * heads * pairs * monomials)))
    return _by_blocks(intercept, fit, how, size)
