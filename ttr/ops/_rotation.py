"""Pairs of channels turned by an angle: what a complex decay adds to a real one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotate(x: Float[Tensor, "*axes key"], angle: Float[Tensor, "*_ pair"]) -> Float[Tensor, "*axes key"]:
    r"""Turn channels 2n and 2n + 1 by the n-th angle, in radians.

    .. math:: x_{2n} + \mathrm i\,x_{2n+1} \;\mapsto\; e^{\mathrm i\theta_n}(x_{2n} + \mathrm i\,x_{2n+1})

    The angles broadcast against x. Turns cost no accuracy far into a sequence where the angle comes in float64.
    """
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([cosine * real - sine * imaginary, sine * real + cosine * imaginary], dim=-1)
    return turned.flatten(-2)
