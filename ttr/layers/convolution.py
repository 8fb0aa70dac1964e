"""The short causal convolution that lets a key, query or value see the tokens just before it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    r"""A causal filter a channel, then SiLU, unless `silu` is False.

    .. math:: y_{t} = \operatorname{SiLU}\Bigl(\sum_{j=0}^{w-1} c_j \odot x_{t-j}\Bigr)

    A value can be bound to the token before it only if its key has seen that token. Fu et al. (2022) reach it by a
    shift state-space model, Wang et al. (2025) by keys made of neighbouring tokens.
    """

    def __init__(self, channels: int, width: int, silu: bool = True):
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected at least 1, got {width}")
        self.width, self.silu = width, silu
        self.filter = nn.Conv1d(channels, channels, width, groups=channels, bias=False)

    def forward(
        self, x: Float[Tensor, "batch time channels"], past: Float[Tensor, "batch before channels"] | None = None
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch before channels"]]:
        """The filtered sequence, and the last width − 1 inputs, with which a next call goes on."""
        if past is None:
            past = x.new_zeros(x.shape[0], self.width - 1, x.shape[2])
        if x.shape[1] == 0:
            return x, past
        extended = torch.cat([past, x], dim=1)
        filtered = self.filter(extended.mT).mT
        return nn.functional.silu(filtered) if self.silu else filtered, extended[:, x.shape[1] :]
