"""`make bench DEVICE=cuda`: the kernels on a GPU, each beside flash-linear-attention's op of the same name.

Every answer is first held to float64, on some heads: an op that is wrong has no speed. All rows make a record,
results/kernels.<device>.json; a slice (`make bench DEVICE=cuda BENCH="-k delta"`) is printed only.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import provenance, roofline
from benchmarks.kernel_cases import OPS, Call, Direction, Op, Shape, Tensors, compute, error, tensors
from benchmarks.record import table

Record = dict[str, Any]

WITHOUT_GPU = """\
make bench DEVICE=cuda needs a GPU, and torch {version} sees none.
  with a GPU:     install torch's build for it (https://pytorch.org/get-started), and look at `nvidia-smi`
  without one:    `make bench` measures the ops on the CPU, and
                  `python -m benchmarks.estimate` estimates the kernels' times from operations and bytes"""


class Gpu:
    """Times and memory of calls."""

    def seconds(self, call: Callable[[], Any]) -> Record:
        from triton.testing import do_bench

        q1, median, q3 = do_bench(call, quantiles=[0.25, 0.5, 0.75])
        return {"q1": q1 / 1e3, "median": median / 1e3, "q3": q3 / 1e3}

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most that is held during a call, beyond what was held before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def measured(op: Op, call: Call, x: Tensors, direction: Direction, gpu: Any, bound: float = math.inf) -> Record:
    """Error, seconds and bytes of a call; in the place of these what stood against them."""
    try:
        found = error(op, call, x, direction)
    except Exception as problem:  # theirs too must not end the run
        return {"refused": f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"}
    if not found <= bound:
        return {"error": found, "refused": f"error {found:.1e} > {bound:.0e}"}

    def once() -> tuple[Tensor, ...]:
        return compute(op, call, x, direction)

    return {"error": found, "seconds": gpu.seconds(once), "peak_bytes": gpu.peak_bytes(once)}


def row(op: Op, shape: Shape, direction: Direction, device: str, peaks: roofline.Peaks | None, gpu: Any) -> Record:
    x = tensors(shape, torch.bfloat16, device)
    flops, moved = roofline.flops_of(op.name, shape, direction), roofline.bytes_of(op, shape, direction)
    theirs = op.rival_call()
    made: Record = {
        "op": op.name,
        "shape": list(shape),
        "direction": direction,
        "flops": flops,
        "bytes": moved,
        "ours": measured(op, op.ours, x, direction, gpu, op.bound),
        "rival": op.rival,
        "theirs": theirs and measured(op, theirs, x, direction, gpu),
    }
    if op.rival == "torch" and theirs:
        made["theirs"].pop("error", None)  # attention is another function
    if peaks and "seconds" in made["ours"]:
        made["roofline"] = roofline.seconds(flops, moved, peaks) / made["ours"]["seconds"]["median"]
    return made


def text(rows: Sequence[Record]) -> str:
    """As a table for a terminal: ours, theirs, and how many times faster ours is."""
    lines = []
    for made in rows:
        ours, theirs = made["ours"], made["theirs"] or {}
        both = "seconds" in ours and "seconds" in theirs
        lines.append(
            (
                made["op"],
                made["direction"],
                str(Shape(*made["shape"])),
                _milliseconds(ours),
                f"{made['roofline']:.0%}" if "roofline" in made else "",
                _mebibytes(ours),
                _error(ours),
                _milliseconds(theirs),
                _mebibytes(theirs),
                _error(theirs),
                f"{theirs['seconds']['median'] / ours['seconds']['median']:.2f}" if both else "",
            )
        )
    header = (
        "op",
        "direction",
        "shape",
        "ms",
        "roofline",
        "MiB",
        "error",
        "theirs: ms",
        "MiB",
        "error",
        "times faster",
    )
    return table(header, lines)


def _milliseconds(one: Record) -> str:
    if "seconds" in one:
        q1, median, q3 = (1e3 * one["seconds"][name] for name in ("q1", "median", "q3"))
        return f"{median:.3f} ({q1:.3f}–{q3:.3f})"
    return f"NOT MEASURED: {one['refused']}" if "refused" in one else "not installed"


def _mebibytes(one: Record) -> str:
    return f"{one['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in one else ""


def _error(one: Record) -> str:
    return f"{one['error']:.0e}" if "error" in one else ""


def driver() -> str:
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", dest="pattern", default="", help="only rows whose op, direction or shape match")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    pattern = parse_arguments(arguments).pattern
    if not torch.cuda.is_available():
        print(WITHOUT_GPU.format(version=torch.__version__), file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    peaks = roofline.peaks_of(device)
    made = provenance.provenance(device, driver()) | {"peaks": peaks and peaks._asdict(), "rows": []}
    if "flash-linear-attention" not in made["versions"]:
        print("flash-linear-attention is not installed: ours alone (pip install flash-linear-attention)", flush=True)
    cases = [
        (op, shape, direction)
        for op in OPS
        for shape in op.shapes
        for direction in op.directions
        if re.search(pattern, f"{op.name}, {direction}, {shape}")
    ]
    for number, (op, shape, direction) in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {op.name}, {direction}, {shape}", flush=True)
        made["rows"].append(row(op, shape, direction, "cuda", peaks, Gpu()))
        torch.cuda.empty_cache()
    print("", provenance.sentence(made), text(made["rows"]), sep="\n\n")
    if not pattern:
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        provenance.write(made, provenance.RESULTS / f"kernels.{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
