"""What the ops that iterate say where they stop short."""

from __future__ import annotations

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
