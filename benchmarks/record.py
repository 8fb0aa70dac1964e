"""The record of a run: where its figures come from, the figures, and what follows from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "benchmarks" / "results" / "ops.cpu.json"

Record = dict[str, Any]

STATISTICS = ("min", "q1", "median", "q3", "rounds")
LONG = 8192
ATTENTION = "scaled_dot_product_attention"


def digest_of_ops() -> str:
    """Of the sources of what was timed: a record with another digest was made before their last change."""
    return digest_of(ROOT / "ttr" / "ops")


def digest_of(*folders: Path) -> str:
    paths = (path for folder in folders for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def made_of(found: dict[str, Any], sources: str) -> Record:
    """The record of what pytest-benchmark found, its JSON, with the digest of the sources that were timed."""
    import torch

    rows: dict[str, list[Record]] = {"matrix_product": [], "op": [], "step": []}
    for row in found["benchmarks"]:
        seconds = {name: row["stats"][name] for name in STATISTICS}
        information = dict(row["extra_info"])
        rows[information.pop("kind")].append(information | {"seconds": seconds})
    machine, cpu = found["machine_info"], found["machine_info"]["cpu"]
    record = {
        "device": f"{machine['machine']} CPU, {cpu['brand_raw']}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": machine["system"],
        "versions": {"python": machine["python_version"]}
        | {name: metadata.version(name) for name in ("torch", "numpy", "pytest-benchmark")},
        "sources": sources,
        "commit": found["commit_info"]["id"],
        "changed": found["commit_info"]["dirty"],
        "date": found["datetime"][:10],
        "matrix_product": next(iter(rows["matrix_product"]), {}),
        "rows": rows["op"],
        "steps": rows["step"],
    }
    return record | {"ratios": list(ratios(record))}


def provenance(record: Record) -> str:
    """Where and when, and whether the ops have changed since, as Markdown."""
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    stale = record["sources"] != digest_of_ops()
    return (
        f"Measured on {record['date']}: {record['device']}, {threads}, {record['system']}; "
        f"{versions}; commit `{record['commit'][:12]}`{' and changes' * record['changed']}."
        + " **Recorded before the last change of the ops:** `make bench` makes the record anew."
        * stale
    )


def load() -> Record:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def write(made: Record, path: Path) -> None:
    """A row a line, which is what a reader of a difference wants."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in made["rows"])
    head = json.dumps(made | {"rows": []}, indent=1)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n", encoding="utf-8")


class Figures:
    """A record's rows by op, direction, length and sequences; a `KeyError` for what a slice left out."""

    def __init__(self, record: Record):
        self.record = record
        self.rows = {(row["op"], row["direction"], row["time"], row["batch"]): row for row in record["rows"]}

    def row(self, op: str, time: int = LONG, direction: str = "forward", batch: int = 2) -> dict[str, Any]:
        return self.rows[op, direction, time, batch]

    def ratio(self, op: str, other: str, time: int = LONG, direction: str = "forward", batch: int = 2) -> float:
        """How many times as long the first op takes."""
        return median(self.row(op, time, direction, batch)) / median(self.row(other, time, direction, batch))

    def share_of_products(self, op: str) -> float:
        """The op's operations a second, as a share of those of a large matrix product on this machine."""
        row, product = self.row(op), self.record["matrix_product"]
        return row["flops"] / median(row) / product["flops"] * median(product)

    def growth(self, op: str) -> float:
        """The largest time(2T) / time(T) of the forward."""
        forward = [row for row in self.record["rows"] if (row["op"], row["direction"]) == (op, "forward")]
        seconds = {row["time"]: median(row) for row in forward}
        doublings = [seconds[2 * time] / seconds[time] for time in seconds if 2 * time in seconds]
        if not doublings:
            raise KeyError(op)
        return max(doublings)

    def slowest_step(self) -> float:
        if not self.record["steps"]:
            raise KeyError("steps")
        return 1e6 * max(map(median, self.record["steps"]))


def median(row: dict[str, Any]) -> float:
    return row["seconds"]["median"]


@dataclass(frozen=True)
class Ratio:
    """A figure that follows from others of the same run, and what it is meant to reach."""

    name: str
    figure: Callable[[Figures], float]
    at_least: float | None = None
    at_most: float | None = None


HEBBIAN, DELTA = "linear_attention, decay per head", "delta_rule, decay per head"
CHANNEL = "linear_attention, decay per channel"
FADING, STAYING = "least_squares, ridge decays", "least_squares, ridge stays"
SLOPE = "local_polynomial, degree 1"
BOTH = "forward+backward"

RATIOS = (
    Ratio(f"{HEBBIAN}: share of matrix products, T={LONG}", lambda f: f.share_of_products(HEBBIAN), at_least=0.28),
    Ratio(f"{HEBBIAN}: times faster than attention, T={LONG}", lambda f: f.ratio(ATTENTION, HEBBIAN), at_least=16),
    Ratio(
        f"{HEBBIAN}: times faster than attention with backward, T={LONG}",
        lambda f: f.ratio(ATTENTION, HEBBIAN, direction=BOTH),
        at_least=18,
    ),
    Ratio(f"{CHANNEL}: times per head, T={LONG}", lambda f: f.ratio(CHANNEL, HEBBIAN), at_most=2),
    Ratio(f"{DELTA}: share of matrix products, T={LONG}", lambda f: f.share_of_products(DELTA), at_least=0.25),
    Ratio(f"{DELTA}: times faster than attention, T={LONG}", lambda f: f.ratio(ATTENTION, DELTA), at_least=9),
    Ratio(
        f"{DELTA}: times faster than attention with backward, T={LONG}",
        lambda f: f.ratio(ATTENTION, DELTA, direction=BOTH),
        at_least=8,
    ),
    Ratio(f"{FADING}: times linear attention, T=4096", lambda f: f.ratio(FADING, HEBBIAN, 4096), at_most=5),
    Ratio(f"{FADING}: error, T=4096", lambda f: f.row(FADING, 4096)["error"], at_most=1e-4),
    Ratio(f"{STAYING}: times linear attention, T=4096", lambda f: f.ratio(STAYING, HEBBIAN, 4096), at_most=14),
    Ratio(f"{STAYING}: error, T=4096", lambda f: f.row(STAYING, 4096)["error"], at_most=1e-4),
    Ratio(f"{SLOPE}: times attention, T=2048", lambda f: f.ratio(SLOPE, ATTENTION, 2048, batch=1), at_most=9),
    Ratio(f"{SLOPE}: error, T=2048", lambda f: f.row(SLOPE, 2048, batch=1)["error"], at_most=1e-4),
    Ratio(f"{SLOPE}: peak GiB, T={LONG}", lambda f: f.row(SLOPE, batch=1)["peak_bytes"] / 2**30, at_most=2),
    Ratio("slowest single-token step, µs", Figures.slowest_step, at_most=150),
)


def ratios(record: Record) -> Iterator[Record]:
    """Those that this run has the rows for."""
    figures = Figures(record)
    linear = dict.fromkeys(row["op"] for row in record["rows"] if row["cost"] == "linear")
    growths = (Ratio(f"{op}: largest time(2T)/time(T)", partial(Figures.growth, op=op), at_most=2.15) for op in linear)
    for ratio in (*RATIOS, *growths):
        try:
            value = ratio.figure(figures)
        except KeyError:
            continue
        yield {"name": ratio.name, "value": value, "at_least": ratio.at_least, "at_most": ratio.at_most}


def reached(ratio: Record) -> bool:
    low, high = ratio["at_least"], ratio["at_most"]
    return (low is None or ratio["value"] >= low) and (high is None or ratio["value"] <= high)


def bound(ratio: Record) -> str:
    return f"≥ {ratio['at_least']:g}" if ratio["at_least"] is not None else f"≤ {ratio['at_most']:g}"


def text(record: Record) -> str:
    """The record as tables for a terminal."""
    parts = [provenance(record)]
    if product := record["matrix_product"]:
        parts.append(f"matrix product: {product['flops'] / median(product) / 1e9:.0f} GFLOP/s")
    for direction in dict.fromkeys(row["direction"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["direction"] == direction]
        for title, figure in (
            (f"{direction}, milliseconds", lambda row: f"{1e3 * median(row):.1f}"),
            (f"{direction}, peak MiB beyond the inputs", lambda row: f"{row['peak_bytes'] / 2**20:.0f}"),
            (f"{direction}, relative error", lambda row: f"{row['error']:.0e}"),
        ):
            parts.append(over_lengths(title, rows, figure))
    steps = [(row["design"], f"{1e6 * median(row):.0f}", f"{row['error']:.0e}") for row in record["steps"]]
    if steps:
        parts.append(table(("single-token step", "µs", "error"), steps))
    met = [(r["name"], f"{r['value']:.3g}", bound(r), "yes" if reached(r) else "NO") for r in record["ratios"]]
    if met:
        parts.append(table(("ratio", "value", "to reach", "reached"), met))
    return "\n\n".join(parts)


def over_lengths(title: str, rows: list[Record], figure: Callable[[Record], str]) -> str:
    times = sorted({row["time"] for row in rows})
    lines: dict[tuple[str, int], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["op"], row["batch"]), {})[row["time"]] = figure(row)
    return table(
        (title, "B", *(f"T={time}" for time in times)),
        [(op, str(batch), *(cells.get(time, "") for time in times)) for (op, batch), cells in lines.items()],
    )


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
