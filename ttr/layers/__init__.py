"""Modules around a design: projections, short convolutions, norms and gates."""

from ttr.layers.convolution import ShortConvolution
from ttr.layers.orchid import OrchidLayer
from ttr.layers.regression import Cache, RegressionLayer

__all__ = ["Cache", "OrchidLayer", "RegressionLayer", "ShortConvolution"]
