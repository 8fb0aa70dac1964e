"""What every design means: its definition, slow and obvious, in the dtype of the input.

Each optimizer is computed straight from the problem it solves, with no chunk and no algebra borrowed from `ttr.ops`:
Hebbian memories by summing over all past pairs, gradient steps by differentiating the stated loss, exact fits by
`lstsq` on the stacked, weighted data. All of it is differentiable. The ops are tested against these functions, and a
design that has no op runs on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ttr._choices import (
    LMS,
    NLMS,
    ComplexDecay,
    DiagonalNewton,
    Exact,
    Gain,
    GradientDescent,
    Hebbian,
    Implicit,
    Kernel,
    LocalPolynomial,
    Muon,
    OnlineEM,
    Probe,
    Quadratic,
    Weights,
    Window,
)
from ttr._design import Design
from ttr._inputs import Prepared, check_state, forgetting, history_axes, pair_axes, prepare, streaming_axes
from ttr._neural_oracle import neural
from ttr._state import State
from ttr.ops._chunks import state_dtype, without_autocast


def regress(
    design: Design,
    q: Float[Tensor, "batch time heads key"],
    k: Float[Tensor, "batch time *pairs key"],
    v: Float[Tensor, "batch time *pairs value"],
    *,
    state: State | None = None,
    **inputs: Tensor,
) -> tuple[Float[Tensor, "batch time heads value"], State]:
    """Fit keys to values at every step and predict at the query, by definition: see `ttr.regress`.

    Takes and raises what `ttr.regress` does, from which it differs in speed, and in that its state may be the history.
    """
    return solve(design, prepare(design, q, k, v, inputs), state)


def solve(design: Design, tensors: Prepared, state: State | None) -> tuple[Tensor, State]:
    """`regress` on tensors that are prepared; in at least float32 whatever their dtype and autocast."""
    v, dtype = tensors.v, state_dtype(tensors.v)
    if dtype != v.dtype:
        wide = {name: x.to(dtype) for name, x in tensors.inputs.items()}
        tensors = prepare(design, tensors.raw_q.to(dtype), tensors.raw_k.to(dtype), v.to(dtype), wide)
    with without_autocast(v):
        y, after = _solve(design, tensors, state)
    return y.to(v.dtype), after


def _solve(design: Design, tensors: Prepared, state: State | None) -> tuple[Tensor, State]:
    optimizer = design.optimizer
    if design.weights.recursive and isinstance(optimizer, (GradientDescent, Hebbian, Muon, OnlineEM)):
        state = check_state(design, state, streaming_axes(design), tensors)
        if design.descends_networks or isinstance(optimizer, OnlineEM):
            return neural(design, tensors, state)
        if isinstance(optimizer, Hebbian):
            return _hebbian(design, optimizer, tensors, state)
        assert isinstance(optimizer, GradientDescent)
        return _gradient_descent(design, optimizer, tensors, state)

    state = check_state(design, state, history_axes(design), tensors)
    tensors, history = _with_history(design, tensors, state.history)
    if isinstance(optimizer, Hebbian):
        y, _ = _hebbian(design, optimizer, tensors, State())
    elif isinstance(optimizer, Probe):
        y = _probe(design, tensors)
    elif isinstance(optimizer, Exact):
        y = _exact(design, optimizer, tensors)
    else:
        raise ValueError(f"optimizer: expected one that ttr.oracle defines, got {optimizer}")
    return y, State(history=history)


def _with_history(design: Design, tensors: Prepared, past: dict[str, Tensor]) -> tuple[Prepared, dict[str, Tensor]]:
    """The tensors with all past pairs before the new ones; queries stay new."""
    by_name = {"k": tensors.raw_k, "v": tensors.v} | tensors.inputs
    new = {name: by_name[name] for name in pair_axes(design)}
    history = {name: torch.cat([past[name], x], dim=1) for name, x in new.items()} if past else new
    features = design.feature_map(history["k"]) if past else tensors.k
    inputs = tensors.inputs | {name: x for name, x in history.items() if name in design.inputs}
    return Prepared(tensors.q, features, history["v"], inputs, tensors.raw_q, history["k"]), history


def _log_weights(weights: Weights, tensors: Prepared) -> Iterator[tuple[int, Tensor]]:
    """For each query its time t and the log of γ_i^(t) of every pair i ≤ t, (batch, pairs, heads, 1 or key).

    A complex decay's has an imaginary part, and an entry a pair of channels.
    """
    q, k, inputs = tensors.raw_q, tensors.raw_k, tensors.inputs
    log_decay, importance = _log_factors(weights, inputs, k)
    total = log_decay[:, :0]
    first = k.shape[1] - q.shape[1]
    for t in range(k.shape[1]):
        total = torch.cat([total + log_decay[:, t : t + 1], torch.zeros_like(log_decay[:, :1])], dim=1)
        if t < first:
            continue
        log_weight = total
        if importance is not None:
            weight = importance[:, : t + 1].unsqueeze(-1)
            tiny = torch.finfo(weight.dtype).tiny
            log_weight = log_weight + torch.where(weight > 0, weight.clamp_min(tiny).log(), -torch.inf)
        if "log_input_gate" in inputs:
            log_weight = log_weight + inputs["log_input_gate"][:, : t + 1].unsqueeze(-1)
        for factor in weights.factors:
            if isinstance(factor, Kernel):
                similarity = factor.similarity(q[:, t - first].unsqueeze(1), k[:, : t + 1])
                log_weight = log_weight + similarity.unsqueeze(-1) / factor.bandwidth**2
            if isinstance(factor, Window):
                old = torch.arange(t, -1, -1, device=k.device) >= factor.size
                log_weight = log_weight.masked_fill(old[:, None, None], -torch.inf)
            if isinstance(factor, ComplexDecay):
                turns = torch.arange(t, -1, -1, device=k.device)[:, None, None] * inputs["frequency"]
                log_weight = torch.complex(*torch.broadcast_tensors(log_weight[..., ::2], turns))
        yield t, log_weight


def _log_factors(weights: Weights, inputs: Mapping[str, Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    """log α_t, (batch, time, heads, 1 or key), and the weight of a new pair, (batch, time, heads); 0 and 1 if none."""
    log_decay, importance = forgetting(weights, inputs, k)
    if log_decay is None:
        log_decay = k.new_zeros(*k.shape[:2], k.shape[-2])
    if importance is None:
        importance = k.new_ones(*k.shape[:2], k.shape[-2])
    return log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1), importance


def _log_carried(weights: Weights, log_decay: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The log of what is left of a memory after these tokens, (batch, heads, 1 or key or, if complex, pair)."""
    left = log_decay.sum(1)
    if weights.factor(ComplexDecay):
        return torch.complex(*torch.broadcast_tensors(left[..., ::2], log_decay.shape[1] * inputs["frequency"]))
    return left


def _hebbian(design: Design, optimizer: Hebbian, tensors: Prepared, state: State) -> tuple[Tensor, State]:
    """S_t = γ_0 S_0 + Σ γ_i k_i v_iᵀ, summed afresh at every t; `normalize` carries Σ γ_i k_i as one more value.

    Where gates come as logarithms of any size, S is kept divided by e^m, the largest weight that they gave so far.
    """
    q, k, v, inputs, *_ = tensors
    if optimizer.normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    log_decay, _ = _log_factors(design.weights, inputs, k)
    first = k.shape[1] - q.shape[1]
    initial, outputs = state.memory, []
    memory = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]) if initial is None else initial
    log_scale = first_scale = (
        k.new_full((k.shape[0], k.shape[-2]), -torch.inf) if state.log_scale is None else state.log_scale
    )
    for t, log_weight in _log_weights(design.weights, tensors):
        log_carried = _log_carried(design.weights, log_decay[:, : t + 1], inputs)
        if "log_input_gate" in inputs:
            log_scale = torch.maximum(log_decay[:, t, :, 0] + log_scale, inputs["log_input_gate"][:, t]).detach()
            log_weight = log_weight - log_scale[:, None, :, None]
            log_carried = log_carried + (first_scale - log_scale).unsqueeze(-1)
        memory = torch.einsum("bihk,bihv->bhkv", _weighted(log_weight, k[:, : t + 1]), v[:, : t + 1])
        if initial is not None:
            memory = memory + _weighted(log_carried.unsqueeze(-2), initial.mT).mT
        y = _read(memory, q[:, t - first])
        outputs.append(normalized(y, optimizer.floor, log_scale) if optimizer.normalize else y)
    return _stack(outputs, tensors.v), State(memory, log_scale=log_scale if "log_input_gate" in inputs else None)


def _weighted(log_weight: Tensor, x: Tensor) -> Tensor:
    """γ ∘ x; a complex weight multiplies x as the complex numbers that pairs of its channels are."""
    if not log_weight.is_complex():
        return log_weight.exp() * x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(log_weight.exp() * pairs).flatten(-2)


def normalized(y: Tensor, floor: float = 0.0, log_scale: Tensor | None = None) -> Tensor:
    """Sums of values over their last entry, the sum of weights, or over `floor` where that is larger in size.

    Both sums come divided by the exponential of `log_scale`. Without weights the answer is 0.
    """
    total = y[..., -1:]
    if floor:
        least = floor if log_scale is None else floor * (-log_scale).exp().unsqueeze(-1)
        return y[..., :-1] / total.abs().clamp_min(least)
    return y[..., :-1] / torch.where(total == 0, 1, total)


def _probe(design: Design, tensors: Prepared) -> Tensor:
    """E_w[v] + Cov_w(v, k) r_t, with the weights of each query's past."""
    q, k, v, inputs, *_ = tensors
    first = k.shape[1] - q.shape[1]
    outputs = []
    for t, log_weight in _log_weights(design.weights, tensors):
        weight = _normalized_log(log_weight).exp()
        key, value = k[:, : t + 1], v[:, : t + 1]
        mean_key, mean_value = ((weight * x).sum(1) for x in (key, value))
        covariance = torch.einsum(
            "bihk,bihv->bhkv", weight * (key - mean_key.unsqueeze(1)), value - mean_value.unsqueeze(1)
        )
        outputs.append(mean_value + _read(covariance, inputs["probe"][:, t - first]))
    return _stack(outputs, v)


def _gradient_descent(
    design: Design, optimizer: GradientDescent, tensors: Prepared, state: State
) -> tuple[Tensor, State]:
    """One pair after the other: decay the memory, differentiate the pair's loss there, step."""
    q, k, v, inputs, *_ = tensors
    log_decay, importance = _log_factors(design.weights, inputs, k)
    step_size = inputs["step_size"]
    if optimizer.steps == 1:
        k, v, step_size = (x.unsqueeze(2) for x in (k, v, step_size))
    zeros = k.new_zeros(k.shape[0], *k.shape[-2:], v.shape[-1])
    memory = zeros if state.memory is None else state.memory
    momentum = zeros if state.momentum is None else state.momentum
    curvature = zeros[..., 0] if state.curvature is None else state.curvature

    outputs = []
    for t in range(q.shape[1]):
        factor = log_decay[:, t].exp()
        memory, curvature = factor.unsqueeze(-1) * memory, factor * curvature
        for key, value, size in zip(k[:, t].unbind(1), v[:, t].unbind(1), step_size[:, t].unbind(1), strict=True):
            size = size * importance[:, t]

            def loss(memory: Tensor, key: Tensor = key, value: Tensor = value, t: int = t) -> Tensor:
                settings = {name: inputs[name][:, t].unsqueeze(-1) for name in design.loss.inputs}
                return design.loss(value - _read(memory, key), **settings).sum()

            gradient = torch.func.grad(loss)(memory)
            curvature = curvature + importance[:, t].unsqueeze(-1) * key.square()
            step = -_in_metric(optimizer.gain, gradient, size, key, curvature, inputs)
            if optimizer.momentum:
                momentum = inputs["log_momentum"][:, t].exp()[..., None, None] * momentum + step
                step = momentum
            memory = memory + step
        outputs.append(_read(memory, q[:, t]))
    kept = State(
        memory=memory,
        momentum=momentum if optimizer.momentum else None,
        curvature=curvature if isinstance(optimizer.gain, DiagonalNewton) else None,
    )
    return _stack(outputs, v[:, :, 0]), kept


def _in_metric(
    gain: Gain, gradient: Tensor, size: Tensor, key: Tensor, curvature: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """The gradient as this gain's step takes it: β times the inverse of the metric it measures steps by."""
    scaled = size[..., None, None] * gradient
    if isinstance(gain, NLMS):
        return scaled / (gain.epsilon + key.square().sum(-1))[..., None, None]
    if isinstance(gain, DiagonalNewton):
        return scaled / (inputs["ridge"] + curvature).unsqueeze(-1)
    if isinstance(gain, Implicit):
        # argmin_S ‖S − S̄‖²/2 + β‖v − Sᵀk‖²/2 is one Newton step from S̄, whose Hessian is I + βkkᵀ.
        identity = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
        outer = key.unsqueeze(-1) * key.unsqueeze(-2)
        return torch.linalg.solve(identity + size[..., None, None] * outer, scaled)
    if isinstance(gain, LMS):
        return scaled
    raise ValueError(f"gain: expected one that ttr.oracle defines, got {gain}")


def _exact(design: Design, optimizer: Exact, tensors: Prepared) -> Tensor:
    """The weighted ridge regression of each query's past, by `lstsq` on the rows √w_i (φ_i, v_i) and √Λ (I, 0).

    Weights that differ by channel minimise no squared error: see `_estimate`.
    """
    q, k, v, inputs, *_ = tensors
    log_decay, _ = _log_factors(design.weights, inputs, k)
    first = k.shape[1] - q.shape[1]
    local = design.regressor if isinstance(design.regressor, LocalPolynomial) else None
    outputs = []
    for t, log_weight in _log_weights(design.weights, tensors):
        query = q[:, t - first]
        if local:
            log_weight = _normalized_log(log_weight)
            rows = _monomials(k[:, : t + 1] - query.unsqueeze(1), local.degree)
            root_penalty = _local_root_penalty(rows, inputs.get("ridge"))
            read = torch.zeros_like(rows[:, 0])
            read[..., 0] = 1
        else:
            rows, read = k[:, : t + 1], query
            log_penalty = inputs["ridge"].log().expand_as(query)
            if optimizer.ridge_decays:
                log_penalty = log_penalty + log_decay[:, : t + 1].sum(1)
            if log_weight.shape[-1] > 1:
                memory = _estimate(log_weight.exp() * rows, rows, v[:, : t + 1], log_penalty.exp())
                outputs.append(_read(memory, read))
                continue
            # Only the ratio of weights and ridge counts: kernel weights too large for a number are scaled down.
            largest = log_weight.detach().amax(1, keepdim=True).clamp_min(0)
            log_weight = log_weight - largest
            root_penalty = ((log_penalty - largest.squeeze(1)) / 2).exp().clamp_min(torch.finfo(v.dtype).tiny)
        root = (log_weight / 2).exp()
        data = torch.cat([(root * rows).transpose(1, 2), torch.diag_embed(root_penalty)], dim=-2)
        target = (root * v[:, : t + 1]).transpose(1, 2)
        padded = torch.nn.functional.pad(target, (0, 0, 0, root_penalty.shape[-1]))
        outputs.append(_read(torch.linalg.lstsq(data, padded).solution, read))
    return _stack(outputs, v)


def _normalized_log(log_weight: Tensor) -> Tensor:
    """The log of weights that sum to one; of none where no pair has any weight, so that the answer there is zero."""
    nothing = log_weight.isneginf().all(1, keepdim=True)
    return log_weight.masked_fill(nothing, 0).log_softmax(1).masked_fill(nothing, -torch.inf)


def _estimate(weighted: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
    """The S whose errors each channel finds uncorrelated with its keys under its own weights.

    Σ_i Diag(γ_i) k_i (v_i − Sᵀ k_i)ᵀ = Λ S: least squares' normal equations, one weighting a row.
    """
    moment = torch.einsum("bihk,bihl->bhkl", weighted, k) + torch.diag_embed(ridge)
    return torch.linalg.solve(moment, torch.einsum("bihk,bihv->bhkv", weighted, v))


def _monomials(x: Tensor, degree: int) -> Tensor:
    """[1], [1, x] or [1, x, vech(x xᵀ)]; the products scaled so that their norm does not depend on the axes."""
    return torch.cat([torch.ones_like(x[..., :1]), x, Quadratic()(x)][: degree + 1], dim=-1)


def _local_root_penalty(rows: Tensor, ridge: Tensor | None) -> Tensor:
    """√λ on every coefficient but the constant one, (batch, heads, coefficients)."""
    penalty = torch.zeros_like(rows[:, 0])
    if ridge is not None:
        penalty[..., 1:] = ridge.sqrt().unsqueeze(-1)
    return penalty


def _read(memory: Tensor, query: Tensor) -> Tensor:
    return torch.einsum("bhkv,bhk->bhv", memory, query)


def _stack(outputs: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(outputs, dim=1) if outputs else like[:, :0]
