r"""Family (c): exact least squares, the regression solved at every token.

With the curvature G_t and the cross moment C_t of all pairs so far, the memory is (G_t + Λ)⁻¹ C_t. It is read as
C_tᵀ x_t: linear attention whose queries x_t = (G_t + Λ)⁻¹ q_t have been whitened. Everything here is about finding
x_t; three solvers do, and none of them forms more than one G a chunk at a time.

The chunk form, for a decay per head and no ridge but what G_0 contains. Scale the keys by √w, write c_t for the
cumulative log-decay in the chunk, and let J G_0⁻¹-whiten, JᵀJ = G_0⁻¹. With K̂ = K Jᵀ, Q̂ = Q Jᵀ,

    A = Diag(e^c) + K̂ K̂ᵀ = L Lᵀ,   W = L⁻¹ K̂,   X = Diag(e^{−c}) (Q̂ − tril(Q̂ Wᵀ) W) J

are all tokens' answers: Woodbury's identity for every leading block of A at once. Two factorisations a chunk, all
chunks at the same time. The subtraction loses the digits by which a chunk's own pairs outweigh what was there before
it. Both losses can be read off the factors; chunks that lose too many are cut in halves, and at a few tokens solved
one by one. No exponent but that of the last division is positive, and where that is large the chunk is cut.

The gradient of a solve is a solve: with z_t = (G_t + Λ)⁻ᵀ ∂y/∂x_t, what remains is the derivative of −z_tᵀ (G_t + Λ) x_t
at fixed x and z, linear attention again.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttr.ops._backend import Backend, uses_triton
from ttr.ops._check import check_chunk_size, check_range, check_shapes, decay_axes
from ttr.ops._chunks import ChunkDecay, map_chunks, state_dtype, without_autocast, zero_state
from ttr.ops._conjugate_gradients import ConvergenceWarning, conjugate_gradients
from ttr.ops.linear_attention import linear_attention

__all__ = ["ConvergenceWarning", "least_squares"]

Solver = Literal["auto", "chunk", "conjugate_gradients", "direct"]

# What can solve which problem, the one to prefer first.
SOLVERS: dict[tuple[str, str], tuple[Solver, ...]] = {
    ("a ridge that decays", "head"): ("chunk", "direct", "conjugate_gradients"),
    ("a ridge that stays", "head"): ("conjugate_gradients", "direct"),
    ("a ridge that decays", "channel"): ("direct",),
    ("a ridge that stays", "channel"): ("direct",),
}
FEW_TOKENS = 4


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
    steps: int = 100,
    tolerance: float = 1e-5,
    initial_state: tuple[Float[Tensor, "batch heads key key"], Float[Tensor, "batch heads key value"]] | None = None,
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> tuple[
    Float[Tensor, "batch time heads value"],
    tuple[Float[Tensor, "batch heads key key"], Float[Tensor, "batch heads key value"]],
]:
    r"""TODO."""
    per_head = ridge.ndim == 1 if isinstance(ridge, Tensor) else False
    curvature, cross = (None, None) if initial_state is None else initial_state
    check_shapes(
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        ridge=(ridge, "heads" if per_head else "heads key"),
        log_decay=(log_decay, decay_axes(log_decay)),
        weight=(weight, "batch time heads"),
        **{
            "initial_state[0]": (curvature, "batch heads key key"),
            "initial_state[1]": (cross, "batch heads key value"),
        },
    )
    check_range("ridge", ridge, low=0.0, open_low=True)
    check_range("log_decay", log_decay, high=0.0)
    check_range("weight", weight, low=0.0)
    check_chunk_size(chunk_size)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number, got {tolerance}")
    uses_triton(backend, q, missing="least squares")
    method = _choose(solver, ridge_decays, log_decay, q.shape[1])

    dtype = state_dtype(v)
    with without_autocast(v):
        output_dtype = v.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if per_head:
            ridge = ridge.unsqueeze(-1).expand(-1, k.shape[-1])
        ridge = ridge.to(dtype)
        if curvature is None:
            prior = torch.diag_embed(ridge) if ridge_decays else torch.zeros_like(ridge).diag_embed()
            curvature = prior.expand(k.shape[0], *prior.shape)
        weighted = k if weight is None else weight.unsqueeze(-1) * k
        cross = zero_state(k, v) if cross is None else cross.to(dtype)
        curvature = curvature.to(dtype)
        solve = _Solve(method, chunk_size, steps, tolerance)
        x = _Whiten.apply(solve, q, k, weight, log_decay, curvature, None if ridge_decays else ridge)
        y, cross = linear_attention(
            x, weighted, v, log_decay, initial_state=cross, chunk_size=chunk_size, backend=backend
        )
        return y.to(output_dtype), (_last_curvature(k, weighted, log_decay, curvature), cross)


def _choose(solver: Solver, ridge_decays: bool, log_decay: Tensor | None, time: int) -> Solver:
    ridge = "a ridge that decays" if ridge_decays else "a ridge that stays"
    per = decay_axes(log_decay).split()[-1].removesuffix("s")
    allowed = SOLVERS[
        "a ridge that decays" if ridge_decays else "a ridge that stays", "channel" if per == "key" else "head"
    ]
    if solver == "auto":
        return allowed[0] if time > FEW_TOKENS else "direct"
    if solver not in allowed:
        raise ValueError(f"solver: expected {allowed} got {solver!r} {ridge}")
    return solver


def _last_curvature(k: Tensor, weighted: Tensor, log_decay: Tensor | None, curvature: Tensor) -> Tensor:
    if log_decay is None:
        return curvature + torch.einsum("bthi,bthj->bhij", weighted, k)
    elapsed = log_decay.double().flip(1).cumsum(1).flip(1)
    if elapsed.ndim == 3:
        elapsed = elapsed.unsqueeze(-1)
    left = (elapsed - log_decay.double().reshape(*log_decay.shape[:3], -1)).to(k.dtype).exp()
    total = log_decay.double().reshape(*log_decay.shape[:3], -1).sum(1).to(k.dtype).exp().unsqueeze(-1)
    return total * curvature + torch.einsum("bthi,bthj->bhij", left * weighted, k)


class _Solve:
    def __init__(self, method, chunk_size, steps, tolerance):
        self.method, self.chunk_size, self.how = method, chunk_size, {"steps": steps, "tolerance": tolerance}

    def __call__(self, right, k, weight, log_decay, curvature, ridge, adjoint):
        keys = k if weight is None else weight.sqrt().unsqueeze(-1) * k

        def step(right, k, log_decay, curvature):
            decay = ChunkDecay(log_decay)
            starts = []
            writes = decay.until_end(k).mT @ k
            for factor, write in zip(decay.over_chunks(k.shape[2], k.dtype), writes.unbind(2), strict=True):
                starts.append(curvature)
                curvature = factor * curvature + write
            start = torch.stack(starts, 2)
            shape = right.shape
            if ridge is not None:
                flat_ridge = ridge[:, None, :].expand(shape[0], -1, shape[2], -1).flatten(0, 2).unsqueeze(1)
            else:
                flat_ridge = None
            right, k, start = (x.flatten(0, 2) for x in (right, k, start))
            log_decay = None if log_decay is None else log_decay.flatten(0, 2)
            if self.method == "chunk":
                x = in_chunks(right, k, log_decay, start)
            elif self.method == "direct":
                x = one_by_one(right, k, log_decay, start, flat_ridge, adjoint)
            else:
                x = iterate(right, k, log_decay, start, flat_ridge, **self.how)
            return x.view(shape), curvature

        return map_chunks(step, (right, keys, log_decay), curvature, like=right, chunk_size=self.chunk_size)[0]


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, solve, q, k, weight, log_decay, curvature, ridge):
        x = solve(q, k, weight, log_decay, curvature, ridge, adjoint=False)
        ctx.solve = solve
        ctx.save_for_backward(x, k, weight, log_decay, curvature, ridge)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, *tensors = ctx.saved_tensors
        z = ctx.solve(gradient, *tensors, adjoint=True)
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
            k, weight, log_decay, curvature, ridge = leaves
            weighted = k if weight is None else weight.unsqueeze(-1) * k
            image, _ = linear_attention(z, weighted, k, log_decay, initial_state=curvature, backend="torch")
            if ridge is not None:
                image = image + ridge * z
            wanted = [t for t, n in zip(leaves, needed, strict=True) if n]
            found = iter(torch.autograd.grad(image, wanted, -x) if wanted else ())
        return None, z, *(next(found) if n else None for n in needed)


def inverse_factor(a: Tensor) -> Tensor:
    size = a.shape[-1]
    if size <= 16:
        factor, info = torch.linalg.cholesky_ex(a)
        factor = torch.where((info > 0)[..., None, None], torch.nan, factor)
        return torch.linalg.solve_triangular(factor, torch.eye(size, dtype=a.dtype, device=a.device), upper=False)
    half = size // 2
    first = inverse_factor(a[..., :half, :half])
    below = a[..., half:, :half] @ first.mT
    second = inverse_factor(torch.baddbmm(a[..., half:, half:], below, below.mT, alpha=-1))
    inverse = torch.zeros_like(a)
    inverse[..., :half, :half] = first
    inverse[..., half:, half:] = second
    inverse[..., half:, :half] = second @ (below @ first).neg_()
    return inverse


def in_chunks(right: Tensor, k: Tensor, log_decay: Tensor | None, start: Tensor) -> Tensor:
    size = right.shape[1]
    if size <= FEW_TOKENS:
        return one_by_one(right, k, log_decay, start)
    decay = ChunkDecay(log_decay)
    eps = torch.finfo(k.dtype).eps
    limit = eps**-0.33
    left = decay.since_start(torch.ones_like(k[..., :1]))
    whitening = inverse_factor(start)
    keys, queries = k @ whitening.mT, right @ whitening.mT
    a = keys @ keys.mT
    a.diagonal(dim1=-2, dim2=-1).add_(left.squeeze(-1))
    inverse = inverse_factor(a)
    gains = inverse @ keys
    x = queries - (queries @ gains.mT).tril_() @ gains

    def pivot(a, i):
        return (a.diagonal(dim1=-2, dim2=-1) * i.diagonal(dim1=-2, dim2=-1).square()).amax(-1)

    fine = (
        (pivot(start, whitening) < 1 / (eps * start.shape[-1])) & (pivot(a, inverse) < limit) & (left[:, -1, 0] > eps)
    )
    fine &= (queries.norm(dim=-1) <= limit * x.norm(dim=-1)).all(-1)
    x = (x / left) @ whitening
    global LAST
    LAST = (pivot(a, inverse), (queries.norm(dim=-1) / x.norm(dim=-1)).amax(-1))
    for poor in (~fine).nonzero().squeeze(-1).split(256):
        half = size // 2
        first, second = (
            [None if t is None else t[poor, span] for t in (right, k, log_decay)]
            for span in (slice(half), slice(half, None))
        )
        until = ChunkDecay(first[-1])
        middle = until.until_end(first[1]).mT @ first[1]
        middle += start[poor] * (1 if log_decay is None else until.cumulative[:, -1:].exp().to(k.dtype))
        x[poor] = torch.cat([in_chunks(*first, start[poor]), in_chunks(*second, middle)], 1)
    return x


def one_by_one(right, k, log_decay, start, ridge=None, adjoint=False):
    outputs = []
    curvature = start
    eps = torch.finfo(k.dtype).eps
    tiny = torch.finfo(k.dtype).tiny ** 0.5
    symmetric = log_decay is None or log_decay.ndim == 2
    for t in range(k.shape[1]):
        write = k[:, t, :, None] * k[:, t, None, :]
        if log_decay is not None:
            f = log_decay[:, t].exp()
            curvature = curvature * (f[:, None, None] if symmetric else f[..., None])
        curvature = curvature + write
        m = curvature if ridge is None else curvature + torch.diag_embed(ridge[:, 0])
        outputs.append(solve_one(m.mT if adjoint else m, right[:, t], symmetric))
    return torch.stack(outputs, 1)


def solve_one(m, right, symmetric):
    eps = torch.finfo(m.dtype).eps
    floor = m.shape[-1] * eps * m.diagonal(dim1=-2, dim2=-1).abs()
    if symmetric:
        factor, info = torch.linalg.cholesky_ex(m)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    else:
        lu, p, info = torch.linalg.lu_factor_ex(m)
        pivots = lu.diagonal(dim1=-2, dim2=-1).abs()
    poor = (~(pivots > floor).all(-1) | (info > 0)).nonzero().squeeze(-1)
    if len(poor):
        m = m[poor] + torch.diag_embed(2 * floor[poor] + torch.finfo(m.dtype).tiny ** 0.5)
        if symmetric:
            factor[poor] = torch.linalg.cholesky(m)
        else:
            lu[poor], p[poor], _ = torch.linalg.lu_factor_ex(m)
    if symmetric:
        return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    return torch.linalg.lu_solve(lu, p, right.unsqueeze(-1)).squeeze(-1)


def iterate(right, k, log_decay, start, ridge, **how):
    decay = ChunkDecay(log_decay)
    left = decay.since_start(torch.ones_like(k[..., :1]))
    mask = torch.ones(k.shape[1], k.shape[1], dtype=k.dtype).tril() if log_decay is None else decay.matrix
    diagonal = mask @ k.square() + left * start.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    if ridge is not None:
        diagonal += ridge

    def multiply(p):
        out = (p @ start).mul_(left)
        if ridge is not None:
            out.addcmul_(p, ridge)
        return torch.baddbmm(out, (p @ k.mT).mul_(mask), k)

    return conjugate_gradients(multiply, right, diagonal, **how)
