"""The synthetic tasks of mechanistic architecture design (MAD): Poli et al., arXiv 2403.17844.

The defaults are the suite's own. Where the suite trains on every next token and asks for answers in its tests alone,
these tasks ask for the answers in both.
"""

from typing import Any

import torch
from torch import Tensor

from ttr.tasks.recall import distinct_integers, repeats
from ttr.tasks.task import IGNORED, Batch, Task, require, require_at_least


class SelectiveCopy(Task):
    """Tokens among blanks, then the order to copy; the targets behind it are the tokens without the blanks.

        tokens     a · · b · c ·  copy  ·  ·  ·
        targets    · · · · · · ·   ·    a  b  c

    Of vocab_size tokens, the last says copy and the one before is the blank; those to be copied come from the others,
    each as likely, and stand at random places.

    Args:
        vocab_size: number of tokens.
        length: tokens in a sequence.
        num_tokens: tokens to be copied.
        **task: the arguments of `Task`.

    Raises ValueError if the sequence has no room for the tokens and their copies.

    Source: Poli et al., arXiv 2403.17844.
    """

    def __init__(self, vocab_size: int = 16, length: int = 256, num_tokens: int = 16, **task: Any):
        super().__init__(**task)
        require_at_least(1, num_tokens=num_tokens)
        require_at_least(3, vocab_size=vocab_size)
        least = 2 * num_tokens + 1
        require(length >= least, "length", f"at least 2 * num_tokens + 1 = {least}", length)
        self.vocab_size, self.length, self.num_tokens = vocab_size, length, num_tokens

    def draw(self, split: str, index: int) -> Batch:
        generator = self.generator(split, index)
        blank, copy = self.vocab_size - 2, self.vocab_size - 1
        copied = torch.randint(blank, (self.batch_size, self.num_tokens), generator=generator)
        before = self.length - self.num_tokens - 1
        places = distinct_integers(generator, self.batch_size, before, self.num_tokens).sort().values
        tokens = torch.full((self.batch_size, self.length), blank).scatter_(1, places, copied)
        tokens[:, before] = copy
        targets = torch.full_like(tokens, IGNORED)
        targets[:, before + 1 :] = copied
        return tokens, targets


class NoisyRecall(Task):
    """Pairs of a key and its value, some of them noise; the target at a key that was there before is its value.

        tokens     k₁ v₁  n n  k₂ v₂  k₁ v₁  n n  k₂ v₂
        targets     ·  ·  · ·   ·  ·  v₁  ·  · ·  v₂  ·

    Of vocab_size tokens, the last `noise_vocab_size` are noise; the others are keys and, the upper half, values. Each
    sequence gives each key one value. A pair is noise with probability `noise`, but not the last, whose key has
    always been there before. noise = 0 and noise_vocab_size = 0 make it the suite's plain in-context recall.

    Args:
        vocab_size: number of tokens.
        length: tokens in a sequence, an even number.
        noise: share of pairs that are noise.
        noise_vocab_size: number of tokens that are noise.
        **task: the arguments of `Task`.

    Raises ValueError for an odd length, a share outside [0, 1), a vocabulary without keys, values, or noise to use.

    Source: Poli et al., arXiv 2403.17844.
    """

    def __init__(
        self, vocab_size: int = 32, length: int = 128, noise: float = 0.2, noise_vocab_size: int = 16, **task: Any
    ):
        super().__init__(**task)
        require_at_least(0, noise_vocab_size=noise_vocab_size)
        require(length % 2 == 0 and length >= 4, "length", "an even number, at least 4", length)
        require(0 <= noise < 1, "noise", "a share in [0, 1)", noise)
        require(noise == 0 or noise_vocab_size > 0, "noise_vocab_size", "at least 1 where there is noise", 0)
        least = noise_vocab_size + 2
        require(vocab_size >= least, "vocab_size", f"at least noise_vocab_size + 2 = {least}", vocab_size)
        self.vocab_size, self.length, self.noise, self.noise_vocab_size = vocab_size, length, noise, noise_vocab_size

    def draw(self, split: str, index: int) -> Batch:
        generator = self.generator(split, index)
        pairs, first_noise = self.length // 2, self.vocab_size - self.noise_vocab_size
        num_keys = first_noise // 2
        sizes = self.batch_size, pairs
        keys = torch.randint(num_keys, sizes, generator=generator)
        is_noise = torch.rand(sizes, generator=generator) < self.noise
        # One pair before the last is never noise, and the last asks for one that is not.
        never = torch.randint(pairs - 1, (self.batch_size, 1), generator=generator)
        is_noise.scatter_(1, never, False)
        is_noise[:, -1] = False
        among = torch.rand(self.batch_size, pairs - 1, generator=generator).masked_fill_(is_noise[:, :-1], -1)
        keys[:, -1:] = keys.gather(1, among.argmax(1, keepdim=True))
        value_of = torch.randint(num_keys, first_noise, (self.batch_size, num_keys), generator=generator)
        values = value_of.gather(1, keys)
        asked = repeats(keys.masked_fill(is_noise, -1)) & ~is_noise
        tokens = torch.stack([keys, values], dim=-1)
        if self.noise_vocab_size:
            noise = torch.randint(first_noise, self.vocab_size, (*sizes, 2), generator=generator)
            tokens = torch.where(is_noise[..., None], noise, tokens)
        targets = torch.full_like(tokens, IGNORED)
        targets[..., 0] = values.where(asked, IGNORED)
        return tokens.flatten(1), targets.flatten(1)


class FuzzyRecall(Task):
    """Recall of keys and values of several tokens each; the targets are the tokens of a repeated key's value.

        tokens     k₁ k₁′ v₁  k₂ v₂ v₂′ v₂″  k₁ k₁′ v₁  …  k₂ v₂  v₂′
        targets     ·   ·  ·   ·  ·   ·   ·   ·  v₁  ·  …  v₂ v₂′ v₂″

    A key has 1 … `max_key` different tokens, each length as likely, and always `max_key` in validation and test; a
    value has 1 … `max_value`. Each sequence gives each key one value. Pairs follow each other while there is room,
    then one of them comes once more; in front, the padding. Of vocab_size tokens the last pads; the others are keys
    and, the upper half, values.

    Args:
        vocab_size: number of tokens.
        length: tokens in a sequence.
        max_key: tokens of the longest keys.
        max_value: tokens of the longest values.
        **task: the arguments of `Task`.

    Raises ValueError for a vocabulary too small for the longest keys and values, or no room for two of them.

    Source: Poli et al., arXiv 2403.17844.
    """

    def __init__(self, vocab_size: int = 16, length: int = 128, max_key: int = 3, max_value: int = 3, **task: Any):
        super().__init__(**task)
        require_at_least(1, max_key=max_key, max_value=max_value)
        least = 1 + 2 * max(max_key, max_value)
        require(vocab_size >= least, "vocab_size", f"at least 1 + 2 * max(max_key, max_value) = {least}", vocab_size)
        least = 2 * (max_key + max_value)
        require(length >= least, "length", f"at least 2 * (max_key + max_value) = {least}", length)
        self.vocab_size, self.length, self.max_key, self.max_value = vocab_size, length, max_key, max_value

    def draw(self, split: str, index: int) -> Batch:
        generator = self.generator(split, index)
        pad, num_keys = self.vocab_size - 1, (self.vocab_size - 1) // 2
        longest = self.max_key + self.max_value
        slots = self.length // 2  # as many as the shortest pairs could fill
        keys = self._motifs(generator, slots, 0, num_keys, self.max_key, self.max_key if split != "train" else 1)
        values = self._motifs(generator, slots, num_keys, pad, self.max_value, 1)
        number = ((keys + 1) * self.vocab_size ** torch.arange(self.max_key)).sum(-1)  # one for each key
        first = (number[:, :, None] == number[:, None]).int().argmax(-1)
        values = values.gather(1, first[..., None].expand_as(values))
        pairs = torch.cat([keys, values], dim=-1)
        ends = (pairs >= 0).sum(-1).cumsum(1)
        # The sequence and its next token are length + 1 tokens, of which the last pair has `longest` or fewer.
        kept = ends <= self.length + 1 - longest
        again = torch.rand(kept.shape, generator=generator).masked_fill_(~kept, -1).argmax(1)
        rows = torch.arange(self.batch_size)
        chosen = torch.cat([pairs.masked_fill(~kept[..., None], -1), pairs[rows, again][:, None]], dim=1)
        repeated = torch.cat([first < torch.arange(slots), torch.ones(self.batch_size, 1, dtype=torch.bool)], dim=1)
        is_value = torch.arange(longest) >= self.max_key
        asked = repeated[..., None] & is_value & (chosen >= 0)
        return self._close_ranks(chosen.flatten(1), asked.flatten(1), pad)

    def _motifs(
        self, generator: torch.Generator, slots: int, start: int, stop: int, longest: int, least: int
    ) -> Tensor:
        """Different tokens of [start, stop), `least` to `longest` of them and then −1: (batch, slots, longest)."""
        rows = self.batch_size * slots
        motifs = start + distinct_integers(generator, rows, stop - start, longest)
        sizes = torch.randint(least, longest + 1, (rows, 1), generator=generator)
        return motifs.where(torch.arange(longest) < sizes, -1).unflatten(0, (self.batch_size, slots))

    def _close_ranks(self, tokens: Tensor, asked: Tensor, pad: int) -> Batch:
        """Tokens −1 left out, padding put in front; the target at a token is the next one, where that is asked for."""
        order = (tokens >= 0).int().sort(dim=1, stable=True).indices[:, -(self.length + 1) :]
        tokens, asked = tokens.gather(1, order), asked.gather(1, order)
        tokens = tokens.where(tokens >= 0, pad)
        return tokens[:, :-1], tokens[:, 1:].where(asked[:, 1:], IGNORED)


class Memorization(Task):
    """Keys whose values are the same in all sequences: what the weights have to know, and no context says.

        tokens     k₁  ?   k₂  ?   …
        targets     ·  v₁   ·  v₂  …

    Of vocab_size tokens the last stands for the value to be told; the others are keys and, the upper half, values. The
    map from keys to values is one to one and drawn from the seed.

    Args:
        vocab_size: number of tokens.
        length: tokens in a sequence, an even number.
        **task: the arguments of `Task`.

    Raises ValueError for an odd length or a vocabulary without keys and values.

    Source: Poli et al., arXiv 2403.17844.
    """

    def __init__(self, vocab_size: int = 256, length: int = 32, **task: Any):
        super().__init__(**task)
        require_at_least(3, vocab_size=vocab_size)
        require(length % 2 == 0 and length >= 2, "length", "an even number, at least 2", length)
        self.vocab_size, self.length = vocab_size, length
        num_keys = (vocab_size - 1) // 2
        values = torch.randperm(vocab_size - 1 - num_keys, generator=torch.Generator().manual_seed(self.seed))
        self.value_of = num_keys + values[:num_keys]

    def draw(self, split: str, index: int) -> Batch:
        sizes = self.batch_size, self.length // 2
        keys = torch.randint(len(self.value_of), sizes, generator=self.generator(split, index))
        tokens = torch.stack([keys, torch.full_like(keys, self.vocab_size - 1)], dim=-1)
        targets = torch.stack([torch.full_like(keys, IGNORED), self.value_of[keys]], dim=-1)
        return tokens.flatten(1), targets.flatten(1)


class Compression(Task):
    """Random tokens and, at the end, the order to compress them; the targets are the tokens themselves.

        tokens     a  b  c  …  compress
        targets    a  b  c  …      ·

    For `ttr.training.TokenReconstruction`, whose model answers from the last token's vector alone: a model that sees
    each token where it is asked for has nothing to do. Of vocab_size tokens, the last says compress.

    Args:
        vocab_size: number of tokens.
        length: tokens in a sequence.
        **task: the arguments of `Task`.

    Raises ValueError for a length or a vocabulary below two.

    Source: Poli et al., arXiv 2403.17844.
    """

    def __init__(self, vocab_size: int = 16, length: int = 32, **task: Any):
        super().__init__(**task)
        require_at_least(2, vocab_size=vocab_size, length=length)
        self.vocab_size, self.length = vocab_size, length

    def draw(self, split: str, index: int) -> Batch:
        sizes = self.batch_size, self.length
        tokens = torch.randint(self.vocab_size - 1, sizes, generator=self.generator(split, index))
        tokens[:, -1] = self.vocab_size - 1
        targets = tokens.clone()
        targets[:, -1] = IGNORED
        return tokens, targets
