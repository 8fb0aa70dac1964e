"""Compile every kernel that a public function launches, for several GPUs and with none present.

    python tests/kernels/compile_kernels.py                    a table of all that is compiled
    python tests/kernels/compile_kernels.py --update           and make it the budgets, budgets/<kernel>.json
    python tests/kernels/compile_kernels.py -k delta --target sm_90

Run without TRITON_INTERPRET, which turns kernels into Python functions. What a kernel compiled to is kept in _build
under the digest of its source, arguments and target, so that only what has changed is compiled again.
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import launches
import torch
import triton
from cases import CASES
from launches import TARGETS, Launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGETS = HERE / "budgets"
CACHE = ROOT / "_build" / "compiled_kernels.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

SIZES = {"bf16 D=64": (torch.bfloat16, 64), "bf16 D=128": (torch.bfloat16, 128), "fp32 D=64": (torch.float32, 64)}
PRODUCTS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"
Row = dict[str, Any]
MEASURED = "1"  # changes with what a row says


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


class Variant(NamedTuple):
    """A kernel as one case launches it."""

    launch: Launch
    target: str
    size: str
    case: str

    @property
    def digest(self) -> str:
        parts = (MEASURED, triton.__version__, self.launch.source.hash(), self.target, self.launch.options.hash())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def variants(targets: Iterable[str], sizes: Iterable[str], pattern: str = "") -> list[Variant]:
    """Each distinct one once; forwards where any case launches it forwards."""
    found: dict[tuple[str, str], Variant] = {}
    for target in targets:
        for size in sizes:
            for case in CASES:
                for launch in launches.of_case(case, target, *SIZES[size]):
                    variant = Variant(launch, target, size, str(case))
                    if re.search(pattern, f"{launch.kernel} {case}"):
                        known = found.setdefault((size, variant.digest), variant)
                        if launch.forward and not known.launch.forward:
                            found[size, variant.digest] = variant
    return list(found.values())


def compiled(wanted: list[Variant], jobs: int = 2) -> list[Row]:
    """A row a variant, in order; those not known from before are compiled, in processes of their own."""
    known: dict[str, Row] = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    missing = list({variant.digest: variant for variant in wanted if variant.digest not in known}.values())
    failed: list[str] = []
    if missing:
        # Forked, so that the recorded kernels are there; what is slowest to compile comes first.
        missing.sort(key=lambda variant: (variant.launch.forward, variant.size != "bf16 D=128"))
        global _missing
        _missing = missing
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for count, (variant, row) in enumerate(zip(missing, pool.imap(_measure, range(len(missing))), strict=True)):
                if isinstance(row, str):
                    failed.append(f"{variant.launch.kernel}, {variant.target}, {variant.size}, {variant.case}: {row}")
                else:
                    known[variant.digest] = row
                print(f"\rcompiled {count + 1} of {len(missing)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        CACHE.parent.mkdir(exist_ok=True)
        CACHE.write_text(json.dumps(known))
    if failed:
        raise SystemExit("\n\n".join(["kernels that do not compile:", *failed]))
    return [
        {
            "kernel": variant.launch.kernel,
            "target": variant.target,
            "size": variant.size,
            "forward": variant.launch.forward,
            "case": variant.case,
            **known[variant.digest],
        }
        for variant in wanted
    ]


_missing: list[Variant] = []


def _measure(index: int) -> Row | str:
    """A row, or what the compiler said."""
    try:
        return measure(_missing[index].launch, _missing[index].target)
    except Exception as error:  # of a compiler of C++, of ptxas
        return f"{type(error).__name__}: {error}"


def worst(rows: list[Row]) -> list[Row]:
    """A row a kernel, target, size and direction: the most that any variant takes, the products that all have."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"], row["size"], row["forward"]), []).append(row)
    return [
        {
            "kernel": kernel,
            "target": target,
            "size": size,
            "direction": "forward" if forward else "backward",
            "variants": len(group),
            **{name: max(row[name] for row in group) for name in ("registers", "spilled", "shared")},
            "programs": min(
                programs_at_once(target, row["registers"], row["shared"], row["warps"]) for row in group
            ),
            "products": sorted(set.intersection(*(set(row["products"]) for row in group))),
        }
        for (kernel, target, size, forward), group in sorted(groups.items())
    ]


def text(rows: list[Row]) -> str:
    line = "{kernel:<26}{target:<8}{size:<12}{direction:<10}{variants:>8}{registers:>11}{spilled:>9}{shared:>8}"
    line += "{programs:>10}  {products}"
    names = ("kernel", "target", "size", "direction", "variants", "registers", "spilled", "shared", "programs")
    header = line.format(**{name: name for name in names}, products="matrix instructions")
    return "\n".join([header, *(line.format(**row | {"products": " ".join(row["products"])}) for row in rows)])


def budgets(rows: list[Row]) -> dict[str, Any]:
    """By kernel, target, then size and direction."""
    found: dict[str, Any] = {}
    for row in rows:
        of_target = found.setdefault(row["kernel"], {}).setdefault(row["target"], {})
        figures = {name: row[name] for name in ("registers", "spilled", "shared", "programs", "products")}
        of_target[f"{row['size']}, {row['direction']}"] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the budgets; those of kernels not compiled go")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--size", action="append", choices=SIZES, help="default: all")
    parser.add_argument("-k", dest="pattern", default="", help="only kernels or cases that match")
    parser.add_argument("--every", action="store_true", help="a line a variant, not the worst of a kernel")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.update and (arguments.target or arguments.size or arguments.pattern):
        parser.error("--update is for all kernels, targets and sizes")
    rows = compiled(variants(arguments.target or TARGETS, arguments.size or SIZES, arguments.pattern), arguments.jobs)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(text(worst(rows)))


if __name__ == "__main__":
    main()
