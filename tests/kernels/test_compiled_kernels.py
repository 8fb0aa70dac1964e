"""Every kernel compiles for its GPUs within budget.json: registers, shared memory, instructions, no spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.4", reason="needs the ahead-of-time compiler of triton 3.4, Linux only")

HERE = Path(__file__).parent
BUDGET = json.loads((HERE / "budget.json").read_text())
ROW = "{kernel!s:<24}{target:>7}{dtype:>7}{size:>6}{registers:>11}{spilled:>9}{shared:>8}  {instructions}"


def overruns(row: dict) -> list[str]:
    target, kernel = BUDGET["targets"][str(row["target"])], BUDGET["kernels"][row["kernel"]]
    limits = {
        "spilled": 0,
        "registers": kernel["registers"],
        "shared": min(kernel["shared"], target["shared"]),
    }
    over = [f"{name} {row[name]} > {limit}" for name, limit in limits.items() if row[name] > limit]
    needed = [target["tensor_core"] if name == "tensor_core" else name for name in kernel[row["dtype"]]]
    return over + [f"no {name}" for name in needed if name not in row["instructions"]]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_compiled_kernels_keep_to_the_budget(rows, capsys):
    with capsys.disabled():
        print("", *(ROW.format(**row) for row in [{name: name for name in rows[0]}, *rows]), sep="\n")
    assert {(row["kernel"], str(row["target"])) for row in rows} == {
        (kernel, target) for kernel in BUDGET["kernels"] for target in BUDGET["targets"]
    }
    broken = {ROW.format(**row): over for row in rows if (over := overruns(row))}
    assert not broken
