"""Execute the chapters: notebooks/NAME.py (text) in, notebooks/NAME.ipynb (with outputs, for the build) out.

A chapter is executed again only when its code, its parameters, the versions or the sources it imports have
changed; an edit of its prose is merged with the outputs it has. Afterwards the recorded numbers are held
against tests/golden.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import golden
import jupytext
import nbformat
import papermill
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "notebooks"
CACHE = ROOT / "_build" / ".execute"
GOLDEN = ROOT / "tests" / "golden"
IMPORTED = ("ttr", "kernels", "configs", "benchmarks")
VERSIONED = ("torch", "triton", "numpy", "matplotlib", "lightning")

# The parameters that every chapter has, the default first.
CHOICES = {"scale": ("smoke", "full"), "device": ("cpu", "cuda")}

KERNEL = "ttr-book"
KERNEL_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a caller's `agg` would drop every figure
    "OMP_NUM_THREADS": "1",  # the order of a sum, so its last digits, depends on the number of threads
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, of a widget that a page could not show
}
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def main() -> int:
    arguments = parse_arguments()
    available = {path.stem: path for path in sorted(CHAPTERS.glob("*.py"))}
    try:
        if unknown := set(arguments.names) - set(available):
            raise ValueError(f"unknown chapter: {listed(sorted(unknown))}; the chapters are {listed(available)}")
        names = arguments.names or list(available)
        sources = {name: read_chapter(available[name], requested_parameters(arguments)) for name in names}
    except ValueError as error:
        print(f"execute: {error}", file=sys.stderr)
        return 2

    versions, imported = installed_versions(), digest_of_imports()
    keys = {name: key_of(source, versions, imported) for name, source in sources.items()}
    caches = {name: read_json(CACHE / f"{name}.json") for name in names}
    stale = [name for name in names if arguments.force or caches[name].get("key") != keys[name]]

    print(f"execute: {len(stale)} of {len(names)} chapters: {listed(stale)}", flush=True)
    failed = []
    provenance = {"versions": versions, "scale": arguments.scale, "device": device_name(arguments.device)}
    for name, result in execute({name: sources[name] for name in stale}, arguments.jobs):
        if isinstance(result, str):
            failed.append(name)
            print(f"{name}: FAILED\n{result}", file=sys.stderr, flush=True)
        else:
            caches[name] = {"key": keys[name], **provenance, **result}
            write_json(CACHE / f"{name}.json", caches[name])
            print(f"{name}: executed in {result['seconds']} s", flush=True)
    executed, unchanged = len(stale) - len(failed), len(names) - len(stale)
    print(f"execute: {executed} executed, {unchanged} unchanged, {len(failed)} failed")

    faults = []
    for name in names:
        if name not in failed:
            write(CHAPTERS / f"{name}.ipynb", product(sources[name], caches[name]["outputs"]))
            rows = verdicts(name, caches[name]["outputs"], is_comparable(arguments), arguments.update_golden)
            write_json(CACHE / f"{name}.json", caches[name] | {"golden": [row._asdict() for row in rows]})
            faults += [(name, row) for row in rows if row.fault]
    for name, row in faults:
        print(f"golden: {name}: {row.name}: {row.verdict}: {row.value!r}, golden {row.golden!r}", file=sys.stderr)
    return 1 if failed or faults else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a chapter, e.g. 04_delta_rule (default: all)")
    for name, choices in CHOICES.items():
        parser.add_argument(f"--{name}", choices=choices, default=choices[0])
    parser.add_argument("--jobs", type=int, default=2, help="chapters at a time (always one on a GPU)")
    parser.add_argument("--force", action="store_true", help="execute unchanged chapters too")
    parser.add_argument(
        "-p",
        dest="parameters",
        metavar="name=value",
        action="append",
        default=[],
        help="a parameter of the chapters, as often as needed",
    )
    parser.add_argument("--update-golden", action="store_true", help="make these numbers the golden ones")
    arguments = parser.parse_args()
    for assignment in list(arguments.parameters):  # the same as the options, and as binding
        name, _, value = assignment.partition("=")
        if name in CHOICES:
            if value not in CHOICES[name]:
                parser.error(f"-p {assignment}: expected one of {', '.join(CHOICES[name])}")
            setattr(arguments, name, value)
            arguments.parameters.remove(assignment)
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    if arguments.update_golden and not is_comparable(arguments):
        parser.error("golden numbers are those of the smoke scale on the CPU with the default parameters")
    if arguments.device == "cuda":
        arguments.jobs = 1
    return arguments


def is_comparable(arguments: argparse.Namespace) -> bool:
    return (arguments.scale, arguments.device, arguments.parameters) == ("smoke", "cpu", [])


def requested_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    requested = {"scale": arguments.scale, "device": arguments.device}
    for assignment in arguments.parameters:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"-p {assignment}: expected name=value")
        requested[name] = literal(text)
    return requested


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def literal(text: str) -> Any:
    """A Python literal, or else the text itself, so that `-p design=delta_net` needs no inner quotes."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def read_chapter(path: Path, requested: dict[str, Any]) -> NotebookNode:
    """The chapter as a notebook; a parameter that is not at its default is set by a cell the reader sees."""
    chapter = jupytext.read(path, fmt="py:percent")
    chapter.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    known = papermill.inspect_notebook(chapter)
    if unknown := set(requested) - set(known):
        raise ValueError(f"{path.stem} has no parameter {listed(sorted(unknown))}; its parameters are: {listed(known)}")
    overrides = {name: value for name, value in requested.items() if value != literal(known[name]["default"])}
    chapter = papermill.execute_notebook(chapter, None, overrides, prepare_only=True)
    del chapter.metadata["papermill"]
    for cell in chapter.cells:
        cell.metadata.pop("papermill", None)  # the cell it added has none
    return chapter


def code_cells(chapter: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in chapter.cells if cell.cell_type == "code"]


def installed_versions() -> dict[str, str]:
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    packages = {name: installed[name] for name in VERSIONED if name in installed}
    return {"python": platform.python_version()} | packages


def device_name(device: str) -> str:
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"


def digest_of_imports() -> str:
    """Contents, not times: a checkout changes every time and no content."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in IMPORTED for path in (ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(chapter: NotebookNode, versions: dict[str, str], imported: str) -> str:
    code = [(cell.source, cell.metadata.get("tags", [])) for cell in code_cells(chapter)]
    return hashlib.sha256(json.dumps([code, versions, imported, KERNEL_ENVIRONMENT]).encode()).hexdigest()


def execute(chapters: dict[str, NotebookNode], jobs: int) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields (name, result) as chapters finish: seconds and outputs, or the traceback of one that raised."""
    with tempfile.TemporaryDirectory() as folder:
        specification = {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"],
            "display_name": "Python 3",
            "language": "python",
            "env": KERNEL_ENVIRONMENT,
        }
        write(Path(folder) / "kernels" / KERNEL / "kernel.json", json.dumps(specification))
        os.environ["JUPYTER_PATH"] = folder
        # Processes, for papermill changes the working directory; spawned, for no event loop may be forked.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            futures: dict[Future[dict[str, Any]], str] = {}
            for position, (name, chapter) in enumerate(chapters.items()):
                futures[pool.submit(run, name, chapter, position)] = name
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], future.result() if error is None else readable(error)


def readable(error: BaseException) -> str:
    """The notebook's own traceback where it has one, else that of what failed around it (a dead kernel)."""
    if isinstance(error, PapermillExecutionError):
        return str(error)
    return "".join(traceback.format_exception(error))


def run(name: str, chapter: NotebookNode, position: int) -> dict[str, Any]:
    start = time.monotonic()
    bar = {"desc": name, "position": position, "leave": False, "disable": not sys.stderr.isatty()}
    executed = papermill.execute_notebook(
        chapter, None, kernel_name=KERNEL, cwd=CHAPTERS, progress_bar=bar, coalesce_streams=True
    )
    seconds = round(time.monotonic() - start, 1)
    return {"seconds": seconds, "outputs": [cell.outputs for cell in code_cells(executed)]}


def product(chapter: NotebookNode, outputs: list[list[dict[str, Any]]]) -> str:
    """The source's cells with the run's outputs and nothing else of the run: equal runs give equal bytes."""
    for number, (cell, cell_outputs) in enumerate(zip(code_cells(chapter), outputs, strict=True), start=1):
        cell.execution_count = number
        cell.outputs = nbformat.from_dict(cell_outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    for index, cell in enumerate(chapter.cells):
        cell.id = f"cell-{index}"
    return nbformat.writes(chapter)


def verdicts(name: str, outputs: list[list[dict[str, Any]]], comparable: bool, update: bool) -> list[golden.Row]:
    records, path = golden.recorded(outputs), GOLDEN / f"{name}.json"
    if not comparable:
        return list(golden.uncompared(records))
    if update:
        write_json(path, records)
    return list(golden.compare(records, read_json(path)))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write(path: Path, text: str) -> None:
    """Whole or not at all, and not when nothing changes: Sphinx rebuilds a page by its file's time."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
