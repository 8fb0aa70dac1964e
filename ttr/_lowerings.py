"""Which op computes a design, and what its choices are as that op's arguments: one lowering a family of memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ttr import ops, oracle
from ttr._choices import (
    KL,
    L2,
    LMS,
    MLP,
    NLMS,
    DiagonalNewton,
    Exact,
    Exponential,
    Gaussian,
    GradientDescent,
    Hebbian,
    Huber,
    Implicit,
    Kernel,
    Linear,
    LocalPolynomial,
    Lp,
    Lq,
    Mixture,
    Muon,
    Network,
    NormalizedLinear,
    OnlineEM,
    SquaredError,
    Window,
)
from ttr._design import Design
from ttr._inputs import Prepared, forgetting, history_axes, pair_axes, streaming_axes
from ttr._state import State
from ttr.ops._backend import only_torch
from ttr.ops._log_scale import divide_out_largest
from ttr.ops._rotation import rotate

LOSSES: dict[type, str] = {SquaredError: "squared", Huber: "huber", Lp: "power"}
RETENTIONS: dict[type, str] = {L2: "l2", Lq: "lq", KL: "kl"}
NETWORKS = (Linear, NormalizedLinear, MLP)
DESCENTS = (GradientDescent, Muon)

Lowering = Callable[..., tuple[Tensor, State]]

SIMILARITIES: dict[type, Literal["exponential", "gaussian"]] = {Exponential: "exponential", Gaussian: "gaussian"}


def lowering_of(design: Design) -> Lowering | None:
    """The lowering of a design; None where only its definition computes it."""
    optimizer, regressor, weights = design.optimizer, design.regressor, design.weights
    # Exact types: a choice of one's own that extends one of these means something else.
    if type(regressor) is Mixture and type(optimizer) is OnlineEM:
        return _expectation_maximisation
    kinds = ((regressor, NETWORKS), (design.loss, LOSSES), (design.retention, RETENTIONS), (optimizer, DESCENTS))
    known = all(type(choice) in among for choice, among in kinds)
    if known and (design.descends_networks or _descends_plainly(design)):
        return _descent
    if type(design.loss) is not SquaredError:
        return None
    if type(regressor) is LocalPolynomial:
        kernel = weights.factor(Kernel)
        return _local_fit if kernel and type(kernel.similarity) in SIMILARITIES else None
    if type(regressor) is not Linear or not weights.recursive:
        return None
    if isinstance(optimizer, Hebbian):
        return _hebbian_sum
    if isinstance(optimizer, GradientDescent) and type(optimizer.gain) in (LMS, NLMS, Implicit, DiagonalNewton):
        return None if optimizer.momentum and weights.per_channel else _error_correction
    return _least_squares if isinstance(optimizer, Exact) else None


def continued_axes(design: Design) -> dict[str, str]:
    """The fields of the state that the design's op goes on from, and their axes."""
    return history_axes(design) if isinstance(design.regressor, LocalPolynomial) else streaming_axes(design)


def _descends_plainly(design: Design) -> bool:
    """Whether a linear map takes plain gradient steps of a loss other than the squared error."""
    optimizer = design.optimizer
    plain = type(optimizer) is GradientDescent and optimizer.gain == LMS() and optimizer.steps == 1
    return plain and type(design.loss) is not SquaredError and not design.weights.per_channel


def _descent(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, raw_q, raw_k, _ = tensors
    optimizer, regressor, loss, retention = design.optimizer, design.regressor, design.loss, design.retention
    log_decay, importance = forgetting(design.weights, inputs, k)
    if isinstance(regressor, Network):
        weights, norm = [inputs[name] for name in regressor.weights], (inputs["norm_scale"], inputs["norm_shift"])
        # The key is carried around the network, which is fitted to what it leaves of the value.
        v = v - raw_k
    else:
        weights, norm = [k.new_zeros(*k.shape[-2:], v.shape[-1])], None
    threshold = inputs.get("threshold")
    if isinstance(loss, Huber) and loss.delta is not None:
        threshold = torch.full_like(inputs["step_size"], loss.delta)
    settings: dict[str, Any] = {"power": float(loss.p)} if isinstance(loss, Lp) else {}
    if isinstance(optimizer, Muon):
        settings |= {"window": optimizer.window, "orthogonalize": optimizer.iterations}
    else:
        settings |= {"batch": optimizer.batch, "average": optimizer.average}  # type: ignore[attr-defined]
    if isinstance(retention, Lq):
        settings |= {"retention_norm": float(retention.q)}
    only_torch(how.pop("backend"), "neural memories")
    named = state.network
    if state.memory is not None:
        named = {"w1": state.memory}
        if "log_momentum" in inputs:
            named["momentum.w1"] = torch.zeros_like(state.memory) if state.momentum is None else state.momentum
    y, named = ops.neural_memory(
        q,
        k,
        v,
        weights,
        inputs["step_size"],
        norm=norm,
        log_decay=log_decay,
        log_momentum=inputs.get("log_momentum"),
        weight=importance,
        loss=LOSSES[type(loss)],
        threshold=threshold,
        retention="lq_printed" if isinstance(retention, Lq) and retention.printed else RETENTIONS[type(retention)],
        initial_state=named,
        **settings,
        **how,
    )
    if norm is not None:
        y = y + raw_q
    if design.descends_networks:
        return y, State(network=named)
    return y, State(memory=named["w1"], momentum=named.get("momentum.w1"))


def _expectation_maximisation(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    log_decay, importance = forgetting(design.weights, inputs, k)
    step_size = inputs["step_size"] if importance is None else importance * inputs["step_size"]
    only_torch(how.pop("backend"), "mixtures")
    y, memory = ops.online_em(
        q,
        k,
        v,
        inputs["key_logits"],
        inputs["query_logits"],
        step_size,
        log_decay,
        initial_state=state.memory,
        **how,
    )
    return y, State(memory=memory)


def _hebbian_sum(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    optimizer: Hebbian = design.optimizer  # type: ignore[assignment]
    log_decay, importance = forgetting(design.weights, inputs, k)
    log_scale = None
    if "log_input_gate" in inputs:
        log_decay, gate, log_scale = divide_out_largest(
            torch.zeros_like(k[..., 0]) if log_decay is None else log_decay, inputs["log_input_gate"], state.log_scale
        )
        importance = gate if importance is None else gate * importance
    if importance is not None:
        k = importance.unsqueeze(-1) * k
    if optimizer.normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if "frequency" in inputs:
        # In a frame that turns with the memory, only the decay is left of it.
        turns = torch.arange(k.shape[1] + 1, device=k.device).double()[:, None, None] * inputs["frequency"]
        q, k = rotate(q, -turns[1:]), rotate(k, -turns[1:])
    y, memory = ops.linear_attention(q, k, v, log_decay, initial_state=state.memory, **how)
    if "frequency" in inputs:
        memory = rotate(memory.mT, turns[-1].unsqueeze(-2)).mT
    if optimizer.normalize:
        y = oracle.normalized(y, optimizer.floor, log_scale)
    if log_scale is not None:
        nothing = k.new_full((k.shape[0], k.shape[2]), -torch.inf) if state.log_scale is None else state.log_scale
        log_scale = log_scale[:, -1] if k.shape[1] else nothing
    return y, State(memory=memory, log_scale=log_scale)


def _error_correction(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    optimizer: GradientDescent = design.optimizer  # type: ignore[assignment]
    log_decay, importance = forgetting(design.weights, inputs, q)
    step_size = inputs["step_size"]
    if optimizer.steps > 1:
        # Each step a token of its own: the memory forgets before a token's first step and is read after its last.
        q = q.repeat_interleave(optimizer.steps, dim=1)
        k, v, step_size = (x.flatten(1, 2) for x in (k, v, step_size))
        if log_decay is not None:
            rest = [torch.zeros_like(log_decay)] * (optimizer.steps - 1)
            log_decay = torch.stack([log_decay, *rest], dim=2).flatten(1, 2)
        if importance is not None:
            importance = importance.repeat_interleave(optimizer.steps, dim=1)
    if importance is not None:
        step_size = step_size * importance

    curvature = None
    if isinstance(optimizer.gain, DiagonalNewton):
        gain, curvature = ops.gains.diagonal_newton(
            k, step_size, inputs["ridge"], log_decay, weight=importance, initial_curvature=state.curvature
        )
    elif isinstance(optimizer.gain, NLMS):
        gain = ops.gains.nlms(k, step_size, optimizer.gain.epsilon)
    elif isinstance(optimizer.gain, Implicit):
        gain = ops.gains.implicit(k, step_size)
    else:
        gain = ops.gains.lms(k, step_size)

    if optimizer.momentum:
        y, (memory, momentum) = ops.momentum_delta_rule(
            q,
            k,
            v,
            gain,
            inputs["log_momentum"],
            log_decay,
            initial_state=state.memory,
            initial_momentum=state.momentum,
            **how,
        )
        return y, State(memory=memory, momentum=momentum, curvature=curvature)
    y, memory = ops.delta_rule(q, k, v, gain, log_decay, initial_state=state.memory, **how)
    return y[:, optimizer.steps - 1 :: optimizer.steps], State(memory=memory, curvature=curvature)


def _least_squares(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    optimizer: Exact = design.optimizer  # type: ignore[assignment]
    log_decay, importance = forgetting(design.weights, inputs, k)
    initial = None if state.curvature is None or state.cross is None else (state.curvature, state.cross)
    y, (curvature, cross) = ops.least_squares(
        q,
        k,
        v,
        inputs["ridge"],
        log_decay,
        weight=importance,
        ridge_decays=optimizer.ridge_decays,
        initial_state=initial,
        **how,
    )
    return y, State(curvature=curvature, cross=cross)


def _local_fit(design: Design, tensors: Prepared, state: State, **how: Any) -> tuple[Tensor, State]:
    q, k, v, inputs, *_ = tensors
    kernel, window = design.weights.factor(Kernel), design.weights.factor(Window)
    assert kernel is not None
    regressor: LocalPolynomial = design.regressor  # type: ignore[assignment]
    by_name = {"k": k, "v": v} | inputs
    new = {name: by_name[name] for name in pair_axes(design)}
    log_decay, importance = forgetting(design.weights, inputs, k)
    past = None
    if state.history:
        past_decay, past_importance = forgetting(design.weights, inputs | state.history, state.history["k"])
        past = ops.PastPairs(state.history["k"], state.history["v"], past_decay, past_importance)
    y, _ = ops.local_polynomial(
        q,
        k,
        v,
        degree=regressor.degree,
        bandwidth=kernel.bandwidth,
        ridge=inputs.get("ridge"),
        log_decay=log_decay,
        weight=importance,
        window=window.size if window else None,
        similarity=SIMILARITIES[type(kernel.similarity)],
        probe=inputs.get("probe"),
        initial_state=past,
        **how,
    )
    history = {name: torch.cat([state.history[name], x], dim=1) for name, x in new.items()} if state.history else new
    if window is not None:
        history = {name: x[:, max(0, x.shape[1] - window.size + 1) :] for name, x in history.items()}
    return y, State(history=history)
