"""Models of sequences of vectors, and one that writes a sequence down in a vector."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ttr.models.backbone import Backbone


class RegressionModel(nn.Module):
    r"""Vectors to vectors: :math:`y = W_o\,\text{backbone}(W_i x + b_i)`, causal in time.

    Args:
        input_size: entries of an input.
        output_size: entries of an output.
        d_model: size of a token's vector inside.
        **backbone: every other argument of `Backbone`.

    Raises:
        ValueError: as `Backbone`.
    """

    def __init__(self, input_size: int, output_size: int = 1, d_model: int = 128, **backbone: Any):
        super().__init__()
        self.embedding = nn.Linear(input_size, d_model)
        self.backbone = Backbone(d_model, **backbone)
        self.head = nn.Linear(d_model, output_size, bias=False)

    def forward(self, x: Float[Tensor, "batch time input"]) -> Float[Tensor, "batch time output"]:
        """The answer at every token."""
        return self.head(self.backbone(self.embedding(x)))


class RegressionAutoencoder(nn.Module):
    """Tokens to one vector, the last that the backbone makes, and from it alone back to tokens.

        code = backbone(tokens)_T ,   logits_t = decoder(code + position_t)

    The positions are the transformer's sines and cosines, the decoder two layers; both as in the compression task of
    Poli et al., arXiv 2403.17844.

    Args:
        vocab_size: number of tokens.
        d_model: size of a token's vector, and of the code.
        **backbone: every other argument of `Backbone`.

    Raises:
        ValueError: as `Backbone`, and for an odd d_model.
    """

    def __init__(self, vocab_size: int, d_model: int = 128, **backbone: Any):
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model: expected an even number for sines and cosines, got {d_model}")
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.backbone = Backbone(d_model, **backbone)
        self.decoder = nn.Sequential(
            nn.RMSNorm(d_model, eps=1e-5),
            nn.Linear(d_model, d_model),
            nn.GELU(),
            nn.RMSNorm(d_model, eps=1e-5),
            nn.Linear(d_model, d_model),
            nn.GELU(),
            nn.RMSNorm(d_model, eps=1e-5),
        )
        self.head = nn.Linear(d_model, vocab_size)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """Logits of the tokens themselves, each from the code and its position."""
        code = self.backbone(self.embedding(tokens))[:, -1:]
        positions = _sines(tokens.shape[1], code.shape[-1]).to(code)
        return self.head(self.decoder(code + positions))


def _sines(length: int, size: int) -> Float[Tensor, "{length} {size}"]:
    rates = 10_000.0 ** -torch.linspace(0, 1, size // 2)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
