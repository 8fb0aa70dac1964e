"""Every kernel that a public function launches compiles for its GPUs within its budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.7", reason="needs the ahead-of-time compiler of triton 3.7, Linux only")
import compile_kernels
import ttr_kernels
from cases import CASES

HERE = Path(__file__).parent
REGISTERS_OF_SLACK = 8
SPILLED = {"forward": 0, "step": 0, "backward": 255}  # at most, on the GPUs that the kernels are made for
MADE_FOR = ("sm_90", "sm_100")


@pytest.fixture(scope="module")
def rows() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, HERE / "compile_kernels.py", "--for-test"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {tuple(group): row for *group, row in json.loads(result.stdout)}


def overruns(row: dict, budget: dict) -> list[str]:
    limits = {"registers": budget["registers"] + REGISTERS_OF_SLACK} | {
        name: budget[name] for name in ("spilled", "shared")
    }
    over = [f"{row[name]} {name} > {limit}" for name, limit in limits.items() if row[name] > limit]
    return over + [f"no {name}" for name in budget["products"] if name not in row["products"]]


def test_every_kernel_keeps_to_its_budget(rows, capsys):
    with capsys.disabled():
        print("", compile_kernels.text(rows), sep="\n")
    budgets = compile_kernels.load_budgets()
    assert set(rows) == set(budgets), "python tests/kernels/compile_kernels.py --update"
    assert not {group: over for group, row in rows.items() if (over := overruns(row, budgets[group]))}


def test_every_kernel_fits_into_its_gpu(rows):
    assert not {group: row for group, row in rows.items() if row["programs"] < 1}


def test_registers_are_not_spilled(rows):
    assert not {
        group: row["spilled"]
        for group, row in rows.items()
        if group[1] in MADE_FOR and row["spilled"] > SPILLED[group[3]]
    }


def test_every_public_function_has_its_cases():
    assert {case.function for case in CASES} == set(ttr_kernels.__all__)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [("sm_90", 128, 0, 4, 4), ("sm_90", 40, 0, 4, 12), ("sm_90", 32, 0, 1, 32), ("sm_90", 64, 100_000, 4, 2),
     ("sm_80", 64, 170_000, 4, 0), ("gfx942", 256, 0, 4, 2), ("gfx942", 256, 65536, 4, 1)],
)  # fmt: skip
def test_programs_at_once(target, registers, shared, warps, expected):
    assert compile_kernels.programs_at_once(target, registers, shared, warps) == expected
