"""Losses: how an error counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ttr._choices.choice import Choice


class Loss(Choice, ABC):
    """A loss of the error e = v − m(k), a channel at a time; `influence` is its derivative, in LaTeX.

    One of your own is a frozen dataclass with `__call__`; it runs on its definition.
    """

    influence: ClassVar[str] = r"\ell'%s"

    @abstractmethod
    def __call__(self, error: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SquaredError(Loss):
    """e²/2."""

    formula = r"\tfrac12 e^2"
    influence = "%s"

    def __call__(self, error: Tensor) -> Tensor:
        return error.square() / 2


@dataclass(frozen=True)
class Huber(Loss):
    r"""A square up to δ, then a line: an outlier pulls no harder than δ.

    .. math:: \tfrac12 e^2 \text{ where } |e| \le \delta, \qquad \delta|e| - \tfrac12\delta^2 \text{ elsewhere}
    """

    delta: float = 1.0

    cites = ("huber1964robust",)
    formula = r"\rho_\delta(e)"
    influence = r"\operatorname{clip}_{[-\delta, \delta]}%s"

    def __post_init__(self) -> None:
        self._require_positive("delta")

    def __call__(self, error: Tensor) -> Tensor:
        size = error.abs()
        return torch.where(size <= self.delta, error.square() / 2, self.delta * (size - self.delta / 2))


@dataclass(frozen=True)
class Lp(Loss):
    r"""A power of the error: :math:`|e|^p / p`."""

    p: float = 2.0

    formula = r"\tfrac1p |e|^p"
    influence = r"\bigl(\operatorname{sgn}(\cdot)|\cdot|^{p-1}\bigr)%s"

    def __post_init__(self) -> None:
        self._require("p", 1 <= self.p < float("inf"), "a finite number of at least 1")

    def __call__(self, error: Tensor) -> Tensor:
        return error.abs().pow(self.p) / self.p
