"""What a memory hands on from one stretch of a sequence to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
        lengths: how many tokens each sequence keeps, where the history (or the mini-batch that a network has started)
            is that of sequences that keep different numbers: packed end to end, in a batch of one. None where all keep
            as many, and are a batch.
    """

    memory: Tensor | None = None
    momentum: Tensor | None = None
    log_scale: Tensor | None = None
    curvature: Tensor | None = None
    cross: Tensor | None = None
    network: dict[str, Tensor] | None = None
    history: dict[str, Tensor] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None

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
        return _state({name: function(x) for name, x in _tensors(self).items()}, self.lengths)

    def split(self) -> list[State]:
        """The state of each sequence, as a batch of one. Raises `ValueError` where fields differ in their batch."""
        pieces = {
            name: x.split(1) if self.lengths is None or not _keeps_tokens(name) else x.split(self.lengths, dim=1)
            for name, x in _tensors(self).items()
        }
        counts = {name: len(xs) for name, xs in pieces.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"state: expected one batch in all fields, got {counts}")
        return [_state(dict(zip(pieces, each, strict=True))) for each in zip(*pieces.values(), strict=True)]

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The state of several sequences, from one state each: what `split` takes apart.

        Raises `ValueError` for no state, states of different fields, and a state of more than one sequence.
        """
        named = [_tensors(state) for state in states]
        if len({tuple(each) for each in named}) != 1 or any(len(x) != 1 for each in named for x in each.values()):
            raise ValueError("states: expected one sequence each, and the same fields")
        kept = [next((x.shape[1] for name, x in each.items() if _keeps_tokens(name)), 0) for each in named]
        packed = len(set(kept)) > 1
        axes = {name: int(packed and _keeps_tokens(name)) for name in named[0]}
        joined = {name: torch.cat([each[name] for each in named], dim=axis) for name, axis in axes.items()}
        return _state(joined, tuple(kept) if packed else None)


def _tensors(state: State) -> dict[str, Tensor]:
    """All tensors by name; those in a dictionary by the names of both."""
    tensors: dict[str, Tensor] = {}
    for name, value in vars(state).items():
        if isinstance(value, dict):
            tensors |= {f"{name}/{key}": x for key, x in value.items()}
        elif isinstance(value, Tensor):
            tensors[name] = value
    return tensors


def _state(tensors: dict[str, Tensor], lengths: tuple[int, ...] | None = None) -> State:
    """The state whose tensors have these names."""
    plain = {name: x for name, x in tensors.items() if "/" not in name}
    inside: dict[str, dict[str, Tensor]] = {"network": {}, "history": {}}
    for name, x in tensors.items():
        if "/" in name:
            field_name, key = name.split("/")
            inside[field_name][key] = x
    return State(**plain, network=inside["network"] or None, history=inside["history"], lengths=lengths)


def _keeps_tokens(name: str) -> bool:
    """Whether the tensor of this name has an entry for every token that a sequence keeps, in its second axis."""
    return name.startswith(("history/", "network/started."))
