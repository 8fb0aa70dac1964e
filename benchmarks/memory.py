"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from collections.abc import Callable, Iterator

from benchmarks.cases import Case

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
SHORT = 2 * 64  # tokens of a first call, which loads libraries and starts threads


@contextmanager
def fresh_processes() -> Iterator[Callable[[Case], int]]:
    """A function that measures a case in a process made for it; the imports are done once, before the fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ttr"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        yield lambda case: processes.submit(peak_growth, case).result()


def peak_growth(case: Case) -> int:
    """Bytes by which the call raises this process's peak over its inputs; outputs count."""
    case._replace(time=SHORT).compute(case._replace(time=SHORT).tensors())
    x = case.tensors()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case.compute(x)
    return UNIT * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
