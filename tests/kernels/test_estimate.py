"""The estimate counts what kernels would compute and move."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
if torch.cuda.is_available():
    pytest.skip("the estimate is for machines without a GPU", allow_module_level=True)
import triton
import triton.language as tl
from cases import CASES

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks import estimate, roofline
from benchmarks.kernel_cases import OPS, Shape

PEAKS = roofline.Peaks(half=1e12, tf32=5e11, float32=1e11, bytes=1e12, multiprocessors=4)


@triton.jit
def squares_kernel(p_x, p_y, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, 16)
    o_tile = tl.program_id(0) * 256 + o[:, None] * 16 + o[None, :]
    b_x = tl.load(p_x + o_tile)
    b_y = tl.zeros([16, 16], tl.float32)
    for _ in range(COUNT):
        b_y = tl.dot(b_x, b_x, b_y, input_precision=PRECISION)
    tl.store(p_y + o_tile, b_y)


@pytest.mark.parametrize(
    ("dtype", "precision", "kind", "products"),
    [(torch.bfloat16, "tf32", "half", 1), (torch.float32, "tf32", "tf32", 1), (torch.float32, "tf32x3", "tf32", 3),
     (torch.float32, "ieee", "float32", 1)],
)  # fmt: skip
def test_a_launch_is_counted(dtype, precision, kind, products):
    x, y = torch.zeros(6, 16, 16, dtype=dtype), torch.zeros(6, 16, 16)
    with estimate.counted() as launches:
        squares_kernel[(6,)](x, y, COUNT=5, PRECISION=precision)
    (launch,) = launches
    expected = dict.fromkeys(("half", "tf32", "float32"), 0) | {kind: 6 * 5 * products * 2 * 16**3}
    assert {name: getattr(launch, name) for name in expected} == expected
    assert (launch.programs, launch.products, launch.forward) == (6, 5, True)
    assert launch.bytes == 6 * 256 * (x.element_size() + 4)


def test_a_launch_takes_the_longest_of_its_bounds():
    launch = estimate.Launch("a_kernel", 10, 2e9, 1e9, 0, 3e9, 50, True)
    assert estimate.seconds(launch, 2, PEAKS) == {
        "products": pytest.approx(4e-3),
        "memory": pytest.approx(3e-3),
        "latency": pytest.approx(2 * 50 * estimate.PRODUCT_SECONDS),  # ten programs, eight at once
    }
    few = launch._replace(programs=1)
    assert estimate.seconds(few, 2, PEAKS)["memory"] == pytest.approx(12e-3)


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in {op.name for op in OPS}], ids=str)
def test_kernels_execute_no_less_than_is_needed(case):
    """The count by hand takes half of a product within a chunk; kernels compute the tile, in parts for float32."""
    shape = Shape(1, 128, 2, 32)
    rows = estimate.estimates([case], (shape,))
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row["moved"] >= row.get("bytes", 0)
        assert row["seconds"] >= row.get("roofline", 0)
        if row.get("flops"):
            assert row["flops"] <= sum(row["executed"].values()) <= 40 * row["flops"]
    assert estimate.text(rows)


def test_ops_are_called_as_their_cases_are():
    assert {op.name for op in OPS} <= {str(case) for case in CASES if case.backward}
