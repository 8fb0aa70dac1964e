"""`import ttr` is light: no triton, no GPU, nothing that only training or the book needs."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, time
for absent in ("triton", "ttr_kernels", "lightning", "matplotlib", "IPython", "jsonargparse"):
    sys.modules[absent] = None  # importing it now raises
import torch
compiler = "torch._dynamo" in sys.modules
threads, dtype, seed = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()
start = time.perf_counter()
import ttr
seconds = time.perf_counter() - start
assert (threads, dtype, seed) == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
assert compiler == ("torch._dynamo" in sys.modules)  # torch's compiler takes seconds, and imports triton
x = torch.randn(1, 5, 1, 4)
ttr.regress(ttr.Design(), x, x, x)
print(seconds)
"""


def test_import_needs_torch_only_and_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    # The promise is two seconds beyond torch; ten leave room for a busy machine and still catch a heavy import.
    assert float(done.stdout) < 10
