"""What a memory hands on from one stretch of a sequence to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from torch import Tensor


@dataclass(frozen=True)
class State:
    """The tensors from which `ttr.regress` goes on.

    Attributes:
        memory: the fitted linear map, (batch, heads, key, value).
        momentum: the step that goes on, (batch, heads, key, value).
        curvature: the keys' weighted second moment, (batch, heads, key, key) or its diagonal.
        history: for fits that no fixed-size state can continue, every past tensor by name, time second.
    """

    memory: Tensor | None = None
    momentum: Tensor | None = None
    curvature: Tensor | None = None
    history: dict[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The state with the function applied to each of its tensors (`Tensor.detach`, a move, a selection)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "history"}
        mapped = {name: None if x is None else function(x) for name, x in tensors.items()}
        return State(**mapped, history={name: function(x) for name, x in self.history.items()})
