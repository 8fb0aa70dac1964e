"""What a design asks of its tensors: held to its axes and ranges, features taken, decays gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ttr._choices import (
    ComplexDecay,
    ContinuousDecay,
    Decay,
    DiagonalNewton,
    Exact,
    GradientDescent,
    Hebbian,
    Identity,
    InputGate,
    Kernel,
    Network,
    OnlineEM,
    Uniform,
    Weights,
    Window,
)
from ttr._design import Design
from ttr._state import State
from ttr.ops._check import check_range, check_shapes
from ttr.ops._packed import cut

RANGES: dict[str, dict[str, Any]] = {
    "frequency": {},
    "input_gate": {"low": 0.0},
    "key_logits": {},
    "log_decay": {"high": 0.0},
    "log_input_gate": {},
    "log_momentum": {"high": 0.0},
    "norm_scale": {},
    "norm_shift": {},
    "probe": {},
    "query_logits": {},
    "rate": {"low": 0.0},
    "ridge": {"low": 0.0, "open_low": True},
    "step_size": {"low": 0.0},
    "threshold": {"low": 0.0},
    "time_step": {"low": 0.0},
    "w1": {},
    "w2": {},
}

OF_THE_QUERY = ("probe",)


class Prepared(NamedTuple):
    """Queries and keys as features, values, the design's inputs, and queries and keys as they came; all checked.

    `sizes` has the size of each axis that is named in the design's inputs, or is one of q, k and v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: dict[str, Tensor]
    raw_q: Tensor
    raw_k: Tensor
    sizes: Mapping[str, int] = {}


def prepare(
    design: Design,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Mapping[str, Tensor],
    cu_seqlens: Tensor | None = None,
) -> Prepared:
    """Check the tensors against the design and take the features of queries and keys.

    Raises `ValueError` for a missing or unknown input, a wrong shape, dtype or device, a value out of range.
    """
    if not isinstance(design, Design):
        raise ValueError(f"design: expected a Design, such as an entry of ttr.atlas, got {design!r}")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor is None:
            raise ValueError(f"{name}: expected a tensor, got None")
    takes, feature_map = design.inputs, design.feature_map
    missing = [name for name in takes if inputs.get(name) is None]
    unknown = [name for name in inputs if name not in takes]
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            known = ", ".join(f"{name} ({axes})" for name, axes in takes.items()) or "no inputs"
            raise ValueError(f"{', '.join(names)}: {problem} input for {design}, which takes {known}")

    steps = design.optimizer.steps if isinstance(design.optimizer, GradientDescent) else 1
    pairs = "batch time heads" if steps == 1 else "batch time steps heads"
    axes = {"q": "batch time heads key", "k": f"{pairs} key", "v": f"{pairs} value"} | takes
    tensors = {"q": q, "k": k, "v": v} | dict(inputs)
    if feature_map != Identity():
        check_shapes(**{name: (tensors[name], axes[name]) for name in "qkv"})
        tensors |= {"q": feature_map(q), "k": feature_map(k)}
    sizes = check_shapes(None, cu_seqlens, **{name: (x, axes[name]) for name, x in tensors.items()})
    if isinstance(design.regressor, Network) and k.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"v: expected values of the keys' size {k.shape[-1]}, to which they are added, got {v.shape[-1]}"
        )
    for axis, size in design.regressor.sizes(v.shape[-1]).items():
        if sizes[axis] != size:
            raise ValueError(f"{axis}: expected {size} for {design.regressor}, got {sizes[axis]}")
    if sizes.get("steps", 1) != steps:
        raise ValueError(f"k: expected {steps} steps a token, got {sizes['steps']}")
    if sizes.get("pair", sizes["key"] / 2) != sizes["key"] / 2:
        raise ValueError(
            f"frequency: expected one for each pair of channels, got {sizes['pair']} for keys of {sizes['key']}"
        )
    for name, tensor in inputs.items():
        check_range(name, tensor, **RANGES[name])
    return Prepared(tensors["q"], tensors["k"], v, dict(inputs), q, k, sizes | {"raw": k.shape[-1]})


def each_packed(
    design: Design, tensors: Prepared, state: State | None, cu_seqlens: Tensor
) -> Iterator[tuple[Prepared, State | None]]:
    """What `prepare` has made of packed sequences, and the state to go on from, for each of them."""
    states: Sequence[State | None] = [] if state is None else _is_state(state).split()
    count = len(cu_seqlens) - 1
    if len(states) not in (0, count):
        raise ValueError(f"state: expected that of {count} sequences, got that of {len(states)}")
    timed = [name for name, axes in design.inputs.items() if "time" in axes.split()]
    own = (tensors.q, tensors.k, tensors.v, tensors.raw_q, tensors.raw_k)
    pieces = cut(cu_seqlens, [*own, *(tensors.inputs[name] for name in timed)])
    for (q, k, v, raw_q, raw_k, *inputs), start in zip(pieces, states or [None] * count, strict=True):
        now = tensors.inputs | dict(zip(timed, inputs, strict=True))
        yield Prepared(q, k, v, now, raw_q, raw_k, {**tensors.sizes, "time": q.shape[1]}), start


def check_state(design: Design, state: State | None, axes: Mapping[str, str], tensors: Prepared) -> State:
    """The state to go on from, held to the fields that this computation continues; an empty one for None.

    Raises `ValueError` for anything but a state, a field that would be ignored, or a wrong shape.
    """
    if state is None:
        return State()
    if _is_state(state).lengths is not None:
        raise ValueError(
            f"state: expected a batch, got sequences that keep {state.lengths} tokens; go on from each of state.split()"
        )
    given = {name: x for name, x in vars(state).items() if name != "history" and x is not None}
    if "network" in given and "network" in axes:
        return state  # of whatever form; the op knows which
    given |= {f"history[{name!r}]": x for name, x in state.history.items()}
    unused = [name for name in given if name not in axes]
    if unused or (state.history and set(given) != set(axes)):
        takes = ", ".join(axes)
        raise ValueError(f"state: expected {takes} to go on with {design}, got {', '.join(given)}")
    pairs = "batch time heads value" if tensors.v.ndim == 4 else "batch time steps heads value"
    check_shapes(tensors.sizes, v=(tensors.v, pairs), **{f"state.{name}": (x, axes[name]) for name, x in given.items()})
    return state


def _is_state(state: State) -> State:
    if not isinstance(state, State):
        raise ValueError(f"state: expected what an earlier call returned, got {state!r}")
    return state


def streaming_axes(design: Design) -> dict[str, str]:
    """The fields of the state of a memory that needs no history, and their axes."""
    optimizer = design.optimizer
    if design.descends_networks:
        return {"network": ""}
    if isinstance(optimizer, OnlineEM):
        return {"memory": "batch heads maps key value"}
    normalized = isinstance(optimizer, Hebbian) and optimizer.normalize
    axes = {"memory": "batch heads key value" if not normalized else "batch heads key value_and_one"}
    if normalized and "log_input_gate" in design.inputs:
        axes["log_scale"] = "batch heads"
    if isinstance(optimizer, Exact):
        axes = {"curvature": "batch heads key key", "cross": "batch heads key value"}
    if isinstance(optimizer, GradientDescent):
        if optimizer.momentum:
            axes["momentum"] = "batch heads key value"
        if isinstance(optimizer.gain, DiagonalNewton):
            axes["curvature"] = "batch heads key"
    return axes


def pair_axes(design: Design) -> dict[str, str]:
    """What belongs to a pair, and its axes: key, value and every input that has a time but the query's own."""
    timed = {n: axes for n, axes in design.inputs.items() if "time" in axes.split() and n not in OF_THE_QUERY}
    return {"k": "batch time heads raw", "v": "batch time heads value"} | timed


def history_axes(design: Design) -> dict[str, str]:
    """The state of a memory that keeps every past pair, and its axes."""
    return {f"history[{name!r}]": axes.replace("time", "past") for name, axes in pair_axes(design).items()}


def forgetting(weights: Weights, inputs: Mapping[str, Tensor], k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The log of the factor on old pairs a token, (batch, time, heads[, key]), and the weight of a new one.

    Either is None where the weights leave it at one. Neither holds what is no such factor: a window, a kernel, the
    turning of a complex decay, and a gate that comes as its logarithm because it may be of any size.
    """
    log_decay = importance = None
    for factor in weights.factors:
        own = new = None
        if isinstance(factor, (Decay, ComplexDecay)):
            own = inputs["log_decay"]
            if isinstance(factor, ComplexDecay):
                own = own.repeat_interleave(2, dim=-1)
            if "time" not in factor.inputs["log_decay"].split():
                own = own.expand(*k.shape[:2], *own.shape)
        elif isinstance(factor, ContinuousDecay):
            own, new = -inputs["rate"] * inputs["time_step"], inputs["time_step"]
        elif isinstance(factor, InputGate):
            new = None if factor.exponential else inputs["input_gate"]
        elif not isinstance(factor, (Uniform, Window, Kernel)):
            raise ValueError(f"weights: expected weights that ttr.oracle defines, got {factor}")
        if own is not None:
            log_decay = own if log_decay is None else _aligned(log_decay, own) + _aligned(own, log_decay)
        if new is not None:
            importance = new if importance is None else importance * new
    return log_decay, importance


def _aligned(x: Tensor, other: Tensor) -> Tensor:
    return x.unsqueeze(-1) if x.ndim < other.ndim else x
