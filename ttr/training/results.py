"""Results of a sweep on disk: a file a run, whole or not there, and a table made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ttr.training.files import write_whole

AXES = ("task", "design", "learning_rate", "seed")


@dataclass(frozen=True)
class Results:
    """The folder of a sweep: `runs/<hash>.json`, written once each, and `results.parquet`.

    A file is written under another name, brought to the disk and renamed: under its own name it is always whole.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).absolute())  # the same for workers with another cwd

    @property
    def table(self) -> Path:
        return self.folder / "results.parquet"

    @property
    def _runs(self) -> Path:
        return self.folder / "runs"

    def prepare(self) -> None:
        """Make the folder and write to it. Raises `OSError` if that cannot be."""
        self._runs.mkdir(parents=True, exist_ok=True)
        write_whole(self._runs / "writable", b"yes")
        (self._runs / "writable").unlink()

    def __contains__(self, key: str) -> bool:
        return (self._runs / f"{key}.json").exists()

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep the record of a run; one of the same hash gives way to it."""
        write_whole(self._runs / f"{record['hash']}.json", json.dumps(record).encode())

    def read(self) -> dict[str, dict[str, Any]]:
        """All records by hash. Raises `ValueError` for a file that somebody else has changed."""
        records = {}
        for path in sorted(self._runs.glob("*.json")):
            try:
                records[path.stem] = json.loads(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path}: expected the record of a run, got {error}; remove it to run again") from None
        return records

    @contextmanager
    def started(self, key: str) -> Iterator[None]:
        """Leaves a mark that only a process which dies does not take away."""
        mark = self._runs / f"{key}.started"
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def under_way(self) -> set[str]:
        """Hashes of the runs that were started and have not ended."""
        return {path.stem for path in self._runs.glob("*.started")}

    def forget_started(self) -> None:
        """Remove the marks of runs whose process died."""
        for path in self._runs.glob("*.started"):
            path.unlink(missing_ok=True)

    def assemble(self) -> Path:
        """Write the table of all records: axes, status, metrics by name, and how the run went.

        `config` and `versions` are JSON; metrics that a task does not have are null.
        """
        records = sorted(self.read().values(), key=lambda record: [record[axis] for axis in AXES])
        names = sorted({name for record in records for name in record["metrics"]})
        types = {
            "hash": pa.string(),
            **dict(zip(AXES, (pa.string(), pa.string(), pa.float64(), pa.int64()), strict=True)),
            "status": pa.string(),
            **dict.fromkeys(names, pa.float64()),
            **{"steps": pa.int64(), "seconds": pa.float64(), "started": pa.float64(), "device": pa.string()},
            **{"versions": pa.string(), "config": pa.string(), "traceback": pa.string()},
        }
        plain = [
            record | record["metrics"] | {key: json.dumps(record[key]) for key in ("versions", "config")}
            for record in records
        ]
        columns = {name: pa.array([row.get(name) for row in plain], kind) for name, kind in types.items()}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_whole(self.table, sink.getvalue().to_pybytes())
        return self.table
