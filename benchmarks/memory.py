"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from benchmarks.cases import CHUNK, OPS, Case, Direction

Measure = Callable[[Case], int]

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
SHORT = 2 * CHUNK  # tokens of a first call, which loads libraries and starts threads


@contextmanager
def fresh_processes() -> Iterator[Measure]:
    """A function that measures a case in a process made for it; the imports are done once, before the fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ttr"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        yield lambda case: processes.submit(peak_growth, OPS.index(case.op), case.direction, case.time).result()


def peak_growth(number: int, direction: Direction, time: int) -> int:
    """Bytes by which a call of this op raises its process's peak over the inputs; outputs count."""
    case = Case(OPS[number], direction, time)
    short = case._replace(time=SHORT)
    short.compute(short.tensors())
    x = case.tensors()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case.compute(x)
    return UNIT * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
