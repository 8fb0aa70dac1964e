"""The recorded benchmarks say where they come from and leave nothing out; a slice of them runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import cases, record, speed  # noqa: E402

PROVENANCE = {"device", "threads", "cores", "system", "versions", "sources", "commit", "changed", "date"}
ATTENTION, LINEAR = cases.OPS[:2]


@pytest.fixture(scope="module")
def recorded() -> record.Record:
    return record.load()


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> record.Record:
    """What the command in the Makefile makes of two ops at one length."""
    path = tmp_path_factory.mktemp("benchmarks") / "part.json"
    chosen = [
        "matrix_product",
        "step[delta_net]",
        *(f"op[{op}, forward, T1024]" for op in (ATTENTION.name, LINEAR.name)),
    ]
    command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", f"--benchmark-json={path}"]
    command += ["--benchmark-max-time=0", "--benchmark-min-rounds=1", "--length=1024"]
    command += [f"benchmarks/speed.py::test_{name}" for name in chosen]
    # In a worker of xdist, whose variables it would inherit, pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    made = json.loads(path.read_text(encoding="utf-8"))
    assert record.text(made) in run.stdout
    return made


def rows_of(made: record.Record) -> list[record.Record]:
    return [*made["rows"], *made["steps"], made["matrix_product"]]


def test_the_record_has_its_provenance(recorded):
    assert set(recorded) >= PROVENANCE
    assert len(recorded["sources"]) == 64
    assert set(recorded["versions"]) >= {"python", "torch", "numpy", "pytest-benchmark"}


def test_the_record_has_every_row(recorded):
    expected = {(op.name, op.batch, "forward", time) for op in cases.OPS for time in op.forward}
    expected |= {(op.name, op.batch, "forward+backward", time) for op in cases.OPS for time in op.backward}
    assert {(row["op"], row["batch"], row["direction"], row["time"]) for row in recorded["rows"]} == expected
    assert [row["design"] for row in recorded["steps"]] == speed.STREAMING


@pytest.mark.parametrize("name", ["recorded", "part"])
def test_every_row_has_a_time_and_a_small_error(name, request):
    made = request.getfixturevalue(name)
    for row in rows_of(made):
        seconds = row["seconds"]
        assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert 0 <= row["error"] < speed.LARGEST_ERROR
    assert all(row["peak_bytes"] >= 0 for row in made["rows"])


@pytest.mark.parametrize("name", ["recorded", "part"])
def test_what_follows_from_the_rows_is_recorded(name, request):
    made = request.getfixturevalue(name)
    assert made["ratios"] == list(record.ratios(made))


def test_the_record_has_every_ratio(recorded):
    linear = [op for op in cases.OPS if op.cost == "linear"]
    assert len(recorded["ratios"]) == len(record.RATIOS) + len(linear)


def test_a_slice_has_its_rows_and_a_peak_that_holds_the_outputs(part):
    assert set(part) >= PROVENANCE
    assert [row["op"] for row in part["rows"]] == [ATTENTION.name, LINEAR.name]
    assert [row["design"] for row in part["steps"]] == ["delta_net"]
    for row in part["rows"]:
        assert row["peak_bytes"] >= 0.9 * 4 * row["batch"] * row["time"] * cases.HEADS * cases.DIM


def test_an_op_that_is_wrong_has_no_speed():
    def rounded(x: cases.Tensors) -> torch.Tensor:
        y = ATTENTION.call(x)
        return y.bfloat16().float() if y.dtype == torch.float32 else y

    wrong = cases.Case(replace(ATTENTION, call=rounded), "forward", 64)
    with pytest.raises(AssertionError):
        speed.test_op(wrong, benchmark=None, peak_growth=lambda case: 0)


def test_gradients_are_held_to_float64_too():
    assert 0 < cases.Case(LINEAR, "forward+backward", 96).error() < 1e-5


def test_operations_of_attention_are_those_of_its_causal_half():
    products = 2 * (2 * 512 * 512 * cases.DIM)
    assert ATTENTION.flops(512) == products / 2


def test_a_record_made_before_a_change_of_the_ops_says_so(part, monkeypatch, tmp_path):
    made = part | {"sources": record.digest_of_ops()}
    assert "before the last change" not in record.provenance(made)
    folder = tmp_path / "ttr" / "ops"
    folder.mkdir(parents=True)
    (folder / "an_op.py").write_text("changed = True\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert "before the last change" in record.provenance(made)
