"""The directive `reproducibility-status`: what the outputs were computed with, and whether they agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

Run = dict[str, Any]


class ReproducibilityStatus(SphinxDirective):
    """Tables of the versions, the chapters and the recorded numbers, from what book/execute.py left."""

    def run(self) -> list[nodes.Node]:
        paths = sorted(Path(self.env.srcdir, "_build", ".execute").glob("*.json"))
        if not paths:
            raise self.error("no chapter has been executed: run book/execute.py first")
        for path in paths:
            self.env.note_dependency(str(path))
        runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        return self.parse_text_to_nodes("\n".join(report(runs)))


def report(runs: dict[str, Run]) -> Iterator[str]:
    versions = {name: version for run in runs.values() for name, version in run["versions"].items()}
    yield from table(("software", "version"), versions.items())
    yield from table(
        ("chapter", "scale", "device", "seconds"),
        ((link(name), run["scale"], run["device"], run["seconds"]) for name, run in runs.items()),
    )
    for name, run in runs.items():
        if run["golden"]:
            yield link(name)
            yield ""
            yield from table(("number", "here", "golden", "verdict"), map(row, run["golden"]))


def link(chapter: str) -> str:
    return f"{{doc}}`/notebooks/{chapter}`"


def row(record: dict[str, Any]) -> tuple[str, ...]:
    corpus = f" (corpus `{record['corpus'][:12]}`)" if record["corpus"] else ""
    return f"`{record['name']}`", shown(record["value"]), shown(record["golden"]), record["verdict"] + corpus


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    columns = list(header)
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("reproducibility-status", ReproducibilityStatus)
    return {"parallel_read_safe": True}
