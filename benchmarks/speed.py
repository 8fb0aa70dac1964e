"""One run that measures everything side by side: `make bench`, or a slice of it: `make bench BENCH="-k delta"`.

Each op's float32 answers are first held to float64 ones: an op that is wrong has no speed. Ops stand next to each other
at each length, so that what is compared was measured at nearly the same moment.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import ttr
from benchmarks.cases import DIM, OPS, Case
from benchmarks.memory import Measure

LARGEST_ERROR = {"forward": 1e-4, "forward+backward": 1e-3}
STEP_HEADS = 8
SQUARE = 2048

CASES = [Case(op, "forward", time) for op in OPS for time in op.forward]
CASES += [Case(op, "forward+backward", time) for op in OPS for time in op.backward]
# Memories that an update of fixed size carries on, and whose state is all that they know of the past.
STREAMING = [
    slug
    for slug, design in ttr.atlas.items()
    if design.weights.recursive and isinstance(design.optimizer, ttr.Hebbian | ttr.GradientDescent)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        lengths = metafunc.config.getoption("length")
        cases = [case for case in CASES if not lengths or case.time in lengths]
        cases.sort(key=lambda case: (case.time, case.direction))
        metafunc.parametrize("case", cases, ids=str)


def test_matrix_product(benchmark: Any) -> None:
    a = torch.randn(SQUARE, SQUARE, generator=torch.Generator().manual_seed(0))
    error = relative_error(a @ a, a.double() @ a.double())
    assert error < LARGEST_ERROR["forward"]
    benchmark.extra_info.update(kind="matrix_product", flops=2 * SQUARE**3, error=error)
    benchmark(torch.matmul, a, a)


def test_op(case: Case, benchmark: Any, peak_growth: Measure) -> None:
    error = case.error()
    assert error < LARGEST_ERROR[case.direction]
    op = case.op
    flops = None if op.flops is None or case.direction != "forward" else op.batch * HEADS * op.flops(case.time)
    benchmark.extra_info.update(
        kind="op",
        op=op.name,
        cost=op.cost,
        batch=op.batch,
        direction=case.direction,
        time=case.time,
        flops=flops,
        error=error,
        peak_bytes=peak_growth(case),
    )
    x = case.tensors()
    benchmark(case.compute, x)
