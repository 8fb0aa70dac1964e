"""Multi-query associative recall: the smallest task that a memory exists for."""

from typing import Any, Literal

import torch
from torch import Tensor

from ttr.tasks.task import IGNORED, Batch, Task, require, require_at_least

_FILLER = 0


def recall_batch(
    generator: torch.Generator,
    batch_size: int = 64,
    vocab_size: int = 128,
    length: int = 32,
    num_pairs: int = 6,
    placement: Literal["uniform", "power_law"] = "uniform",
    power_a: float = 0.01,
) -> Batch:
    """Sequences of key, value pairs, then every key once more; the target there is the value it was bound to.

        tokens    k₁ v₁ k₂ v₂ … k_P v_P  ·  k₂ ·  ·  k_P k₁ ·  …
        targets    ·  ·  ·  ·  …  ·  ·   ·  v₂ ·  ·  v_P v₁ ·  …

    The answers are never tokens of the query part, so a model that only knows which values occurred is right
    once in `num_pairs` times. Keys and values have a token each to themselves: with key and value at
    neighbouring positions, binding them takes either a second layer or a short convolution.

    Where the queries stand, of the places behind the pairs: `"uniform"`, any, each as likely; `"power_law"`, every
    second one, place n = 1, 2, … with weight n^(power_a − 1), without replacement, key after key: a key is asked for
    soon after the pairs as a word is soon repeated in text. That is the field's benchmark, with lengths and pairs
    from (64, 4) to (1024, 256) and 8192 tokens; power_a = 1 makes all places alike.

    Shapes: two int64 tensors (batch_size, length). Token 0 fills the gaps, keys come from
    [1, vocab_size // 2) and values from [vocab_size // 2, vocab_size), no two alike in a sequence; the target is
    −100 wherever no query stands.

    Raises ValueError if the sequence is too short for the pairs and their queries, or the vocabulary too
    small for distinct keys and values.

    Source: multi-query associative recall, Arora et al., "Zoology", arXiv 2312.04927.
    """
    _require_room(vocab_size, length, num_pairs, placement, power_a)
    require_at_least(1, batch_size=batch_size)
    pairs_end, first_value = 2 * num_pairs, vocab_size // 2

    def distinct(start: int, stop: int) -> Tensor:
        return start + distinct_integers(generator, batch_size, stop - start, num_pairs)

    keys = distinct(_FILLER + 1, first_value)
    values = distinct(first_value, vocab_size)
    if placement == "uniform":
        queries = distinct(pairs_end, length)
    else:
        places = torch.arange(1, (length - pairs_end) // 2 + 1).pow(power_a - 1)
        # The first arrivals of Poisson processes at these rates are draws without replacement, in order.
        arrivals = torch.empty(batch_size, len(places)).exponential_(generator=generator) / places
        queries = pairs_end + 2 * arrivals.topk(num_pairs, largest=False).indices
    tokens = torch.full((batch_size, length), _FILLER)
    tokens[:, :pairs_end] = torch.stack([keys, values], dim=-1).flatten(1)
    targets = torch.full_like(tokens, IGNORED)
    return tokens.scatter_(1, queries, keys), targets.scatter_(1, queries, values)


def distinct_integers(generator: torch.Generator, batch_size: int, below: int, count: int) -> Tensor:
    """`count` different integers in [0, below) a row, in random order; int64 (batch_size, count)."""
    if below < 1024:
        return torch.rand(batch_size, below, generator=generator).topk(count).indices
    drawn = torch.randint(below, (batch_size, count), generator=generator)
    while True:  # few of many: to draw repeated ones anew is an eighth of the time, and as fair to every integer
        repeated = repeats(drawn)
        if not repeated.any():
            return drawn
        drawn[repeated] = torch.randint(below, (int(repeated.sum()),), generator=generator)


def repeats(numbers: Tensor) -> Tensor:
    """Whether a number was in its row before; bool, shaped as the numbers (batch, count)."""
    in_order, places = numbers.sort(stable=True)
    repeated = torch.zeros_like(numbers, dtype=torch.bool)
    return repeated.scatter_(1, places[:, 1:], in_order[:, 1:] == in_order[:, :-1])


def _require_room(vocab_size: int, length: int, num_pairs: int, placement: str, power_a: float) -> None:
    require_at_least(1, num_pairs=num_pairs)
    require(placement in ("uniform", "power_law"), "placement", "'uniform' or 'power_law'", placement)
    require(0 < power_a <= 1, "power_a", "a number in (0, 1]", power_a)
    tokens = 3 if placement == "uniform" else 4  # a power law's places are two tokens wide
    require(length >= tokens * num_pairs, "length", f"at least {tokens} * num_pairs = {tokens * num_pairs}", length)
    smallest = 2 * (num_pairs + 1)  # the filler takes one token of the keys' half
    require(vocab_size >= smallest, "vocab_size", f"at least 2 * (num_pairs + 1) = {smallest}", vocab_size)


class Recall(Task):
    """Multi-query associative recall as a data module; `recall_batch` says what a sequence is.

    Args:
        vocab_size: number of tokens: a filler, then keys, then values.
        length: tokens in a sequence.
        num_pairs: key, value pairs in a sequence.
        placement: where the queries stand.
        power_a: exponent of the power law, plus one.
        **task: the arguments of `Task`.

    Raises ValueError if the numbers leave no room for the pairs.

    Source: Arora et al., "Zoology", arXiv 2312.04927.
    """

    def __init__(
        self,
        vocab_size: int = 128,
        length: int = 32,
        num_pairs: int = 6,
        placement: Literal["uniform", "power_law"] = "uniform",
        power_a: float = 0.01,
        **task: Any,
    ):
        super().__init__(**task)
        _require_room(vocab_size, length, num_pairs, placement, power_a)
        self.vocab_size, self.length, self.num_pairs = vocab_size, length, num_pairs
        self.placement, self.power_a = placement, power_a

    def draw(self, split: str, index: int) -> Batch:
        generator = self.generator(split, index)
        sizes = self.batch_size, self.vocab_size, self.length, self.num_pairs
        return recall_batch(generator, *sizes, self.placement, self.power_a)
