"""How a layer makes the inputs that a design declares, each with the field's parametrisation and initial values.

An input with a time axis is a projection of the token; one without is a parameter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ttr._design import Design


class _Projection(nn.Module):
    """A linear map of the token to `shape`, with a bias of its own that starts where a subclass puts it."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.weight = nn.Linear(d_model, math.prod(shape), bias=False)
        self.bias = nn.Parameter(self.initial_bias(math.prod(shape)))

    def initial_bias(self, size: int) -> Tensor:
        return torch.zeros(size)

    def squash(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        # Gates are taken in the parameters' dtype: under mixed precision bfloat16 would round a decay near one to one.
        return self.squash(self.weight(x).to(self.bias.dtype) + self.bias).unflatten(-1, self.shape)


class TimeStep(_Projection):
    """Δ = softplus(Wx + b), starting log-uniform in [0.001, 0.1]. Gu & Dao (2023), section 3.6."""

    def initial_bias(self, size: int) -> Tensor:
        start = torch.empty(size).uniform_(math.log(1e-3), math.log(0.1)).exp()
        return start + torch.log(-torch.expm1(-start))

    def squash(self, x: Tensor) -> Tensor:
        return softplus(x)


class Rate(nn.Module):
    """a > 0, starting uniform in [1, 16]. Dao & Gu (2024)."""

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


class FixedLogDecay(nn.Module):
    """log(1 − 2^(−5−h)) for head h, the same in all its channels; not learned. Sun et al. (2023), eq. 8."""

    log_decay: Tensor

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        per_head = torch.log1p(-(2.0 ** (-5 - torch.arange(shape[0]))))
        self.register_buffer("log_decay", per_head.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.log_decay


class StepSize(_Projection):
    """β = σ(Wx + b), to be scaled to the largest step allowed."""

    def squash(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class LogMomentum(_Projection):
    """log η = log σ(Wx + b), starting at η = σ(1) ≈ 0.73."""

    def initial_bias(self, size: int) -> Tensor:
        return torch.ones(size)

    def squash(self, x: Tensor) -> Tensor:
        return logsigmoid(x)


class Ridge(nn.Module):
    """λ = softplus(b) + 0.25, starting at 1. Von Oswald et al. (2025) keep the ridge from 0.25."""

    def __init__(self, d_model: int, shape: tuple[int, ...]):
        super().__init__()
        self.bias = nn.Parameter(torch.full(shape, math.log(math.expm1(0.75))))

    def forward(self, x: Tensor) -> Tensor:
        return softplus(self.bias) + 0.25


MODULES: dict[tuple[str, bool], type[nn.Module]] = {
    ("log_decay", True): LogDecay,
    ("log_decay", False): FixedLogDecay,
    ("log_momentum", True): LogMomentum,
    ("rate", False): Rate,
    ("ridge", False): Ridge,
    ("step_size", True): StepSize,
    ("time_step", True): TimeStep,
}


def input_modules(design: Design, d_model: int, sizes: dict[str, int]) -> nn.ModuleDict:
    """A module for exactly the inputs that the design declares, by name; each maps tokens to its input."""
    modules = {}
    for name, axes in design.inputs.items():
        own = [axis for axis in axes.split() if axis not in ("batch", "time")]
        modules[name] = MODULES[name, "time" in axes.split()](d_model, tuple(sizes[axis] for axis in own))
    return nn.ModuleDict(modules)
