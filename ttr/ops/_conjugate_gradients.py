"""Conjugate gradients on many positive definite systems at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class ConvergenceWarning(UserWarning):
    """An iteration used up its steps before every system met the tolerance."""


def conjugate_gradients(multiply: Callable[[Tensor], Tensor], right: Tensor, *, steps: int, tolerance: float) -> Tensor:
    """Solve M x = right for each vector along the last axis, until all residuals are at most tolerance·‖right‖.

    `multiply` applies to each vector its own M. Warns with the largest relative residual if `steps` were too few.
    Hestenes & Stiefel (1952).
    """
    x = torch.zeros_like(right)
    residual = right.clone()
    direction = right.clone()
    size = energy = _dot(right, right)
    for _ in range(steps):
        running = energy > tolerance**2 * size
        if not running.any():
            return x
        image = multiply(direction)
        # A system that has converged stays where it is: its next step might be 0/0.
        length = torch.where(running, energy / _dot(direction, image), 0)
        x.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, energy = energy, _dot(residual, residual)
        direction.mul_(torch.where(running, energy / before, 0)).add_(residual)
    relative = (energy / size.clamp_min(torch.finfo(size.dtype).tiny)).max().sqrt().item()
    if not relative <= tolerance:
        message = f"conjugate gradients: residual {relative:.1e} after {steps} steps, expected {tolerance:.1e}"
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
