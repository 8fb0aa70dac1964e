"""Feature maps: what a linear regressor sees of a key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ttr._choices.choice import Choice


class FeatureMap(Choice, ABC):
    """What a linear regressor sees of a key; `positive` where φ(q)ᵀφ(k) is never negative.

    One of your own is a frozen dataclass with `size`, `__call__` and a `formula` in x; it runs on the fast ops.
    """

    positive: ClassVar[bool] = False

    @abstractmethod
    def size(self, key: int) -> int:
        """The number of features of a key of that size."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Identity(FeatureMap):
    """The key itself."""

    formula = "x"

    def size(self, key: int) -> int:
        return key

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class EluPlusOne(FeatureMap):
    """elu(x) + 1, a channel at a time. Katharopoulos et al. (2020), eq. 7."""

    positive = True
    cites = ("katharopoulos2020transformers",)
    formula = r"\operatorname{elu}(x) + 1"

    def size(self, key: int) -> int:
        return key

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.elu(x) + 1


@dataclass(frozen=True)
class Quadratic(FeatureMap):
    r"""All products of two channels: :math:`\phi(q)^\top\phi(k) = (q^\top k)^2` from K(K+1)/2 features."""

    formula = r"\operatorname{vech}(x x^\top)"

    def size(self, key: int) -> int:
        return key * (key + 1) // 2

    def __call__(self, x: Tensor) -> Tensor:
        row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        products = x[..., row] * x[..., column]
        return torch.where(row == column, products, 2**0.5 * products)


@dataclass(frozen=True)
class Taylor(FeatureMap):
    r"""The exponential to second order: :math:`\phi(q)^\top\phi(k) = 1 + q^\top k + (q^\top k)^2/2`.

    Arora et al. (2024, Based), section 4.
    """

    positive = True
    cites = ("arora2024based",)
    formula = r"\bigl[1,\; x,\; \operatorname{vech}(x x^\top)/\sqrt 2\bigr]"

    def size(self, key: int) -> int:
        return 1 + key + Quadratic().size(key)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[..., :1]), x, Quadratic()(x) / 2**0.5], dim=-1)


@cache
def _orthogonal_directions(number: int, key: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames = -(-number // key)
    normal = torch.randn(frames, key, key, generator=generator, dtype=torch.float64)
    lengths = torch.randn(frames, key, key, generator=generator, dtype=torch.float64).norm(dim=-1)
    frame, triangle = torch.linalg.qr(normal)
    # LAPACK fixes the columns' signs by their entries; those of the triangle make the frame uniform again.
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    rows = (frame * signs).mT * lengths.unsqueeze(-1)
    return rows.flatten(0, 1)[:number]


@dataclass(frozen=True)
class PositiveRandom(FeatureMap):
    r"""Random features of the exponential kernel, with orthogonal directions ω.

    .. math:: \phi(x)_j = m^{-1/2} \exp(\omega_j^\top x - \lVert x\rVert^2/2), \qquad
        \mathbb E\,\phi(q)^\top\phi(k) = e^{q^\top k}

    Choromanski et al. (2020), lemma 1 and section 2.4.
    """

    number: int = 64
    seed: int = 0

    positive = True
    cites = ("choromanski2020performers",)
    formula = r"m^{-1/2}\, e^{\Omega x - \lVert x\rVert^2/2}"

    def __post_init__(self) -> None:
        self._require("number", self.number >= 1, "at least 1")

    def size(self, key: int) -> int:
        return self.number

    def directions(self, key: int) -> Tensor:
        """(number, key), float64: rows of independent orthogonal frames with Gaussian lengths."""
        return _orthogonal_directions(self.number, key, self.seed)

    def __call__(self, x: Tensor) -> Tensor:
        projected = x @ self.directions(x.shape[-1]).to(x).mT
        return (projected - x.square().sum(-1, keepdim=True) / 2).exp() / self.number**0.5
