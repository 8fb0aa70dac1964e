"""Memory that shows what a kernel does to it: NaN around what it reads, margins around what it writes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

MARGIN = 4096  # elements: a block past either end is still in it, and 16 bytes stay aligned
SENTINEL = 1234


def in_nan(tensor: Tensor) -> Tensor:
    """The same floating-point numbers, with NaN before and after them in memory; a leaf where the tensor was one."""
    buffer = tensor.new_full((tensor.numel() + 2 * MARGIN,), math.nan)
    inside = buffer[MARGIN:-MARGIN].view(tensor.shape).copy_(tensor.detach())
    return inside.requires_grad_(tensor.requires_grad)


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `Tensor.new_empty` hands out starts as NaN (integers: as the smallest), and its margins must survive."""
    buffers: list[Tensor] = []
    allocate = Tensor.new_empty

    def new_empty(tensor: Tensor, *size, dtype: torch.dtype | None = None, **options) -> Tensor:
        # The interpreter makes copies on the host (it names the device); the tracers' tensors have no memory.
        if options or type(tensor) is not Tensor or tensor.is_meta:
            return allocate(tensor, *size, dtype=dtype, **options)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or tensor.dtype
        buffer = torch.full((shape.numel() + 2 * MARGIN,), SENTINEL, dtype=dtype, device=tensor.device)
        buffer[MARGIN:-MARGIN] = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield
    for buffer in buffers:
        margins = torch.cat((buffer[:MARGIN], buffer[-MARGIN:]))
        assert (margins == margins.new_tensor(SENTINEL)).all(), "a kernel wrote outside of its output"
