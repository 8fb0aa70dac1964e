r"""Degree 1 of family (d), and its learned probe: the weights of a block of queries, one solve a query, two sums.

With p the normalised weights of a query, μ = Σ p k and C = Σ p (k − μ)(k − μ)ᵀ, the local linear fit reads

    y = Σ p_i (1 + u·(k_i − μ)) v_i ,   (C + λI) u = q − μ .

C is never formed for a query: (C + λI) x = (P ∘ (x Kᵀ − x·μ)) K + λx for a block of queries at once, two matrix
products. P, block × keys, is kept while conjugate gradients run, so the exponentials are taken once. All solves
are preconditioned. The mean of C over the block costs key/(2·block) of a step and holds what the queries share;
the C of each query makes the solve direct, and the steps that follow undo its rounding.

A forward with n steps costs (2n + 4)·T²·key floating-point operations a head, a backward (2n + 11). The direct
solver adds T²·key²/2 + T·key³/3. Memory is block × keys for the heads that are treated together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ttr.ops._chunks import without_autocast
from ttr.ops._convergence import warn_unless_converged

Solver = Literal["auto", "conjugate_gradients", "direct"]

DIRECT_KEY = 8  # up to here factors of single queries are cheaper than the steps they save
WORTH_A_COPY = 0.85  # so few of the queries unfinished that their weights are copied out
SCORES_IN_CACHE, SCORES_ON_DEVICE = 2**20, 2**26  # numbers in a block of scores, on the CPU and elsewhere


@dataclass(frozen=True)
class Settings:
    """All that a local linear fit takes beside tensors."""

    chunk_size: int
    window: int | None
    solver: Solver
    steps: int
    tolerance: float


def spans(past: int, time: int, window: int | None, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the pairs that a block sees; the first `past` pairs have no query."""
    for start in range(0, time, size):
        stop = min(start + size, time)
        first = 0 if window is None else max(0, past + start - window + 1)
        yield slice(start, stop), slice(first, past + stop)


def log_factors(
    rows: slice, columns: slice, window: int | None, elapsed: Tensor | None, key_bias: Tensor | None, like: Tensor
) -> Tensor:
    """What is added to the scores of a block: decay, the bias of a key, and −inf outside the window or the past.

    `elapsed` and `key_bias` are (…, pairs); the decay is a difference of float64 sums, as in `ChunkDecay`. Of the
    result, (…, rows, columns), leading axes are absent where nothing depends on them.
    """
    index = torch.arange(columns.start, columns.stop, device=like.device)
    time = index[rows.start - rows.stop :]
    outside = index > time[:, None]
    if window is not None:
        outside |= index <= time[:, None] - window
    factors = like.new_zeros(())
    if elapsed is not None:
        elapsed = elapsed[..., columns]
        factors = (elapsed[..., rows.start - rows.stop :, None] - elapsed[..., None, :]).to(like.dtype)
    if key_bias is not None:
        factors = factors + key_bias[..., None, columns]
    return torch.where(outside, -torch.inf, factors)


@dataclass(frozen=True)
class Block:
    """The pairs that a block of queries sees. No method records gradients; `scores` is scratch space.

    Attributes:
        k: (heads, pairs, key).
        weights: normalised, (heads, queries, pairs).
        mean: of the keys, (heads, queries, key).
        scores: shaped like the weights.
    """

    k: Tensor
    weights: Tensor
    mean: Tensor
    scores: Tensor

    @classmethod
    def weigh(cls, q: Tensor, k: Tensor, factors: Tensor, may_be_empty: bool) -> Block:
        """The softmax of q·k + factors over the pairs; queries whose factors are all −inf only where said so."""
        scores = q @ k.mT
        weights = scores.add_(factors).softmax(-1)
        if may_be_empty:  # a query that no pair has weight for sees zeros, not the softmax of nothing
            weights.masked_fill_(factors.isneginf().all(-1, keepdim=True), 0)
        return cls(k, weights, weights @ k, scores)

    def take(self, rows: Tensor) -> Block:
        """The block of these queries, (heads × queries) of this one's laid flat, as many in each head."""
        weights, mean = _take(self.weights, rows), _take(self.mean, rows)
        return Block(self.k, weights, mean, self.scores.flatten()[: weights.numel()].view_as(weights))

    def contrasts(self, x: Tensor) -> Tensor:
        """x·(k_i − μ) for every pair, in the scratch space."""
        return torch.bmm(x, self.k.mT, out=self.scores).sub_((x * self.mean).sum(-1, keepdim=True))

    def covariance(self, x: Tensor) -> Tensor:
        """C x."""
        return self.contrasts(x).mul_(self.weights) @ self.k

    def mean_covariance(self) -> Tensor:
        """The mean of C over the queries, (heads, 1, key, key)."""
        weights = self.weights.mean(1).unsqueeze(-1)
        moment = (weights * self.k).mT @ self.k - self.mean.mT @ self.mean / self.mean.shape[1]
        return moment.unsqueeze(1)

    def covariances(self) -> Tensor:
        """C of each query, (heads, queries, key, key), as one product with all k_a k_b of a stretch of pairs."""
        key, (heads, queries, _) = self.k.shape[-1], self.weights.shape
        a, b = torch.triu_indices(key, key, device=self.k.device)
        moment = self.k.new_zeros(heads, queries, len(a))
        stretch = max(256, self.scores.numel() // (heads * len(a)))
        for k, weights in zip(self.k.split(stretch, 1), self.weights.split(stretch, 2), strict=True):
            moment.baddbmm_(weights, k[..., a] * k[..., b])
        moment -= self.mean[..., a] * self.mean[..., b]
        full = moment.new_empty(heads, queries, key, key)
        full[..., a, b] = full[..., b, a] = moment
        return full


def _preconditioner(covariance: Tensor, ridge: Tensor) -> Callable[[Tensor], Tensor]:
    """x ↦ (C + λI)^{-1} x for a matrix a head, (heads, 1, key, key), or a query."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    # Rounding may leave the smallest eigenvalues below zero. This much more makes them positive, and costs steps only.
    floor = 2 * covariance.shape[-1] * torch.finfo(covariance.dtype).eps * diagonal.sum(-1, keepdim=True)
    diagonal += ridge + floor
    factor, _ = torch.linalg.cholesky_ex(covariance)
    if covariance.shape[1] == 1:
        inverse = torch.cholesky_inverse(factor).squeeze(1)
        return lambda x: x @ inverse
    return lambda x: torch.cholesky_solve(x.unsqueeze(-1), factor).squeeze(-1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, (x.shape[0], -1))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _solve(block: Block, ridge: Tensor, right: Tensor, how: Settings) -> tuple[Tensor, float]:
    """(C + λI)^{-1} right for each query by conjugate gradients, and the largest relative residual.

    Residuals are measured by the preconditioner, rᵀMr, which every step takes anyway; M ≈ (C + λI)^{-1} makes that
    the error in the norm that least squares is about. Queries that have converged are left out of what follows.
    """
    heads, queries, key = right.shape
    tiny = torch.finfo(right.dtype).tiny
    factorised = never = how.steps + 1
    if queries > 1 and how.solver == "direct":
        factorised = 0
    if queries > 1 and how.solver == "auto":
        # Its factor costs a query less than key steps, by which only rounding can have kept it from converging.
        factorised = 0 if key <= DIRECT_KEY else key
    if factorised:
        precondition = _preconditioner(block.mean_covariance(), ridge)

    length = right.norm(dim=-1, keepdim=True)
    left = right / length.clamp_min(tiny)
    x, direction = torch.zeros_like(left), torch.zeros_like(left)
    fall, shortest = torch.ones_like(length), torch.ones_like(length)
    solution, rows = x.new_empty(heads * queries, key), torch.arange(heads * queries, device=x.device)

    def settle() -> None:
        # What is left after the last step is known, and a step along it as short as any so far is safe.
        solution.index_copy_(0, rows, torch.addcmul(x, shortest, conditioned).flatten(0, 1))

    for step in range(never):
        if step == factorised:
            precondition = _preconditioner(block.covariances(), ridge)
            direction.zero_()
        conditioned = precondition(left)
        previous, fall = fall, _dot(left, conditioned)
        if step == 0:
            goal = how.tolerance**2 * fall
        unfinished = fall > goal
        most = int(unfinished.sum(1).max())
        if most == 0 or step == how.steps:
            break
        if step < factorised and most <= WORTH_A_COPY * unfinished.shape[1]:
            settle()
            kept = unfinished.squeeze(-1).float().topk(most, dim=1).indices
            kept = (kept + unfinished.shape[1] * torch.arange(heads, device=x.device)[:, None]).flatten()
            rows, block = rows[kept], block.take(kept)
            x, left, conditioned, direction = (_take(each, kept) for each in (x, left, conditioned, direction))
            previous, fall, goal, shortest = (_take(each, kept) for each in (previous, fall, goal, shortest))
        direction = torch.addcmul(conditioned, fall / previous.clamp_min(tiny), direction)
        image = block.covariance(direction).addcmul_(ridge, direction)
        size = fall / _dot(direction, image).clamp_min(tiny)
        shortest = torch.minimum(shortest, size)
        x.addcmul_(size, direction)
        left.addcmul_(size, image, value=-1)
    settle()
    residual = how.tolerance * (fall / goal)[unfinished].max().sqrt().item() if most else 0.0
    return solution.view_as(right) * length, residual


def _blocks(
    q: Tensor, k: Tensor, elapsed: Tensor | None, key_bias: Tensor | None, how: Settings
) -> Iterator[tuple[slice, slice, slice, Block]]:
    """Heads, queries and pairs of every block, and the block; as many heads at once as fit its scores."""
    heads, time, pairs = *q.shape[:2], k.shape[1]
    seen = pairs if how.window is None else min(pairs, how.window + how.chunk_size)
    widest = max(seen, q.shape[-1] ** 2) if how.solver == "direct" else seen
    numbers = SCORES_IN_CACHE if q.device.type == "cpu" else SCORES_ON_DEVICE
    together = max(1, numbers // (min(how.chunk_size, time) * widest))
    for first in range(0, heads, together):
        group = slice(first, min(first + together, heads))
        some_elapsed, some_bias = (None if x is None else x[group] for x in (elapsed, key_bias))
        for rows, columns in spans(pairs - time, time, how.window, how.chunk_size):
            factors = log_factors(rows, columns, how.window, some_elapsed, some_bias, q)
            yield group, rows, columns, Block.weigh(q[group, rows], k[group, columns], factors, key_bias is not None)


class LocalLinear(torch.autograd.Function):
    """y from q (scaled), k and v, (heads, time, …), with u solved for at `target` or given as `probe`.

    Pairs may precede the queries. `elapsed` (float64) and `key_bias`, (heads, pairs), enter the log-weights as
    elapsed_t − elapsed_i + key_bias_i. `ridge` is (heads, 1, 1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        target: Tensor,
        ridge: Tensor | None,
        probe: Tensor | None,
        elapsed: Tensor | None,
        key_bias: Tensor | None,
        how: Settings,
    ) -> Tensor:
        y = v.new_empty(*q.shape[:2], v.shape[-1])
        slope = torch.empty_like(q) if probe is None else probe
        worst = 0.0
        for heads, rows, columns, block in _blocks(q, k, elapsed, key_bias, how):
            if ridge is not None:
                u, residual = _solve(block, ridge[heads], target[heads, rows] - block.mean, how)
                slope[heads, rows] = u
                worst = max(worst, residual)
            lifted = block.contrasts(slope[heads, rows]).add_(1).mul_(block.weights)
            y[heads, rows] = lifted @ v[heads, columns]
        warn_unless_converged(worst, how.tolerance, how.steps)
        ctx.save_for_backward(q, k, v, slope, ridge, elapsed, key_bias)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With a_i = u·(k_i − μ), g_i = ∂y·v_i less its mean, z = (C + λI)^{-1} Σ p g k and e_i = z·(k_i − μ):

        ∂k_i = p_i (g_i − e_i) u − p_i (1 + a_i) z and the log-weight gets p_i (1 + a_i)(g_i − e_i) less its share
        of the sum; the target gets z and λ gets −z·u. For a probe z is 0, and the probe gets Σ p g k.
        """
        q, k, v, slope, ridge, elapsed, key_bias = ctx.saved_tensors
        how = ctx.how
        to_q, to_k, to_v, to_slope = (torch.zeros_like(x) for x in (q, k, v, slope))
        to_bias = k.new_zeros(k.shape[:2])
        worst = 0.0
        with without_autocast(k):
            for heads, rows, columns, block in _blocks(q, k, elapsed, key_bias, how):
                u, y_gradient, weights = slope[heads, rows], gradient[heads, rows], block.weights
                lift = block.contrasts(u) + 1
                lifted = lift * weights
                to_v[heads, columns].baddbmm_(lifted.mT, y_gradient)

                pull = y_gradient @ v[heads, columns].mT
                pull -= (pull * weights).sum(-1, keepdim=True)
                z = (pull * weights) @ block.k
                if ridge is not None:
                    z, residual = _solve(block, ridge[heads], z, how)
                    worst = max(worst, residual)
                    pull -= block.contrasts(z)
                    to_k[heads, columns].baddbmm_(lifted.mT, z, alpha=-1)
                to_slope[heads, rows] = z

                pull *= weights
                to_k[heads, columns].baddbmm_(pull.mT, u)
                pull *= lift
                pull -= weights * pull.sum(-1, keepdim=True)
                to_q[heads, rows] = pull @ block.k
                to_k[heads, columns].baddbmm_(pull.mT, q[heads, rows])
                to_bias[heads, columns] += pull.sum(1)
        warn_unless_converged(worst, how.tolerance, how.steps)
        to_ridge = None if ridge is None else -(to_slope * slope).sum((1, 2), keepdim=True)
        to_target, to_probe = (None, to_slope) if ridge is None else (to_slope, None)
        to_elapsed = None if elapsed is None else -to_bias.double()
        return to_q, to_k, to_v, to_target, to_ridge, to_probe, to_elapsed, None if key_bias is None else to_bias, None
