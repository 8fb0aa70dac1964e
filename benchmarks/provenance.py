"""Where the figures of a record come from; a record of the kernels that does not say is refused."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import record

Record = dict[str, Any]

RESULTS = record.ROOT / "benchmarks" / "results"
DISTRIBUTIONS = ("torch", "triton", "flash-linear-attention")
REQUIRED = {"device", "driver", "peaks", "versions", "sources", "commit", "changed", "date", "rows"}


def digest_of_kernels() -> str:
    return record.digest_of(record.ROOT / "kernels" / "ttr_kernels")


def provenance(device: str, driver: str | None) -> Record:
    """All but the peaks and the rows; the driver is None for a device that was not there."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "driver": driver,
        "versions": versions,
        "sources": digest_of_kernels(),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "kernels", "ttr", "benchmarks")),
        "date": datetime.now(UTC).date().isoformat(),
    }


def on_this_cpu(distributions: Sequence[str], packages: Sequence[str]) -> Record:
    """Where figures of the CPU come from; `packages` are the parts of ttr whose change makes them old."""
    import cpuinfo  # a dependency of pytest-benchmark

    return {
        "device": f"{platform.machine()} CPU, {cpuinfo.get_cpu_info()['brand_raw']}",
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in distributions},
        "sources": digest_of_packages(packages),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "ttr", "configs", ":(glob)benchmarks/*.py")),
        "date": datetime.now(UTC).date().isoformat(),
    }


def digest_of_packages(packages: Sequence[str]) -> str:
    return record.digest_of(*(record.ROOT / "ttr" / package for package in packages))


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=record.ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()  # fmt: skip


def checked(made: Record) -> Record:
    """The record, or a ValueError that names what its provenance lacks."""
    missing = sorted(REQUIRED - set(made))
    missing += sorted({"python", "torch", "triton"} - set(made.get("versions", {})))
    missing += [name for name in ("device", "commit", "date") if name in made and not made[name]]
    if len(made.get("sources", "")) != 64:
        missing.append("sources")
    if made.get("driver") is None and not made.get("estimate"):
        missing.append("driver")
    if missing:
        raise ValueError(f"a record of the kernels without provenance: {', '.join(dict.fromkeys(missing))}")
    return made


def load(path: Path) -> Record:
    return checked(json.loads(path.read_text(encoding="utf-8")))


def write(made: Record, path: Path) -> None:
    record.write(checked(made), path)


def sentence(made: Record) -> str:
    """Where and when, and whether the kernels have changed since, as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    how = "Estimated" if made.get("estimate") else "Measured"
    where = f"for an {made['device']}" if made.get("estimate") else f"{made['device']}, driver {made['driver']}"
    stale = made["sources"] != digest_of_kernels()
    commit = f"commit `{made['commit'][:12]}`{' and changes' * made['changed']}"
    return (
        f"{how} on {made['date']} {where}; {versions}; {commit}."
        + " **Made before the last change of the kernels.**" * stale
    )
