"""Modules around a design: projections, short convolutions, norms and gates."""

from ttr.layers.convolution import ShortConvolution
from ttr.layers.regression import Cache, RegressionLayer

__all__ = ["Cache", "RegressionLayer", "ShortConvolution"]
