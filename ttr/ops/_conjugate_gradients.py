"""Conjugate gradients for one positive definite system a token, all tokens at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class ConvergenceWarning(UserWarning):
    """An iteration used up its steps before every system met its tolerance."""


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, *, steps: int, tolerance: float
) -> Tensor:
    """Solve M x = right for every vector along the last axis, to a residual of at most tolerance·‖right‖.

    `multiply` applies every token's own M; `diagonal` holds the diagonals of M, the preconditioner. Stops when all
    systems have converged; warns with the largest relative residual where `steps` did not suffice. Hestenes & Stiefel
    (1952).
    """
    x = torch.zeros_like(right)
    residual = right.clone()
    target = tolerance**2 * _dot(right, right)
    direction = residual / diagonal
    energy = _dot(residual, direction)
    for _ in range(steps):
        running = _dot(residual, residual) > target
        if not running.any():
            return x
        image = multiply(direction)
        # A system that has converged takes no more steps: their length would be 0/0.
        length = torch.where(running, energy / _dot(direction, image), 0)
        x.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        preconditioned = residual / diagonal
        before, energy = energy, _dot(residual, preconditioned)
        direction.mul_(torch.where(running, energy / before, 0)).add_(preconditioned)
    relative = tolerance * (_dot(residual, residual) / target).nan_to_num(0.0).amax().sqrt().item()
    if not relative <= tolerance:
        message = f"conjugate gradients: residual {relative:.1e} after {steps} steps, tolerance {tolerance:.1e}"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)
