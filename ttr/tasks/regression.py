"""In-context regression: inputs and answers are vectors, and a sequence has a function of its own."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ttr.tasks.task import Task, ValueBatch, require, require_at_least


class RegressionTask(Task):
    """Pairs (x_t, y_t) of a function that differs from sequence to sequence; y_t is asked for before it is shown.

        inputs    [x₁, 0]  [0, y₁]  [x₂, 0]  [0, y₂]  …  [x_T, 0]
        targets      ·        ·        ·        ·     …    f(x_T)

    A short convolution of width two, on keys alone, makes these tokens pairs of key x_t and value y_t, at whose query
    x_t the memory has seen the pairs before t and no more. Targets are without noise and, before it, of variance one
    or nearly so: the mean squared error is the share of the variance that is missed, 1 for the answer 0.

    Shapes: inputs (batch, 2T − 1, input_size = entries of x + 1) and targets (batch, 2T − 1, 1), both float32; the
    target is NaN where nothing is asked.

    Args:
        input_size: entries of a token.
        first_asked: pairs before the first that is asked for.
        noise: standard deviation of what is added to every y that is shown.
        **task: the arguments of `Task`.

    Raises ValueError for negative noise.

    Source: Garg et al., arXiv 2208.01066; von Oswald et al., arXiv 2309.05858.
    """

    output_size = 1

    def __init__(self, input_size: int, first_asked: int, noise: float, **task: Any):
        super().__init__(**task)
        require(noise >= 0, "noise", "at least 0", noise)
        self.input_size, self.first_asked, self.noise = input_size, first_asked, noise

    @abstractmethod
    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (batch, pairs, entries) and the function's values there (batch, pairs)."""

    def draw(self, split: str, index: int) -> ValueBatch:
        generator = self.generator(split, index)
        x, value = self.sample(generator)
        batch, pairs, entries = x.shape
        tokens = torch.zeros(batch, pairs, 2, entries + 1)
        tokens[:, :, 0, :-1] = x
        tokens[:, :, 1, -1] = value + self.noise * torch.randn(batch, pairs, generator=generator)
        targets = torch.full((batch, pairs, 2), torch.nan)
        targets[:, self.first_asked :, 0] = value[:, self.first_asked :]
        return tokens.flatten(1, 2)[:, :-1], targets.flatten(1)[:, :-1, None]


class LinearRegression(RegressionTask):
    """One linear function a sequence: x ~ N(0, I), f(x) = w·x with w ~ N(0, I/dim).

    With `num_pairs` = n pairs seen, least squares misses noise²·dim/(n − dim − 1) where n > dim + 1, and the best
    single step of gradient descent (dim + 1)/(n + dim + 1).

    Args:
        dim: entries of x.
        num_pairs: pairs before the first query.
        num_queries: pairs after them, each asked for before it is shown.
        noise: standard deviation of what is added to every y that is shown.
        **task: the arguments of `Task`.

    Raises ValueError for a count below one or negative noise.

    Source: Garg et al., arXiv 2208.01066; von Oswald et al., arXiv 2212.07677.
    """

    def __init__(self, dim: int = 8, num_pairs: int = 16, num_queries: int = 1, noise: float = 0.035, **task: Any):
        super().__init__(dim + 1, num_pairs, noise, **task)
        require_at_least(1, dim=dim, num_pairs=num_pairs, num_queries=num_queries)
        self.dim, self.length = dim, num_pairs + num_queries

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch_size, self.length, self.dim, generator=generator)
        w = torch.randn(self.batch_size, self.dim, 1, generator=generator) / math.sqrt(self.dim)
        return x, (x @ w).squeeze(-1)


class PiecewiseRegression(RegressionTask):
    r"""A linear function a segment, f(x) = √dim w_s·x with w_s ~ N(0, I/dim) and ‖x‖ = 1; every y is asked for.

    With a `cone`, the inputs of segment s lie about a direction of their own, :math:`x = \text{unit}(\mu_s +
    \text{cone}\,\epsilon)` with μ_s uniform on the sphere and ε ~ N(0, I/dim): who keeps the keys apart keeps all
    segments. Without one, all segments share the sphere, and only forgetting helps.

    Args:
        dim: entries of x.
        num_segments: segments in a sequence.
        segment: pairs in a segment.
        cone: spread of a segment's inputs about their direction, which has length one; None for the whole sphere.
        noise: standard deviation of what is added to every y that is shown.
        **task: the arguments of `Task`.

    Raises ValueError for a count below one, a cone that is not positive or negative noise.
    """

    def __init__(
        self,
        dim: int = 16,
        num_segments: int = 8,
        segment: int = 128,
        cone: float | None = None,
        noise: float = 0.01,
        **task: Any,
    ):
        super().__init__(dim + 1, 0, noise, **task)
        require_at_least(1, dim=dim, num_segments=num_segments, segment=segment)
        require(cone is None or cone > 0, "cone", "a positive number, or None", cone)
        self.dim, self.num_segments, self.segment, self.cone = dim, num_segments, segment, cone

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sizes = self.batch_size, self.num_segments
        x = torch.randn(*sizes, self.segment, self.dim, generator=generator)
        if self.cone is not None:
            center = torch.randn(*sizes, 1, self.dim, generator=generator)
            x = torch.nn.functional.normalize(center, dim=-1) + self.cone * x / math.sqrt(self.dim)
        x = torch.nn.functional.normalize(x, dim=-1)
        w = torch.randn(*sizes, self.dim, 1, generator=generator)  # √dim · N(0, I/dim)
        return x.flatten(1, 2), (x @ w).flatten(1)


class DriftingRegression(RegressionTask):
    r"""A linear function on a random walk, f_t(x) = w_t·x with x ~ N(0, I); every y is asked for.

    .. math:: w_t = \sqrt{1 - \text{drift}^2}\, w_{t-1} + \text{drift}\, \epsilon_t, \qquad
        w_0, \epsilon_t \sim N(0, I/\text{dim})

    Args:
        dim: entries of x.
        length: pairs in a sequence.
        drift: what a step takes from the old function and gives the new; 0 for none, 1 for a new one every time.
        noise: standard deviation of what is added to every y that is shown.
        **task: the arguments of `Task`.

    Raises ValueError for a count below one, a drift outside [0, 1] or negative noise.
    """

    def __init__(self, dim: int = 16, length: int = 256, drift: float = 0.05, noise: float = 0.01, **task: Any):
        super().__init__(dim + 1, 0, noise, **task)
        require_at_least(1, dim=dim, length=length)
        require(0 <= drift <= 1, "drift", "a number in [0, 1]", drift)
        self.dim, self.length, self.drift = dim, length, drift

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch_size, self.length, self.dim, generator=generator)
        w = torch.randn(self.batch_size, self.length, self.dim, generator=generator) / math.sqrt(self.dim)
        w[:, 1:] *= self.drift
        kept, reach = math.sqrt(1 - self.drift**2), 1
        while reach < self.length:  # every round adds to w_t what the `reach` steps before those have left in it
            w[:, reach:] += kept**reach * w[:, :-reach].clone()
            reach *= 2
        return x, (w * x).sum(-1)


class SystemIdentification(RegressionTask):
    r"""A dynamical system a sequence, driven by white noise u: y_t from the inputs up to u_t; every y is asked for.

    .. math:: y = h * u \quad\text{(linear)}, \qquad
        y = h_2 * \text{erf}(\text{saturation}\cdot(h_1 * u)) \quad\text{(Wiener–Hammerstein)}

    The filters are random, of unit length, and remember `lags` inputs in all, the present one included; x_t shows the
    last `window` of them. A window of the system's lags leaves regression; of one, keys that a layer has to make.

    Args:
        length: pairs in a sequence.
        lags: inputs on which an output depends.
        window: inputs that a token shows, the latest first.
        saturation: slope of the static nonlinearity between two filters; None for one filter and no nonlinearity.
        noise: standard deviation of what is added to every y that is shown.
        **task: the arguments of `Task`.

    Raises ValueError for a count below one, a saturation that is not positive or negative noise.
    """

    def __init__(
        self,
        length: int = 600,
        lags: int = 10,
        window: int = 10,
        saturation: float | None = None,
        noise: float = 0.1,
        **task: Any,
    ):
        super().__init__(window + 1, 0, noise, **task)
        require_at_least(1, length=length, lags=lags, window=window)
        require(saturation is None or saturation > 0, "saturation", "a positive number, or None", saturation)
        self.length, self.lags, self.window, self.saturation = length, lags, window, saturation

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        before = max(self.lags, self.window) - 1
        u = torch.randn(self.batch_size, before + self.length, generator=generator)
        if self.saturation is None:
            y = self._filter(u, self.lags, generator)
        else:
            first = (self.lags + 1) // 2
            y = torch.erf(self.saturation * self._filter(u, first, generator))
            variance = 2 / math.pi * math.asin(2 * self.saturation**2 / (1 + 2 * self.saturation**2))
            y = self._filter(y / math.sqrt(variance), self.lags + 1 - first, generator)
        windows = u.unfold(1, self.window, 1)[:, -self.length :].flip(-1)
        return windows, y[:, -self.length :]

    def _filter(self, u: Tensor, taps: int, generator: torch.Generator) -> Tensor:
        h = torch.randn(self.batch_size, taps, 1, generator=generator)
        return (u.unfold(1, taps, 1) @ torch.nn.functional.normalize(h, dim=1)).squeeze(-1)
