"""Compile every kernel for several GPUs, with none present, and print one JSON line for each.

Run without TRITON_INTERPRET, which turns kernels into Python functions.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ttr_kernels import linear_attention

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
INPUTS = ("p_q", "p_k", "p_v", "p_y")
CHUNK_KERNELS = (linear_attention.chunk_state_fwd_kernel, linear_attention.chunk_output_fwd_kernel)
TARGETS = (80, 90, 100)
SIZES = ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64))


def measure(kernel, target: int, dtype: torch.dtype, size: int, constants: dict, options: dict) -> dict:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = f"*{ELEMENTS[dtype] if name in INPUTS else 'fp32'}"
        else:
            signature[name] = "i32"
    # As at a launch: torch's pointers are multiples of 16 bytes, and loads are vectors only if Triton knows it.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.startswith("p_")}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|cp\.async"
    return {
        "kernel": kernel.__name__,
        "target": target,
        "dtype": ELEMENTS[dtype],
        "size": size,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "instructions": sorted(set(re.findall(instructions, compiled.asm["ptx"]))),
    }


def main() -> None:
    for target in TARGETS:
        for dtype, size in SIZES:
            constants = linear_attention.sizes(size, size, dtype, chunk_size=64)
            for kernel in CHUNK_KERNELS:
                print(json.dumps(measure(kernel, target, dtype, size, constants, linear_attention.OPTIONS)))
        scan = {"SIZE": 64 * 64, **linear_attention.SCAN}
        print(json.dumps(measure(linear_attention.state_scan_fwd_kernel, target, torch.float32, 64, scan, {})))


if __name__ == "__main__":
    main()
