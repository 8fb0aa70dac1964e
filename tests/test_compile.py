"""`torch.compile` traces a model in one graph: no check reads a value, no branch looks at data."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the type checker of the tests wraps every function, and the compiler does not trace it.
SCRIPT = """
import torch
from ttr.models import RegressionLM

torch.manual_seed(0)
model = RegressionLM(17, 16, num_layers=2, num_heads=2, design=["linear_attention", "kda"])
tokens = torch.arange(2 * 70).reshape(2, 70) % 17
compiled = torch.compile(model, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(tokens), model(tokens))
"""


def test_a_model_is_one_graph() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
