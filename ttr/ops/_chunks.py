"""What the chunkwise ops share: cutting a sequence into chunks, and decay within one.

Inside a chunk, c_t is the running sum of the log-decay up to and including token t. A pair written at j is seen
at t through exp(c_t − c_j), j ≤ t. No factor is ever above one, so no decay overflows. Behind one strong decay,
differences of float32 sums would have lost the weak ones: a decay per head takes float64 sums and differences, and
a decay per channel, where exponentials are dear, multiplies the factors themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")

# Numbers in each operand of a batched product on the CPU: 1 MiB of float32, so that a step stays in its caches.
CACHED = 2**18
# Fewer tokens than this are cheaper one by one than as a chunk.
SHORTEST = 8


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype that states and reductions have for such an input: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """No lower precision on the device of x, where there is any."""
    device = x.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if lowered else nullcontext()


def zero_state(k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """S_0 = 0, (sequences, heads, key, value)."""
    batch, _, heads, key = k.shape
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return k.new_zeros(sequences, heads, key, v.shape[-1], dtype=state_dtype(v))


def map_chunks(
    step: Callable[..., tuple[Tensor, State]],
    sequences: Sequence[Tensor | None],
    state: State,
    *,
    like: Tensor,
    chunk_size: int,
    token: Callable[..., tuple[Tensor, State]] | None = None,
) -> tuple[Tensor, State]:
    """Apply `step(*chunked sequences, state)` to a few chunks at a time, in order.

    A sequence (batch, time, heads, …) reaches `step` as (batch, heads, chunks, chunk, …), in at least float32
    whatever autocast says; the outputs come back in the layout and dtype of `like`. A chunk has a power of two of
    tokens, at most chunk_size. The last few tokens reach `token`, where there is one, as (batch, heads, …) each.
    """
    batch, time, heads, *_ = like.shape
    width = max(math.prod(x.shape[3:]) for x in sequences if x is not None)
    at_once = CACHED // max(1, batch * heads * width) if like.device.type == "cpu" else sys.maxsize
    spans = list(_spans(time, chunk_size, at_once, 1 if token is None else SHORTEST))
    # Split once: the gradient of a slice is as long as the sequence, so that of many would be quadratic in time.
    lengths = [chunks * size for chunks, size in spans]
    split = [[x] * len(spans) if x is None or len(spans) == 1 else x.split(lengths, dim=1) for x in sequences]
    wide = state_dtype(like)
    outputs = []
    with without_autocast(like):
        for (chunks, size), *piece in zip(spans, *split, strict=True):
            piece = [None if x is None else x.to(wide) for x in piece]
            if size == 1 and token is not None:
                for each in zip(*([None] * chunks if x is None else x.unbind(1) for x in piece), strict=True):
                    output, state = token(*each, state)
                    outputs.append(output.unflatten(2, (1, 1, -1)))
                continue
            chunked = [None if x is None else x.unflatten(1, (chunks, size)).movedim(3, 1).contiguous() for x in piece]
            output, state = step(*chunked, state)
            outputs.append(output)
        if len(outputs) == 1:  # a step, most of whose time a function of autograd's would take
            return outputs[0].movedim(1, 3).flatten(1, 2).to(like.dtype), state
        return _InTime.apply(like.dtype, *outputs) if outputs else like[:, :0], state


class _InTime(torch.autograd.Function):
    """Spans of outputs, (batch, heads, chunks, chunk, …), written once into (batch, time, heads, …)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dtype: torch.dtype, *spans: Tensor) -> Tensor:
        batch, heads, _, _, *rest = spans[0].shape
        y = spans[0].new_empty(batch, sum(x.shape[2] * x.shape[3] for x in spans), heads, *rest, dtype=dtype)
        start = 0
        for x in spans:
            stop = start + x.shape[2] * x.shape[3]
            y[:, start:stop].unflatten(1, x.shape[2:4]).copy_(x.movedim(1, 3))
            start = stop
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.spans = inputs[1].dtype, [x.shape[2:4] for x in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pieces = gradient.to(ctx.dtype).split([chunks * size for chunks, size in ctx.spans], dim=1)
        unflat = (x.unflatten(1, span).movedim(3, 1) for x, span in zip(pieces, ctx.spans, strict=True))
        return None, *(x.contiguous() for x in unflat)


def _spans(time: int, chunk_size: int, at_once: int, shortest: int) -> Iterator[tuple[int, int]]:
    """Cut time into spans of (chunks, chunk), `at_once` tokens each where a chunk is shorter."""
    size = 1 << (chunk_size.bit_length() - 1)
    while time:
        size = min(size, 1 << (time.bit_length() - 1))
        if size < shortest:
            size = 1
        chunks = time if size < shortest else min(time // size, max(1, at_once // size))
        yield chunks, size
        time -= chunks * size


def fade(state: Tensor, log_decay: Tensor | None) -> Tensor:
    """What one token's decay, (batch, heads) or (batch, heads, key), leaves of (batch, heads, key, value)."""
    if log_decay is None:
        return state
    factor = log_decay.exp().unsqueeze(-1)
    return (factor if log_decay.ndim == 3 else factor.unsqueeze(-1)) * state


class ChunkDecay:
    """The factors that a decay puts inside chunks; without one, all of them are 1.

    `log_decay` is None, (batch, heads, chunks, chunk) for a decay per head, or has a key axis for one per channel.
    """

    def __init__(self, log_decay: Tensor | None):
        self.none = log_decay is None
        self._matrix: Tensor | None = None
        if log_decay is None:
            return
        self.dtype, self.per_channel = log_decay.dtype, log_decay.ndim == 5
        if self.per_channel:
            self.levels = list(_levels(log_decay.exp()))
            self.since, self.until = (x.squeeze(-3) for x in self.levels.pop())
        else:
            self.cumulative = log_decay.double().cumsum(-1).unsqueeze(-1)
            self.since = self.cumulative.exp().to(self.dtype)
            self.until = (self.cumulative[..., -1:, :] - self.cumulative).exp().to(self.dtype)

    def since_start(self, rows: Tensor) -> Tensor:
        """rows_t · exp(c_t): what is left at t of the state that the chunk began with."""
        return rows if self.none else rows * self.since

    def until_end(self, columns: Tensor) -> Tensor:
        """columns_j · exp(c_end − c_j): what is left of a write at j when the chunk ends."""
        return columns if self.none else columns * self.until

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A_tj = Σ_d rows_td · columns_jd · exp(c_td − c_jd) for j ≤ t, else 0."""
        if self.none:
            return (rows @ columns.mT).tril_()
        if not self.per_channel:
            return (rows @ columns.mT) * self.matrix
        products = (rows * columns).sum(-1)[..., None, None]
        for since, until in self.levels:
            # Below two neighbouring blocks on the diagonal, all rows come after the first and all columns are in it.
            pairs = (-1, 2, since.shape[-2])
            later = rows.unflatten(-2, pairs)[..., 1, :, :] * since[..., 1::2, :, :]
            earlier = columns.unflatten(-2, pairs)[..., 0, :, :] * until[..., ::2, :, :]
            products = join(products, later @ earlier.mT)
        return products.squeeze(-3)

    @property
    def matrix(self) -> Tensor:
        """D_tj = exp(c_t − c_j) for j ≤ t, else 0; of a decay per head. Made where it is asked for, and once."""
        # functools.cached_property has a lock in Python 3.11, and torch.compile traces none.
        if self._matrix is None:
            self._matrix = _Differences.apply(self.cumulative, self.dtype)
        return self._matrix

    def over_chunks(self, chunks: int, dtype: torch.dtype) -> Sequence[Tensor | float]:
        """exp(c_end) of each chunk, shaped to scale a state."""
        return [1.0] * chunks if self.none else self.since[..., -1:, :].mT.to(dtype).unbind(2)


class _Differences(torch.autograd.Function):
    """exp(c_t − c_j) for j ≤ t, else 0, of columns c in float64. Autograd would pass over the matrix six times more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor, dtype: torch.dtype) -> Tensor:
        # The past has no positive exponent; those of the future would overflow.
        return (c - c.mT).to(dtype).clamp_(max=0.0).exp_().tril_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        exponents = (gradient * matrix).double()
        return exponents.sum(-1, keepdim=True) - exponents.sum(-2).unsqueeze(-1), None


def _levels(factor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For blocks of 1, 2, 4, … tokens, (…, blocks, block, key): the decay since a block began, and until it ends.

    The first counts a block's own tokens up to t, the second those after j: products, none above one.
    """
    since, until = factor.unsqueeze(-2), torch.ones_like(factor).unsqueeze(-2)
    yield since, until
    while since.shape[-3] > 1:
        first, second = since[..., -1:, :].unflatten(-3, (-1, 2)).unbind(-3)
        one = torch.ones_like(first)
        longer = torch.stack([one, first], dim=-3), torch.stack([second, one], dim=-3)
        since, until = (
            (x.unflatten(-3, (-1, 2)) * more).flatten(-3, -2) for x, more in zip((since, until), longer, strict=True)
        )
        yield since, until


def join(blocks: Tensor, square: Tensor) -> Tensor:
    """Neighbouring blocks on the diagonal, and the square below it between them, make the next block."""
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    above = torch.cat([first, torch.zeros_like(square)], dim=-1)
    return torch.cat([above, torch.cat([square, second], dim=-1)], dim=-2)
