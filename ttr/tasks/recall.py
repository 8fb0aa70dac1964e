"""Multi-query associative recall: the smallest task that a memory exists for."""

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
) -> Batch:
    """Sequences of key, value pairs, then every key once more; the target there is the value it was bound to.

        tokens    k₁ v₁ k₂ v₂ … k_P v_P  ·  k₂ ·  ·  k_P k₁ ·  …
        targets    ·  ·  ·  ·  …  ·  ·   ·  v₂ ·  ·  v_P v₁ ·  …

    The answers are never tokens of the query part, so a model that only knows which values occurred is right
    once in `num_pairs` times. Keys and values have a token each to themselves: with key and value at
    neighbouring positions, binding them takes either a second layer or a short convolution.

    Shapes: two int64 tensors (batch_size, length). Token 0 fills the gaps, keys come from
    [1, vocab_size // 2) and values from [vocab_size // 2, vocab_size), no two alike in a sequence; queries
    stand at uniformly random positions in random order; the target is −100 wherever no query stands.

    Raises ValueError if the sequence is too short for the pairs and their queries, or the vocabulary too
    small for distinct keys and values.

    Source: multi-query associative recall, Arora et al., "Zoology", arXiv 2312.04927.
    """
    _require_room(vocab_size, length, num_pairs)
    require_at_least(1, batch_size=batch_size)
    pairs_end, first_value = 2 * num_pairs, vocab_size // 2

    def distinct(start: int, stop: int) -> Tensor:
        return start + torch.rand(batch_size, stop - start, generator=generator).topk(num_pairs).indices

    keys = distinct(_FILLER + 1, first_value)
    values = distinct(first_value, vocab_size)
    queries = distinct(pairs_end, length)
    tokens = torch.full((batch_size, length), _FILLER)
    tokens[:, :pairs_end] = torch.stack([keys, values], dim=-1).flatten(1)
    targets = torch.full_like(tokens, IGNORED)
    return tokens.scatter(1, queries, keys), targets.scatter(1, queries, values)


def _require_room(vocab_size: int, length: int, num_pairs: int) -> None:
    require_at_least(1, num_pairs=num_pairs)
    require(length >= 3 * num_pairs, "length", f"at least 3 * num_pairs = {3 * num_pairs}", length)
    smallest = 2 * (num_pairs + 1)  # the filler takes one token of the keys' half
    require(vocab_size >= smallest, "vocab_size", f"at least 2 * (num_pairs + 1) = {smallest}", vocab_size)


class Recall(Task):
    """Multi-query associative recall as a data module; `recall_batch` says what a sequence is.

    Args:
        vocab_size: number of tokens: a filler, then keys, then values.
        length: tokens in a sequence.
        num_pairs: key, value pairs in a sequence.
        batch_size: sequences in a batch.
        num_train: batches in an epoch; every epoch draws new ones.
        num_val: batches to validate on, and as many others to test on.
        seed: of the sequences; the model's seed is the trainer's.

    Raises ValueError if the numbers leave no room for the pairs.

    Source: Arora et al., "Zoology", arXiv 2312.04927.
    """

    def __init__(
        self,
        vocab_size: int = 128,
        length: int = 32,
        num_pairs: int = 6,
        batch_size: int = 64,
        num_train: int = 100,
        num_val: int = 16,
        seed: int = 0,
    ):
        super().__init__(batch_size, num_train, num_val, seed)
        _require_room(vocab_size, length, num_pairs)
        self.vocab_size, self.length, self.num_pairs = vocab_size, length, num_pairs

    def draw(self, split: str, index: int) -> Batch:
        generator = self.generator(split, index)
        return recall_batch(generator, self.batch_size, self.vocab_size, self.length, self.num_pairs)
