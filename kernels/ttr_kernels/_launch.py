"""What every kernel's launch shares: the checks of its tensors, the GPU it runs on, the precision of products."""

import os
from functools import lru_cache

import torch
import triton
from torch import Tensor

OLDEST_TRITON = (3, 4)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
    raise ImportError(
        f"triton: expected {'.'.join(map(str, OLDEST_TRITON))} or newer, got {triton.__version__}; "
        'upgrade it with torch, or use backend="torch"'
    )

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256


def interpreted() -> bool:
    """Whether kernels are Python functions that run on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def architecture(device: torch.device) -> str:
    """What kernels are tuned for: "sm_90" and the like, "gfx942" and the like, or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Of products with a float32 operand, where the inputs have this dtype.

    Half-precision inputs have 8 or 11 bits; TF32 keeps 11. Three products of TF32 keep those of float32.
    """
    if architecture(device).startswith("gfx"):
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def block(size: int, most: int = MAX_HEAD_SIZE) -> int:
    """Length of the block that holds a head's channels; the tensor cores take no less than 16."""
    return min(most, max(16, triton.next_power_of_2(size)))


def decay_kind(log_decay: Tensor | None) -> int:
    """0 without a decay, 1 for one a head, 2 for one a channel: `NO_DECAY`, `PER_HEAD`, `PER_CHANNEL` of kernels."""
    return 0 if log_decay is None else log_decay.ndim - 2


def check(
    like: str,
    /,
    cu_seqlens: Tensor | None = None,
    **arguments: tuple[Tensor | None, str],
) -> dict[str, int]:
    """Hold each `name=(tensor, "axes")` to its axes; returns their sizes.

    The tensor called `like` fixes dtype and device. Names in `STATES` and those that start with "log_", "initial_"
    or "ridge" are float32. With `cu_seqlens`, the batch is one and the axis "sequences" counts what it bounds; else
    "sequences" is the batch. Raises `ValueError` that names the argument, what was expected and what came.
    """
    sizes: dict[str, int] = {}
    reference = arguments[like][0]
    assert reference is not None
    if reference.dtype not in DTYPES:
        raise ValueError(
            f'{like}: expected dtype float32, float16 or bfloat16, got {reference.dtype}; use backend="torch"'
        )
    if reference.device.type == "cpu" and not interpreted():
        raise ValueError(
            f"{like}: expected a GPU tensor, got one on the CPU; set TRITON_INTERPRET=1 before triton is imported, "
            'or use backend="torch"'
        )
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, reference)
        sizes["sequences"] = len(cu_seqlens) - 1
    for name, (tensor, axes) in arguments.items():
        if tensor is None:
            continue
        names = axes.split()
        if tensor.ndim == len(names):
            for axis, size in zip(names, tensor.shape, strict=True):
                sizes.setdefault(axis, size)
            if cu_seqlens is None and "batch" in sizes:
                sizes.setdefault("sequences", sizes["batch"])
        expected = [sizes.get(axis) for axis in names]
        if list(tensor.shape) != expected:
            wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in names)
            raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
        of_tokens = not {"time", "pairs"}.isdisjoint(names) and not name.startswith(("log_", "weight"))
        dtype = reference.dtype if of_tokens else torch.float32
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
        if tensor.device != reference.device:
            raise ValueError(f"{name}: expected device {reference.device}, that of {like}, got {tensor.device}")
    for axis in ("key", "value"):
        if not 1 <= sizes[axis] <= MAX_HEAD_SIZE:
            raise ValueError(
                f'{axis}: expected a head size from 1 to {MAX_HEAD_SIZE}, got {sizes[axis]}; use backend="torch"'
            )
    return sizes


def _check_bounds(cu_seqlens: Tensor, like: Tensor) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens: expected int32 (sequences + 1), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if like.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1, whose tokens it divides, got {like.shape[0]}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens: expected device {like.device}, got {cu_seqlens.device}")
