"""What a memory hands on from one stretch of a sequence to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """The tensors from which `ttr.regress` goes on.

    Attributes:
        memory: the fitted linear map, (batch, heads, key, value).
        momentum: the step that goes on, (batch, heads, key, value).
        log_scale: the logarithm of what the memory has been divided by, (batch, heads).
        curvature: the keys' weighted second moment, (batch, heads, key, key) or its diagonal.
        cross: the weighted sum of key–value products, (batch, heads, key, value).
        network: what a neural memory goes on from, by name, batch first: see `ttr.ops.neural_memory`.
        history: for fits that no fixed-size state can continue, every past tensor by name, time second.
    """

    memory: Tensor | None = None
    momentum: Tensor | None = None
    log_scale: Tensor | None = None
    curvature: Tensor | None = None
    cross: Tensor | None = None
    network: dict[str, Tensor] | None = None
    history: dict[str, Tensor] = field(default_factory=dict)

    def linear_map(self, ridge: Tensor | None = None) -> Tensor:
        """The fitted map S of m(k) = Sᵀφ(k), (batch, heads, key, value), of a memory that is linear.

        It is the memory itself or, of an exact fit, the solution of (G + Λ) S = C with the least norm, G the curvature
        and C the cross moments; `ridge` is Λ where that stays. Raises `ValueError` for a memory of another kind.
        """
        if self.memory is not None:
            return self.memory
        if self.curvature is None or self.cross is None:
            raise ValueError(f"state: expected that of a linear memory, got {self}")
        curvature = self.curvature if ridge is None else self.curvature + torch.diag_embed(ridge)
        return torch.linalg.pinv(curvature) @ self.cross

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state with the function applied to each of its tensors (`Tensor.detach`, a move, a selection)."""
        mapped = {f.name: _each(function, getattr(self, f.name)) for f in fields(self)}
        return State(**mapped)


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(x) for name, x in value.items()}
    return None if value is None else function(value)
