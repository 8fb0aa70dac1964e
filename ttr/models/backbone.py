"""The blocks of every model: vectors to vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

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

    def __init__(self, mixer: RegressionLayer, d_model: int, mlp_ratio: float, norm: bool, checkpoint: bool):
        super().__init__()
        self.checkpoint = checkpoint
        self.mixer_norm = _norm(d_model, norm)
        self.mixer = mixer
        hidden = round(mlp_ratio * d_model)
        self.mlp = nn.Sequential(_norm(d_model, norm), SwiGLU(d_model, hidden)) if hidden else None

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """The block on a whole sequence: a tensor for a tensor, which is what compilers and shards can wrap."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._whole, x, use_reentrant=False)
        return self._whole(x)

    def _whole(self, x: Tensor) -> Tensor:
        return self.extend(x)[0]

    def extend(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The block on a stretch that goes on from a cache, and the cache after it."""
        mixed, cache = self.mixer.extend(self.mixer_norm(x), cache)
        x = x + mixed
        return x if self.mlp is None else x + self.mlp(x), cache


class Backbone(nn.Module):
    """Blocks around a memory each, and a norm behind the last: what is common to models of tokens and of vectors.

    Args:
        d_model: size of a token's vector.
        num_layers: number of blocks.
        num_heads: memories in each block.
        design: a `ttr.Design` or the slug of a published one for all blocks, or a list of them (a hybrid), which
            repeats until every block has one: three and an attention, in twelve blocks, stand there three times.
        mlp_ratio: hidden size of the blocks' MLPs over d_model; 0 leaves them out.
        key_dim: size of a key in each head; d_model // num_heads by default.
        value_dim: size of a value in each head; d_model // num_heads by default.
        conv_width: taps of the short convolutions.
        conv_on: which of "q", "k" and "v" have one; "" for none.
        conv_silu: whether a SiLU follows them.
        max_step_size: what β reaches; 2 admits negative eigenvalues.
        gate: whether the memories' answers are gated.
        unit: whether queries and keys are brought to unit length; as published by default.
        fixed: which of "q" and "k" are the same at every token; as published by default.
        norm: whether there are norms at all, the memories' own included; without them an answer keeps its size, so
            that one layer can be the regression itself.
        checkpoint_activations: whether a block keeps its input only and is computed again in the backward pass: the
            same numbers and gradients, in less memory and some 4/3 of the time. Chen et al., arXiv 1604.06174.

    Raises:
        ValueError: for an unknown slug, or a list of designs whose length does not divide num_layers.
    """

    def __init__(
        self,
        d_model: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        design: str | Design | Sequence[str | Design] = "gated_delta_net",
        mlp_ratio: float = 2.0,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        conv_on: str = "qkv",
        conv_silu: bool = True,
        max_step_size: float = 1.0,
        gate: bool = False,
        unit: bool | None = None,
        fixed: str | None = None,
        norm: bool = True,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        pattern = [design] if isinstance(design, (str, Design)) else list(design)
        if not pattern or num_layers % len(pattern):
            raise ValueError(
                f"design: expected one, or a list whose length divides num_layers={num_layers}, got {len(pattern)}"
            )
        designs = pattern * (num_layers // len(pattern))
        options = {
            "key_dim": key_dim,
            "value_dim": value_dim,
            "conv_width": conv_width,
            "conv_on": conv_on,
            "conv_silu": conv_silu,
            "max_step_size": max_step_size,
            "gate": gate,
            "unit": unit,
            "fixed": fixed,
            "norm": norm,
        }
        self.blocks = nn.ModuleList(
            Block(
                RegressionLayer(own, d_model, num_heads, **options),  # type: ignore[arg-type]
                *(d_model, mlp_ratio, norm, checkpoint_activations),
            )
            for own in designs
        )
        self.norm = _norm(d_model, norm)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """The blocks on a whole sequence."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def extend(
        self, x: Float[Tensor, "batch time d_model"], caches: Sequence[Cache | None] | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], list[Cache]]:
        """The blocks on a stretch that goes on from their caches, and the caches after it."""
        kept = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block.extend(x, cache)  # type: ignore[operator]
            kept.append(cache)
        return self.norm(x), kept


def _norm(d_model: int, norm: bool) -> nn.Module:
    return nn.RMSNorm(d_model, eps=1e-5) if norm else nn.Identity()
