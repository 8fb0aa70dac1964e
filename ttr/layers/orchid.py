"""A layer that is no regression: kept beside the others as a baseline."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class OrchidLayer(nn.Module):
    r"""A gated convolution as long as the sequence, whose filter is made from the sequence.

    .. math:: z, u, v = c(W x), \qquad \hat h = \text{conv}(\text{LN}(|\mathcal F v|)), \qquad
        o = W_o \bigl(z \odot \mathcal F^{-1}(\hat h \odot \mathcal F(u \odot v))\bigr)

    with depthwise convolutions c over time and conv over frequencies. A filter made of magnitudes alone does not change
    when v is shifted, so the convolution is equivariant to (circular) shifts.

    Why it is no row of the atlas: what token i gives to token t depends on t − i and on the sequence as a whole, and on
    no comparison of a query with a key; nothing is fitted to pairs. And since the filter has seen the whole sequence
    the layer is not causal: it cannot decode, and has no place in a `RegressionLM`.

    Args:
        d_model: size of a token.
        width: taps of both short convolutions.

    Raises ValueError for sizes below one and an even width. Karami & Ghodsi (2024), type I conditioning; without
    their fixed long filters.
    """

    def __init__(self, d_model: int, width: int = 3):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model: expected at least 1, got {d_model}")
        if width < 1 or width % 2 == 0:
            raise ValueError(f"width: expected an odd number of at least 1, got {width}")
        self.input = nn.Linear(d_model, 3 * d_model)
        self.short = nn.Conv1d(3 * d_model, 3 * d_model, width, padding=width - 1, groups=3 * d_model)
        self.norm = nn.LayerNorm(d_model)
        self.condition = nn.Conv1d(d_model, d_model, width, padding="same", groups=d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """The layer on a whole sequence."""
        if x.shape[1] == 0:
            return self.output(x)
        gate, u, v = self.short(self.input(x).mT)[..., : x.shape[1]].mT.chunk(3, dim=-1)
        return self.output(gate * self.convolve(u * v, v))

    def convolve(
        self, x: Float[Tensor, "batch time d_model"], by: Float[Tensor, "batch time d_model"]
    ) -> Float[Tensor, "batch time d_model"]:
        """The circular convolution of x with the filter that is made from `by`."""
        magnitude = torch.fft.rfft(by, dim=1, norm="ortho").abs()
        filtered = self.condition(self.norm(magnitude).mT).mT * torch.fft.rfft(x, dim=1)
        return torch.fft.irfft(filtered, n=x.shape[1], dim=1)
