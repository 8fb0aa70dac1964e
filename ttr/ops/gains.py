r"""The gains of family (b): what an online learner multiplies its error by.

Every online learner for the squared loss moves the memory along g_t times its error; the gain g_t is the step
:math:`\beta_t k_t` after a metric has been chosen. `ttr.ops.delta_rule` takes any of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ttr.ops._check import check_range, check_shapes, decay_axes
from ttr.ops._chunks import state_dtype
from ttr.ops.scan import decayed_sum

Keys = Float[Tensor, "batch time heads key"]
StepSize = Float[Tensor, "batch time heads"]


def lms(k: Keys, step_size: StepSize) -> Keys:
    r"""Gradient step (least mean squares, DeltaNet): :math:`g_t = \beta_t k_t`.

    Raises `ValueError` for a wrong shape or a step size that is negative or not finite. Widrow & Hoff (1960).
    """
    _check(k, step_size)
    return step_size.unsqueeze(-1) * k


def nlms(k: Keys, step_size: StepSize, epsilon: float = 1e-6) -> Keys:
    r"""Normalised step: :math:`g_t = \beta_t k_t / (\varepsilon + \lVert k_t\rVert^2)`; β = 1 is Kaczmarz' projection.

    Raises `ValueError` as `lms`, and for epsilon ≤ 0. Nagumo & Noda (1967); Kaczmarz (1937).
    """
    _check(k, step_size)
    if not epsilon > 0:
        raise ValueError(f"epsilon: expected a positive number, got {epsilon}")
    return k * (step_size / (epsilon + k.square().sum(-1))).unsqueeze(-1)


def implicit(k: Keys, step_size: StepSize) -> Keys:
    r"""Implicit (proximal) step: :math:`g_t = \beta_t k_t / (1 + \beta_t \lVert k_t\rVert^2)`.

    The gradient is taken at the new memory, so no step size is too large. Raises `ValueError` as `lms`.
    Liu et al. (2024, Longhorn), before their layer puts a diagonal matrix in the place of kkᵀ.
    """
    _check(k, step_size)
    return k * (step_size / (1 + step_size * k.square().sum(-1))).unsqueeze(-1)


def diagonal_newton(
    k: Keys,
    step_size: StepSize,
    ridge: Float[Tensor, "heads key"],
    log_decay: Float[Tensor, "batch time heads"] | Keys | None = None,
    *,
    weight: Float[Tensor, "batch time heads"] | None = None,
    initial_curvature: Float[Tensor, "batch heads key"] | None = None,
) -> tuple[Keys, Float[Tensor, "batch heads key"]]:
    r"""A step a channel, by the diagonal of the keys' second moment.

    .. math:: g_t = \beta_t\, k_t \oslash (\lambda + p_t), \qquad p_t = e^{\ell_t} \odot p_{t-1} + w_t\, k_t \odot k_t

    At unit keys :math:`\lambda \ge \beta/2` keeps the delta rule stable. Returns the gain and the final p. Raises
    `ValueError` as `lms`, for a ridge ≤ 0 and a weight < 0.
    """
    states = {"initial_curvature": (initial_curvature, "batch heads key")}
    _check(k, step_size, ridge, log_decay, weight=(weight, "batch time heads"), **states)
    check_range("weight", weight, low=0.0)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    if initial_curvature is None:
        initial_curvature = k.new_zeros(k.shape[0], *k.shape[2:], dtype=state_dtype(k))
    moment = k.to(initial_curvature.dtype).square()
    if weight is not None:
        moment = weight.unsqueeze(-1) * moment
    curvature = decayed_sum(moment, log_decay, initial_curvature)
    gain = step_size.unsqueeze(-1) * k / (ridge + curvature)
    return gain, curvature[:, -1] if k.shape[1] else initial_curvature


def recursive_least_squares(
    k: Keys,
    ridge: Float[Tensor, "heads key"],
    log_decay: Float[Tensor, "batch time heads"] | None = None,
    *,
    weight: Float[Tensor, "batch time heads"] | None = None,
    initial_curvature: Float[Tensor, "batch heads key key"] | None = None,
) -> tuple[Keys, Float[Tensor, "batch heads key key"]]:
    r"""The gain that makes the delta rule exact.

    .. math::
        g_t = w_t\, G_t^{-1} k_t, \qquad G_t = e^{\ell_t} G_{t-1} + w_t\, k_t k_t^\top, \qquad
        G_0 = \operatorname{Diag}(\lambda)

    The ridge is a prior and fades with the data. Once it has faded, keys that do not span the space would leave
    G singular; the rounding unit times its trace is added, the least that a factorisation can resolve, so that the
    gain stays finite and :math:`k_t^\top g_t` in [0, 1]. Every G_t is formed: time·key² numbers and time·key³
    operations a head.

    Returns the gain and the final G. Raises `ValueError` for a wrong shape, a ridge ≤ 0, a positive or
    non-finite log_decay. Plackett (1950) without decay; Haykin (2002) with it.
    """
    states = {"initial_curvature": (initial_curvature, "batch heads key key")}
    _check(k, None, ridge, log_decay, weight=(weight, "batch time heads"), **states)
    check_range("weight", weight, low=0.0)
    batch, _, heads, key = k.shape
    dtype = state_dtype(k)
    if initial_curvature is None:
        initial_curvature = torch.diag_embed(ridge).to(dtype).expand(batch, heads, key, key)
    k = k.to(dtype)
    if log_decay is not None:
        log_decay = log_decay[..., None, None]
    weighted = k if weight is None else weight.unsqueeze(-1) * k
    curvature = decayed_sum(weighted.unsqueeze(-1) * k.unsqueeze(-2), log_decay, initial_curvature)
    limits = torch.finfo(dtype)
    floor = limits.eps * curvature.diagonal(dim1=-2, dim2=-1).sum(-1) + limits.tiny
    identity = torch.eye(key, dtype=dtype, device=k.device)
    factor = torch.linalg.cholesky(curvature + floor[..., None, None] * identity)
    gain = torch.cholesky_solve(weighted.unsqueeze(-1), factor).squeeze(-1)
    return gain, curvature[:, -1] if k.shape[1] else initial_curvature


def _check(
    k: Tensor,
    step_size: Tensor | None,
    ridge: Tensor | None = None,
    log_decay: Tensor | None = None,
    **others: tuple[Tensor | None, str],
) -> None:
    check_shapes(
        k=(k, "batch time heads key"),
        step_size=(step_size, "batch time heads"),
        ridge=(ridge, "heads key"),
        log_decay=(log_decay, decay_axes(log_decay)),
        **others,
    )
    check_range("step_size", step_size, low=0.0)
    check_range("ridge", ridge, low=0.0, open_low=True)
    check_range("log_decay", log_decay, high=0.0)
