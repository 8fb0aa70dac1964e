"""What a memory becomes where one of its numbers goes to an end, or its keys are special.

Each limit is a row: which designs have it, what they become there, and tensors near it, so that it can be executed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ttr._choices import (
    LMS,
    NLMS,
    ComplexDecay,
    ContinuousDecay,
    Decay,
    DiagonalNewton,
    Exact,
    Exponential,
    Gaussian,
    GradientDescent,
    Hebbian,
    Huber,
    Identity,
    Implicit,
    InputGate,
    Kernel,
    Linear,
    LocalPolynomial,
    Lp,
    PositiveRandom,
    Probe,
    SquaredError,
    Taylor,
    Uniform,
    Weights,
    Window,
)

if TYPE_CHECKING:
    from ttr._design import Design

FAR = 1e9


@dataclass(frozen=True)
class Call:
    """A design and the tensors that `ttr.regress` would take."""

    design: Design
    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]

    def of(self, design: Design, without: str = "") -> Call:
        """The same call of another design, without some inputs."""
        return replace(
            self, design=design, inputs={name: x for name, x in self.inputs.items() if name not in without.split()}
        )

    def having(self, **tensors: Tensor) -> Call:
        """The same call with some tensors replaced."""
        qkv: dict[str, Any] = {name: tensors.pop(name) for name in "qkv" if name in tensors}
        return replace(self, **qkv, inputs=self.inputs | tensors)


class Near(NamedTuple):
    """A call near a limit, the call that it nears, and what the first one's answer is multiplied by."""

    near: Call
    limit: Call
    factor: float = 1.0


@dataclass(frozen=True)
class Limit:
    """One limit of one design.

    Attributes:
        when: the limit, in words.
        becomes: the design that the first one is there.
        approach: from a call of the first design to one near the limit and the call that it nears.
        within: the relative difference at which the two calls must agree.
    """

    when: str
    becomes: Design
    approach: Callable[[Call], Near]
    within: float = 1e-6

    def __str__(self) -> str:
        return f"{self.becomes.name or self.becomes} where {self.when}"


def limits(design: Design) -> list[Limit]:
    """Every limit that the table below has for this design and that makes sense there."""
    found = []
    for row in ROWS:
        try:
            becomes = row.becomes(design)
        except ValueError:  # what would be there clashes, so it is no memory
            continue
        if becomes is not None:
            found.append(Limit(row.when, becomes, _approach(row, becomes), row.within))
    return found


class _Row(NamedTuple):
    """A limit of all designs for which `becomes` gives one; the data are `of` a call and of what that becomes."""

    when: str
    becomes: Callable[[Design], Design | None]
    near: Callable[[Call, Design], Near]
    within: float = 1e-6


def _approach(row: _Row, becomes: Design) -> Callable[[Call], Near]:
    return lambda call: row.near(call, becomes)


# --- which designs ----------------------------------------------------------------------------------------------


def _has(design: Design, kind: type[Weights], **values: object) -> bool:
    factor = design.weights.factor(kind)
    return factor is not None and all(getattr(factor, name) == value for name, value in values.items())


def _with_weights(design: Design, kind: type[Weights], *new: Weights) -> Design:
    """The design with other weights in the place of those of one kind."""
    weights: Weights = Uniform()
    for factor in (*(f for f in design.weights.factors if not isinstance(f, kind)), *new):
        weights = weights * factor
    return replace(design, weights=weights)


def _linear(design: Design) -> bool:
    return isinstance(design.regressor, Linear) and isinstance(design.loss, SquaredError)


def _sees_keys(design: Design) -> bool:
    """Whether the memory is a linear map of the keys themselves."""
    return _linear(design) and design.feature_map == Identity()


def _descends(design: Design, gain: type, **values: object) -> bool:
    optimizer = design.optimizer
    return (
        isinstance(optimizer, GradientDescent)
        and isinstance(optimizer.gain, gain)
        and optimizer.batch == 1
        and all(getattr(optimizer, name) == value for name, value in values.items())
    )


def _with_optimizer(design: Design, **changed: Any) -> Design:
    return replace(design, optimizer=replace(design.optimizer, **changed))  # type: ignore[type-var]


def _exact(design: Design) -> bool:
    return isinstance(design.optimizer, Exact)


def _local(design: Design, *degrees: int) -> bool:
    return isinstance(design.regressor, LocalPolynomial) and design.regressor.degree in degrees


def _smooths(design: Design, feature_map: type) -> bool:
    """Whether it is a kernel smoother by features of the exponential."""
    return (
        isinstance(design.regressor, Linear)
        and isinstance(design.regressor.feature_map, feature_map)
        and isinstance(design.optimizer, Hebbian)
        and design.optimizer.normalize
    )


# --- tensors near a limit ---------------------------------------------------------------------------------------


def _set(design: Callable[[Design], Design] | None = None, drop: str = "", **values: float) -> Callable[..., Near]:
    """Inputs set to a number; the limit's call has none of them left that `drop` names."""

    def near(call: Call, becomes: Design) -> Near:
        filled = {name: torch.full_like(call.inputs[name], value) for name, value in values.items()}
        close = call.of(call.design if design is None else design(call.design)).having(**filled)
        return Near(close, close.of(becomes, without=drop))

    return near


def _scaled_by(name: str, value: float, factor: float) -> Callable[..., Near]:
    """An input set to a number, its name unknown in the limit, where the answers are taken times a factor."""

    def near(call: Call, becomes: Design) -> Near:
        close = call.having(**{name: torch.full_like(call.inputs[name], value)})
        return Near(close, call.of(becomes, without=name), factor)

    return near


def _unit(call: Call, becomes: Design) -> Near:
    close = call.having(q=normalize(call.q, dim=-1), k=normalize(call.k, dim=-1))
    return Near(close, close.of(becomes))


def _orthonormal(call: Call, becomes: Design) -> Near:
    time = min(call.k.shape[1], call.k.shape[-1])
    frame = torch.linalg.qr(call.k[:, :time].movedim(1, -1)).Q.movedim(-1, 1)
    ones = torch.ones_like(call.inputs["step_size"][:, :time])
    close = Call(call.design, call.q[:, :time], frame, call.v[:, :time], {"step_size": ones})
    ridge = frame.new_full(frame.shape[-2:], 1e-8)
    return Near(close, Call(becomes, close.q, close.k, close.v, {"ridge": ridge}))


def _one_hot(call: Call, becomes: Design) -> Near:
    k = one_hot(call.k.abs().argmax(-1), call.k.shape[-1]).to(call.k)
    close = call.having(k=k, step_size=torch.ones_like(call.inputs["step_size"]))
    return Near(close, close.of(becomes, without="step_size"))


def _same_in_all_channels(call: Call, becomes: Design) -> Near:
    first = call.inputs["log_decay"][..., :1]
    close = call.having(log_decay=first.expand_as(call.inputs["log_decay"]))
    return Near(close, close.of(becomes).having(log_decay=first.squeeze(-1)))


def _same_at_all_tokens(call: Call, becomes: Design) -> Near:
    log_decay = call.inputs["log_decay"].mean((0, 1))
    close = call.having(log_decay=log_decay.expand_as(call.inputs["log_decay"]))
    return Near(close, close.of(becomes).having(log_decay=log_decay))


def _without_turning(call: Call, becomes: Design) -> Near:
    close = call.having(frequency=torch.zeros_like(call.inputs["frequency"]))
    twice = call.inputs["log_decay"].repeat_interleave(2, dim=-1)
    return Near(close, close.of(becomes, without="frequency").having(log_decay=twice))


def _one_step_used(call: Call, becomes: Design) -> Near:
    step_size = torch.cat([call.inputs["step_size"][:, :, :1], 0 * call.inputs["step_size"][:, :, 1:]], dim=2)
    first = {"k": call.k[:, :, 0], "v": call.v[:, :, 0], "step_size": step_size[:, :, 0]}
    return Near(call.having(step_size=step_size), call.of(becomes).having(**first))


def _large_steps(call: Call, becomes: Design) -> Near:
    size = call.inputs["step_size"]
    stored = call.of(becomes).having(step_size=torch.ones_like(size))
    return Near(call.having(step_size=torch.full_like(size, FAR)), stored)


def _small_keys(call: Call, becomes: Design) -> Near:
    close = call.having(q=call.q / 20, k=call.k / 20)
    return Near(close, close.of(becomes))


def _many_features(call: Call, becomes: Design) -> Near:
    many = replace(call.design, regressor=Linear(PositiveRandom(2**15)))
    close = call.of(many).having(q=call.q / 2, k=call.k / 2)
    return Near(close, close.of(becomes))


def _wide_threshold(call: Call, becomes: Design) -> Near:
    if "threshold" in call.inputs:
        return _set(drop="threshold", threshold=FAR)(call, becomes)
    return _set(lambda d: replace(d, loss=Huber(FAR)))(call, becomes)


def _bandwidth(design: Design) -> Design:
    kernel = design.weights.factor(Kernel)
    return design if kernel is None else _with_weights(design, Kernel, replace(kernel, bandwidth=FAR))


# --- the table --------------------------------------------------------------------------------------------------

ROWS = (
    _Row(
        "the ridge grows without bound, answers times the ridge",
        lambda d: (
            replace(d, optimizer=Hebbian())
            if _exact(d) and _linear(d) and not _has(d, Kernel) and not (d.optimizer.ridge_decays and d.weights.old)  # type: ignore[attr-defined]
            else None
        ),
        _scaled_by("ridge", FAR, FAR),
    ),
    _Row(
        "step sizes go to zero, answers over the step size",
        lambda d: (
            replace(d, optimizer=Hebbian()) if _linear(d) and _descends(d, LMS, steps=1, momentum=False) else None
        ),
        _scaled_by("step_size", 1 / FAR, FAR),
    ),
    _Row(
        "keys are orthonormal, steps are one and the ridge goes to zero",
        lambda d: (
            replace(d, optimizer=Exact())
            if _sees_keys(d) and d.weights == Uniform() and _descends(d, LMS, steps=1, momentum=False)
            else None
        ),
        _orthonormal,
    ),
    _Row(
        "each key is one channel and steps are one",
        lambda d: (
            replace(d, optimizer=Exact())
            if _sees_keys(d) and d.weights == Uniform() and _descends(d, DiagonalNewton, steps=1, momentum=False)
            else None
        ),
        _one_hot,
    ),
    _Row(
        "nothing decays: a ridge that stays and one that fades are the same",
        lambda d: (
            replace(d, optimizer=Exact())
            if _linear(d) and d.optimizer == Exact(ridge_decays=False) and not d.weights.old
            else None
        ),
        _set(),
    ),
    _Row(
        "nothing decays: log_decay is 0",
        lambda d: _with_weights(d, Decay) if _has(d, Decay) else None,
        _set(drop="log_decay", log_decay=0.0),
    ),
    _Row(
        "all channels decay alike",
        lambda d: _with_weights(d, Decay, Decay(fixed=_has(d, Decay, fixed=True))) if d.weights.per_channel else None,
        _same_in_all_channels,
    ),
    _Row(
        "all tokens decay alike",
        lambda d: (
            _with_weights(d, Decay, Decay("channel" if d.weights.per_channel else "head", fixed=True))
            if _has(d, Decay, fixed=False)
            else None
        ),
        _same_at_all_tokens,
    ),
    _Row(
        "no pair of channels turns: the frequency is 0",
        lambda d: _with_weights(d, ComplexDecay, Decay("channel", fixed=True)) if _has(d, ComplexDecay) else None,
        _without_turning,
    ),
    _Row(
        "steps of time are one and the rate is 0",
        lambda d: _with_weights(d, ContinuousDecay) if _has(d, ContinuousDecay) else None,
        _set(drop="time_step rate", time_step=1.0, rate=0.0),
    ),
    _Row(
        "every gate is open",
        lambda d: _with_weights(d, InputGate) if _has(d, InputGate, exponential=False) else None,
        _set(drop="input_gate", input_gate=1.0),
    ),
    _Row(
        "every gate is open",
        lambda d: _with_weights(d, InputGate) if _has(d, InputGate, exponential=True) else None,
        _set(drop="log_input_gate", log_input_gate=0.0),
    ),
    _Row(
        "the window holds the whole past",
        lambda d: _with_weights(d, Window) if _has(d, Window) else None,
        _set(lambda d: _with_weights(d, Window, Window(10**9))),
    ),
    _Row(
        "the bandwidth grows without bound",
        lambda d: _with_weights(d, Kernel) if _has(d, Kernel) and _linear(d) else None,
        _set(_bandwidth),
    ),
    _Row(
        "the ridge grows without bound",
        lambda d: replace(d, regressor=LocalPolynomial(0)) if _local(d, 1, 2) and _exact(d) else None,
        _scaled_by("ridge", FAR, 1.0),
    ),
    _Row(
        "the probe is 0",
        lambda d: replace(d, regressor=LocalPolynomial(0), optimizer=Exact()) if d.optimizer == Probe() else None,
        _set(drop="probe", probe=0.0),
    ),
    _Row(
        "queries and keys have unit length",
        lambda d: (
            _with_weights(d, Kernel, Kernel(Exponential()))
            if _local(d, 0, 1, 2) and _has(d, Kernel, similarity=Gaussian(), bandwidth=1.0)
            else None
        ),
        _unit,
    ),
    _Row(
        "queries and keys have unit length",
        lambda d: (
            _with_weights(d, Kernel, Kernel(Gaussian()))
            if _local(d, 0, 1, 2) and _has(d, Kernel, similarity=Exponential(), bandwidth=1.0)
            else None
        ),
        _unit,
    ),
    _Row(
        "queries and keys are small",
        lambda d: (
            replace(d, weights=d.weights * Kernel(), regressor=LocalPolynomial(0), optimizer=Exact())
            if _smooths(d, Taylor)
            else None
        ),
        _small_keys,
        within=1e-4,
    ),
    _Row(
        "there are many random features",
        lambda d: (
            replace(d, weights=d.weights * Kernel(), regressor=LocalPolynomial(0), optimizer=Exact())
            if _smooths(d, PositiveRandom)
            else None
        ),
        _many_features,
        within=0.05,
    ),
    _Row(
        "momentum goes to zero",
        lambda d: (
            _with_optimizer(d, momentum=False)
            if isinstance(d.optimizer, GradientDescent) and d.optimizer.momentum
            else None
        ),
        _set(drop="log_momentum", log_momentum=-100.0),
    ),
    _Row(
        "all steps of a token but the first are zero",
        lambda d: (
            _with_optimizer(d, steps=1) if isinstance(d.optimizer, GradientDescent) and d.optimizer.steps > 1 else None
        ),
        _one_step_used,
    ),
    _Row(
        "keys have unit length",
        lambda d: _with_optimizer(d, gain=LMS()) if _sees_keys(d) and _descends(d, NLMS, steps=1) else None,
        _unit,
        within=1e-5,
    ),
    _Row(
        "implicit steps grow without bound: each stores its pair",
        lambda d: _with_optimizer(d, gain=NLMS()) if _descends(d, Implicit, steps=1) and not d.weights.new else None,
        _large_steps,
        within=1e-5,
    ),
    _Row(
        "the threshold grows without bound",
        lambda d: replace(d, loss=SquaredError()) if isinstance(d.loss, Huber) else None,
        _wide_threshold,
    ),
    _Row(
        "the power is two",
        lambda d: replace(d, loss=SquaredError()) if isinstance(d.loss, Lp) else None,
        _set(lambda d: replace(d, loss=Lp(2.0))),
    ),
)
