"""What the kernels should take on a GPU that is not here: `python -m benchmarks.estimate`.

Nothing is measured. Each op is called at the shapes of the benchmark with the settings for the GPU; of every launch a
few programs run under Triton's interpreter, where products of matrices are counted. A launch moves each of its tensors
once. It then takes at least

    operations / the GPU's peak,    bytes / its bandwidth,    waves · products one after the other · PRODUCT_SECONDS

and what it takes is put at the largest of the three; a GPU that is not full computes and loads at the part of its rates
that is. How many programs a multiprocessor holds is what the compiler made of the kernel (tests/kernels/budgets).
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import provenance, roofline
from benchmarks.kernel_cases import CG_STEPS, DIRECTIONS, OPS, SHAPES, SOLVER_STEPS, Direction, Shape
from benchmarks.record import ROOT, table

Record = dict[str, Any]

RECORDED = provenance.RESULTS / "kernels.estimate.json"
DEVICE, TARGET = "H200", "sm_90"
PRODUCT_SECONDS = 0.4e-6  # of a product of 64 × 64 tiles that waits for the one before: some 700 cycles, an assumption
LAUNCH_SECONDS = 4e-6  # from one launch to the next, an assumption too

STEPS = {"least_squares": CG_STEPS, "local_linear": SOLVER_STEPS}  # as in the benchmark

TESTS = ROOT / "tests" / "kernels"


class Launch(NamedTuple):
    """A launch as it was counted."""

    kernel: str
    programs: int
    half: float
    tf32: float
    float32: float
    bytes: float
    products: float
    forward: bool


def support() -> tuple[Any, Any, Any]:
    """The tests' cases, launches and budgets, which are beside them and not in a package."""
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    names = ("cases", "launches", "compile_kernels")
    import_module("interpreter_bf16").install()
    cases, launches, compile_kernels = map(import_module, names)
    return cases, launches, compile_kernels


@contextmanager
def counted(target: str = TARGET) -> Iterator[list[Launch]]:
    """The launches of what is called inside; of each, the programs in the middle of the grid's first axis run."""
    from triton.runtime import interpreter

    _, launches, _ = support()
    found: list[Launch] = []
    counts = np.zeros(4)  # operations in half precision, TF32, float32; products
    product = interpreter.interpreter_builder.create_dot

    def dot(a: Any, b: Any, d: Any, input_precision: Any, *others: Any) -> Any:
        *batch, m, k = a.data.shape
        operations = 2 * math.prod(batch) * m * k * b.data.shape[-1]
        name = str(input_precision).rpartition(".")[2].lower()
        if a.dtype.scalar.primitive_bitwidth < 32:
            counts[0] += operations
        elif name in ("tf32", "tf32x3"):
            counts[1] += operations * (3 if name == "tf32x3" else 1)
        else:
            counts[2] += operations
        counts[3] += 1
        return product(a, b, d, input_precision, *others)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = set(kernel.arg_names)
        bound = inspect.getcallargs(kernel.fn, *args, **{k: v for k, v in options.items() if k in names})
        grid = grid(bound) if callable(grid) else grid
        grid = (*grid, 1, 1)[:3]
        counts[:] = 0
        execute(kernel, bound, grid, grid[0] // 2)
        tensors = {x.data_ptr(): x for x in bound.values() if isinstance(x, Tensor)}
        moved = sum(x.numel() * x.element_size() for x in tensors.values())
        half, tf32, single, products = (counts * grid[0]).tolist()
        programs = math.prod(grid)
        found.append(
            Launch(kernel.__name__, programs, half, tf32, single, moved, products / programs, launches.is_forward())
        )

    def execute(kernel: Any, bound: dict[str, Any], grid: tuple[int, ...], x: int) -> None:
        function = kernel.rewrite()
        constants = interpreter.GridExecutor(function, kernel.arg_names, grid).constexprs
        arguments = {k: v if k in constants else interpreter._implicit_cvt(v) for k, v in bound.items()}
        scope = interpreter._patch_lang(function)
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        try:
            for y in range(grid[1]):
                for z in range(grid[2]):
                    builder.set_grid_idx(x, y, z)
                    function(**arguments)
        finally:
            scope.restore()

    changes = [
        (interpreter.InterpretedFunction, "run", run),
        (interpreter.interpreter_builder, "create_dot", dot),
        (Tensor, "new_empty", Tensor.new_zeros),  # most programs do not run: what they would write is no NaN
    ]
    with launches.replaced([*changes, *launches.on_target(target)]), np.errstate(all="ignore"):
        yield found
    del interpreter.interpreter_builder.create_dot


def seconds(launch: Launch, resident: int, peaks: roofline.Peaks) -> dict[str, float]:
    """The three lower bounds of a launch's time."""
    filled = min(1.0, launch.programs / peaks.multiprocessors)
    operations = launch.half / peaks.half + launch.tf32 / peaks.tf32 + launch.float32 / peaks.float32
    waves = math.ceil(launch.programs / (peaks.multiprocessors * resident))
    return {
        "products": operations / filled,
        "memory": launch.bytes / peaks.bytes / filled,
        "latency": waves * launch.products * PRODUCT_SECONDS,
    }


def row(
    name: str,
    shape: Shape,
    direction: Direction,
    launches: list[Launch],
    budgets: dict[tuple[str, str, str, str], Record],
    peaks: roofline.Peaks,
) -> Record:
    """The estimate of an op in one direction: the sum over its launches."""
    chosen = [launch for launch in launches if launch.forward or direction != "forward"]
    kernels: dict[str, Record] = {}
    for launch in chosen:
        size = f"bf16 D={shape.dim}"
        known = [budgets.get((launch.kernel, TARGET, size, way)) for way in ("forward", "backward")]
        resident = max(1, min((budget["programs"] for budget in known if budget), default=1))
        bounds = seconds(launch, resident, peaks)
        kernel = kernels.setdefault(launch.kernel, {"launches": 0, "seconds": 0.0, "bound": "", "resident": resident})
        kernel["launches"] += 1
        kernel["seconds"] += max(bounds.values())
        kernel["bound"] = max(bounds, key=lambda bound: bounds[bound])
    found = {
        "op": name,
        "shape": list(shape),
        "direction": direction,
        "executed": {kind: sum(getattr(launch, kind) for launch in chosen) for kind in ("half", "tf32", "float32")},
        "moved": sum(launch.bytes for launch in chosen),
        "seconds": max(sum(kernel["seconds"] for kernel in kernels.values()), len(chosen) * LAUNCH_SECONDS),
        "kernels": kernels,
    }
    op = next((op for op in OPS if op.name == name), None)
    if op and name in roofline.FLOPS:
        flops, moved = roofline.flops_of(name, shape, direction), roofline.bytes_of(op, shape, direction)
        found |= {"flops": flops, "bytes": moved, "roofline": roofline.seconds(flops, moved, peaks)}
    return found


def draw(inputs: dict[str, Any]) -> None:
    """Numbers with which solvers do not stop at once; decays and weights in logarithms, ridges above zero."""
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            low, high = (-0.1, 0.0) if name.startswith("log_") else (0.5, 1.0) if name == "ridge" else (-0.5, 0.5)
            x.data.uniform_(low, high)


def estimates(cases: list[Any], shapes: tuple[Shape, ...] | None = None) -> list[Record]:
    """Rows of all cases that are differentiated, at the shapes that the benchmark measures each at."""
    _, launches, compile_kernels = support()
    peaks, budgets, rows = roofline.PEAKS[DEVICE], compile_kernels.load_budgets(), []
    of_op = {op.name: op.shapes for op in OPS}
    for case in cases:
        for shape in shapes or of_op.get(str(case), SHAPES):
            sizes = shape._asdict() | {"sequences": shape.batch}
            inputs = case.inputs(torch.bfloat16, sizes.pop("dim"), **sizes)
            draw(inputs)
            if case.function in STEPS and "probe" not in inputs:
                inputs |= {"steps": STEPS[case.function], "tolerance": 0.0}
            with counted() as found, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # so many steps are too few: their number is what counts
                launches.call(case, inputs)
            rows += [row(str(case), shape, direction, found, budgets, peaks) for direction in DIRECTIONS]
            print(f"{case}, {shape}", file=sys.stderr, flush=True)
    return rows


def slowest(made: Record) -> str:
    """The kernel that takes most of an op, which part of it, and what bounds it."""
    name = max(made["kernels"], key=lambda name: made["kernels"][name]["seconds"])
    kernel = made["kernels"][name]
    return f"{name} {kernel['seconds'] / made['seconds']:.0%}, {kernel['bound']}, {kernel['resident']} resident"


def text(rows: list[Record]) -> str:
    header = ("op", "direction", "shape", "estimated ms", "roofline ms", "GFLOP", "MiB", "FLOP/byte", "slowest kernel")
    return table(header, [cells(made) for made in rows])


def cells(made: Record) -> tuple[str, ...]:
    operations = sum(made["executed"].values())
    return (
        made["op"],
        made["direction"],
        str(Shape(*made["shape"])),
        f"{1e3 * made['seconds']:.3f}",
        f"{1e3 * made['roofline']:.3f}" if "roofline" in made else "",
        f"{operations / 1e9:.0f}",
        f"{made['moved'] / 2**20:.0f}",
        f"{operations / made['moved']:.0f}",
        slowest(made),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", dest="pattern", default="", help="only ops whose name has this; the record stays")
    pattern = parser.parse_args().pattern
    cases, _, _ = support()
    measured = {op.name for op in OPS}
    chosen = [case for case in cases.CASES if str(case) in measured and pattern in str(case)]
    peaks = roofline.PEAKS[DEVICE]
    made = provenance.provenance(f"NVIDIA {DEVICE}", None) | {"estimate": True, "peaks": peaks._asdict()}
    made["rows"] = estimates(chosen)
    print(provenance.sentence(made), text(made["rows"]), sep="\n\n")
    if not pattern:
        provenance.write(made, RECORDED)


if __name__ == "__main__":
    main()
