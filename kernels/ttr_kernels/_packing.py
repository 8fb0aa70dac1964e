"""Where sequences lie in memory, and how they are cut into chunks.

Every kernel sees (rows, heads, size): a batch of equal lengths is packed end to end already, and `cu_seqlens` says
where packed sequences of different lengths begin and end. Tables on the device say which rows a program works on, so
no length is ever read back and a compiled graph has no break.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # tokens


class Spans(NamedTuple):
    """Stretches of rows that programs work on.

    Attributes:
        table: int32 (spans, 4): first row, row after the last, chunk that begins at the first row, sequence. Every
            sequence has at least one; those beyond the last one are empty.
        offsets: int32 (sequences + 1): where in the table each sequence's spans begin and end.
    """

    table: Tensor
    offsets: Tensor

    @property
    def number(self) -> int:
        return self.table.shape[0]


class Packing(NamedTuple):
    """The sequences of a call.

    Attributes:
        bounds: int32 (sequences + 1), the row where each begins, and where the last ends.
        rows: tokens of all sequences.
        longest: tokens of one sequence where all are equally long, else None.
        chunk: tokens of a chunk.
    """

    bounds: Tensor
    rows: int
    longest: int | None
    chunk: int = CHUNK

    @property
    def sequences(self) -> int:
        return self.bounds.shape[0] - 1

    @property
    def chunks(self) -> Spans:
        """Every chunk as one span."""
        return self.cut(self.chunk)

    @property
    def whole(self) -> Spans:
        """Every sequence as one span."""
        return self.cut(self.chunk, self.rows // self.chunk + 1)

    def cut(self, chunk: int, chunks: int = 1) -> Spans:
        """Every sequence cut into spans of so many chunks, the last one shorter."""
        if self.longest is None:
            # The most there can be: each sequence ends in one span that is not full.
            return _cut(self.bounds, chunk, chunks, self.rows // (chunk * chunks) + self.sequences)
        return _cut_equal(self.sequences, self.longest, chunk, chunks, self.bounds.device)


def packing(batch: int, time: int, cu_seqlens: Tensor | None, device: torch.device, chunk: int = CHUNK) -> Packing:
    """The packing of a batch, or of the sequences in its one element that `cu_seqlens` bounds."""
    if cu_seqlens is not None:
        return Packing(cu_seqlens, time, None, chunk)
    return Packing(_equal_bounds(batch, time, device), batch * time, time, chunk)


@lru_cache(maxsize=64)
def _equal_bounds(batch: int, time: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * time


@lru_cache(maxsize=64)
def _cut_equal(sequences: int, time: int, chunk: int, chunks: int, device: torch.device) -> Spans:
    return _cut(_equal_bounds(sequences, time, device), chunk, chunks, sequences * max(1, -(-time // (chunk * chunks))))


def _cut(bounds: Tensor, chunk: int, chunks: int, most: int) -> Spans:
    size = chunk * chunks
    lengths = bounds.diff()
    begin_chunk, begin = (
        torch.nn.functional.pad(((lengths + size - 1) // size).clamp_min(1).cumsum(0), (1, 0)) for size in (chunk, size)
    )
    index = torch.arange(most, device=bounds.device)
    sequence = torch.searchsorted(begin, index, right=True) - 1
    used = sequence < len(lengths)
    sequence = sequence.clamp_max(len(lengths) - 1)
    within = index - begin[sequence]
    first = bounds[sequence] + within * size
    stop = torch.minimum(first + size, bounds[sequence + 1])
    table = torch.stack([first, stop, begin_chunk[sequence] + within * chunks, sequence], dim=1)
    return Spans((table * used[:, None]).int(), begin.int())
