"""What a design asks of its tensors: held to its axes and ranges, features taken, decays gathered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ttr._choices import ContinuousDecay, Decay, GradientDescent, Weights
from ttr._design import Design
from ttr.ops._check import check_range, check_shapes

RANGES: dict[str, dict[str, Any]] = {
    "log_decay": {"high": 0.0},
    "log_momentum": {"high": 0.0},
    "rate": {"low": 0.0},
    "ridge": {"low": 0.0, "open_low": True},
    "step_size": {"low": 0.0},
    "time_step": {"low": 0.0},
}


class Prepared(NamedTuple):
    """Queries and keys as features, values, and the design's inputs, all checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]


def prepare(design: Design, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor]) -> Prepared:
    """Check the tensors against the design and take the features of queries and keys.

    Raises `ValueError` for a missing or unknown input, a wrong shape, dtype or device, a value out of range.
    """
    missing = [name for name in design.inputs if inputs.get(name) is None]
    unknown = [name for name in inputs if name not in design.inputs]
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            takes = ", ".join(f"{name} ({axes})" for name, axes in design.inputs.items()) or "no inputs"
            raise ValueError(f"{', '.join(names)}: {problem} input for {design}, which takes {takes}")

    several = isinstance(design.optimizer, GradientDescent) and design.optimizer.steps > 1
    pairs = "batch time steps heads" if several else "batch time heads"
    axes = {"q": "batch time heads key", "k": f"{pairs} key", "v": f"{pairs} value"}
    tensors = {"q": q, "k": k, "v": v}
    sizes = check_shapes(**{name: (tensors[name], axes[name]) for name in tensors})
    if several and sizes["steps"] != design.optimizer.steps:  # type: ignore[attr-defined]
        raise ValueError(f"k: expected {design.optimizer.steps} steps a token, got {sizes['steps']}")  # type: ignore[attr-defined]
    tensors |= {"q": design.feature_map(q), "k": design.feature_map(k)} | dict(inputs)
    axes |= design.inputs
    check_shapes(**{name: (tensors[name], axes[name]) for name in tensors})
    for name, tensor in inputs.items():
        check_range(name, tensor, **RANGES[name])
    return Prepared(tensors["q"], tensors["k"], v, dict(inputs))


def forgetting(weights: Weights, inputs: Mapping[str, Tensor], q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The log of the factor on old pairs a token, (batch, time, heads[, key]), and the weight of a new one.

    Either is None where the weights leave it at one.
    """
    log_decay = importance = None
    for factor in weights.factors:
        if isinstance(factor, Decay):
            own = inputs["log_decay"]
            if factor.fixed:
                own = own.expand(*q.shape[:2], *own.shape)
        elif isinstance(factor, ContinuousDecay):
            own, importance = -inputs["rate"] * inputs["time_step"], inputs["time_step"]
        else:
            continue
        log_decay = own if log_decay is None else _aligned(log_decay, own) + _aligned(own, log_decay)
    return log_decay, importance


def _aligned(x: Tensor, other: Tensor) -> Tensor:
    return x.unsqueeze(-1) if x.ndim < other.ndim else x
