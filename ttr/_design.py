r"""A memory is a choice on each of five axes: this file composes them.

    m_t = argmin over m in M of  Σ_{i≤t} γ_i^(t) loss(v_i − m(k_i)),      y_t = m_t(q_t)

The weights γ, the regressor class M, the optimizer that (nearly) solves the regression, the loss, and the retention,
by which an optimizer that takes steps stays near the memory it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttr._choices import (
    L2,
    LMS,
    Choice,
    ComplexDecay,
    Exact,
    FeatureMap,
    Gain,
    GradientDescent,
    Hebbian,
    Implicit,
    Kernel,
    Linear,
    LocalPolynomial,
    Loss,
    Mixture,
    Muon,
    Network,
    OnlineEM,
    Optimizer,
    Probe,
    Regressor,
    Retention,
    SquaredError,
    Uniform,
    Weights,
    Window,
)
from ttr._cost import Cost, cost
from ttr._limits import Limit, limits
from ttr._references import bibtex
from ttr._update_rule import update_rule

FRAMEWORK = "wang2025testtime"

STREAMING = (Hebbian, GradientDescent, Muon, OnlineEM)


class Clash(NamedTuple):
    """Two axes whose choices cannot stand together, and why."""

    axes: tuple[str, str]
    when: Callable[[Design], object]  # by its truth
    why: str


class Publication(NamedTuple):
    """The name under which a design was published."""

    slug: str
    name: str
    year: int
    cite: str


# The published designs by their structure; `ttr._atlas` writes the rows.
PUBLISHED: dict[tuple[Any, ...], Publication] = {}


@dataclass(frozen=True)
class Design:
    """A point of the design space: one choice on each axis.

    Raises `ValueError` for a choice on the wrong axis, or two choices that clash.
    """

    weights: Weights = Uniform()
    regressor: Regressor = Linear()
    optimizer: Optimizer = Hebbian()
    loss: Loss = SquaredError()
    retention: Retention = L2()

    def __post_init__(self) -> None:
        for axis, kind in AXES.items():
            choice = getattr(self, axis)
            if not isinstance(choice, kind):
                hint = f"; did you mean GradientDescent({choice})?" if isinstance(choice, Gain) else ""
                raise ValueError(f"{axis}: expected {AN[axis]}, got {choice!r}{hint}")
        for clash in CLASHES:
            if clash.when(self):
                first, second = clash.axes
                other = "itself" if first == second else f"{second}={getattr(self, second)}"
                raise ValueError(f"{first}={getattr(self, first)} clashes with {other}: {clash.why}")

    @property
    def choices(self) -> tuple[Weights, Regressor, Optimizer, Loss, Retention]:
        """The choices, in the order of the axes."""
        return self.weights, self.regressor, self.optimizer, self.loss, self.retention

    @property
    def structure(self) -> tuple[Any, ...]:
        """The design without its numbers: what it shares with its published name."""
        return tuple(choice.structure for choice in self.choices)

    @property
    def publication(self) -> Publication | None:
        """Where this point of the design space was published; None where it was not."""
        return PUBLISHED.get(self.structure)

    @property
    def name(self) -> str | None:
        """The published name; None where nobody has published it."""
        return self.publication.name if self.publication else None

    @property
    def feature_map(self) -> FeatureMap:
        """What the fitted part of the regressor sees of a key."""
        return self.regressor.feature_map

    @property
    def inputs(self) -> dict[str, str]:
        """Name and axes of every tensor that `ttr.regress` needs beside q, k and v.

        `key` is the number of features where the feature map changes it.
        """
        ridge = self.regressor.ridge if isinstance(self.optimizer, Exact) else None
        of_choices = {name: axes for choice in self.choices for name, axes in choice.inputs.items()}
        return of_choices | ({"ridge": ridge} if ridge else {})

    @property
    def descends_networks(self) -> bool:
        """Whether its memory is what `ttr.ops.neural_memory` descends: a network, or a linear map learned like one."""
        optimizer = self.optimizer
        in_batches = isinstance(optimizer, GradientDescent) and optimizer.batch > 1
        return isinstance(self.regressor, Network) or isinstance(optimizer, Muon) or in_batches

    def update_rule(self) -> str:
        """How the memory is written and read at step t, in LaTeX (an `aligned` block)."""
        return r"\begin{aligned}" + r" \\ ".join(update_rule(*self.choices)) + r"\end{aligned}"

    def cost(self) -> Cost:
        """Operations, state and working space of one head, as formulas in its sizes."""
        return cost(self)

    def limits(self) -> list[Limit]:
        """What this memory becomes where one of its numbers goes to an end, or its keys are special."""
        return limits(self)

    def cites(self) -> tuple[str, ...]:
        """Keys of the works behind this design, the framework first."""
        published = (self.publication.cite,) if self.publication else ()
        chosen = tuple(key for choice in (*self.choices, self.feature_map) for key in choice.cites)
        return tuple(dict.fromkeys((FRAMEWORK, *published, *chosen)))

    def citation(self) -> str:
        """BibTeX of every work behind these choices."""
        return bibtex(self.cites())

    def __str__(self) -> str:
        default = Design()
        changed = [axis for axis in AXES if getattr(self, axis) != getattr(default, axis)]
        return f"Design({', '.join(f'{axis}={getattr(self, axis)}' for axis in changed)})"


AXES: dict[str, type[Choice]] = {
    "weights": Weights,
    "regressor": Regressor,
    "optimizer": Optimizer,
    "loss": Loss,
    "retention": Retention,
}
AN = {
    "weights": "Weights",
    "regressor": "a Regressor",
    "optimizer": "an Optimizer",
    "loss": "a Loss",
    "retention": "a Retention",
}


def _normalizes(design: Design) -> bool:
    return isinstance(design.optimizer, Hebbian) and design.optimizer.normalize


CLASHES = (
    Clash(
        ("weights", "optimizer"),
        lambda d: isinstance(d.optimizer, STREAMING) and d.weights.factor(Kernel),
        "kernel weights change with the query, but this optimizer keeps one memory for all queries; use Exact()",
    ),
    Clash(
        ("weights", "optimizer"),
        lambda d: isinstance(d.optimizer, (GradientDescent, Muon, OnlineEM)) and d.weights.factor(Window),
        "each step sees the newest pair only, so no pair can leave a window; use Decay(), Hebbian() or Exact()",
    ),
    Clash(
        ("weights", "optimizer"),
        lambda d: d.weights.factor(ComplexDecay) and not isinstance(d.optimizer, Hebbian),
        "turning a pair of channels weighs no error; use Decay() or Hebbian()",
    ),
    Clash(
        ("weights", "optimizer"),
        lambda d: "log_input_gate" in d.weights.inputs and not _normalizes(d),
        "weights of any size overflow unless their sum is divided by; use InputGate() or Hebbian(normalize=True)",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: isinstance(d.regressor, LocalPolynomial) and not isinstance(d.optimizer, (Exact, Probe)),
        "a local polynomial is fitted afresh for every query; use Exact()",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: isinstance(d.optimizer, Probe) and d.regressor != LocalPolynomial(1),
        "a probe stands for the solve of a local linear fit; use LocalPolynomial(1)",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: isinstance(d.regressor, LocalPolynomial) and d.optimizer == Exact(ridge_decays=False),
        "a local fit's ridge is relative to weights that sum to one, and never decays; use Exact()",
    ),
    Clash(
        ("weights", "regressor"),
        lambda d: isinstance(d.regressor, LocalPolynomial) and d.weights.per_channel,
        "a local fit weighs pairs and not their channels; use Decay(per='head')",
    ),
    Clash(
        ("weights", "regressor"),
        lambda d: isinstance(d.regressor, LocalPolynomial) and not d.weights.factor(Kernel),
        "nothing makes the polynomial local; multiply the weights by a Kernel()",
    ),
    Clash(
        ("optimizer", "loss"),
        lambda d: not isinstance(d.optimizer, (GradientDescent, Muon)) and not isinstance(d.loss, SquaredError),
        "this optimizer is derived from the squared error; use GradientDescent()",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: isinstance(d.regressor, Network) and not isinstance(d.optimizer, (GradientDescent, Muon)),
        "a network has no closed form; use GradientDescent() or Muon()",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: isinstance(d.regressor, Mixture) != isinstance(d.optimizer, OnlineEM),
        "shares of an error are for mixtures, and mixtures are learned by them; use Mixture() with OnlineEM()",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: (
            d.descends_networks
            and isinstance(d.optimizer, GradientDescent)
            and (d.optimizer.gain != LMS() or d.optimizer.steps > 1)
        ),
        "this step is that of a linear map, one pair at a time; use GradientDescent(LMS()) with one step a token",
    ),
    Clash(
        ("weights", "optimizer"),
        lambda d: (d.descends_networks or isinstance(d.optimizer, OnlineEM)) and d.weights.per_channel,
        "a step is weighed as a whole, and not by channel; use Decay(per='head')",
    ),
    Clash(
        ("optimizer", "optimizer"),
        lambda d: isinstance(d.optimizer, GradientDescent) and d.optimizer.average and d.optimizer.momentum,
        "a mean of the steps so far and steps that go on are two ways to smooth; use one",
    ),
    Clash(
        ("regressor", "retention"),
        lambda d: not isinstance(d.retention, L2) and not isinstance(d.regressor, Network),
        "it is a geometry of a network's weights, which do not begin at zero; use MLP()",
    ),
    Clash(
        ("optimizer", "loss"),
        lambda d: (
            isinstance(d.optimizer, GradientDescent)
            and isinstance(d.optimizer.gain, Implicit)
            and not isinstance(d.loss, SquaredError)
        ),
        "the implicit step has this closed form for the squared error only; use LMS() or NLMS()",
    ),
    Clash(
        ("optimizer", "optimizer"),
        lambda d: isinstance(d.optimizer, GradientDescent) and d.optimizer.momentum and d.optimizer.steps > 1,
        "momentum over several steps a token has no agreed meaning; use steps=1",
    ),
    Clash(
        ("regressor", "optimizer"),
        lambda d: _normalizes(d) and not d.optimizer.floor and not d.feature_map.positive,  # type: ignore[attr-defined]
        "normalising divides by sums of φ(q)ᵀφ(k), which this feature map does not keep positive; use EluPlusOne() or "
        "a floor",
    ),
    Clash(
        ("weights", "regressor"),
        lambda d: d.weights.factor(ComplexDecay) and d.regressor != Linear(),
        "it turns pairs of the key's own channels; use Linear()",
    ),
    Clash(
        ("weights", "optimizer"),
        lambda d: d.weights.factor(ComplexDecay) and _normalizes(d),
        "complex weights have no positive sum; use Hebbian()",
    ),
)
