"""The blocks of every model: vectors to vectors."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
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

    def __init__(self, mixer: RegressionLayer, d_model: int, mlp_ratio: float, norm: bool):
        super().__init__()
        self.mixer_norm = _norm(d_model, norm)
        self.mixer = mixer
        hidden = round(mlp_ratio * d_model)
        self.mlp = nn.Sequential(_norm(d_model, norm), SwiGLU(d_model, hidden)) if hidden else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        mixed, cache = self.mixer.extend(self.mixer_norm(x), cache)
        x = x + mixed
        return x if self.mlp is None else x + self.mlp(x), cache


class Backbone(nn.Module):
    """Blocks around a memory each, and a norm behind the last: what is common to models of tokens and of vectors.

    Args:
        d_model: size of a token's vector.
        num_layers: number of blocks.
        num_heads: memories in each block.
        design: a `ttr.Design` or the slug of a published one for all blocks, or a list with one for each (a hybrid).
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

    Raises:
        ValueError: for an unknown slug, or a list of designs that is not num_layers long.
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
            "conv_silu": conv_silu,
            "max_step_size": max_step_size,
            "gate": gate,
            "unit": unit,
            "fixed": fixed,
            "norm": norm,
        }
        self.blocks = nn.ModuleList(
            Block(RegressionLayer(own, d_model, num_heads, **options), d_model, mlp_ratio, norm)  # type: ignore[arg-type]
            for own in designs
        )
        self.norm = _norm(d_model, norm)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """The blocks on a whole sequence."""
        return self.extend(x)[0]

    def extend(
        self, x: Float[Tensor, "batch time d_model"], caches: Sequence[Cache | None] | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], list[Cache]]:
        """The blocks on a stretch that goes on from their caches, and the caches after it."""
        kept = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, cache)
            kept.append(cache)
        return self.norm(x), kept


def _norm(d_model: int, norm: bool) -> nn.Module:
    return nn.RMSNorm(d_model, eps=1e-5) if norm else nn.Identity()
