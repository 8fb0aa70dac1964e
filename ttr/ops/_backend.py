"""Which rung computes a call: Triton for CUDA tensors that a kernel takes, PyTorch otherwise."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ttr.ops._warning import warn

Backend = Literal["auto", "torch", "triton"]

# What all kernels take.
HEAD_SIZE = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KernelFallbackWarning(UserWarning):
    """No Triton kernel takes a call with CUDA tensors, so PyTorch computes it."""


def uses_triton(backend: Backend, q: Tensor, v: Tensor, missing: str | None = None) -> bool:
    """Whether a call of an op goes to its Triton kernel.

    `missing` names what about the call that kernel does not compute, beyond the sizes and dtypes that none does. Raises
    `ValueError` or `ImportError` where "triton" is asked for in vain, and warns, once a reason, where "auto" is.
    """
    _check(backend)
    if backend == "torch" or (backend == "auto" and not _wants_kernel(q)):
        return False
    missing = missing or _beyond_kernels(q, v)
    if backend == "triton":
        if missing is not None:
            raise _no_kernel(missing)
        if (failure := _import_failure()) is not None:
            raise ImportError(failure)
        return True
    reason = _import_failure() if missing is None else f"there is no Triton kernel for {missing}"
    if reason is not None and not torch.compiler.is_compiling():
        _warn(reason)
    return reason is None


def in_kernel(
    name: str,
    like: Tensor,
    cu_seqlens: Tensor | None,
    *sequences: Tensor,
    **others: Any,
) -> Any:
    """Call the kernel of that name: sequences as `like`, its other tensors, by keyword, in float32."""
    import ttr_kernels

    wide = {key: x.float() if isinstance(x, Tensor) else x for key, x in others.items()}
    bounds = None if cu_seqlens is None else cu_seqlens.int()
    return getattr(ttr_kernels, name)(*(x.to(like.dtype) for x in sequences), **wide, cu_seqlens=bounds)


def only_torch(backend: Backend, what: str) -> None:
    """Raise `ValueError` for "triton" where there is nothing but PyTorch, whatever the tensors."""
    _check(backend)
    if backend == "triton":
        raise _no_kernel(what)


def _check(backend: Backend) -> None:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend: expected "auto", "torch" or "triton", got {backend!r}')


def _no_kernel(what: str) -> ValueError:
    return ValueError(f'backend: expected "auto" or "torch" for {what}, which has no kernel, got "triton"')


def _wants_kernel(x: Tensor) -> bool:
    """Whether one would expect a kernel to compute with this tensor."""
    return x.is_cuda


def _beyond_kernels(q: Tensor, v: Tensor) -> str | None:
    """The size or dtype that no kernel takes."""
    for name, x in (("keys", q), ("values", v)):
        if not 1 <= x.shape[-1] <= HEAD_SIZE:
            return f"{name} of {x.shape[-1]} channels (kernels take 1 to {HEAD_SIZE})"
        if x.dtype not in DTYPES:
            return f"{x.dtype} (kernels take float32, float16 and bfloat16)"
    return None


def _import_failure() -> str | None:
    return _failure()


# As `torch.compiler.assume_constant_result` would mark it, which imports the compiler. A traced import may not fail.
_import_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _failure() -> str | None:
    """Why there are no kernels, found out when the first one is wanted."""
    try:
        import ttr_kernels  # noqa: F401
    except ModuleNotFoundError as error:
        install = 'pip install "test-time-regression[triton]"'
        return f'{error.name} is not installed, and kernels need it: {install}, or use backend="torch"'
    except ImportError as error:
        return str(error)
    return None


@cache
def _warn(reason: str) -> None:
    warn(f'{reason}; PyTorch computes this call, and without a warning with backend="torch"', KernelFallbackWarning)
