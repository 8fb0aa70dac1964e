"""Weights: how much each past pair counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ttr._choices.choice import Choice

Kind = TypeVar("Kind", bound="Weights")


class Weights(Choice):
    """How much pair i counts in the fit at time t, γ_i^(t). Weights multiply: `Kernel() * Decay()`.

    `recursive` weights follow from those a step before: all old ones by the factor `old`, the new one is `new`.
    """

    recursive: ClassVar[bool] = True
    new: ClassVar[str] = ""

    @property
    def old(self) -> str:
        return ""

    @property
    def factors(self) -> tuple[Weights, ...]:
        return (self,)

    def factor(self, kind: type[Kind]) -> Kind | None:
        """The factor of a kind, of which a product has at most one."""
        return next((factor for factor in self.factors if isinstance(factor, kind)), None)

    @property
    def per_channel(self) -> bool:
        """Whether a decay weighs each channel of a key by itself."""
        decay = self.factor(Decay)
        return decay is not None and decay.per == "channel"

    def __mul__(self, other: Weights) -> Weights:
        if not isinstance(other, Weights):
            return NotImplemented
        factors = [factor for factor in (*self.factors, *other.factors) if factor != Uniform()]
        factors.sort(key=str)
        kinds = [type(factor).__name__ for factor in factors]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"weights: expected each kind once in a product, got {' * '.join(kinds)}")
        names = [name for factor in factors for name in factor.inputs]
        if len(set(names)) < len(names):
            raise ValueError(f"weights: expected each input once in a product, got {', '.join(names)}")
        return Product(tuple(factors)) if len(factors) > 1 else (factors or [Uniform()])[0]


@dataclass(frozen=True)
class Uniform(Weights):
    """Every past pair counts the same: γ = 1."""

    formula = "1"


@dataclass(frozen=True)
class Decay(Weights):
    r"""Old pairs fade: :math:`\gamma_i^{(t)} = \prod_{j=i+1}^{t} \alpha_j`.

    One factor a head, or one a channel of the key (the weight is then a vector over channels). Comes as the input
    `log_decay` = log α ≤ 0: a number a token or, where `fixed`, one for all tokens.
    """

    per: Literal["head", "channel"] = "head"
    fixed: bool = False

    def __post_init__(self) -> None:
        self._require("per", self.per in ("head", "channel"), "'head' or 'channel'")
        self._require("fixed", isinstance(self.fixed, bool), "a bool")

    @property
    def formula(self) -> str:  # type: ignore[override]
        factor = self._factor if self.fixed else self._factor + "_j"
        return rf"\textstyle\prod_{{j=i+1}}^{{t}} {factor}"

    @property
    def old(self) -> str:
        factor = self._factor if self.fixed else self._factor + "_t"
        return rf"\operatorname{{Diag}}({factor})\," if self.per == "channel" else factor + r"\,"

    @property
    def _factor(self) -> str:
        return r"\boldsymbol\alpha" if self.per == "channel" else r"\alpha"

    @property
    def inputs(self) -> dict[str, str]:
        axes = "heads" if self.per == "head" else "heads key"
        return {"log_decay": axes if self.fixed else f"batch time {axes}"}


@dataclass(frozen=True)
class ContinuousDecay(Weights):
    r"""Pairs fade in continuous time: :math:`\gamma_i^{(t)} = \Delta_i e^{-a(\Delta_{i+1} + \dots + \Delta_t)}`.

    A linear state-space model discretised with step Δ: the input `time_step` Δ ≥ 0 both forgets, at the head's
    `rate` a ≥ 0, and scales what is written.
    """

    cites = ("dao2024mamba2",)
    formula = r"\Delta_i\, e^{-a(\Delta_{i+1} + \dots + \Delta_t)}"
    old = r"e^{-a\Delta_t}\,"
    new = r"\Delta_t\,"

    @property
    def inputs(self) -> dict[str, str]:
        return {"time_step": "batch time heads", "rate": "heads"}


@dataclass(frozen=True)
class ComplexDecay(Weights):
    r"""Old pairs fade and turn, in pairs of channels: :math:`\gamma_i^{(t)} = e^{(\ell + \mathrm i\omega)(t - i)}`.

    Channels 2n and 2n + 1 are the real and imaginary part of a key's n-th entry; the answer is the real part of the
    inner product. The inputs, the same at every token, are `log_decay` = ℓ ≤ 0 and `frequency` = ω, in radians a token:
    a linear time-invariant state-space model with a diagonal, complex state matrix.
    """

    cites = ("gu2022s4d",)
    formula = r"e^{(\ell + \mathrm i\omega)(t - i)}"
    old = r"\operatorname{Diag}(e^{\ell + \mathrm i\omega})\,"

    @property
    def inputs(self) -> dict[str, str]:
        return {"log_decay": "heads pair", "frequency": "heads pair"}


@dataclass(frozen=True)
class InputGate(Weights):
    r"""Each pair comes with its own importance: :math:`\gamma_i^{(t)} = w_i`.

    The input `input_gate` ≥ 0 or, where `exponential`, its logarithm `log_input_gate`, of any size.
    """

    exponential: bool = False

    def __post_init__(self) -> None:
        self._require("exponential", isinstance(self.exponential, bool), "a bool")

    @property
    def formula(self) -> str:  # type: ignore[override]
        return r"e^{\tilde w_i}" if self.exponential else "w_i"

    @property
    def new(self) -> str:  # type: ignore[override]
        return r"e^{\tilde w_t}\," if self.exponential else r"w_t\,"

    @property
    def inputs(self) -> dict[str, str]:
        return {"log_input_gate" if self.exponential else "input_gate": "batch time heads"}


@dataclass(frozen=True)
class Window(Weights):
    """Only the last `size` pairs count."""

    size: int

    recursive = False
    formula = r"\mathbb 1[t - i < w]"

    def __post_init__(self) -> None:
        self._require("size", isinstance(self.size, int) and self.size >= 1, "an integer of at least 1")


class Similarity(Choice, ABC):
    """How a kernel compares query and key: the log of the weight at bandwidth 1."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Exponential(Similarity):
    r"""The dot product: :math:`\exp(q^\top k / h^2)`."""

    formula = r"e^{q_t^\top k_i / h^2}"

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * k).sum(-1)


@dataclass(frozen=True)
class Gaussian(Similarity):
    r"""The distance: :math:`\exp(-\lVert q - k\rVert^2 / 2h^2)`; the exponential one, to a constant at unit norm."""

    formula = r"e^{-\lVert q_t - k_i\rVert^2 / 2h^2}"

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return -(q - k).square().sum(-1) / 2


@dataclass(frozen=True)
class Kernel(Weights):
    """Pairs count by how near their keys are to the query, at the scale of a bandwidth h."""

    similarity: Similarity = Exponential()
    bandwidth: float = 1.0

    recursive = False
    cites = ("nadaraya1964estimating", "watson1964smooth")

    def __post_init__(self) -> None:
        self._require("similarity", isinstance(self.similarity, Similarity), "a similarity such as Gaussian()")
        self._require_positive("bandwidth")

    @property
    def formula(self) -> str:  # type: ignore[override]
        return self.similarity.formula


@dataclass(frozen=True)
class Product(Weights):
    """A product of weights; written with `*`."""

    parts: tuple[Weights, ...]

    @property
    def factors(self) -> tuple[Weights, ...]:
        return self.parts

    @property
    def recursive(self) -> bool:  # type: ignore[override]
        return all(part.recursive for part in self.parts)

    @property
    def old(self) -> str:
        return "".join(part.old for part in self.parts)

    @property
    def new(self) -> str:  # type: ignore[override]
        return "".join(part.new for part in self.parts)

    @property
    def inputs(self) -> dict[str, str]:
        return {name: axes for part in self.parts for name, axes in part.inputs.items()}

    @property
    def structure(self) -> tuple[Any, ...]:
        return type(self), *(part.structure for part in self.parts)

    @property
    def formula(self) -> str:  # type: ignore[override]
        return r" \cdot ".join(part.formula for part in self.parts)

    @property
    def cites(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(key for part in self.parts for key in part.cites)

    def __str__(self) -> str:
        return " * ".join(map(str, self.parts))
