"""How a layer makes the inputs that a design declares, each with the field's parametrisation and initial values.

An input with a time axis is a projection of the token; one without is a parameter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ttr._choices import KL, MLP, Exact, Network
from ttr._design import Design


class _Projection(nn.Module, ABC):
    """A linear map of the token to `shape`, with a bias of its own that starts where a subclass puts it."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.weight = nn.Linear(d_model, math.prod(shape), bias=False)
        self.bias = nn.Parameter(self.initial_bias(math.prod(shape)))

    def initial_bias(self, size: int) -> Tensor:
        return torch.zeros(size)

    @abstractmethod
    def squash(self, x: Tensor) -> Tensor:
        """From a real number to the range of the input."""

    def forward(self, x: Tensor) -> Tensor:
        # Gates are taken in the parameters' dtype: under mixed precision bfloat16 would round a decay near one to one.
        return self.squash(self.weight(x).to(self.bias.dtype) + self.bias).unflatten(-1, self.shape)


class TimeStep(_Projection):
    """Δ = softplus(Wx + b), starting log-uniform in [0.001, 0.1]. Dao & Gu (2024), in their code."""

    def initial_bias(self, size: int) -> Tensor:
        start = torch.empty(size).uniform_(math.log(1e-3), math.log(0.1)).exp()
        return start + torch.log(-torch.expm1(-start))

    def squash(self, x: Tensor) -> Tensor:
        return softplus(x)


class Rate(nn.Module):
    """a > 0, starting uniform in [1, 16]. Dao & Gu (2024), in their code."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.log_rate = nn.Parameter(torch.empty(shape).uniform_(1, 16).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.log_rate.exp()


class LogDecay(nn.Module):
    """log α = −aΔ, a rate times a step. Yang et al. (2024, gated), after Dao & Gu (2024)."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.time_step = TimeStep(d_model, shape)
        self.rate = Rate(d_model, shape)

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate(x) * self.time_step(x)


class SlowLogDecay(_Projection):
    """log α = log σ(Wx + b), starting at α = 0.99: a network that fades leaves its layer norm little to divide by."""

    def initial_bias(self, size: int) -> Tensor:
        return torch.full((size,), math.log(99))

    def squash(self, x: Tensor) -> Tensor:
        return logsigmoid(x)


class FixedLogDecay(nn.Module):
    """log(1 − 2^(−5−h)) for head h, the same in all its channels; not learned. Sun et al. (2023), eq. 8."""

    log_decay: Tensor

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        per_head = torch.log1p(-(2.0 ** (-5 - torch.arange(shape[0]))))
        self.register_buffer("log_decay", per_head.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.log_decay


class LogComplexDecay(nn.Module):
    """ℓ = −Δ/2, learned; steps Δ evenly spread in logarithm over the heads, 0.001 to 0.1. Gu et al. (2022), S4D-Lin."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.log_rate = nn.Parameter((_time_steps(*shape) / 2).log())

    def forward(self, x: Tensor) -> Tensor:
        return -self.log_rate.exp()


class Frequency(nn.Module):
    """ω_n = πnΔ for the n-th pair of channels, learned; Δ as for `LogComplexDecay`. Gu et al. (2022), S4D-Lin."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.frequency = nn.Parameter(math.pi * torch.arange(shape[1]) * _time_steps(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.frequency


def _time_steps(heads: int, pairs: int) -> Tensor:
    return torch.logspace(-3, -1, heads).unsqueeze(-1).expand(heads, pairs)


class StepSize(_Projection):
    """β = largest · σ(Wx + b)."""

    def __init__(self, d_model: int, shape: tuple[int, ...], largest: float):
        super().__init__(d_model, shape)
        self.largest = largest

    def squash(self, x: Tensor) -> Tensor:
        return self.largest * x.sigmoid()


class InputGate(_Projection):
    """w = σ(Wx + b). von Oswald et al. (2025)."""

    def squash(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class Threshold(_Projection):
    """δ = softplus(Wx + b), starting at 1. Behrouz et al. (2025, Miras) learn it, and do not say how."""

    def initial_bias(self, size: int) -> Tensor:
        return torch.full((size,), math.log(math.expm1(1)))

    def squash(self, x: Tensor) -> Tensor:
        return softplus(x)


class Unbounded(_Projection):
    """Wx + b: an exponential gate's logarithm (Beck et al., 2024), a probe (Zuo et al., 2026), logits of a mixture."""

    def squash(self, x: Tensor) -> Tensor:
        return x


class Weights(nn.Module):
    """A layer of the network that every sequence begins with, learned from outside.

    It starts normal, and such that a layer's outputs are about one: the layer norm behind them divides gradients by
    their size, so that networks that start near zero take wild first steps.
    """

    def __init__(self, d_model: int, shape: tuple[int, ...], length: float):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape) / length)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix


class NormScale(nn.Module):
    """The scale of a network's layer norm, starting at one."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale


class NormShift(nn.Module):
    """The shift of a network's layer norm, starting at zero."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift


class LogMomentum(_Projection):
    """log η = log σ(Wx + b), starting at η = σ(1) ≈ 0.73."""

    def initial_bias(self, size: int) -> Tensor:
        return torch.ones(size)

    def squash(self, x: Tensor) -> Tensor:
        return logsigmoid(x)


class Ridge(nn.Module):
    """λ = softplus(b) + least, starting 0.75 above the least."""

    def __init__(self, d_model: int, shape: tuple[int, ...], least: float):
        super().__init__()
        self.least = least
        self.bias = nn.Parameter(torch.full(shape, math.log(math.expm1(0.75))))

    def forward(self, x: Tensor) -> Tensor:
        return softplus(self.bias) + self.least


# By name, and by what the input has one of for: each token, each pair of channels, or neither.
MODULES: dict[tuple[str, str], type[nn.Module]] = {
    ("frequency", "pair"): Frequency,
    ("input_gate", "time"): InputGate,
    ("key_logits", "time"): Unbounded,
    ("log_decay", "time"): LogDecay,
    ("log_decay", "pair"): LogComplexDecay,
    ("log_decay", ""): FixedLogDecay,
    ("log_input_gate", "time"): Unbounded,
    ("log_momentum", "time"): LogMomentum,
    ("norm_scale", ""): NormScale,
    ("norm_shift", ""): NormShift,
    ("probe", "time"): Unbounded,
    ("query_logits", "time"): Unbounded,
    ("rate", ""): Rate,
    ("ridge", ""): Ridge,
    ("step_size", "time"): StepSize,
    ("threshold", "time"): Threshold,
    ("time_step", "time"): TimeStep,
    ("w1", ""): Weights,
    ("w2", ""): Weights,
}

OF_NETWORKS: dict[tuple[str, str], type[nn.Module]] = {("log_decay", "time"): SlowLogDecay}

# An exact fit's least ridge is that of von Oswald et al. (2025).
LEAST_RIDGE = 0.25


def input_modules(design: Design, d_model: int, sizes: dict[str, int], max_step_size: float) -> nn.ModuleDict:
    """A module for exactly the inputs that the design declares, by name; each maps tokens to its input."""
    # A step of the diagonal Newton gain turns the memory by 1 − kᵀg ≥ 1 − β/λ at unit keys: λ ≥ β/2 keeps it stable.
    least_ridge = LEAST_RIDGE if isinstance(design.optimizer, Exact) else max_step_size / 2
    # Keys have unit length, hidden units about the square root of their number; a distribution's logarithms are free.
    hidden = 1.0 if isinstance(design.retention, KL) else sizes.get("hidden", 1) ** 0.5
    if isinstance(design.regressor, MLP):
        # So that a step takes a share of the error and no more: about 0.4 · hidden of its step size, and TTT-MLP's own
        # 0.1/K. Sun et al. (2024), section 2.7.
        max_step_size = 0.1 * max_step_size / sizes["value"]
    settings = {"step_size": {"largest": max_step_size}, "ridge": {"least": least_ridge}}
    settings |= {"w1": {"length": 1.0}, "w2": {"length": hidden}}
    known = MODULES | (OF_NETWORKS if isinstance(design.regressor, Network) else {})
    modules = {}
    for name, axes in design.inputs.items():
        varies = next((axis for axis in ("time", "pair") if axis in axes.split()), "")
        shape = tuple(sizes[axis] for axis in axes.split() if axis not in ("batch", "time"))
        modules[name] = known[name, varies](d_model, shape, **settings.get(name, {}))
    return nn.ModuleDict(modules)
