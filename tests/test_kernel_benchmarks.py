"""The kernels' benchmarks: what is counted by hand, what a record must say, and that a wrong op has no speed."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the package

from benchmarks import cuda, kernel_cases, provenance, roofline  # noqa: E402
from benchmarks.kernel_cases import DIRECTIONS, OPS, Shape  # noqa: E402

SMALL = Shape(1, 24, 2, 8)
LINEAR = next(op for op in OPS if op.name == "linear_attention, decay per head")
ON_CPU = replace(LINEAR, ours=LINEAR.exact)  # PyTorch's rung in bfloat16


class FakeGpu:
    def __init__(self) -> None:
        self.calls = 0

    def seconds(self, call):
        call()
        self.calls += 1
        return {"q1": 1e-3, "median": 2e-3, "q3": 3e-3}

    def peak_bytes(self, call):
        return 2**20


@pytest.fixture
def made() -> provenance.Record:
    gpu, peaks = FakeGpu(), roofline.PEAKS["H200"]
    rows = [cuda.row(ON_CPU, SMALL, direction, "cpu", peaks, gpu) for direction in DIRECTIONS]
    return provenance.provenance("a GPU", "1.2") | {"peaks": peaks._asdict(), "rows": rows}


def test_operations_of_a_chunk_counted_one_by_one():
    """Four tokens in a chunk, two channels: half of 4 · 4 pairs in two products, and two products with the state."""
    pairs, state = 4 * 4 / 2, 2 * 2
    assert roofline.hebbian(2, 4, 4)[0] == (2 * pairs * 2 * 2 + 2 * 4 * state * 2) / 4
    backward = 5 * pairs * 2 * 2 + 5 * 4 * state * 2
    assert roofline.flops_of(LINEAR.name, Shape(3, 64, 5, 16), "forward") == 3 * 64 * 5 * (2 * 64 * 16 + 4 * 16 * 16)
    assert roofline.hebbian(2, 4, 4)[1] == backward / 4
    # Beside that, the delta rule has another score, a triangle inverted and applied, and reads a state once more.
    more = roofline.error_correcting(2, 4, 4)[0] - roofline.hebbian(2, 4, 4)[0]
    assert more == pytest.approx((2 * pairs * 2 * 2 + 4**3 / 3 + 4 * state * 2) / 4)
    # A step multiplies a pair three times; attention twice.
    assert roofline.solved_locally(64, 64, 8192)[0] / (2 * 64 * 8192) == (3 * 8 + 5) / 2


def test_every_op_has_a_count():
    assert {op.name for op in OPS} == set(roofline.FLOPS)
    for op in OPS:
        for direction in op.directions:
            assert roofline.flops_of(op.name, SMALL, direction) is None or (
                roofline.flops_of(op.name, SMALL, direction) > 0
            )


def test_bytes_are_those_of_inputs_and_outputs():
    shape = Shape(1, 10, 2, 4)
    rows, scalars = 10 * 2 * 4 * 2, 10 * 2 * 4
    assert roofline.bytes_of(LINEAR, shape, "forward") == 3 * rows + scalars + rows
    assert roofline.bytes_of(LINEAR, shape, "forward+backward") == 3 * (3 * rows + scalars) + 2 * rows
    x = kernel_cases.tensors(shape, torch.bfloat16, "cpu")
    inputs = sum(getattr(x, name).numel() * getattr(x, name).element_size() for name in LINEAR.needs)
    assert roofline.bytes_of(LINEAR, shape, "forward") == inputs + x.v.numel() * x.v.element_size()


def test_the_roofline_is_the_slower_of_products_and_memory():
    peaks = roofline.Peaks(half=100.0, tf32=50.0, float32=10.0, bytes=10.0, multiprocessors=1)
    assert roofline.seconds(1000.0, 10.0, peaks) == 10.0
    assert roofline.seconds(1000.0, 1000.0, peaks) == 100.0
    assert roofline.seconds(None, 50.0, peaks) == 5.0


@pytest.mark.parametrize(
    ("device", "peaks"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
     ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), ("NVIDIA A100-SXM4-80GB", "A100")],
)  # fmt: skip
def test_peaks_are_found_by_the_name_of_the_device(device, peaks):
    assert roofline.peaks_of(device) == roofline.PEAKS[peaks]
    assert roofline.peaks_of("NVIDIA GeForce 256") is None


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_exact_form_of_an_op_has_its_gradients(op):
    x = kernel_cases.tensors(SMALL, torch.bfloat16, "cpu").map(torch.Tensor.double)
    (y,) = kernel_cases.compute(op, op.exact, x, "forward")
    gradients = kernel_cases.compute(op, op.exact, x, "forward+backward")
    assert y.shape == x.v.shape
    assert len(gradients) == len(op.needs)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("op", [op for op in OPS if op.rival], ids=lambda op: op.name)
def test_the_other_is_called_without_a_scale_and_with_logarithms(op):
    given = {}

    def function(*args, **kwargs):
        given.update(kwargs)
        return args[2] if op.rival == "torch" else (args[2], None, None)

    x = kernel_cases.tensors(SMALL, torch.bfloat16, "cpu")
    assert op.theirs(function, x).shape == x.v.shape
    if op.rival not in ("torch", "mesa_net.chunk_mesa_net"):
        assert given["scale"] == 1.0
    assert (given.get("g", torch.zeros(1)) <= 0).all()


def test_a_row_has_its_figures(made):
    for row in made["rows"]:
        assert set(row) >= {"op", "shape", "direction", "flops", "bytes", "ours", "theirs", "roofline"}
        assert 0 < row["ours"]["error"] < LINEAR.bound
        assert row["roofline"] == roofline.seconds(row["flops"], row["bytes"], roofline.PEAKS["H200"]) / 2e-3
    assert "2.000 (1.000–3.000)" in cuda.text(made["rows"])


def test_an_op_that_is_wrong_has_no_speed():
    gpu = FakeGpu()
    for wrong in (lambda x: 1.1 * LINEAR.exact(x), lambda x: LINEAR.exact(x) * math.nan):
        row = cuda.row(replace(LINEAR, ours=wrong), SMALL, "forward", "cpu", roofline.PEAKS["H200"], gpu)
        assert "seconds" not in row["ours"]
        assert "roofline" not in row
        assert "> 2e-02" in row["ours"]["refused"]
        assert "NOT MEASURED: error" in cuda.text([row])
    assert gpu.calls == 0


def test_what_fails_does_not_end_the_run():
    def fails(x):
        raise RuntimeError("out of registers\nand more")

    row = cuda.row(replace(LINEAR, ours=fails), SMALL, "forward", "cpu", None, FakeGpu())
    assert row["ours"] == {"refused": "RuntimeError: out of registers"}


@pytest.mark.parametrize("missing", ["device", "driver", "versions", "sources", "commit", "date", "peaks"])
def test_a_record_without_provenance_is_refused(made, missing, tmp_path):
    provenance.write(made, tmp_path / "kernels.json")
    assert provenance.load(tmp_path / "kernels.json") == made
    del made[missing]
    with pytest.raises(ValueError, match=f"without provenance: .*{missing}"):
        provenance.checked(made)
    with pytest.raises(ValueError, match="without provenance"):
        provenance.write(made, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_only_an_estimate_has_no_driver(made):
    made["driver"] = None
    with pytest.raises(ValueError, match="driver"):
        provenance.checked(made)
    assert provenance.checked(made | {"estimate": True})


@pytest.mark.parametrize("path", sorted(provenance.RESULTS.glob("kernels.*.json")), ids=lambda path: path.name)
def test_committed_records_have_their_provenance(path):
    made = provenance.load(path)
    assert ("estimate" in path.name) == made.get("estimate", False)
    assert made["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert cuda.main([]) == 2
    message = capsys.readouterr().err
    assert all(hint in message for hint in ("nvidia-smi", "make bench", "benchmarks.estimate"))


@pytest.mark.parametrize(("device", "program"), [("cpu", "pytest"), ("cuda", "benchmarks.cuda")])
def test_the_device_chooses_the_benchmark(device, program):
    command = ["make", "--dry-run", "--old-file=.venv/.ready", "bench", f"DEVICE={device}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"-m {program} " in plan
