"""Random tensors for a design or an op, with names and sizes that tell the axes apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ttr import Design, GradientDescent, Lp
from ttr._choices import Network

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, and the plain norm where the expected is zero."""
    scale = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (scale or 1.0)


def sample(
    design: Design, time: int, *, batch: int = BATCH, heads: int = HEADS, key: int = KEY, value: int = VALUE,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """q, k (of unit norm), v and the inputs that the design declares, each inside its range.

    A design that reads its channels in pairs gets one channel more where `key` is odd; one that adds keys to values
    gets values of their size.
    """
    key += key % 2 if "frequency" in design.inputs else 0
    value = key if isinstance(design.regressor, Network) else value
    generator = torch.Generator().manual_seed(seed)
    steps = design.optimizer.steps if isinstance(design.optimizer, GradientDescent) else 1
    pairs = (steps,) if steps > 1 else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q = normal(batch, time, heads, key)
    k = normalize(normal(batch, time, *pairs, heads, key), dim=-1)
    v = normal(batch, time, *pairs, heads, value)
    features = design.feature_map.size(key)
    sizes = {"batch": batch, "time": time, "steps": steps, "heads": heads, "key": features, "pair": features // 2}
    sizes |= {"value": value} | design.regressor.sizes(value)
    inputs = {}
    for name, axes in design.inputs.items():
        shape = [sizes[axis] for axis in axes.split()]
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        if name in ("w1", "w2", "key_logits", "query_logits"):
            inputs[name] = normal(*shape)
        else:
            inputs[name] = (-uniform if name.startswith("log_") else uniform + 0.1).to(dtype)
    if isinstance(design.regressor, Network) or isinstance(design.loss, Lp):
        # Where a gradient is not linear in the memory, steps near one are chaotic: rounding grows from token to token.
        # So do weights that fade, under a layer norm.
        inputs |= {name: 0.03 * inputs[name] for name in ("step_size", "log_decay") if name in inputs}
    return q, k, v, inputs


def piece(design: Design, tensors: tuple, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The tokens from start to stop of what `sample` made."""
    q, k, v, inputs = tensors
    timed = {name for name, axes in design.inputs.items() if "time" in axes.split()}
    inputs = {name: x[:, start:stop] if name in timed else x for name, x in inputs.items()}
    return q[:, start:stop], k[:, start:stop], v[:, start:stop], inputs
