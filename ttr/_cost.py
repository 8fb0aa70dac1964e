"""What a memory costs: operations, state and working space of one head, as functions of its sizes.

T is the number of tokens, d the size of a key and of a value, f the number of features of a key (d without a feature
map), C a chunk or mini-batch, n the steps of an iterative solver, w a window. Leading terms of the fast ops' forward
pass; a multiplication and an addition are two operations.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ttr._choices import (
    L2,
    MLP,
    DiagonalNewton,
    Exact,
    GradientDescent,
    Hebbian,
    Identity,
    LocalPolynomial,
    Mixture,
    Muon,
    Network,
    Probe,
    SquaredError,
    Window,
)

if TYPE_CHECKING:
    from sympy import Expr

    from ttr._design import Design


class Cost(NamedTuple):
    """Of one head, in the symbols T, d, f, C, n and w.

    Attributes:
        flops: operations of a forward pass over T tokens; None where only the definition computes it.
        state: the most numbers that one step hands to the next.
        memory: numbers held at once beside inputs and outputs, over T tokens; None as for `flops`.
    """

    flops: Expr | None
    state: Expr
    memory: Expr | None

    def at(self, **sizes: int) -> tuple[float | None, ...]:
        """The three as numbers. Raises ValueError for a symbol without a size."""
        symbols = {str(symbol) for x in self if x is not None for symbol in x.free_symbols}
        if missing := sorted(symbols - set(sizes)):
            raise ValueError(f"sizes: expected one for each of {', '.join(sorted(symbols))}, got none for {missing}")
        return tuple(None if x is None else float(x.subs(sizes)) for x in self)

    def as_text(self) -> dict[str, str]:
        """The three as one writes them, 4Td² and not 4*T*d**2, by name; a dash for None."""
        texts = {}
        for name, term in self._asdict().items():
            text = "–" if term is None else str(term)
            for power, raised in {"**2": "²", "**3": "³", "**4": "⁴", "**5": "⁵", "*": ""}.items():
                text = text.replace(power, raised)
            texts[name] = text
        return texts


def cost(design: Design) -> Cost:
    """What the design costs."""
    from sympy import expand, symbols, sympify  # imported late: it takes longer than the rest of the package

    found = _cost(design, *symbols("T d f C n w"))
    if isinstance(design.feature_map, Identity):
        found = Cost(*(None if x is None else sympify(x).subs("f", "d") for x in found))
    return Cost(*(None if x is None else expand(x) for x in found))


def _cost(design: Design, T: Expr, d: Expr, f: Expr, C: Expr, n: Expr, w: Expr) -> Cost:
    optimizer, regressor = design.optimizer, design.regressor
    if isinstance(regressor, LocalPolynomial):
        one = 3 if isinstance(optimizer, Probe) else 2 * n + 4
        # Of all causal pairs half are computed; of a window's, nearly all that a block of queries sees.
        pairs = 2 * T * w if design.weights.factor(Window) else T**2
        flops = pairs * (2 * d, one * d, d**4 / 4)[regressor.degree]
        return Cost(flops, _history(design, T, d, w), T * C * (1, 1, d**2)[regressor.degree])
    if isinstance(regressor, Network):
        return _network(design, T, d, f, C)
    if isinstance(regressor, Mixture):
        maps = regressor.maps * f * d
        return Cost(6 * T * maps, maps, T * maps / C)
    if not design.weights.recursive:
        return Cost(None, _history(design, T, d, w), None)
    read = 4 * T * f * d + 2 * T * C * (f + d)
    if isinstance(optimizer, Hebbian):
        return Cost(read, f * (d + int(optimizer.normalize)), T * f * d / C + T * C)
    if isinstance(optimizer, Exact):
        state, memory = f * (f + d), T * f * (f + d) / C + T * C
        if design.weights.per_channel:
            return Cost(read + 4 * T * f**2 + 2 * T * f**3 / 3, state, T * f * d / C + C * f**2)
        if optimizer.ridge_decays:
            return Cost(read + 8 * T * f**2 + 7 * T * C * f + 2 * T * f**3 / (3 * C), state, memory)
        return Cost(read + 2 * T * f**2 + n * T * (2 * f**2 + 4 * C * f), state, memory)
    if isinstance(optimizer, GradientDescent) and isinstance(design.loss, SquaredError):
        writes = 2 if optimizer.momentum else 1
        solve = T * C * ((writes + 3) * f + d)
        flops = optimizer.steps * (writes * (read + 2 * T * f * d) + solve)
        state = writes * f * d + f * int(isinstance(optimizer.gain, DiagonalNewton))
        return Cost(flops, state, optimizer.steps * (writes * T * f * d / C + (writes + 1) * T * C))
    return _network(design, T, d, f, C)


def _history(design: Design, T: Expr, d: Expr, w: Expr) -> Expr:
    """All past keys and values, or those in the window."""
    return 2 * d * (w if design.weights.factor(Window) else T)


def _network(design: Design, T: Expr, d: Expr, f: Expr, C: Expr) -> Cost:
    """A chain of layers, each with inputs and outputs; a map alone is a chain of one."""
    optimizer = design.optimizer
    hidden = [design.regressor.expansion * d] if isinstance(design.regressor, MLP) else []
    sides = [f, *hidden, d]
    layers = list(pairwise(sides))
    weights = sum(a * b for a, b in layers)
    back = sum(a * b for a, b in layers[1:])
    window = optimizer.window if isinstance(optimizer, Muon) else 1
    momentum = isinstance(optimizer, Muon) or (isinstance(optimizer, GradientDescent) and optimizer.momentum)
    batch = optimizer.batch if isinstance(optimizer, GradientDescent) else 1
    state = weights * (2 if momentum else 1) + 2 * d * (window - 1) + 2 * d * (batch - 1)
    # Keys and queries are read and each pair written once; errors come back through all layers but the first.
    flops = T * (2 * (2 * weights + weights + back) + 2 * (window - 1) * (2 * weights + back))
    if isinstance(optimizer, Muon):
        flops = flops + T * optimizer.iterations * sum(4 * d**2 * (a + b - d) + 2 * d**3 for a, b in layers)
    elif isinstance(design.retention, L2):
        flops = flops + 2 * T * C * sum(a + b for a, b in layers)
    return Cost(flops, state, T * weights / C + C * weights)
