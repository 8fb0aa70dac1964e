"""The language-model backbone around any memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ttr.layers import Cache
from ttr.models.backbone import Backbone


class RegressionLM(nn.Module):
    """A causal language model whose every block is a `RegressionLayer`.

    Args:
        vocab_size: number of tokens.
        d_model: size of a token's vector.
        **backbone: every other argument of `Backbone`.

    Raises:
        ValueError: as `Backbone`.
    """

    def __init__(self, vocab_size: int, d_model: int = 128, **backbone: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.backbone = Backbone(d_model, **backbone)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of every next token."""
        return self.head(self.backbone(self.embedding(tokens)))

    def extend(
        self, tokens: Int[Tensor, "batch time"], caches: Sequence[Cache | None] | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], list[Cache]]:
        """Logits for a stretch that goes on from the blocks' caches, and the caches after it."""
        x, caches = self.backbone.extend(self.embedding(tokens), caches)
        return self.head(x), caches

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "batch time"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """The prompt and max_new_tokens sampled after it, one by one from the cache.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest. Raises `ValueError` for an empty prompt,
        a negative temperature or top_k < 1.
        """
        sampled = self.stream(prompt, temperature=temperature, top_k=top_k, generator=generator)
        return torch.cat([prompt, *islice(sampled, max_new_tokens)], dim=1)

    def stream(
        self,
        prompt: Int[Tensor, "batch time"],
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, "batch 1"]]:
        """What `generate` samples, a token at a time and without end; beside the caches it holds one token.

        Caches do not grow for designs with a state of fixed size. Raises as `generate`.
        """
        if prompt.shape[1] == 0:
            raise ValueError("prompt: expected at least one token, got none")
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        return self._stream(prompt, temperature, top_k, generator)

    @torch.no_grad()
    def _stream(
        self, new: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        caches: list[Cache] | None = None
        while True:
            logits, caches = self.extend(new, caches)
            new = _sample(logits[:, -1].float(), temperature, top_k, generator)
            yield new


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
