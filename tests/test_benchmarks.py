"""A recorded benchmark says where its figures come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
PROVENANCE = {"device", "threads", "cores", "python", "torch", "shape", "sources", "commit", "date"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_carry_their_provenance(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) >= PROVENANCE
    assert len(result["sources"]) == 64
    for row in result["rows"]:
        first, median, third = row["seconds_forward"]
        assert 0 < first <= median <= third


def test_there_are_results() -> None:
    assert RESULTS
