"""One layer class for every memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from ttr._atlas import atlas
from ttr._choices import NLMS, GradientDescent, Identity, Implicit, Kernel, Network
from ttr._design import Design
from ttr._regress import regress
from ttr._state import State
from ttr.layers.convolution import ShortConvolution
from ttr.layers.inputs import input_modules


@dataclass(frozen=True)
class Cache:
    """What a layer remembers between tokens: the memory, and the convolutions' last inputs by "q", "k", "v"."""

    state: State | None
    past: dict[str, Tensor]


class Constant(nn.Module):
    """The same learned vector at every token."""

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(width))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
        return self.vector.to(x.dtype).expand(*x.shape[:-1], -1)


class RegressionLayer(nn.Module):
    r"""Tokens to queries, keys and values; a memory between them; its answers back to tokens.

    .. math:: q, k = \text{unit}(c(W_q x)), \text{unit}(c(W_k x)), \quad v = c(W_v x), \quad
        o = W_o \bigl(\text{RMSNorm}(\text{regress}(q, k, v, \dots)) \odot \text{SiLU}(W_g x)\bigr)

    The layer makes a projection for exactly the inputs that the design declares, so a design that nobody has named
    trains as any other. Where the memory compares q and k by more than their product (kernel weights, a feature map),
    unit queries and keys are scaled by a learned temperature a head.

    Args:
        design: a `ttr.Design`, or the slug of a published one, which brings the options that were published with it.
        d_model: size of a token.
        num_heads: memories side by side.
        key_dim: size of a key in each head; d_model // num_heads by default.
        value_dim: size of a value in each head; d_model // num_heads by default.
        conv_width: taps of the short convolutions c.
        conv_on: which of "q", "k" and "v" have one, as "qkv" or "k"; "" for none.
        conv_silu: whether a SiLU follows them; without one, keys and queries are linear in the tokens.
        max_step_size: what β reaches; 2 admits negative eigenvalues, and with them parity. Grazzi et al. (2024).
        gate: whether the answers are gated by SiLU(W_g x).
        unit: whether queries and keys are brought to unit length; a slug's own by default, else True.
        fixed: which of "q" and "k" are the same at every token, learned and without a convolution: a linear
            time-invariant layer. A slug's own by default, else "".
        norm: whether the answers are brought to unit size by an RMS norm.

    Raises:
        ValueError: for an unknown slug, sizes that are not positive or do not divide, letters that name nothing.
    """

    def __init__(
        self,
        design: Design | str,
        d_model: int,
        num_heads: int = 4,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int = 4,
        conv_on: str = "qkv",
        conv_silu: bool = True,
        max_step_size: float = 1.0,
        gate: bool = False,
        unit: bool | None = None,
        fixed: str | None = None,
        norm: bool = True,
    ):
        super().__init__()
        self.design = atlas[design] if isinstance(design, str) else design
        published = atlas.row(design).layer if isinstance(design, str) else {}
        self.unit = published.get("unit", True) if unit is None else unit
        fixed = published.get("fixed", "") if fixed is None else fixed
        if num_heads < 1 or (d_model % num_heads and None in (key_dim, value_dim)):
            raise ValueError(f"num_heads: expected a divisor of d_model={d_model}, got {num_heads}")
        if not set(conv_on) <= set("qkv"):
            raise ValueError(f'conv_on: expected letters of "qkv", got {conv_on!r}')
        if not set(fixed) <= set("qk"):
            raise ValueError(f'fixed: expected letters of "qk", got {fixed!r}')
        if not 0 < max_step_size <= 2:
            raise ValueError(f"max_step_size: expected a number in (0, 2], got {max_step_size}")
        key_dim = d_model // num_heads if key_dim is None else key_dim
        value_dim = d_model // num_heads if value_dim is None else value_dim
        for name, size in {"d_model": d_model, "key_dim": key_dim, "value_dim": value_dim}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        optimizer = self.design.optimizer
        steps = optimizer.steps if isinstance(optimizer, GradientDescent) else 1
        pairs = (steps,) if steps > 1 else ()
        # The other gains measure their step against the features themselves.
        plain = isinstance(optimizer, GradientDescent) and not isinstance(optimizer.gain, (NLMS, Implicit))
        self.measures_steps = plain and self.design.feature_map != Identity()
        self.shapes = {
            "q": (num_heads, key_dim),
            "k": (*pairs, num_heads, key_dim),
            "v": (*pairs, num_heads, value_dim),
        }
        widths = {name: torch.Size(shape).numel() for name, shape in self.shapes.items()}
        self.projections = nn.ModuleDict(
            {n: Constant(width) if n in fixed else nn.Linear(d_model, width, bias=False) for n, width in widths.items()}
        )
        convolved = [n for n in "qkv" if n in conv_on and n not in fixed]
        self.convolutions = nn.ModuleDict({n: ShortConvolution(widths[n], conv_width, conv_silu) for n in convolved})
        features = self.design.feature_map.size(key_dim)
        if "frequency" in self.design.inputs and features % 2:
            raise ValueError(f"key_dim: expected an even number for {self.design.weights}, got {key_dim}")
        if isinstance(self.design.regressor, Network) and key_dim != value_dim:
            raise ValueError(f"value_dim: expected key_dim={key_dim} for {self.design.regressor}, got {value_dim}")
        sizes = {"heads": num_heads, "key": features, "value": value_dim, "pair": features // 2, "steps": steps}
        sizes |= self.design.regressor.sizes(value_dim)
        self.inputs = input_modules(self.design, d_model, sizes, max_step_size)
        compares = self.design.weights.factor(Kernel) is not None
        needs_temperature = compares or self.design.feature_map != Identity()
        # Unit vectors begin as far apart as random ones of length √d under 1/√d; vectors as they come, under 1/√d.
        log_temperature = torch.full((num_heads, 1), key_dim ** (0.5 if self.unit else -0.5)).log()
        self.log_temperature = nn.Parameter(log_temperature) if needs_temperature else None
        self.norm = nn.RMSNorm(value_dim, eps=1e-5) if norm else None
        self.gate = nn.Linear(d_model, num_heads * value_dim, bias=False) if gate else None
        self.output = nn.Linear(num_heads * value_dim, d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        """The layer on a whole sequence."""
        return self.extend(x)[0]

    def step(
        self, x: Float[Tensor, "batch d_model"], cache: Cache | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], Cache]:
        """The layer on one more token; the numbers are those of `forward`."""
        y, cache = self.extend(x.unsqueeze(1), cache)
        return y.squeeze(1), cache

    def extend(
        self, x: Float[Tensor, "batch time d_model"], cache: Cache | None = None
    ) -> tuple[Float[Tensor, "batch time d_model"], Cache]:
        """The layer on a stretch that goes on from a cache, and the cache after it."""
        cache = cache or Cache(state=None, past={})
        past: dict[str, Tensor] = {}
        projected = {}
        for name, projection in self.projections.items():
            z = projection(x)
            if name in self.convolutions:
                z, past[name] = self.convolutions[name](z, cache.past.get(name))
            projected[name] = z.unflatten(-1, self.shapes[name])
        q, k, v = (projected[name].to(projected["v"].dtype) for name in "qkv")
        if self.unit:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        if self.log_temperature is not None:
            scale = (self.log_temperature / 2).exp()
            q, k, v = scale * q, scale * k, v.to(scale.dtype)
        inputs = {name: module(x) for name, module in self.inputs.items()}
        if self.measures_steps:
            # β is the share of an error that a step removes: of features that have no unit length, too.
            length = self.design.feature_map(k).square().sum(-1)
            inputs["step_size"] = inputs["step_size"] / length.clamp_min(1)
        y, state = regress(self.design, q, k, v, state=cache.state, **inputs)
        y = y.to(self.output.weight.dtype)
        y = (y if self.norm is None else self.norm(y)).flatten(2)
        if self.gate is not None:
            y = y * silu(self.gate(x))
        return self.output(y), Cache(state, past)
