"""The networks that are memories, by closed form: what they answer, and the step that a pair asks for.

A network is a chain of matrices with gelu between them and, where it has one, a layer norm at the end. Tokens come as
(batch, heads, group, token, channel), and each group has matrices of its own, (batch, heads, group, in, out): one
group for a whole batch of tokens that see the same matrices, a group a token where each sees its own.

A pair's gradient in every matrix is an outer product, of what enters the matrix and of what comes back to it. Both are
written out here, so that whatever is built from them can be differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# |x| stands for √(x² + ε) where its derivative would be infinite: the ε that Behrouz et al. (2025, Miras) print.
SMOOTHING = 1e-6
# That of the code of Sun et al. (2024).
NORM_EPSILON = 1e-6


class Norm(NamedTuple):
    """A layer norm's scale and shift, (heads, 1, 1, value)."""

    scale: Tensor
    shift: Tensor


def _squared(error: Tensor, threshold: Tensor | None, power: float) -> Tensor:
    return error


def _huber(error: Tensor, threshold: Tensor | None, power: float) -> Tensor:
    assert threshold is not None
    return torch.minimum(torch.maximum(error, -threshold), threshold)


def _power(error: Tensor, threshold: Tensor | None, power: float) -> Tensor:
    # The clamp keeps 0 · ∞ out of the second derivative where p < 2.
    return error.sign() * error.abs().clamp_min(torch.finfo(error.dtype).tiny).pow(power - 1)


# The derivative of each loss, a channel at a time.
INFLUENCES: dict[str, Callable[[Tensor, Tensor | None, float], Tensor]] = {
    "squared": _squared,
    "huber": _huber,
    "power": _power,
}


def _l2(accumulated: Tensor, q: float) -> Tensor:
    return accumulated


def _lq(accumulated: Tensor, q: float) -> Tensor:
    p = q / (q - 1)
    square = accumulated.square() + SMOOTHING
    norm = square.pow(p / 2).sum((-2, -1), keepdim=True).pow(1 / p)
    return accumulated * square.pow(p / 2 - 1) * norm ** (2 - p)


def _lq_printed(accumulated: Tensor, q: float) -> Tensor:
    return accumulated / torch.linalg.vector_norm(accumulated, q, dim=(-2, -1), keepdim=True) ** (q - 2)


def _kl(accumulated: Tensor, q: float) -> Tensor:
    return accumulated.softmax(-2)


# The weights of each retention, from what steps and decay have accumulated.
MIRRORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l2": _l2,
    "lq": _lq,
    "lq_printed": _lq_printed,
    "kl": _kl,
}


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), with the tanh form of Φ."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of `gelu`."""
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    return (1 + t) / 2 + x * (1 - t.square()) * root * (1 + 3 * 0.044715 * x.square()) / 2


def normalized(x: Tensor, norm: Norm | None) -> Tensor:
    """The layer norm of x; x itself without one."""
    return x if norm is None else _standardized(x)[0] * norm.scale + norm.shift


def pulled_back(gradient: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
    """A gradient at the layer norm's output, taken to its input x."""
    if norm is None:
        return gradient
    standard, deviation = _standardized(x)
    scaled = gradient * norm.scale
    projection = (scaled * standard).mean(-1, keepdim=True)
    return (scaled - scaled.mean(-1, keepdim=True) - standard * projection) / deviation


def _standardized(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt()
    return centred / deviation, deviation


def answer(x: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], norm: Norm | None) -> Tensor:
    """The network at x, each layer a function of what enters it."""
    for depth, layer in enumerate(layers):
        x = layer(gelu(x) if depth else x)
    return normalized(x, norm)


def descent(
    k: Tensor,
    v: Tensor,
    matrices: Sequence[Tensor],
    kept: Tensor | float,
    norm: Norm | None,
    influence: Callable[[Tensor], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """For each matrix, the two sides of minus the gradient of every token's loss: what enters, what comes back.

    The matrices are taken times `kept`, one factor a token.
    """
    entering, sums = [k], list[Tensor]()
    for depth, matrix in enumerate(matrices):
        if depth:
            entering.append(gelu(sums[-1]))
        sums.append((kept * entering[-1]) @ matrix)
    back = pulled_back(influence(v - normalized(sums[-1], norm)), sums[-1], norm)
    coming_back = [back]
    for matrix, x in zip(reversed(matrices[1:]), reversed(sums[:-1]), strict=True):
        back = gelu_slope(x) * ((kept * back) @ matrix.mT)
        coming_back.append(back)
    return list(zip(entering, reversed(coming_back), strict=True))


def orthogonalized(x: Tensor, iterations: int) -> Tensor:
    """U Vᵀ of each matrix U Σ Vᵀ, nearly: the quintic of Jordan et al. (2024) takes singular values near one."""
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    wide = wide / (torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.mT if x.shape[-2] > x.shape[-1] else wide
