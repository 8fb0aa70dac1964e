"""Checks every op makes of its arguments, so that a mistake is named where it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shapes(
    known: Mapping[str, int] | None = None,
    cu_seqlens: Tensor | None = None,
    /,
    **arguments: tuple[Tensor | None, str],
) -> dict[str, int]:
    """Hold each `name=(tensor, "axes")` to its axes; the first tensor that has an axis not `known` fixes its size.

    A `None` tensor is passed over. All tensors must be floating point, of one dtype (float32 states beside
    half-precision sequences are welcome) and on one device. Returns the axis sizes. Raises `ValueError`.

    The axis "sequences" is the batch or, with `cu_seqlens`, what that divides the tokens of a batch of one into.
    """
    sizes = dict(known or {})
    if cu_seqlens is not None:
        sizes["sequences"] = _sequences(cu_seqlens)
    first: tuple[str, Tensor] | None = None
    for name, (tensor, axes) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor of axes ({axes}), got {tensor!r}")
        names = (axes if cu_seqlens is not None else axes.replace("sequences", "batch")).split()
        shape = tensor.shape
        # The size of each axis that is known by now, and the tensor's own for one that is not.
        if len(shape) != len(names) or tuple(map(sizes.get, names, shape)) != shape:
            expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in names)
            raise ValueError(f"{name}: expected shape ({expected}), got {tuple(shape)}")
        sizes.update(zip(names, shape, strict=True))

        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if first is None:
            first = name, tensor
            continue
        reference_name, reference = first
        if tensor.dtype != reference.dtype and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name}: expected the dtype of {reference_name} ({reference.dtype}) or torch.float32, "
                f"got {tensor.dtype}"
            )
        if tensor.device != reference.device:
            raise ValueError(
                f"{name}: expected the device of {reference_name} ({reference.device}), got {tensor.device}"
            )
    if cu_seqlens is not None and first is not None:
        name, tensor = first
        if cu_seqlens.device != tensor.device:
            raise ValueError(f"cu_seqlens: expected the device of {name} ({tensor.device}), got {cu_seqlens.device}")
        if sizes["batch"] != 1:
            raise ValueError(f"cu_seqlens: expected a batch of 1, whose tokens it divides, got {sizes['batch']}")
        if may_read(cu_seqlens):
            sequence_lengths(cu_seqlens, sizes["time"])
    return sizes


def _sequences(cu_seqlens: Tensor) -> int:
    dtype, shape = getattr(cu_seqlens, "dtype", type(cu_seqlens)), tuple(getattr(cu_seqlens, "shape", ()))
    if dtype not in (torch.int32, torch.int64) or len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected int32 or int64 (sequences + 1), got {dtype} {shape}")
    return shape[0] - 1


def sequence_lengths(cu_seqlens: Tensor, time: int) -> list[int]:
    """How long each packed sequence is. Reads the bounds; raises `ValueError` unless they rise from 0 to `time`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != time:
        raise ValueError(f"cu_seqlens: expected bounds from 0 to time={time}, got from {bounds[0]} to {bounds[-1]}")
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if min(lengths) < 0:
        raise ValueError(f"cu_seqlens: expected bounds that never fall, got a sequence of length {min(lengths)}")
    return lengths


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read values: that makes a GPU wait and breaks a compiled graph."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or os.environ.get("TTR_CHECK") == "1")


def check_range(
    name: str, tensor: Tensor | None, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """Hold every entry to be finite and within [low, high], or (low, high] where `open_low`.

    CUDA tensors are read only under `TTR_CHECK=1`, and nothing is read while `torch.compile` traces.
    """
    if tensor is None or tensor.numel() == 0 or not may_read(tensor):
        return
    try:
        smallest, largest = (extreme.item() for extreme in tensor.detach().aminmax())
    except RuntimeError:  # a tensor without values: under vmap, or fake
        return
    above = smallest > low if open_low else smallest >= low
    if not (above and largest <= high and math.isfinite(smallest) and math.isfinite(largest)):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if high == math.inf else "]"
        raise ValueError(
            f"{name}: expected finite values in {left}{low:g}, {high:g}{right}, "
            f"got values from {smallest:g} to {largest:g}"
        )


def check_chunk_size(chunk_size: int) -> None:
    """Hold a chunk to at least one token."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")


def decay_axes(log_decay: Tensor | None) -> str:
    """The axes a log_decay must have: one factor a channel if it has a fourth axis, else one a head."""
    return "batch time heads key" if log_decay is not None and log_decay.ndim == 4 else "batch time heads"
