"""The choices on each axis of the design space, as small frozen dataclasses.

A choice says which inputs a token must bring for it, how it reads as a formula and whom to cite. Where it is a
function (a feature map, a similarity, a loss) it can be called. What a combination of choices means is in
`ttr.oracle`, how to compute it fast in `ttr.ops`.
"""

from ttr._choices.choice import Choice
from ttr._choices.feature_maps import EluPlusOne, FeatureMap, Identity, PositiveRandom, Quadratic, Taylor
from ttr._choices.losses import Huber, Loss, Lp, SquaredError
from ttr._choices.optimizers import (
    LMS,
    NLMS,
    DiagonalNewton,
    Exact,
    Gain,
    GradientDescent,
    Hebbian,
    Implicit,
    Muon,
    OnlineEM,
    Optimizer,
    Probe,
)
from ttr._choices.regressors import MLP, Linear, LocalPolynomial, Mixture, Network, NormalizedLinear, Regressor
from ttr._choices.retentions import KL, L2, Lq, Retention
from ttr._choices.weights import (
    ComplexDecay,
    ContinuousDecay,
    Decay,
    Exponential,
    Gaussian,
    InputGate,
    Kernel,
    Product,
    Similarity,
    Uniform,
    Weights,
    Window,
)

__all__ = [
    "KL",
    "L2",
    "LMS",
    "MLP",
    "NLMS",
    "Choice",
    "ComplexDecay",
    "ContinuousDecay",
    "Decay",
    "DiagonalNewton",
    "EluPlusOne",
    "Exact",
    "Exponential",
    "FeatureMap",
    "Gain",
    "Gaussian",
    "GradientDescent",
    "Hebbian",
    "Huber",
    "Identity",
    "Implicit",
    "InputGate",
    "Kernel",
    "Linear",
    "LocalPolynomial",
    "Loss",
    "Lp",
    "Lq",
    "Mixture",
    "Muon",
    "Network",
    "NormalizedLinear",
    "OnlineEM",
    "Optimizer",
    "PositiveRandom",
    "Probe",
    "Product",
    "Quadratic",
    "Regressor",
    "Retention",
    "Similarity",
    "SquaredError",
    "Taylor",
    "Uniform",
    "Weights",
    "Window",
]
