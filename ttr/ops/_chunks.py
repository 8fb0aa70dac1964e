"""What the chunkwise ops share: cutting a sequence into chunks, and decay within one.

Inside a chunk, c_t is the running sum of the log-decay up to and including token t. A pair written at j is seen
at t through exp(c_t − c_j), j ≤ t. Every exponent taken here is at most zero, so no decay overflows, and sums and
differences are float64: behind one strong decay, differences of float32 sums would have lost the weak ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype that states and reductions have for such an input: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """No lower precision on the device of x, where there is any."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def zero_state(k: Tensor, v: Tensor) -> Tensor:
    """S_0 = 0, (batch, heads, key, value)."""
    batch, _, heads, key = k.shape
    return k.new_zeros(batch, heads, key, v.shape[-1], dtype=state_dtype(v))


def map_chunks(
    step: Callable[..., tuple[Tensor, State]],
    sequences: Sequence[Tensor | None],
    state: State,
    *,
    like: Tensor,
    chunk_size: int,
) -> tuple[Tensor, State]:
    """Apply `step(*chunked sequences, state)` to the whole chunks, then to the shorter rest.

    A sequence (batch, time, heads, …) reaches `step` as (batch, heads, chunks, chunk, …), in at least float32
    whatever autocast says; the outputs come back in the layout and dtype of `like`. The rest is a chunk of its
    own, so nothing is ever padded.
    """
    time = like.shape[1]
    whole = time - time % chunk_size
    outputs = []
    with without_autocast(like):
        for start, stop, size in ((0, whole, chunk_size), (whole, time, time - whole)):
            if start == stop:
                continue
            chunked = [
                None
                if x is None
                else x[:, start:stop].to(state_dtype(like)).unflatten(1, (-1, size)).movedim(3, 1).contiguous()
                for x in sequences
            ]
            output, state = step(*chunked, state)
            outputs.append(output.movedim(1, 3).flatten(1, 2).to(like.dtype))
        if len(outputs) == 1:
            return outputs[0], state
        return torch.cat(outputs or [like[:, :0]], dim=1), state


class ChunkDecay:
    """The factors that a decay puts inside chunks; without one, all of them are 1.

    `log_decay` is None, (batch, heads, chunks, chunk) for a decay per head, or has a key axis for one per channel.
    """

    def __init__(self, log_decay: Tensor | None):
        self.cumulative = None
        if log_decay is not None:
            self.dtype, self.per_channel = log_decay.dtype, log_decay.ndim == 5
            each = log_decay if self.per_channel else log_decay.unsqueeze(-1)
            self.cumulative = each.double().cumsum(-2)

    def since_start(self, rows: Tensor) -> Tensor:
        """rows_t · exp(c_t): what is left at t of the state that the chunk began with."""
        if self.cumulative is None:
            return rows
        return rows * self.cumulative.to(rows.dtype).exp()

    def until_end(self, columns: Tensor) -> Tensor:
        """columns_j · exp(c_end − c_j): what is left of a write at j when the chunk ends."""
        if self.cumulative is None:
            return columns
        return columns * (self.cumulative[..., -1:, :] - self.cumulative).to(columns.dtype).exp()

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A_tj = Σ_d rows_td · columns_jd · exp(c_td − c_jd) for j ≤ t, else 0."""
        if self.cumulative is None:
            return (rows @ columns.mT).tril()
        if self.per_channel:
            return _channel_products(rows, columns, self.cumulative)
        return (rows @ columns.mT) * self.matrix

    @cached_property
    def matrix(self) -> Tensor:
        """D_tj = exp(c_t − c_j) for j ≤ t, else 0; of a decay per head."""
        c = self.cumulative
        assert c is not None
        future = torch.ones(c.shape[-2], c.shape[-2], dtype=torch.bool, device=c.device).triu(1)
        return (c - c.mT).to(self.dtype).masked_fill(future, -torch.inf).exp()

    def over_chunks(self, chunks: int, dtype: torch.dtype) -> Sequence[Tensor | float]:
        """exp(c_end) of each chunk, shaped to scale a state."""
        if self.cumulative is None:
            return [1.0] * chunks
        return self.cumulative[..., -1, :].to(dtype).exp().unsqueeze(-1).unbind(2)


def _channel_products(rows: Tensor, columns: Tensor, cumulative: Tensor) -> Tensor:
    """The per-channel case, by doubling: two neighbouring blocks and the square below them make the next block.

    In that square every row comes after the reference token (the last of the first block) and no column does, so
    both factors exp(c_t − c_ref) and exp(c_ref − c_j) are at most one.
    """
    size = rows.shape[-2]
    padding = 2 ** math.ceil(math.log2(size)) - size
    if padding:
        rows, columns = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (rows, columns))
        last = cumulative[..., -1:, :].expand(*cumulative.shape[:-2], padding, -1)
        cumulative = torch.cat([cumulative, last], dim=-2)

    products = (rows * columns).sum(-1)[..., None, None]
    while (block := products.shape[-1]) < size + padding:
        row, column, c = (x.unflatten(-2, (-1, 2, block)) for x in (rows, columns, cumulative))
        reference = c[..., 0, -1:, :]
        later = row[..., 1, :, :] * (c[..., 1, :, :] - reference).to(rows.dtype).exp()
        earlier = column[..., 0, :, :] * (reference - c[..., 0, :, :]).to(rows.dtype).exp()
        square = later @ earlier.mT
        first, second = products.unflatten(-3, (-1, 2)).unbind(-3)
        above = torch.cat([first, torch.zeros_like(square)], dim=-1)
        products = torch.cat([above, torch.cat([square, second], dim=-1)], dim=-2)
    return products.squeeze(-3)[..., :size, :size]
