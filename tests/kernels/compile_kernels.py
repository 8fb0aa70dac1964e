"""Compile every kernel that a public function launches, for several GPUs and with none present.

    python tests/kernels/compile_kernels.py                    a table of all that is compiled
    python tests/kernels/compile_kernels.py --update           and make it the budgets, budgets/<kernel>.json
    python tests/kernels/compile_kernels.py -k delta --target sm_90 --every

Run without TRITON_INTERPRET, which turns kernels into Python functions. What a kernel compiled to is kept in _build
under the digest of its source, arguments and target. The budgets have such digests too: the tests take from them what
a kernel that has not changed since compiles to.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import launches
import torch
import triton
from cases import CASES, Case
from launches import TARGETS, Launch
from triton.runtime.jit import JITFunction

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGETS = HERE / "budgets"
CACHE = ROOT / "_build" / "compiled_kernels.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

SIZES = {"bf16 D=64": (torch.bfloat16, 64), "bf16 D=128": (torch.bfloat16, 128), "fp32 D=64": (torch.float32, 64)}
PRODUCTS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"
DIRECTIONS = ("forward", "step", "backward")
Row = dict[str, Any]
Group = tuple[str, str, str, str]  # kernel, target, size, direction
MEASURED = "1"  # changes with what a row says
TENSOR_MEMORY = 512  # columns, on sm_100


class Multiprocessor(NamedTuple):
    """What the programs on one multiprocessor (or compute unit) share."""

    registers: int
    threads: int
    shared: int  # bytes, and the most that one program can have
    one_shared: int
    programs: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 2048, 167936, 166912, 32),
    "sm_90": Multiprocessor(65536, 2048, 233472, 232448, 32),
    "sm_100": Multiprocessor(65536, 2048, 233472, 232448, 32),
    "gfx942": Multiprocessor(4 * 512 * 64, 2048, 65536, 65536, 40),
}


def programs_at_once(target: str, registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor holds, by their registers, shared memory and threads; at most its limit."""
    has, threads = MULTIPROCESSORS[target], warps * TARGETS[target].warp_size
    each = max(1, -(-registers // 8) * 8) * threads
    bounds = [has.programs, has.threads // threads, has.registers // each]
    return min([*bounds, has.shared // (shared + (1024 if target.startswith("sm") else 0))] if shared else bounds)


def measure(launch: Launch, target: str) -> Row:
    """Registers a thread, bytes of them spilled, bytes of shared memory, matrix instructions."""
    compiled = triton.compile(launch.source, target=TARGETS[target], options=launch.options.__dict__)
    if (tensor_memory := getattr(compiled.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY:  # becomes an empty kernel
        raise ValueError(f"{tensor_memory} columns of tensor memory, of which there are {TENSOR_MEMORY}")
    row = in_amdgcn(compiled.asm["amdgcn"]) if target.startswith("gfx") else in_cubin(compiled.asm["cubin"])
    instructions = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    row |= {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    return row | {"products": sorted(set(re.findall(PRODUCTS, instructions)))}


def in_cubin(cubin: bytes) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def in_amdgcn(assembly: str) -> Row:
    """A thread's vector registers, those for accumulation among them; what lies in scratch memory is spilled."""
    used = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)}
    return {"registers": used["vgpr_count"], "spilled": used["private_segment_fixed_size"]}


@cache
def source_of(function: JITFunction) -> str:
    """The code of a kernel and of all that it calls: no comments, no line numbers."""
    tree = function.parse()
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    used = [(name, function.__globals__.get(name)) for name in names]
    parts = [ast.dump(tree), *(source_of(value) for _, value in used if isinstance(value, JITFunction))]
    return "\n".join(
        parts + [f"{name} = {value}" for name, value in used if isinstance(value, triton.language.constexpr)]
    )


class Variant(NamedTuple):
    """A kernel as one case launches it."""

    launch: Launch
    target: str
    size: str
    case: str
    direction: str
    digest: str

    @property
    def group(self) -> Group:
        return self.launch.kernel, self.target, self.size, self.direction


def variant(launch: Launch, target: str, size: str, case: Case) -> Variant:
    direction = "backward" if not launch.forward else "forward" if case.backward else "step"
    source = launch.source
    compiled_from = (source_of(source.fn), source.signature, source.constants, source.attrs, launch.options.hash())
    parts = (MEASURED, triton.__version__, target, *map(str, compiled_from))
    return Variant(launch, target, size, str(case), direction, hashlib.sha256("\0".join(parts).encode()).hexdigest())


def variants(targets: Iterable[str] = TARGETS, sizes: Iterable[str] = SIZES, pattern: str = "") -> list[Variant]:
    """Each distinct one of a target and size once; where cases differ, as forwards, or else as of a step."""
    found: dict[tuple[str, str], Variant] = {}
    for target in targets:
        for size in sizes:
            for case in CASES:
                for launch in launches.of_case(case, target, *SIZES[size]):
                    if not re.search(pattern, f"{launch.kernel} {case}"):
                        continue
                    new = variant(launch, target, size, case)
                    known = found.setdefault((size, new.digest), new)
                    if DIRECTIONS.index(new.direction) < DIRECTIONS.index(known.direction):
                        found[size, new.digest] = new
    return list(found.values())


def compiled(wanted: list[Variant], jobs: int = 2) -> dict[str, Row]:
    """By digest; what is not known from before is compiled, in processes of their own."""
    known: dict[str, Row] = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    missing = list({variant.digest: variant for variant in wanted if variant.digest not in known}.values())
    failed: list[str] = []
    if missing:
        # Forked, so that the recorded kernels are there; what is slowest to compile comes first.
        missing.sort(key=lambda variant: (variant.launch.forward, variant.size != "bf16 D=128"))
        global _missing
        _missing = missing
        CACHE.parent.mkdir(exist_ok=True)
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for count, (one, row) in enumerate(zip(missing, pool.imap(_measure, range(len(missing))), strict=True), 1):
                if isinstance(row, str):
                    failed.append(f"{one.launch.kernel}, {one.target}, {one.size}, {one.case}: {row}")
                else:
                    known[one.digest] = row
                if count % 20 == 0 or count == len(missing):
                    print(f"compiled {count} of {len(missing)}", file=sys.stderr, flush=True)
                    CACHE.write_text(json.dumps(known))
    if failed:
        raise SystemExit("\n\n".join(["kernels that do not compile:", *failed]))
    return {variant.digest: known[variant.digest] for variant in wanted}


_missing: list[Variant] = []


def _measure(index: int) -> Row | str:
    """A row, or what the compiler said."""
    try:
        return measure(_missing[index].launch, _missing[index].target)
    except Exception as error:  # of a compiler in C++, of ptxas
        return f"{type(error).__name__}: {error}"


def grouped(wanted: list[Variant]) -> dict[Group, list[Variant]]:
    groups = defaultdict(list)
    for one in wanted:
        groups[one.group].append(one)
    return dict(sorted(groups.items()))


def digest_of(group: list[Variant]) -> str:
    return hashlib.sha256("".join(sorted(one.digest for one in group)).encode()).hexdigest()[:16]


def worst(group: list[Variant], rows: dict[str, Row]) -> Row:
    """The most that any variant of a group takes, and the products that all have."""
    found = [rows[one.digest] for one in group]
    return {
        "variants": len(group),
        **{name: max(row[name] for row in found) for name in ("registers", "spilled", "shared", "warps")},
        "programs": min(
            programs_at_once(group[0].target, row["registers"], row["shared"], row["warps"]) for row in found
        ),
        "products": sorted(set.intersection(*(set(row["products"]) for row in found))),
        "digest": digest_of(group),
    }


def text(rows: dict[Group, Row]) -> str:
    line = "{:<29}{:<8}{:<12}{:<10}{:>8}{:>11}{:>9}{:>8}{:>7}{:>10}  {}"
    columns = ("variants", "registers", "spilled", "shared", "warps", "programs")
    lines = [line.format("kernel", "target", "size", "direction", *columns, "matrix instructions")]
    lines += [
        line.format(*group, *(row[name] for name in columns), " ".join(row["products"])) for group, row in rows.items()
    ]
    return "\n".join(lines)


def load_budgets() -> dict[Group, Row]:
    found = {}
    for path in sorted(BUDGETS.glob("*.json")):
        for target, of_target in json.loads(path.read_text()).items():
            for setting, row in of_target.items():
                size, _, direction = setting.partition(", ")
                found[path.stem, target, size, direction] = row
    return found


def write_budgets(rows: dict[Group, Row]) -> None:
    """A file a kernel; those of kernels that are no more go."""
    files: dict[str, Any] = {}
    for (kernel, target, size, direction), row in rows.items():
        files.setdefault(kernel, {}).setdefault(target, {})[f"{size}, {direction}"] = row
    BUDGETS.mkdir(exist_ok=True)
    for path in BUDGETS.glob("*.json"):
        if path.stem not in files:
            path.unlink()
    for kernel, targets in files.items():
        # A line a setting, so that a small change is a small one here too.
        parts = []
        for target, settings in targets.items():
            lines = (f"  {json.dumps(setting)}: {json.dumps(row)}" for setting, row in settings.items())
            parts.append(f' "{target}": {{\n' + ",\n".join(lines) + "\n }")
        (BUDGETS / f"{kernel}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def in_sample(kernel: str, target: str, size: str, direction: str) -> bool:
    """Whether the tests compile a kernel even where its budget is of the same sources."""
    return size == "bf16 D=64" and (target == "sm_90" or kernel == "scores_kernel")


def rows_for_test() -> dict[Group, Row]:
    """Rows of all groups: measured where a kernel is not that of its budget, and for a sample; else the budget's."""
    groups, known = grouped(variants()), load_budgets()
    fresh = {
        group: members
        for group, members in groups.items()
        if known.get(group, {}).get("digest") != digest_of(members) or in_sample(*group)
    }
    rows = compiled([one for members in fresh.values() for one in members])
    return {group: worst(members, rows) if group in fresh else known[group] for group, members in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="make what was measured the budgets")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--size", action="append", choices=SIZES, help="default: all")
    parser.add_argument("-k", dest="pattern", default="", help="only kernels or cases that match")
    parser.add_argument("--every", action="store_true", help="a line a variant, not the worst of its kernel")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--for-test", action="store_true", help="as JSON, measuring only what the budgets do not tell")
    arguments = parser.parse_args()
    if arguments.for_test:
        print(json.dumps([[*group, row] for group, row in rows_for_test().items()]))
        return
    if arguments.update and (arguments.target or arguments.size or arguments.pattern):
        parser.error("--update is of all kernels, targets and sizes")
    wanted = variants(arguments.target or TARGETS, arguments.size or SIZES, arguments.pattern)
    rows = compiled(wanted, arguments.jobs)
    if arguments.every:
        for one in wanted:
            constants = {
                one.launch.source.fn.arg_names[i]: value for (i,), value in one.launch.source.constants.items()
            }
            print(one.case, constants, text({one.group: worst([one], rows)}), sep="\n", end="\n\n")
        return
    found = {group: worst(members, rows) for group, members in grouped(wanted).items()}
    print(text(found))
    if arguments.update:
        write_budgets(found)


if __name__ == "__main__":
    main()
