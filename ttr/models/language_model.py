"""The language-model backbone around any memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from ttr._design import Design
from ttr.layers import Cache, RegressionLayer


class SwiGLU(nn.Module):
    r"""A gated two-layer map: :math:`W_2(\text{SiLU}(W_1 x) \odot W_3 x)`. Shazeer (2020)."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * value)


class Block(nn.Module):
    """A memory, then (where mlp_ratio > 0) an MLP, each behind a norm and around a residual path."""

    def __init__(self, mixer: RegressionLayer, d_model: int, mlp_ratio: float):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = mixer
        hidden = round(mlp_ratio * d_model)
        self.mlp = nn.Sequential(nn.RMSNorm(d_model, eps=1e-5), SwiGLU(d_model, hidden)) if hidden else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        mixed, cache = self.mixer.extend(self.mixer_norm(x), cache)
        x = x + mixed
        return x if self.mlp is None else x + self.mlp(x), cache


class RegressionLM(nn.Module):
    """A causal language model whose every block is a `RegressionLayer`.

    Args:
        vocab_size: number of tokens.
        d_model: size of a token's vector.
        num_layers: number of blocks.
        num_heads: memories in each block.
        design: a `ttr.Design` or the slug of a published one for all blocks, or a list with one for each (a hybrid).
        mlp_ratio: hidden size of the blocks' MLPs over d_model; 0 leaves them out.
        key_dim: size of a key in each head; d_model // num_heads by default.
        value_dim: size of a value in each head; d_model // num_heads by default.
        conv_width: taps of the short convolutions.
        conv_on: which of "q", "k" and "v" have one; "" for none.
        max_step_size: what β reaches; 2 admits negative eigenvalues.
        gate: whether the memories' answers are gated.
        unit: whether queries and keys are brought to unit length; as published by default.
        fixed: which of "q" and "k" are the same at every token; as published by default.

    Raises:
        ValueError: for an unknown slug, or a list of designs that is not num_layers long.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        design: str | Design | Sequence[str | Design] = "gated_delta_net",
        mlp_ratio: float = 2.0,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        conv_on: str = "qkv",
        max_step_size: float = 1.0,
        gate: bool = False,
        unit: bool | None = None,
        fixed: str | None = None,
    ):
        super().__init__()
        designs = [design] * num_layers if isinstance(design, (str, Design)) else list(design)
        if len(designs) != num_layers:
            raise ValueError(f"design: expected one, or a list of num_layers={num_layers}, got {len(designs)}")
        options = {
            "key_dim": key_dim,
            "value_dim": value_dim,
            "conv_width": conv_width,
            "conv_on": conv_on,
            "max_step_size": max_step_size,
            "gate": gate,
            "unit": unit,
            "fixed": fixed,
        }
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(RegressionLayer(own, d_model, num_heads, **options), d_model, mlp_ratio)  # type: ignore[arg-type]
            for own in designs
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of every next token."""
        return self.extend(tokens)[0]

    def extend(
        self, tokens: Int[Tensor, "batch time"], caches: Sequence[Cache | None] | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], list[Cache]]:
        """Logits for a stretch that goes on from the blocks' caches, and the caches after it."""
        x = self.embedding(tokens)
        kept = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, cache)
            kept.append(cache)
        return self.head(self.norm(x)), kept

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
