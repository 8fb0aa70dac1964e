"""Records of studies that `ttr sweep` has finished: `python -m benchmarks.studies configs/study.yaml ...`.

A record holds a row a run: axes, steps, seconds and metrics; and where and from what the runs were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.provenance import digest_of_packages, on_this_cpu
from ttr.commands import read_study
from ttr.training import Study
from ttr.training.results import AXES, Results

Record = dict[str, Any]

RESULTS = record.ROOT / "benchmarks" / "results"
DISTRIBUTIONS = ("torch", "numpy", "lightning")
SOURCES = ("_choices", "ops", "layers", "models", "tasks", "training")


def made(study: Study, configuration: str) -> Record:
    """The record of all runs of a study, from its folder.

    Raises `ValueError` where a run has no result there, or its result is a failure.
    """
    found = Results(study.folder).read()
    runs = {run.hash: run for run in study.runs()}
    missing = [run for key, run in runs.items() if key not in found or found[key]["status"] != "finished"]
    if missing:
        first = f"{missing[0].design} on {missing[0].task}"
        raise ValueError(
            f"{study.folder}: expected all {len(runs)} runs to be finished, {len(missing)} are not: {first}"
        )
    rows = [found[key] for key in runs]
    return {
        **on_this_cpu(DISTRIBUTIONS, SOURCES),
        "configuration": digest(configuration),
        "seconds": sum(row["seconds"] for row in rows),  # of one core
        "rows": [
            {name: row[name] for name in (*AXES, "steps")}
            | {name: float(f"{value:.5g}") for name, value in {"seconds": row["seconds"], **row["metrics"]}.items()}
            for row in rows
        ],
    }


def digest(configuration: str) -> str:
    return hashlib.sha256(configuration.encode()).hexdigest()


def path_of(configuration: Path) -> Path:
    return RESULTS / f"{configuration.stem}.cpu.json"


def load(configuration: Path) -> Record:
    return json.loads(path_of(configuration).read_text(encoding="utf-8"))


def stale(made: Record, configuration: Path) -> bool:
    """Whether the sources or the study have changed since."""
    return (made["sources"], made["configuration"]) != (digest_of_packages(SOURCES), digest(configuration.read_text()))


def sentence(made: Record, configuration: Path) -> str:
    """Where and when, and whether anything has changed since, as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"{len(made['rows'])} runs, {made['seconds'] / 60:.0f} minutes of one core of an {made['device']}, in all, "
        f"{made['date']}; {versions}; "
        f"commit `{made['commit'][:12]}`{' and changes' * made['changed']}."
        + f" **Older than the sources:** `ttr sweep --config configs/{configuration.name}` makes the runs anew."
        * stale(made, configuration)
    )


def mean(rows: Iterable[Record], metric: str, **axes: Any) -> float:
    """Over the runs at these places of the axes. Raises `ValueError` where there is none."""
    values = [row[metric] for row in rows if all(row[axis] == value for axis, value in axes.items())]
    if not values:
        raise ValueError(f"expected a run of {axes}, there is none")
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="+", type=Path, help="of studies whose runs are finished")
    for configuration in parser.parse_args().configurations:
        result = made(read_study(configuration), configuration.read_text())
        record.write(result, path_of(configuration))
        print(f"{path_of(configuration).relative_to(record.ROOT)}: {sentence(result, configuration)}")


if __name__ == "__main__":
    main()
