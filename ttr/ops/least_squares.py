r"""Family (c): exact least squares, the regression solved anew at every token.

With the curvature G_t and the cross moment C_t of all pairs so far, the memory is (G_t + Λ)⁻¹ C_t. It is read as
C_tᵀ x_t, x_t = (G_t + Λ)⁻ᵀ q_t: linear attention with whitened queries. Three solvers whiten them, in parallel over
chunks and without the T matrices G_t.

Token by token: G_t is carried along all chunks at the same time, and factorised.

Conjugate gradients: within a chunk G_t x_t is linear attention with keys for values.

The chunk form takes no Λ but the one in G_0, and no decay per channel. Write K for the chunk's keys times √w, c for
the cumulative log-decay in the chunk, G for the curvature at its start, and K̂ = K Jᵀ, Q̂ = Q Jᵀ where JᵀJ = G⁻¹. Then

    L Lᵀ = Diag(e^c) + K̂ K̂ᵀ,   W = L⁻¹ K̂,   X = Diag(e^{−c}) (Q̂ − tril(Q̂ Wᵀ) W) J

is Woodbury's identity at every token: a leading block of L is the factor of the leading block. Two factorisations a
chunk replace one a token. What they subtract costs digits, where a chunk knows much that its start did not: the more,
the stronger the decay. The factors tell how many. A chunk that loses too many is cut in halves, and solved token by
token in the end; so no decay is too strong.

The gradient of a solve is a solve. With z_t = (G_t + Λ)⁻¹ ∂/∂x_t, the rest is the gradient of −x_tᵀ (G_t + Λ) z_t for
constant x and z: linear attention once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttr.ops._backend import Backend, in_kernel, uses_triton
from ttr.ops._check import check_chunk_size, check_range, check_shapes, decay_axes, may_read
from ttr.ops._chunks import ChunkDecay, map_chunks, state_dtype, without_autocast, zero_state
from ttr.ops._conjugate_gradients import conjugate_gradients
from ttr.ops._convergence import warn_unless_converged
from ttr.ops._packed import Bounds, each_sequence
from ttr.ops.linear_attention import linear_attention

Solver = Literal["auto", "chunk", "conjugate_gradients", "direct"]

FEW_TOKENS = 4  # are solved one by one
KERNEL_KEY_SIZE = 128
CHUNKS_TOGETHER = 64  # are solved at once on a CPU, so that they stay in its cache


def least_squares(
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time heads key"],
    v: Float[Tensor, "batch time heads value"],
    ridge: Float[Tensor, "heads key"] | Float[Tensor, " heads"],
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key"] | None = None,
    *,
    weight: Float[Tensor, "batch time heads"] | None = None,
    ridge_decays: bool = True,
    solver: Solver = "auto",
    steps: int = 200,
    tolerance: float | None = None,
    initial_state: tuple[Float[Tensor, "sequences heads key key"], Float[Tensor, "sequences heads key value"]]
    | None = None,
    cu_seqlens: Bounds | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[
    Float[Tensor, "batch time heads value"],
    tuple[Float[Tensor, "sequences heads key key"], Float[Tensor, "sequences heads key value"]],
]:
    r"""Predict by the exact weighted ridge regression on all pairs so far.

    .. math::
        y_t = C_t^\top (G_t + \Lambda)^{-\top} q_t, \qquad
        G_t = \operatorname{Diag}(e^{\ell_t})\, G_{t-1} + w_t\, k_t k_t^\top, \qquad
        C_t = \operatorname{Diag}(e^{\ell_t})\, C_{t-1} + w_t\, k_t v_t^\top

    A ridge that decays is a prior: :math:`G_0 = \operatorname{Diag}(\lambda)` and no Λ, recursive least squares. One
    that stays is :math:`\Lambda = \operatorname{Diag}(\lambda)` with :math:`G_0 = 0`.

    With a decay per head the memory :math:`S_t = (G_t + \Lambda)^{-1} C_t` minimises
    :math:`\sum_i \gamma_i w_i \lVert v_i - S^\top k_i\rVert^2` plus the ridge's penalty, γ the products of decays.
    With one per channel it solves the estimating equation
    :math:`\sum_i \operatorname{Diag}(\gamma_i)\, w_i k_i (v_i - S^\top k_i)^\top = \Lambda S`, in which each channel's
    normal equation forgets at its own rate. That minimises nothing: G is not symmetric, G + Λ can be singular for
    some data, and close to it the answer is large. A noiseless linear map is still recovered.

    Once a prior has faded, keys that do not span the space leave G singular. A pivot below key·ε times its diagonal
    entry, ε the rounding unit, is then nothing but rounding. Four times that share of the diagonal is added where there
    is one, and the root of the smallest normal number, so that answers stay bounded.

    As long as keys do not span the space, (G_t + Λ)⁻¹q_t has a part of length ‖q‖/λ that no key sees, and rounding it
    costs digits: float32 gives about two for λ = 10⁻⁴‖k‖² and none for 10⁻⁶‖k‖². A smaller ridge wants float64.

    Args:
        q: queries; no scaling is applied.
        k: keys.
        v: values.
        ridge: λ > 0, one a head or one a channel. With an initial state and `ridge_decays` it has no effect.
        log_decay: :math:`\ell_t \le 0`, one a head or one a channel of the key; None keeps everything.
        weight: :math:`w_t \ge 0`, the weight of a pair as it comes in; None is one.
        ridge_decays: whether the ridge fades with the data.
        solver: "chunk", an exact chunkwise form for a ridge that decays, with at most one decay a head;
            "conjugate_gradients", for at most one decay a head; "direct", a factorisation a token. "auto" takes the
            first of these that may, and "direct" for a few tokens.
        steps: the most steps that conjugate gradients take.
        tolerance: the residual, relative to its right-hand side, at which they stop; None is 10·ε.
        initial_state: :math:`(G_0, C_0)`, as an earlier call returned it.
        cu_seqlens: packed sequences of different lengths, in a batch of one: where each begins and the last one ends,
            int32 or int64. States have one row a sequence. None is a batch of sequences, all equally long.
        chunk_size: tokens treated in one matrix product; changes the speed, not the result.
        backend: "auto" is Triton for CUDA tensors where a kernel exists and PyTorch otherwise; "torch" and
            "triton" force one. There is none for a decay per channel, and none for keys of more than 128 channels.

    Returns:
        The outputs in the dtype of v, and the final state (G, C) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: for a wrong shape, dtype or device, a positive or non-finite log_decay, a ridge ≤ 0, a weight < 0,
            chunk_size or steps < 1, tolerance ≤ 0, bounds that do not rise from 0 to time, a solver that does not solve
            this problem, or backend "triton" where no kernel takes these arguments.

    Warns:
        ConvergenceWarning: with the residual, where conjugate gradients have not converged. Reading it would make a GPU
            wait: kernels warn under `TTR_CHECK=1`.

    Plackett (1950) and Haykin (2002) for a ridge that decays; von Oswald et al. (2025, MesaNet) for one that stays.
    """
    per_head = isinstance(ridge, Tensor) and ridge.ndim == 1
    curvature, cross = initial_state or (None, None)
    check_shapes(
        None,
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        ridge=(ridge, "heads" if per_head else "heads key"),
        log_decay=(log_decay, decay_axes(log_decay)),
        weight=(weight, "batch time heads"),
        **{
            "initial_state[0]": (curvature, "sequences heads key key"),
            "initial_state[1]": (cross, "sequences heads key value"),
        },
    )
    check_range("ridge", ridge, low=0.0, open_low=True)
    check_range("log_decay", log_decay, high=0.0)
    check_range("weight", weight, low=0.0)
    check_chunk_size(chunk_size)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if tolerance is None:
        tolerance = 10 * torch.finfo(state_dtype(v)).eps
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance}")
    if uses_triton(backend, q, v, _without_kernel(q, log_decay)):
        how = {"ridge_decays": ridge_decays, "solver": solver, "steps": steps, "tolerance": tolerance}
        state = None if initial_state is None else tuple(x.float() for x in initial_state)
        tensors = {"ridge": ridge, "log_decay": log_decay, "weight": weight}
        y, state, residual = in_kernel("least_squares", v, cu_seqlens, q, k, v, initial_state=state, **tensors, **how)
        if may_read(residual):
            warn_unless_converged(residual.item(), tolerance, steps)
        return y, state
    choose = partial(_chosen, solver, ridge_decays=ridge_decays, steps=steps, tolerance=tolerance)
    others = (ridge, ridge_decays, choose, chunk_size, backend)
    return each_sequence(cu_seqlens, _in_torch, (q, k, v, log_decay, weight), initial_state, *others)


def _without_kernel(q: Tensor, log_decay: Tensor | None) -> str | None:
    """What about these arguments the kernel does not compute."""
    if log_decay is not None and log_decay.ndim == 4:
        return "least squares with a decay per channel"
    if q.shape[-1] > KERNEL_KEY_SIZE:
        return f"least squares with keys of {q.shape[-1]} channels (its kernels take 1 to {KERNEL_KEY_SIZE})"
    return None


def _in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    weight: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    ridge: Tensor,
    ridge_decays: bool,
    choose: Callable[[Tensor | None, int], Solve],
    chunk_size: int,
    backend: Backend,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dtype = state_dtype(v)
    curvature, cross = state or (None, None)
    solve = choose(log_decay, q.shape[1])
    with without_autocast(v):
        q, k, values, ridge = (x.to(dtype) for x in (q, k, v, ridge))
        log_decay, weight = (None if x is None else x.to(dtype) for x in (log_decay, weight))
        if ridge.ndim == 1:
            ridge = ridge.unsqueeze(-1).expand(k.shape[2:])
        if curvature is None:
            prior = torch.diag_embed(ridge if ridge_decays else torch.zeros_like(ridge))
            curvature = prior.expand(k.shape[0], *prior.shape)
        stays = None if ridge_decays else ridge
        x, curvature = _Whiten.apply(solve, chunk_size, q, k, weight, log_decay, curvature.to(dtype), stays)
        y, cross = linear_attention(
            x,
            _weighted(k, weight),
            values,
            log_decay,
            initial_state=zero_state(k, v) if cross is None else cross.to(dtype),
            chunk_size=chunk_size,
            backend=backend,
        )
    return y.to(v.dtype), (curvature, cross)


class _Systems(NamedTuple):
    """The matrices M_t = G_t + Λ of chunks of tokens, none of them formed; transposed where asked."""

    k: Tensor  # (chunks, chunk, key), times √w
    log_decay: Tensor | None  # (chunks, chunk) or (chunks, chunk, key)
    start: Tensor  # (chunks, key, key)
    ridge: Tensor | None  # (chunks, 1, key)
    transposed: bool

    def part(self, chunks: Any, tokens: slice = slice(None)) -> _Systems:
        """Some of the tokens of some chunks, as if they began with the chunk."""
        k, log_decay, start, ridge, transposed = self
        return _Systems(
            k[chunks, tokens],
            None if log_decay is None else log_decay[chunks, tokens],
            start[chunks],
            None if ridge is None else ridge[chunks],
            transposed,
        )


Solve = Callable[[_Systems, Tensor], Tensor]


class _Whiten(torch.autograd.Function):
    """(x, G_T) with (G_t + Λ)ᵀ x_t = q_t, by implicit differentiation."""

    @staticmethod
    def forward(
        ctx: Any,
        solve: Solve,
        chunk_size: int,
        q: Tensor,
        k: Tensor,
        weight: Tensor | None,
        log_decay: Tensor | None,
        curvature: Tensor,
        ridge: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        matrices = k, weight, log_decay, curvature, ridge
        x, curvature = _whiten(solve, chunk_size, q, *matrices, transposed=True)
        ctx.solve, ctx.chunk_size = solve, chunk_size
        ctx.save_for_backward(x, *matrices)
        return x, curvature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x_gradient: Tensor, curvature_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        z, _ = _whiten(ctx.solve, ctx.chunk_size, x_gradient, *matrices, transposed=False)
        needed = ctx.needs_input_grad[3:]
        leaves: list[Any] = [
            None if matrix is None else matrix.detach().requires_grad_(need)
            for matrix, need in zip(matrices, needed, strict=True)
        ]
        k, weight, log_decay, start, ridge = leaves
        with torch.enable_grad():
            image, curvature = linear_attention(
                x, _weighted(k, weight), k, log_decay, initial_state=start, chunk_size=ctx.chunk_size, backend="torch"
            )
            if ridge is not None:
                image = image + ridge * x
            total = (curvature * curvature_gradient).sum() - (image * z).sum()
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        found = iter(torch.autograd.grad(total, wanted, materialize_grads=True) if wanted else ())
        return None, None, z, *(next(found) if need else None for need in needed)


def _weighted(k: Tensor, weight: Tensor | None) -> Tensor:
    return k if weight is None else weight.unsqueeze(-1) * k


def _chosen(
    solver: Solver, log_decay: Tensor | None, time: int, *, ridge_decays: bool, steps: int, tolerance: float
) -> Solve:
    """The solver of that name; of those that solve this problem, the fastest for "auto"."""
    solvers: dict[Solver, Solve] = {
        "chunk": _by_chunks,
        "conjugate_gradients": partial(_by_conjugate_gradients, steps=steps, tolerance=tolerance),
        "direct": _direct,
    }
    problem = f"a ridge that {'decays' if ridge_decays else 'stays'}"
    if not ridge_decays:
        del solvers["chunk"]
    if log_decay is not None and log_decay.ndim == 4:
        problem = "a decay per channel"
        solvers = {"direct": _direct}
    if solver == "auto":
        return next(iter(solvers.values())) if time > FEW_TOKENS else _direct
    if solver not in solvers:
        names = ", ".join(f'"{name}"' for name in ("auto", *solvers))
        raise ValueError(f"solver: expected one of {names} for {problem}, got {solver!r}")
    return solvers[solver]


def _whiten(
    solve: Solve,
    chunk_size: int,
    right: Tensor,
    k: Tensor,
    weight: Tensor | None,
    log_decay: Tensor | None,
    curvature: Tensor,
    ridge: Tensor | None,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Solve with every token's matrix, or its transpose; also the final curvature."""

    def step(right: Tensor, k: Tensor, log_decay: Tensor | None, curvature: Tensor) -> tuple[Tensor, Tensor]:
        decay = ChunkDecay(log_decay)
        writes = decay.until_end(k).mT @ k
        starts = []
        for factor, write in zip(decay.over_chunks(k.shape[2], k.dtype), writes.unbind(2), strict=True):
            starts.append(curvature)
            curvature = factor * curvature + write
        chunks = right.shape[:3]
        systems = _Systems(
            k.flatten(0, 2),
            None if log_decay is None else log_decay.flatten(0, 2),
            torch.stack(starts, dim=2).flatten(0, 2),
            None if ridge is None else ridge[:, None, None].expand(*chunks, 1, -1).flatten(0, 2),
            transposed,
        )
        return solve(systems, right.flatten(0, 2)).unflatten(0, chunks), curvature

    k = k if weight is None else weight.sqrt().unsqueeze(-1) * k
    return map_chunks(step, (right, k, log_decay), curvature, like=right, chunk_size=chunk_size)


def _parts(systems: _Systems, right: Tensor) -> Iterator[tuple[_Systems, Tensor]]:
    """The chunks and their right-hand sides, as many at a time as are solved together."""
    count = max(len(right), 1)
    together = CHUNKS_TOGETHER if right.device.type == "cpu" else count
    for first in range(0, count, together):
        part = slice(first, first + together)
        yield systems.part(part), right[part]


def _direct(systems: _Systems, right: Tensor) -> Tensor:
    return torch.cat([_token_by_token(*part) for part in _parts(systems, right)])


def _token_by_token(systems: _Systems, right: Tensor) -> Tensor:
    k, log_decay, curvature, ridge, transposed = systems
    symmetric = log_decay is None or log_decay.ndim == 2
    stays = 0.0 if ridge is None else torch.diag_embed(ridge.squeeze(1))
    x = []
    for t in range(k.shape[1]):
        if log_decay is not None:
            factor = log_decay[:, t].exp()
            curvature = (factor[:, None, None] if symmetric else factor[..., None]) * curvature
        curvature = torch.baddbmm(curvature, k[:, t].unsqueeze(2), k[:, t].unsqueeze(1))
        matrix = curvature + stays
        x.append(_factorised(matrix.mT if transposed else matrix, symmetric)(right[:, t].unsqueeze(-1)))
    return torch.stack(x, dim=1).squeeze(-1)


def _factorised(matrix: Tensor, symmetric: bool) -> Callable[[Tensor], Tensor]:
    """Solve with each matrix; where rounding has eaten a pivot, with a little added to the diagonal."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * diagonal.abs()
    factorise = torch.linalg.cholesky_ex if symmetric else torch.linalg.lu_factor_ex
    factors = factorise(matrix)
    pivots = factors[0].diagonal(dim1=-2, dim2=-1)
    pivots = pivots.square() if symmetric else pivots.abs()
    lost = ((pivots <= rounding).any(-1) | (factors[-1] > 0)).nonzero().squeeze(-1)
    if len(lost):
        floor = 4 * rounding[lost] + torch.finfo(matrix.dtype).tiny ** 0.5
        for factor, floored in zip(factors, factorise(matrix[lost] + torch.diag_embed(floor)), strict=True):
            factor[lost] = floored
    if symmetric:
        return partial(torch.cholesky_solve, input2=factors[0])
    return partial(torch.linalg.lu_solve, *factors[:2])


def _by_chunks(systems: _Systems, right: Tensor) -> Tensor:
    size = right.shape[1]
    if size <= FEW_TOKENS:
        return _token_by_token(systems, right)
    solved = [_woodbury(*part) for part in _parts(systems, right)]
    x, accurate = (torch.cat(found) for found in zip(*solved, strict=True))
    cut = (~accurate).nonzero().squeeze(-1)
    if len(cut):
        half = size // 2
        first, second = (systems.part(cut, tokens) for tokens in (slice(half), slice(half, None)))
        decay = ChunkDecay(first.log_decay)
        left = decay.since_start(torch.ones_like(first.k[..., :1]))[:, -1:]
        second = second._replace(start=left * first.start + decay.until_end(first.k).mT @ first.k)
        x[cut] = torch.cat([_by_chunks(first, right[cut, :half]), _by_chunks(second, right[cut, half:])], dim=1)
    return x


def _woodbury(systems: _Systems, right: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk form, and which of the chunks it solves accurately."""
    k, log_decay, start, *_ = systems
    left = ChunkDecay(log_decay).since_start(torch.ones_like(k[..., :1]))
    whitening = _inverse_factor(start)
    keys, queries = k @ whitening.mT, right @ whitening.mT
    overlap = keys @ keys.mT
    overlap.diagonal(dim1=-2, dim2=-1).add_(left.squeeze(-1))
    inverse = _inverse_factor(overlap)
    gains = inverse @ keys
    whitened = queries - (queries @ gains.mT).tril_() @ gains
    x = whitened / left @ whitening
    # How much the factors and the subtraction may cancel is measured: with more, answers blow up where float32
    # resolves little; with less, chunks are cut that are accurate.
    eps = torch.finfo(k.dtype).eps
    accurate = _cancellation(start, whitening) <= eps**-0.375
    accurate &= (queries.norm(dim=-1) <= eps**-0.375 * whitened.norm(dim=-1)).all(-1)
    accurate &= (_cancellation(overlap, inverse) <= eps**-0.25) & (left[:, -1, 0] > eps)
    return x, accurate


def _cancellation(matrix: Tensor, inverse: Tensor) -> Tensor:
    """How much larger a diagonal entry is than the pivot left of it, at most; `inverse` is that of the factor."""
    return (matrix.diagonal(dim1=-2, dim2=-1) * inverse.diagonal(dim1=-2, dim2=-1).square()).amax(-1)


def _inverse_factor(matrix: Tensor) -> Tensor:
    """L⁻¹ with L Lᵀ = matrix, by halves: products do most of it, several times faster than batched LAPACK.

    NaN where the matrix is not positive definite.
    """
    size = matrix.shape[-1]
    if size <= 16:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        factor = torch.where(failed[:, None, None] > 0, torch.nan, factor)
        return torch.linalg.solve_triangular(factor, torch.eye(size).to(matrix), upper=False)
    half = size // 2
    first = _inverse_factor(matrix[:, :half, :half])
    below = matrix[:, half:, :half] @ first.mT
    second = _inverse_factor(torch.baddbmm(matrix[:, half:, half:], below, below.mT, alpha=-1))
    inverse = torch.zeros_like(matrix)
    inverse[:, :half, :half] = first
    inverse[:, half:, half:] = second
    inverse[:, half:, :half] = -(second @ (below @ first))
    return inverse


def _by_conjugate_gradients(systems: _Systems, right: Tensor, *, steps: int, tolerance: float) -> Tensor:
    solved = [_iterate(*part, steps=steps, tolerance=tolerance) for part in _parts(systems, right)]
    x, residuals = zip(*solved, strict=True)
    warn_unless_converged(max(residuals), tolerance, steps)
    return torch.cat(x)


def _iterate(systems: _Systems, right: Tensor, *, steps: int, tolerance: float) -> tuple[Tensor, float]:
    k, log_decay, start, ridge, _ = systems
    decay = ChunkDecay(log_decay)
    left = decay.since_start(torch.ones_like(k[..., :1]))
    between = torch.ones_like(k @ k.mT).tril() if log_decay is None else decay.matrix
    stays = torch.zeros_like(start[:, :1]) if ridge is None else ridge

    # Jacobi's preconditioner, one for all tokens of a chunk: as a change of units it costs nothing a step.
    diagonal = left * start.diagonal(dim1=-2, dim2=-1).unsqueeze(1) + between @ k.square() + stays
    unit = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(k.dtype).tiny).rsqrt()
    k, start, stays = unit * k, unit.mT * start * unit, unit * stays * unit

    def multiply(x: Tensor) -> Tensor:
        image = (stays * x).baddbmm_(left * x, start)
        return image.baddbmm_((x @ k.mT).mul_(between), k)

    x, residual = conjugate_gradients(multiply, unit * right, steps=steps, tolerance=tolerance)
    return unit * x, residual
