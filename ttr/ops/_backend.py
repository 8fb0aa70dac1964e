"""Which rung computes a call: Triton for CUDA tensors where a kernel exists, PyTorch otherwise."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


def uses_triton(backend: Backend, x: Tensor, missing: str | None) -> bool:
    """Whether this call goes to a Triton kernel; `missing` names what no kernel computes yet."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend: expected "auto", "torch" or "triton", got {backend!r}')
    if backend == "torch":
        return False
    if backend == "auto":
        return x.is_cuda and missing is None and find_spec("triton") is not None
    if missing is not None:
        raise ValueError(f'backend: expected "auto" or "torch" for {missing}, which has no kernel, got "triton"')
    return True
