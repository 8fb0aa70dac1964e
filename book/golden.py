"""Golden numbers: what a chapter recorded (`ttr.book.record`), held against tests/golden/CHAPTER.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Record = dict[str, Any]


class Row(NamedTuple):
    """One recorded number beside its golden value."""

    name: str
    value: Any
    golden: Any
    verdict: str
    fault: bool
    corpus: str | None = None


def recorded(outputs: Iterable[list[dict[str, Any]]]) -> dict[str, Record]:
    """The records among the outputs of a chapter's code cells, by name."""
    found: dict[str, Record] = {}
    for output in (output for cell in outputs for output in cell):
        metadata = output.get("metadata", {})
        if "golden" in metadata:
            name = metadata["scrapbook"]["name"]
            if name in found:
                raise ValueError(f"{name!r} is recorded twice")
            found[name] = metadata["golden"]
    return found


def uncompared(records: dict[str, Record]) -> Iterator[Row]:
    for name, record in records.items():
        yield Row(name, record["value"], None, "not compared: other parameters", False, record.get("corpus"))


def compare(records: dict[str, Record], golden: dict[str, Record]) -> Iterator[Row]:
    """One row a name: the tolerances are the golden file's, so that a chapter cannot loosen its own."""
    for name in records | golden:
        ours, theirs = records.get(name), golden.get(name)
        if ours is None or theirs is None:
            verdict = "no longer recorded" if ours is None else "not in the golden file"
            yield Row(name, ours and ours["value"], theirs and theirs["value"], verdict, True)
            continue
        values, corpus = (ours["value"], theirs["value"]), ours.get("corpus")
        if corpus != theirs.get("corpus"):
            yield Row(name, *values, "not compared: another corpus", False, corpus)
        elif any(ours[tolerance] != theirs[tolerance] for tolerance in ("rtol", "atol")):
            yield Row(name, *values, "the tolerance differs", True, corpus)
        else:
            agrees = _close(*values, rtol=theirs["rtol"], atol=theirs["atol"])
            yield Row(name, *values, "agrees" if agrees else "differs", not agrees, corpus)


def _close(value: Any, golden: Any, rtol: float, atol: float) -> bool:
    if isinstance(golden, list):
        same_length = isinstance(value, list) and len(value) == len(golden)
        return same_length and all(_close(*pair, rtol, atol) for pair in zip(value, golden, strict=True))
    if isinstance(value, str | list) or isinstance(golden, str):
        return bool(value == golden)
    return bool(abs(value - golden) <= atol + rtol * abs(golden))
