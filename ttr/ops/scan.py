"""The scan behind running statistics of the keys."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def decayed_sum(
    x: Float[Tensor, "batch time *rest"],
    log_decay: Float[Tensor, "batch time *_"] | None,
    initial: Float[Tensor, batch * rest],
) -> Float[Tensor, "batch time *rest"]:
    r"""Running sums that forget.

    .. math:: p_t = e^{\ell_t} p_{t-1} + x_t

    p_0 is `initial`; `log_decay` may have size-1 axes where x has more. In ⌈log₂ T⌉ passes: after the pass of
    stride s, p_t holds the last 2s terms, and every exponent stays at or below zero.
    """
    if log_decay is None:
        return initial.unsqueeze(1) + x.cumsum(1)
    if x.shape[1] == 1:
        return torch.addcmul(x, log_decay.to(initial.dtype).exp(), initial.unsqueeze(1))
    total = torch.cat([initial.unsqueeze(1), x], dim=1)
    elapsed = torch.nn.functional.pad(log_decay.double(), (0, 0) * (x.ndim - 2) + (1, 0))
    stride = 1
    while stride < total.shape[1]:
        factor = elapsed[:, stride:].to(total.dtype).exp()
        total = torch.cat([total[:, :stride], total[:, stride:] + factor * total[:, :-stride]], dim=1)
        elapsed = torch.cat([elapsed[:, :stride], elapsed[:, stride:] + elapsed[:, :-stride]], dim=1)
        stride *= 2
    return total[:, 1:]
