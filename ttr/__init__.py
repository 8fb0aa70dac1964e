"""Test-time regression: sequence layers as associative memories that fit keys to values while they read."""

from ttr import layers, models, ops, oracle
from ttr._atlas import atlas
from ttr._choices import (
    LMS,
    NLMS,
    ContinuousDecay,
    Decay,
    DiagonalNewton,
    EluPlusOne,
    Exact,
    Exponential,
    Gaussian,
    GradientDescent,
    Hebbian,
    Huber,
    Identity,
    Implicit,
    Kernel,
    Linear,
    LocalPolynomial,
    Lp,
    PositiveRandom,
    Quadratic,
    SquaredError,
    Taylor,
    Uniform,
    Window,
)
from ttr._design import Design
from ttr._regress import SlowPathWarning, regress
from ttr._state import State

__version__ = "0.1.0"

__all__ = [
    "LMS",
    "NLMS",
    "ContinuousDecay",
    "Decay",
    "Design",
    "DiagonalNewton",
    "EluPlusOne",
    "Exact",
    "Exponential",
    "Gaussian",
    "GradientDescent",
    "Hebbian",
    "Huber",
    "Identity",
    "Implicit",
    "Kernel",
    "Linear",
    "LocalPolynomial",
    "Lp",
    "PositiveRandom",
    "Quadratic",
    "SlowPathWarning",
    "SquaredError",
    "State",
    "Taylor",
    "Uniform",
    "Window",
    "atlas",
    "layers",
    "models",
    "ops",
    "oracle",
    "regress",
]
