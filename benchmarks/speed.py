"""One run that measures everything side by side: `make bench`, or a slice of it: `make bench BENCH="-k delta"`.

Each op's float32 answers are first held to float64 ones: an op that is wrong has no speed. All rows or none make a
record, and a slice is not one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ttr
from benchmarks.cases import DIM, HEADS, OPS, Case
from benchmarks.memory import Measure
from tests.sampling import piece, relative_error, sample

LARGEST_ERROR = 1e-3
SQUARE = 2048
STEP = {"batch": 1, "heads": 8, "key": DIM, "value": DIM}

# Sums and error-correcting updates of a linear map, which is all that they know of the past.
STREAMING = [
    slug
    for slug, design in ttr.atlas.items()
    if design.weights.recursive
    and isinstance(design.regressor, ttr.Linear)
    and isinstance(design.optimizer, ttr.Hebbian | ttr.GradientDescent)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ops stand next to each other at each length: what is compared was measured at nearly the same moment."""
    if "case" in metafunc.fixturenames:
        only = tuple(metafunc.config.getoption("length"))
        cases = [Case(op, "forward", time) for op in OPS for time in only or op.forward]
        cases += [Case(op, "forward+backward", time) for op in OPS if op.backward for time in only or op.backward]
        cases.sort(key=lambda case: (case.time, case.direction))
        metafunc.parametrize("case", cases, ids=str)


def test_matrix_product(benchmark: Any) -> None:
    a = torch.randn(SQUARE, SQUARE, generator=torch.Generator().manual_seed(0))
    error = relative_error(a @ a, a.double() @ a.double())
    assert error < LARGEST_ERROR
    benchmark.extra_info.update(kind="matrix_product", error=error, flops=2 * SQUARE**3)
    benchmark(torch.matmul, a, a)


@torch.no_grad()
@pytest.mark.parametrize("design", STREAMING)
def test_step(design: str, benchmark: Any) -> None:
    """One token, from the state that another left."""

    def step(dtype: torch.dtype) -> Callable[[], Tensor]:
        tokens = sample(ttr.atlas[design], time=2, dtype=dtype, **STEP)
        first, second = (piece(ttr.atlas[design], tokens, time, time + 1) for time in (0, 1))
        _, state = regress(ttr.atlas[design], first)
        return lambda: regress(ttr.atlas[design], second, state)[0]

    single = step(torch.float32)
    error = relative_error(single(), step(torch.float64)())
    assert error < LARGEST_ERROR
    benchmark.extra_info.update(kind="step", design=design, error=error)
    benchmark(single)


def test_op(case: Case, benchmark: Any, peak_growth: Measure) -> None:
    error = case.error()
    assert error < LARGEST_ERROR
    op = case.op
    flops = op.flops if case.direction == "forward" else None
    benchmark.extra_info.update(
        kind="op",
        op=op.name,
        cost=op.cost,
        batch=op.batch,
        direction=case.direction,
        time=case.time,
        error=error,
        flops=flops and op.batch * HEADS * flops(case.time),
        peak_bytes=peak_growth(case),
    )
    benchmark(case.compute, case.tensors())


def regress(design: ttr.Design, tokens: tuple, state: ttr.State | None = None) -> tuple[Tensor, ttr.State]:
    q, k, v, inputs = tokens
    return ttr.regress(design, q, k, v, state=state, **inputs)
