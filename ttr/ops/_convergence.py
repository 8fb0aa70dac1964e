"""What the ops that iterate say where they stop short."""

from __future__ import annotations

from torch import Tensor

from ttr.ops._check import may_read
from ttr.ops._warning import warn


class ConvergenceWarning(UserWarning):
    """An iterative solver used up its steps before it reached its tolerance."""


def warn_unless_converged(residual: float, tolerance: float, steps: int) -> None:
    """Warn, with the largest relative residual of a call, where that is above the tolerance."""
    if residual > tolerance:
        message = (
            f"conjugate gradients: relative residual {residual:.1e} after {steps} steps, tolerance {tolerance:.1e}"
        )
        warn(message, ConvergenceWarning)


def warn_unless_all_converged(residual: Tensor, tolerance: float, steps: int) -> None:
    """The same of a residual on the device, which is read where checks read values."""
    if may_read(residual):
        warn_unless_converged(residual.item(), tolerance, steps)
