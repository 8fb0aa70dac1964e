"""Regressors: which functions may be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ttr._choices.choice import Choice
from ttr._choices.feature_maps import FeatureMap, Identity


class Regressor(Choice):
    """A class of functions from keys to values; `ridge` gives the axes of the penalty of an exact fit."""

    @property
    def ridge(self) -> str | None:
        return None


@dataclass(frozen=True)
class Linear(Regressor):
    r"""Linear maps of a feature map: :math:`m(k) = S^\top \phi(k)`."""

    feature_map: FeatureMap = Identity()

    formula = r"S^\top \phi(k)"

    def __post_init__(self) -> None:
        self._require("feature_map", isinstance(self.feature_map, FeatureMap), "a feature map such as Taylor()")

    @property
    def ridge(self) -> str:
        return "heads key"


@dataclass(frozen=True)
class LocalPolynomial(Regressor):
    """Polynomials in (k − q), fitted afresh for every query and read at zero; degree 0 is a local constant."""

    degree: int = 0

    cites = ("fan1996local",)

    def __post_init__(self) -> None:
        self._require("degree", self.degree in (0, 1, 2), "0, 1 or 2")

    @property
    def structure(self) -> tuple[Any, ...]:
        return type(self), self.degree

    @property
    def formula(self) -> str:  # type: ignore[override]
        return " + ".join(["c", r"B(k - q_t)", r"C\operatorname{vech}((k - q_t)(k - q_t)^\top)"][: self.degree + 1])

    @property
    def ridge(self) -> str | None:
        return "heads" if self.degree else None
