"""The public functions of `ttr_kernels`, and what each is called with where its kernels are compiled.

A new function gets its cases here, and its kernels are compiled, bounded and estimated.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KEYS, VALUES, SCALARS = "batch time heads key", "batch time heads value", "batch time heads"
STATES = "sequences heads key value"

# Few heads and a long sequence: what is cut into segments. Heads and tokens divide by 16, as in the shapes of models.
SIZES = {"batch": 1, "sequences": 1, "time": 2048, "heads": 16}


# Heads of functions that take less in float32 than is compiled.
LARGEST_IN_FLOAT32 = {"momentum_delta_rule": 32}


@dataclass(frozen=True)
class Case:
    """A call of a public function.

    Attributes:
        function: its name in `ttr_kernels`.
        name: which of its modes.
        tensors: the axes of its tensors, by the name of the argument.
        others: its other arguments.
        sizes: of axes, where they are not `SIZES`.
        backward: whether it is differentiated too.
    """

    function: str
    name: str
    tensors: dict[str, str]
    others: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    backward: bool = True

    def __str__(self) -> str:
        return f"{self.function}, {self.name}"

    def inputs(self, dtype: torch.dtype, size: int, **sizes: int) -> dict[str, Any]:
        """Arguments whose numbers mean nothing; decays, weights and states are float32, as in all of the package."""
        if dtype == torch.float32:
            size = min(size, LARGEST_IN_FLOAT32.get(self.function, size))
        sizes = {"key": size, "value": size} | SIZES | self.sizes | sizes
        inputs: dict[str, Tensor] = {}
        for name, axes in self.tensors.items():
            wide = "time" not in axes.split() or name.startswith(("log_", "weight"))
            shape = [sizes[axis] for axis in axes.split()]
            inputs[name] = torch.zeros(shape, dtype=torch.float32 if wide else dtype).requires_grad_(self.backward)
        return inputs | self.others


QKV = {"q": KEYS, "k": KEYS, "v": VALUES, "initial_state": STATES}
DECAYS: dict[str, dict[str, str]] = {
    "no decay": {},
    "decay per head": {"log_decay": SCALARS},
    "decay per channel": {"log_decay": KEYS},
}
STEP: dict[str, Any] = {"sizes": {"batch": 16, "sequences": 16, "time": 1}, "backward": False}

SQUARES = {"q": KEYS, "k": KEYS, "v": VALUES, "ridge": "heads key"}
STAYS = {"ridge_decays": False}

# By function, its tensors and the decays that it takes.
OF_FUNCTIONS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "linear_attention": (QKV, tuple(DECAYS)),
    "delta_rule": (QKV | {"gain": KEYS}, tuple(DECAYS)),
    "momentum_delta_rule": (
        QKV | {"gain": KEYS, "log_momentum": SCALARS, "initial_momentum": STATES},
        ("no decay", "decay per head"),
    ),
}

CASES = [
    case
    for function, (tensors, decays) in OF_FUNCTIONS.items()
    for decay in decays
    for case in (
        Case(function, decay, tensors | DECAYS[decay]),
        Case(function, f"{decay}, a step", tensors | DECAYS[decay], **STEP),
    )
]
CASES += [
    case
    for name, decay in DECAYS.items()
    if name != "decay per channel"
    for case in (
        Case("least_squares", name, SQUARES | decay | {"weight": SCALARS}),
        Case("least_squares", f"{name}, a ridge that stays", SQUARES | decay, STAYS),
        Case("least_squares", f"{name}, a step", SQUARES | decay, **STEP),
        Case("least_squares", f"{name}, a step, a ridge that stays", SQUARES | decay, STAYS, **STEP),
    )
]

LINES = {"q": KEYS, "k": KEYS, "v": VALUES}
SOLVED = LINES | {"target": KEYS, "ridge": "heads"}
FACTORS = {"log_decay": SCALARS, "log_weight": SCALARS}
CASES += [
    Case("local_linear", "no decay", SOLVED),
    Case("local_linear", "decay, weights and a window", SOLVED | FACTORS, {"window": 512}),
    Case("local_linear", "a probe", LINES | {"probe": KEYS}),
    Case("local_linear", "a step", SOLVED | FACTORS, **STEP),
]
