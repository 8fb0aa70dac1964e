"""Optimizers: how, or how nearly, the regression is solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ttr._choices.choice import Choice


class Optimizer(Choice):
    """How the regression is solved, or approximated."""


@dataclass(frozen=True)
class Hebbian(Optimizer):
    """One gradient step from zero on all past pairs: least squares with the keys' second moment taken for I.

    With `normalize` the answer is divided by the sum of the weights φ(q)ᵀφ(k): kernel smoothing by features. A sum
    smaller than `floor` counts as the floor, whatever its sign: few or opposed pairs then give a small answer.
    """

    normalize: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        self._require("normalize", isinstance(self.normalize, bool), "a bool")
        number = isinstance(self.floor, (int, float)) and 0 <= self.floor < float("inf")
        self._require("floor", number and (self.normalize or not self.floor), "a number ≥ 0, and 0 without normalize")


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

    `batch` > 1 takes the gradients of that many tokens at what is left of the memory with which the batch began: other
    answers than one token after the other, but in parallel. With `average` the memory of the i-th token in a batch has
    made 1/i of the steps of the batch so far (Sun et al., 2024, in their code; that factor is learned there).
    """

    gain: Gain = LMS()
    steps: int = 1
    momentum: bool = False
    batch: int = 1
    average: bool = False

    def __post_init__(self) -> None:
        self._require("gain", isinstance(self.gain, Gain), "a gain such as NLMS()")
        self._require("steps", isinstance(self.steps, int) and self.steps >= 1, "an integer of at least 1")
        self._require("batch", isinstance(self.batch, int) and self.batch >= 1, "an integer of at least 1")
        self._require("average", isinstance(self.average, bool), "a bool")

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
class Muon(Optimizer):
    r"""Momentum on the loss of the last `window` pairs, and a step along its nearest orthogonal matrix.

    .. math::
        Z_t = \eta_t Z_{t-1} - \nabla \sum_{i > t - c} w_i\, \ell(v_i - m(k_i)), \qquad
        W_t = \alpha_t W_{t-1} + \beta_t\, \operatorname{NS}(Z_t)

    NS is `iterations` steps of the Newton–Schulz iteration, which bring singular values near one: all directions of a
    step have about the same length. The weights w_i of the window are those of an `InputGate`, and one without. ATLAS:
    Behrouz et al. (2025), eq. 32–33; the optimizer Jordan et al. (2024).
    """

    window: int = 8
    iterations: int = 5

    cites = ("behrouz2025atlas", "jordan2024muon")

    def __post_init__(self) -> None:
        self._require("window", isinstance(self.window, int) and self.window >= 1, "an integer of at least 1")
        self._require(
            "iterations", isinstance(self.iterations, int) and self.iterations >= 1, "an integer of at least 1"
        )

    @property
    def inputs(self) -> dict[str, str]:
        return {"step_size": "batch time heads", "log_momentum": "batch time heads"}


@dataclass(frozen=True)
class OnlineEM(Optimizer):
    r"""Online expectation–maximisation of a mixture: each map learns from a channel by the share it takes in it.

    .. math::
        w_{jd} \leftarrow \bar w_{jd} + \beta_t\, r_{jd}\, \delta_{jd}\, k_t, \qquad
        r_{jd} \propto \pi_{jd}(k_t)\, e^{-\delta_{jd}^2/2}, \qquad \delta_{jd} = v_{td} - \bar w_{jd}^\top k_t

    with :math:`\bar w` the decayed maps. Lee et al. (2026), eq. 3.4 and 3.8, after Cappé & Moulines (2009); they let β
    and the decay differ by map and channel, here both are one a head.
    """

    cites = ("lee2026switching", "cappe2009online")

    @property
    def inputs(self) -> dict[str, str]:
        return {"step_size": "batch time heads"}


@dataclass(frozen=True)
class Exact(Optimizer):
    """The minimiser itself. A ridge that decays is a prior that the data outgrow; one that does not, stays."""

    ridge_decays: bool = True

    cites = ("hoerl1970ridge",)


@dataclass(frozen=True)
class Probe(Optimizer):
    r"""A learned vector in place of a local linear fit's solve.

    The input `probe` stands for :math:`(\operatorname{Cov}_w(k, k) + \lambda I)^{-1}(q - \mathbb E_w k)`.
    """

    cites = ("zuo2026parallax",)

    @property
    def inputs(self) -> dict[str, str]:
        return {"probe": "batch time heads key"}
