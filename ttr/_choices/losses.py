"""Losses: how an error counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ttr._choices.choice import Choice


class Loss(Choice, ABC):
    """A loss of the error e = v − m(k), a channel at a time; `influence` is its derivative, in LaTeX.

    One of your own is a frozen dataclass with `__call__`; it runs on its definition. What it lists under `inputs`
    comes to `__call__` by name, with one more axis, of size one, for the channels.
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

    With `delta` None each token brings its own δ ≥ 0, the input `threshold`: Yaad, which Behrouz et al. (2025, Miras)
    print both channel by channel, as here, and with the switch on the whole error's norm.
    """

    delta: float | None = 1.0

    def __post_init__(self) -> None:
        if self.delta is not None:
            self._require_positive("delta")

    @property
    def cites(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("huber1964robust",) if self.delta is not None else ("huber1964robust", "behrouz2025miras")

    @property
    def inputs(self) -> dict[str, str]:
        return {"threshold": "batch time heads"} if self.delta is None else {}

    @property
    def structure(self) -> tuple[Any, ...]:
        return type(self), self.delta is None

    @property
    def formula(self) -> str:  # type: ignore[override]
        return rf"\rho_{{{self._threshold}}}(e)"

    @property
    def influence(self) -> str:  # type: ignore[override]
        return rf"\operatorname{{clip}}_{{[-{self._threshold}, {self._threshold}]}}%s"

    @property
    def _threshold(self) -> str:
        return r"\delta" if self.delta is not None else r"\delta_t"

    def __call__(self, error: Tensor, threshold: Tensor | None = None) -> Tensor:
        delta = threshold if self.delta is None else self.delta
        if delta is None:
            raise ValueError("threshold: expected a tensor that broadcasts with the error, got None")
        size = error.abs()
        return torch.where(size <= delta, error.square() / 2, delta * (size - delta / 2))


@dataclass(frozen=True)
class Lp(Loss):
    r"""A power of the error: :math:`|e|^p/p`.

    Beyond p = 2 an outlier pulls harder than under least squares, not softer.
    """

    p: float = 2.0

    formula = r"\tfrac1p |e|^p"
    influence = r"\bigl(\operatorname{sgn}(\cdot)|\cdot|^{p-1}\bigr)%s"

    def __post_init__(self) -> None:
        self._require("p", 1 <= self.p < float("inf"), "a finite number of at least 1")

    def __call__(self, error: Tensor) -> Tensor:
        return error.abs().pow(self.p) / self.p
