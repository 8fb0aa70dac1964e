"""Triton kernels of test-time regression; needs torch and triton, nothing else."""

from ttr_kernels.delta_rule import delta_rule
from ttr_kernels.least_squares import least_squares
from ttr_kernels.linear_attention import linear_attention
from ttr_kernels.local_linear import local_linear
from ttr_kernels.momentum_delta_rule import momentum_delta_rule

__all__ = ["delta_rule", "least_squares", "linear_attention", "local_linear", "momentum_delta_rule"]
