"""The least time that an op can take on a GPU, from operations and bytes counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.kernel_cases import CG_STEPS, SOLVER_STEPS, Direction, Op, Shape

CHUNK = 64


class Peaks(NamedTuple):
    """What a GPU's data sheet promises: dense operations and bytes a second, multiprocessors (or compute units)."""

    half: float
    tf32: float
    float32: float
    bytes: float
    multiprocessors: int


PEAKS = {
    "A100-SXM4-40GB": Peaks(312e12, 156e12, 19.5e12, 1.555e12, 108),
    "A100-PCIE-40GB": Peaks(312e12, 156e12, 19.5e12, 1.555e12, 108),
    "A100": Peaks(312e12, 156e12, 19.5e12, 2.039e12, 108),
    "H100 PCIe": Peaks(756e12, 378e12, 51e12, 2.0e12, 114),
    "H100": Peaks(989e12, 495e12, 67e12, 3.35e12, 132),
    "H200": Peaks(989e12, 495e12, 67e12, 4.8e12, 132),
    "B200": Peaks(2250e12, 1125e12, 75e12, 8.0e12, 148),
    "MI300X": Peaks(1307e12, 654e12, 163e12, 5.3e12, 304),
}


def peaks_of(device: str) -> Peaks | None:
    """By the longest name that occurs in torch's."""
    names = [name for name in PEAKS if name in device]
    return PEAKS[max(names, key=len)] if names else None


# Operations a token and head, forwards and backwards, of keys and values of d channels in chunks of c: products within
# a chunk count by their causal half, c·d, those with a state are 2d². Backwards recomputes what a chunk has in it.
# None where the count depends on the data or on how it is done.
Flops = Callable[[int, int, int], tuple[float, float | None]]


def hebbian(d: int, c: int, time: int) -> tuple[float, float]:
    """Scores, outputs; states, and their reading. Back: ∂v; ∂scores; ∂q, ∂k; scores, states and their gradients."""
    return 2 * c * d + 4 * d * d, 5 * c * d + 10 * d * d


def error_correcting(d: int, c: int, time: int) -> tuple[float, float]:
    """Two scores, a triangle inverted and applied, outputs; a state read twice and written."""
    triangle = c * c / 3
    return 4 * c * d + triangle + 6 * d * d, 11 * c * d + triangle + 16 * d * d


def with_momentum(d: int, c: int, time: int) -> tuple[float, None]:
    return 6 * c * d + c * c / 3 + 12 * d * d, None


def whitened(d: int, c: int, time: int) -> tuple[float, None]:
    """Two factorisations a chunk, and triangles applied."""
    return 6 * c * d + 9 * d * d + 2 * (d**3 / c + c * c) / 3, None


def iterated(d: int, c: int, time: int) -> tuple[float, None]:
    """A step reads curvature as linear attention with keys for values; one more reads the values."""
    return (CG_STEPS + 1) * (2 * c * d + 2 * d * d) + 4 * d * d, None


def solved_locally(d: int, c: int, time: int) -> tuple[float, None]:
    """A pass over the past a step, which takes three products; two for the mean, three for the answer."""
    return (3 * SOLVER_STEPS + 5) * d * time, None


def probed(d: int, c: int, time: int) -> tuple[float, None]:
    return 3 * d * time, None


FLOPS: dict[str, Flops] = {
    "linear_attention, no decay": hebbian,
    "linear_attention, decay per head": hebbian,
    "linear_attention, decay per channel": hebbian,
    "delta_rule, no decay": error_correcting,
    "delta_rule, decay per head": error_correcting,
    "delta_rule, decay per channel": error_correcting,
    "momentum_delta_rule, decay per head": with_momentum,
    "least_squares, decay per head": whitened,
    "least_squares, decay per head, a ridge that stays": iterated,
    "local_linear, no decay": solved_locally,
    "local_linear, a probe": probed,
}


def flops_of(name: str, shape: Shape, direction: Direction) -> float | None:
    """Operations of a whole call."""
    forward, backward = FLOPS[name](shape.dim, CHUNK, shape.time)
    tokens = shape.batch * shape.time * shape.heads
    if direction == "forward":
        return tokens * forward
    return None if backward is None else tokens * (forward + backward)


CHANNELS, SCALARS = ("q", "k", "v", "probe"), ("step_size",)


def bytes_of(op: Op, shape: Shape, direction: Direction, itemsize: int = 2) -> float:
    """What must move at the least: inputs and outputs once, and once more with the gradients of each."""
    tokens = shape.batch * shape.time * shape.heads
    sizes = dict.fromkeys(CHANNELS, tokens * shape.dim * itemsize) | dict.fromkeys(SCALARS, tokens * itemsize)
    sizes |= {"log_decay": 4 * tokens, "log_channel_decay": 4 * tokens * shape.dim, "ridge": 4 * shape.heads}
    inputs, y = sum(sizes[name] for name in op.needs), sizes["v"]
    return inputs + y if direction == "forward" else 3 * inputs + 2 * y


def seconds(flops: float | None, moved: float, peaks: Peaks) -> float:
    """Where products of half-precision inputs and memory are both at their best, and at the same time."""
    return max((flops or 0) / peaks.half, moved / peaks.bytes)
