"""The choices on each axis of the design space, as small frozen dataclasses.

A choice says which inputs a token must bring for it, how it reads as a formula and whom to cite. Where it is a
function (a feature map, a similarity, a loss) it can be called. What a combination of choices means is in
`ttr.oracle`, how to compute it fast in `ttr.ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


class Choice:
    """One choice on one axis: the inputs it needs, its formula, its sources."""

    cites: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = ""

    @property
    def inputs(self) -> dict[str, str]:
        """Name and axes of every tensor that this choice needs beside q, k and v."""
        return {}

    @property
    def structure(self) -> tuple[Any, ...]:
        """What makes two choices the same kind of memory: all but their numbers, which are settings."""
        return type(self), *(
            value.structure if isinstance(value, Choice) else value
            for value in self._values().values()
            if isinstance(value, (Choice, str, bool))
        )

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in self._fields()}

    def _fields(self) -> tuple[Field[Any], ...]:
        return fields(self) if is_dataclass(self) else ()

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in self._fields()}
        changed = {name: value for name, value in self._values().items() if value != defaults[name]}
        shown = [f"{name}={value if isinstance(value, Choice) else repr(value)}" for name, value in changed.items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            got = getattr(self, name)
            raise ValueError(f"{type(self).__name__}.{name}: expected {expected}, got {got!r}")

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        valid = isinstance(value, (int, float)) and 0 < value < float("inf")
        self._require(name, valid, "a positive finite number")


# --- weights: how much each past pair counts ------------------------------------------------------------------


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

    def __mul__(self, other: Weights) -> Weights:
        if not isinstance(other, Weights):
            return NotImplemented
        factors = [factor for factor in (*self.factors, *other.factors) if factor != Uniform()]
        factors.sort(key=str)
        kinds = [type(factor).__name__ for factor in factors]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"weights: expected each kind once in a product, got {' * '.join(kinds)}")
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


# --- regressors: which functions may be fitted ----------------------------------------------------------------


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


# --- losses ---------------------------------------------------------------------------------------------------


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


# --- optimizers: how (nearly) the regression is solved --------------------------------------------------------


class Optimizer(Choice):
    """How the regression is solved, or approximated."""


@dataclass(frozen=True)
class Hebbian(Optimizer):
    """One gradient step from zero on all past pairs: least squares with the keys' second moment taken for I.

    With `normalize` the answer is divided by the sum of the weights φ(q)ᵀφ(k): kernel smoothing by features.
    """

    normalize: bool = False


class Gain(Choice):
    """The metric of a gradient step: the error is written along g_t."""


@dataclass(frozen=True)
class LMS(Gain):
    """The plain gradient: g = βk."""

    cites = ("widrow1960adaptive",)
    formula = r"\beta_t k_t"


@dataclass(frozen=True)
class NLMS(Gain):
    """A step measured against the key's length: g = βk/(ε + ‖k‖²)."""

    epsilon: float = 1e-6

    cites = ("nagumo1967learning", "kaczmarz1937angenaherte")
    formula = r"\beta_t k_t / (\varepsilon + \lVert k_t\rVert^2)"

    def __post_init__(self) -> None:
        self._require_positive("epsilon")


@dataclass(frozen=True)
class Implicit(Gain):
    """The gradient at the new memory: g = βk/(1 + β‖k‖²)."""

    cites = ("liu2024longhorn",)
    formula = r"\beta_t k_t / (1 + \beta_t \lVert k_t\rVert^2)"


@dataclass(frozen=True)
class DiagonalNewton(Gain):
    """A step a channel, by the diagonal of the keys' second moment: g = βk/(λ + Σγ k∘k)."""

    formula = r"\beta_t k_t \oslash \bigl(\lambda + \textstyle\sum_i \gamma_i^{(t)} k_i \odot k_i\bigr)"

    @property
    def inputs(self) -> dict[str, str]:
        return {"ridge": "heads key"}


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    """Gradient steps on the newest pair's loss, from the (decayed) memory of the step before.

    `steps` > 1 takes as many key–value pairs a token, one step each: k and v then have a steps axis after time.
    `momentum` carries the step on by the input `log_momentum`.
    """

    gain: Gain = LMS()
    steps: int = 1
    momentum: bool = False

    def __post_init__(self) -> None:
        self._require("gain", isinstance(self.gain, Gain), "a gain such as NLMS()")
        self._require("steps", isinstance(self.steps, int) and self.steps >= 1, "an integer of at least 1")

    @property
    def structure(self) -> tuple[Any, ...]:
        return *super().structure, self.steps > 1

    @property
    def cites(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.gain.cites

    @property
    def inputs(self) -> dict[str, str]:
        axes = "batch time heads" if self.steps == 1 else "batch time steps heads"
        momentum = {"log_momentum": "batch time heads"} if self.momentum else {}
        return {"step_size": axes} | self.gain.inputs | momentum


@dataclass(frozen=True)
class Exact(Optimizer):
    """The minimiser itself. A ridge that decays is a prior that the data outgrow; one that does not, stays."""

    ridge_decays: bool = True

    cites = ("hoerl1970ridge",)
