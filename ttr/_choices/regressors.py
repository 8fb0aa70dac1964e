"""Regressors: which functions may be fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ttr._choices.choice import Choice
from ttr._choices.feature_maps import FeatureMap, Identity


class Regressor(Choice):
    """A class of functions from keys to values.

    `ridge` gives the axes of the penalty of an exact fit; `feature_map` is what the fitted part sees of a key.
    """

    feature_map: FeatureMap = Identity()

    @property
    def ridge(self) -> str | None:
        return None

    def sizes(self, value: int) -> dict[str, int]:
        """The sizes of the axes that its inputs have of their own, at values of that size."""
        return {}


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


class Network(Regressor, ABC):
    r"""A network around which the key itself is carried: :math:`m(k) = k + \text{LN}(\dots\phi(k))`.

    Keys and values must be of one size. The weights with which every sequence begins are inputs, learned by the layer
    from outside; so are the scale and shift of the final layer norm, which no token updates. Networks have no biases.
    """

    @property
    @abstractmethod
    def weights(self) -> dict[str, str]:
        """Name and axes of the matrices that a memory begins with, first layer first."""

    @property
    def inputs(self) -> dict[str, str]:
        return self.weights | {"norm_scale": "heads value", "norm_shift": "heads value"}


@dataclass(frozen=True)
class NormalizedLinear(Network):
    r"""A linear map, normalised, beside the key: :math:`m(k) = k + \text{LN}(W^\top k)`. TTT-Linear.

    Sun et al. (2024), section 2.7, whose code has a bias besides.
    """

    cites = ("sun2024learning",)
    formula = r"k + \operatorname{LN}(W^\top k)"

    @property
    def weights(self) -> dict[str, str]:
        return {"w1": "heads key value"}


@dataclass(frozen=True)
class MLP(Network):
    r"""Two layers, normalised, beside the key: :math:`m(k) = k + \text{LN}(W_2^\top \text{gelu}(W_1^\top \phi(k)))`.

    `expansion` times as many hidden units as values; gelu in its tanh form. The network of TTT-MLP (Sun et al., 2024,
    section 2.7, whose code has biases besides) and of the memories of Behrouz et al. (2025, Miras), section 5.3.
    """

    feature_map: FeatureMap = Identity()
    expansion: int = 4

    def __post_init__(self) -> None:
        self._require("feature_map", isinstance(self.feature_map, FeatureMap), "a feature map such as Taylor()")
        self._require("expansion", isinstance(self.expansion, int) and self.expansion >= 1, "an integer of at least 1")

    @property
    def formula(self) -> str:  # type: ignore[override]
        features = "k" if isinstance(self.feature_map, Identity) else r"\phi(k)"
        return rf"k + \operatorname{{LN}}\bigl(W_2^\top \operatorname{{gelu}}(W_1^\top {features})\bigr)"

    @property
    def weights(self) -> dict[str, str]:
        return {"w1": "heads key hidden", "w2": "heads hidden value"}

    def sizes(self, value: int) -> dict[str, int]:
        return {"hidden": self.expansion * value}


@dataclass(frozen=True)
class Mixture(Regressor):
    r"""Several linear maps, between which every channel of the value chooses.

    .. math:: m(q)_d = \sum_{j=1}^J \pi_{jd}(q)\, w_{jd}^\top q, \qquad \pi = \operatorname{softmax}(\text{logits})

    The inputs `key_logits` and `query_logits`, of any size, are the mixture's log-probabilities before they are
    normalised over the maps, where a pair is written and where the memory is read. Lee et al. (2026), eq. 3.1 and 3.5.
    """

    maps: int = 4

    cites = ("lee2026switching",)
    formula = r"\textstyle\sum_j \pi_{jd}(k)\, w_{jd}^\top k"

    def __post_init__(self) -> None:
        self._require("maps", isinstance(self.maps, int) and self.maps >= 1, "an integer of at least 1")

    @property
    def inputs(self) -> dict[str, str]:
        axes = "batch time heads maps value"
        return {"key_logits": axes, "query_logits": axes}

    def sizes(self, value: int) -> dict[str, int]:
        return {"maps": self.maps}
