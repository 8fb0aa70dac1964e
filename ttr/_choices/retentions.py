"""Retentions: what holds a memory near the one before while it fits the new pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttr._choices.choice import Choice

# |x| stands for √(x² + ε) where its derivative would be infinite: the ε that Behrouz et al. (2025, Miras) print.
SMOOTHING = 1e-6


class Retention(Choice, ABC):
    r"""The geometry in which a memory keeps what it knew: mirror descent.

    Steps and decay act on an accumulator A of the shape of the weights; the weights are the gradient of a convex
    `potential` of it, :math:`W = \nabla\Phi(A)`. What the learning rule writes down as a penalty on the weights is
    that potential's conjugate.
    """

    @abstractmethod
    def potential(self, accumulated: Tensor) -> Tensor:
        """Φ(A) of each matrix (…, rows, columns), summed."""

    def __call__(self, accumulated: Tensor) -> Tensor:
        """The weights ∇Φ(A)."""
        return torch.func.grad(self.potential)(accumulated)


@dataclass(frozen=True)
class L2(Retention):
    """The squared distance: the old memory fades by the weights' factor, and the step is the plain gradient."""

    formula = "A"

    def potential(self, accumulated: Tensor) -> Tensor:
        return accumulated.square().sum() / 2


@dataclass(frozen=True)
class Lq(Retention):
    r"""The q-norm of each weight matrix, of the memories that Miras calls Moneta.

    .. math:: W = \operatorname{sgn}(A) \odot |A|^{p-1} \big/ \lVert A\rVert_p^{p-2}, \qquad p = q / (q - 1)

    the mirror map of :math:`\tfrac12\lVert W\rVert_q^2`: it scales with A, so forgetting shrinks the weights. The
    paper prints :math:`W = A / \lVert A\rVert_q^{q-2}` instead, which `printed` selects. With q = 4 its weights
    *grow* as A fades, and it is infinite at A = 0. At q = 2 both are A itself. Behrouz et al. (2025, Miras), eq. 24.
    """

    q: float = 4.0
    printed: bool = False

    cites = ("behrouz2025miras",)

    def __post_init__(self) -> None:
        self._require("q", isinstance(self.q, (int, float)) and 1 < self.q < float("inf"), "a finite number above 1")
        self._require("printed", isinstance(self.printed, bool), "a bool")

    @property
    def structure(self) -> tuple[Any, ...]:
        return (type(self),)

    @property
    def formula(self) -> str:  # type: ignore[override]
        if self.printed:
            return r"A \big/ \lVert A\rVert_q^{q-2}"
        return r"\operatorname{sgn}(A) \odot |A|^{p-1} \big/ \lVert A\rVert_p^{p-2}, \quad p = q/(q-1)"

    def potential(self, accumulated: Tensor) -> Tensor:
        p = self.q / (self.q - 1)
        norm = (accumulated.square() + SMOOTHING).sqrt().pow(p).sum((-2, -1)).pow(1 / p)
        return norm.square().sum() / 2

    def __call__(self, accumulated: Tensor) -> Tensor:
        if not self.printed:
            return super().__call__(accumulated)
        norm = torch.linalg.vector_norm(accumulated, self.q, dim=(-2, -1), keepdim=True)
        return accumulated / norm ** (self.q - 2)


@dataclass(frozen=True)
class KL(Retention):
    r"""Relative entropy: the weights into a unit are a distribution, and no weight is ever negative. Memora.

    .. math:: W_t = \operatorname{softmax}\bigl(\alpha_t \log W_{t-1} - \eta_t \nabla\ell\bigr)

    A is log W up to what each unit's weights share. The paper normalises "by slice"; here a slice is the weights from
    all inputs into one unit, a column. Behrouz et al. (2025, Miras), eq. 27.
    """

    cites = ("behrouz2025miras",)
    formula = r"\operatorname{softmax}(A)"

    def potential(self, accumulated: Tensor) -> Tensor:
        return accumulated.logsumexp(-2).sum()
