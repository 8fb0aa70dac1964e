"""Conjugate gradients on many positive definite systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], right: Tensor, *, steps: int, tolerance: float
) -> tuple[Tensor, float]:
    """Solve M x = right for each vector along the last axis, until all residuals are at most tolerance·‖right‖.

    `multiply` applies to each vector its own M. Also returns the largest relative residual, or 0 where
    `steps` sufficed. Hestenes & Stiefel (1952).
    """
    # Squares of a gradient that hardly matters would underflow, and the solution is in proportion to it.
    scale = right.abs().amax(-1, keepdim=True)
    residual = right / torch.where(scale > 0, scale, 1)
    x = torch.zeros_like(right)
    direction = residual.clone()
    size = energy = _dot(residual, residual)
    for _ in range(steps):
        running = energy > tolerance**2 * size
        if not running.any():
            return x * scale, 0.0
        image = multiply(direction)
        # A system that has converged stays where it is: its next step might be 0/0.
        length = torch.where(running, energy / _dot(direction, image), 0)
        x.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        before, energy = energy, _dot(residual, residual)
        direction.mul_(torch.where(running, energy / before, 0)).add_(residual)
    relative = (energy / size.clamp_min(torch.finfo(size.dtype).tiny)).max().sqrt().item()
    return x * scale, relative


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
