"""The run's fixtures, and its record: what pytest-benchmark found, as `benchmarks.record` writes and prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import record
from benchmarks.memory import Measure, fresh_processes

SOURCES = record.digest_of_ops()  # as they are when they are imported, whatever happens to them during the run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--length",
        type=int,
        action="append",
        default=[],
        help="measure at so many tokens in place of the lengths of the table; may be repeated",
    )


@pytest.fixture(scope="session")
def peak_growth() -> Iterator[Measure]:
    with fresh_processes() as measure:
        yield measure


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Our record takes the place of pytest-benchmark's: without every single timing, with what follows from them."""
    made = record.made_of(output_json, SOURCES)
    output_json.clear()
    output_json.update(made)
    print("", record.text(made), sep="\n\n")
