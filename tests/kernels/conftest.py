"""The kernels run on the GPU where there is one, and under Triton's interpreter on the CPU elsewhere."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, and again when a kernel is decorated.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without its interpreter before tests/kernels was collected: "
            "set TRITON_INTERPRET=1, or run tests/kernels in a process of its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"
