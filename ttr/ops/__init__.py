"""The fast algorithms, as functions of tensors: one op a family of memories."""

from ttr.ops import gains
from ttr.ops.delta_rule import delta_rule, momentum_delta_rule
from ttr.ops.linear_attention import linear_attention
from ttr.ops.log_scale import divide_out_largest
from ttr.ops.rotation import rotate
from ttr.ops.scan import decayed_sum

__all__ = [
    "decayed_sum",
    "delta_rule",
    "divide_out_largest",
    "gains",
    "linear_attention",
    "momentum_delta_rule",
    "rotate",
]
