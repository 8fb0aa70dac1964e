"""Weights that come as logarithms of any size, brought under one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

PerHead = Float[Tensor, "batch time heads"]


class Scaled(NamedTuple):
    """Decay and weight of a memory that is kept divided by e^m, and m itself at every token."""

    log_decay: PerHead
    weight: PerHead
    log_scale: PerHead


def divide_out_largest(
    log_decay: PerHead, log_weight: PerHead, initial_log_scale: Float[Tensor, "batch heads"] | None = None
) -> Scaled:
    r"""Keep a decayed sum divided by its largest weight, so that no exponential overflows.

    .. math::
        m_t = \max(\ell_t + m_{t-1},\, \tilde w_t), \qquad
        \ell'_t = \ell_t + m_{t-1} - m_t \le 0, \qquad w'_t = e^{\tilde w_t - m_t} \le 1

    With S the sum of decay ℓ and weights :math:`e^{\tilde w}`, the one of ℓ′ and w′ is :math:`e^{-m_t} S_t`. m_0 is
    minus infinity where nothing is given. No gradient flows through m: what is read does not depend on it.

    Beck et al. (2024), eq. 15–17.
    """
    if initial_log_scale is None:
        initial_log_scale = log_weight.new_full((log_weight.shape[0], log_weight.shape[2]), -torch.inf)
    with torch.no_grad():
        elapsed = log_decay.double().cumsum(1)
        since = torch.cat([initial_log_scale.double().unsqueeze(1), log_weight.double() - elapsed], dim=1)
        largest = since.cummax(1).values
        log_scale = (largest[:, 1:] + elapsed).to(log_weight.dtype)
        # An empty memory has no scale; any decay does for it.
        step = (largest[:, :-1] - largest[:, 1:]).nan_to_num(nan=0.0, neginf=0.0).to(log_decay.dtype)
    return Scaled(_with_gradient(step, log_decay), (log_weight - log_scale).exp(), log_scale)


def _with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """The value, with the gradient of another tensor."""
    return value + (of - of.detach())
