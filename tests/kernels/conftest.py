"""The kernels run on the GPU where there is one, and under Triton's interpreter on the CPU elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from guards import guarded, in_nan
from torch import Tensor

if not torch.cuda.is_available():
    # Triton reads this when it is imported, and again when a kernel is decorated.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without its interpreter before tests/kernels was collected: "
            "set TRITON_INTERPRET=1, or run tests/kernels in a process of its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        import interpreter_bf16
        import interpreter_patched_once

        interpreter_bf16.install()
        interpreter_patched_once.install()


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """What kernels write starts as NaN between margins that must survive; yields `in_nan`, for what they read."""
    with guarded(monkeypatch):
        yield in_nan
