"""The fast algorithms, as functions of tensors: one op a family of memories.

`backend="auto"` is Triton for CUDA tensors where the op has a kernel that takes them, of up to 256 channels in float32,
float16 or bfloat16, and PyTorch otherwise. `KernelFallbackWarning` says why, once a reason, where PyTorch computes what
a kernel might have. "torch" and "triton" force one.
"""

from ttr.ops import gains
from ttr.ops._backend import KernelFallbackWarning
from ttr.ops._convergence import ConvergenceWarning
from ttr.ops.delta_rule import delta_rule, momentum_delta_rule
from ttr.ops.least_squares import least_squares
from ttr.ops.linear_attention import linear_attention
from ttr.ops.local_polynomial import PastPairs, local_polynomial
from ttr.ops.neural_memory import neural_memory
from ttr.ops.online_em import online_em
from ttr.ops.scan import decayed_sum

__all__ = [
    "ConvergenceWarning",
    "KernelFallbackWarning",
    "PastPairs",
    "decayed_sum",
    "delta_rule",
    "gains",
    "least_squares",
    "linear_attention",
    "local_polynomial",
    "momentum_delta_rule",
    "neural_memory",
    "online_em",
]
