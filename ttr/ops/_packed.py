"""Packed sequences of different lengths: cut where `cu_seqlens` says, computed one after the other, joined again.

`cu_seqlens` is int32 or int64, (sequences + 1): sequence n is the tokens from cu_seqlens[n] up to cu_seqlens[n + 1] of
the one element of the batch. It may be empty. PyTorch reads these bounds, for which a GPU waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from ttr.ops._check import sequence_lengths

Bounds = Int[Tensor, " bounds"]
# A tensor, a tuple of them, or None: the sequences in the place of the batch.
State = TypeVar("State")
MaybeTensor = TypeVar("MaybeTensor", bound=Tensor | None)


def each_sequence(
    cu_seqlens: Tensor | None,
    compute: Callable[..., tuple[Tensor, State]],
    tensors: Sequence[Tensor | None],
    state: State | None,
    *others: Any,
) -> tuple[Tensor, State]:
    """`compute(*tensors, state, *others)`: once, or for each packed sequence, with outputs and final states joined.

    The tensors have time second, and None stays None; so does a state that is None.
    """
    if cu_seqlens is None:
        return compute(*tensors, state, *others)
    pieces = cut(cu_seqlens, tensors)
    found = [compute(*piece, start, *others) for piece, start in zip(pieces, _rows(state, len(pieces)), strict=True)]
    outputs, states = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), _joined(states)


def cut(cu_seqlens: Tensor, tensors: Sequence[MaybeTensor]) -> list[tuple[MaybeTensor, ...]]:
    """The tensors of each sequence."""
    time = next(x.shape[1] for x in tensors if x is not None)
    lengths = sequence_lengths(cu_seqlens, time)
    # Split once: the gradient of a slice is as long as all sequences together.
    split: list[Sequence[Any]] = [[None] * len(lengths) if x is None else x.split(lengths, dim=1) for x in tensors]
    return list(zip(*split, strict=True))


def _rows(state: Any, sequences: int) -> Sequence[Any]:
    if isinstance(state, Tensor):
        return state.split(1)
    if state is None:
        return [None] * sequences
    return list(zip(*(_rows(x, sequences) for x in state), strict=True))


def _joined(states: Sequence[Any]) -> Any:
    if isinstance(states[0], Tensor):
        return torch.cat(list(states))
    if states[0] is None:
        return None
    return tuple(_joined(each) for each in zip(*states, strict=True))
