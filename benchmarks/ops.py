"""Time the ops beside `scaled_dot_product_attention` and this machine's own matrix products, in one run.

    python benchmarks/ops.py [--lengths 1024 2048 4096 8192] [--device cpu] [--output benchmarks/results]

Everything is a ratio to something measured in the same run; absolute times are only kept beside them. The result is one
JSON file a device, with quartiles, versions and the digest of the sources that were timed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.benchmark import Timer

from ttr import ops

ROOT = Path(__file__).resolve().parent.parent
BATCH, HEADS, DIM, CHUNK = 2, 4, 64, 64


def tensors(time: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(BATCH, time, HEADS, DIM, generator=generator, device=device)

    decay = -0.1 * torch.rand(BATCH, time, HEADS, generator=generator, device=device)
    return {"q": normal(), "k": normalize(normal(), dim=-1), "v": normal(), "log_decay": decay}


def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True)


# Each op on the tensors above, and its forward floating-point operations a token and head.
WITHIN = CHUNK * DIM  # a causal half of (chunk × chunk) by (chunk × dim), two operations each
ACROSS = 2 * DIM * DIM
OPS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "linear_attention": (lambda q, k, v, log_decay: ops.linear_attention(q, k, v)[0], 2 * WITHIN + 2 * ACROSS),
    "linear_attention, decay per head": (
        lambda q, k, v, log_decay: ops.linear_attention(q, k, v, log_decay)[0],
        2 * WITHIN + 2 * ACROSS,
    ),
    "linear_attention, decay per channel": (
        lambda q, k, v, log_decay: ops.linear_attention(q, k, v, log_decay.unsqueeze(-1).expand_as(k))[0],
        2 * WITHIN + 2 * ACROSS,
    ),
    "delta_rule, decay per head": (
        lambda q, k, v, log_decay: ops.delta_rule(q, k, v, k / 2, log_decay)[0],
        5 * WITHIN + 3 * ACROSS,
    ),
}


def quartiles(function: Callable[[], Any], seconds: float) -> list[float]:
    """First quartile, median and third quartile of one call's seconds."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    times = torch.tensor(timer.blocked_autorange(min_run_time=seconds).times, dtype=torch.float64)
    return times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()


def forward_backward(op: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Callable[[], Any]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    gradient = torch.ones_like(inputs["v"])
    needed = [x for name, x in leaves.items() if not (op is attention and name == "log_decay")]
    return lambda: torch.autograd.grad(op(**leaves).reshape(gradient.shape), needed, gradient, allow_unused=True)


def measure(lengths: list[int], device: str, seconds: float) -> dict[str, Any]:
    square = torch.randn(2048, 2048, device=device)
    product = quartiles(partial(torch.matmul, square, square), seconds)
    gemm_rate = 2 * 2048**3 / product[1]
    print(f"matrix product: {gemm_rate / 1e9:.0f} GFLOP/s")
    rows = []
    for time in lengths:
        inputs = tensors(time, device)
        forward = quartiles(partial(attention, **inputs), seconds)
        both = quartiles(forward_backward(attention, inputs), seconds)
        for name, (op, flops) in OPS.items():
            row: dict[str, Any] = {"op": name, "time": time}
            row["seconds_forward"] = quartiles(partial(op, **inputs), seconds)
            row["seconds_forward_backward"] = quartiles(forward_backward(op, inputs), seconds)
            row["attention_over_op_forward"] = forward[1] / row["seconds_forward"][1]
            row["attention_over_op_forward_backward"] = both[1] / row["seconds_forward_backward"][1]
            row["fraction_of_gemm_rate"] = BATCH * HEADS * time * flops / row["seconds_forward"][1] / gemm_rate
            rows.append(row)
            print(
                f"T={time:6d}  {name:36s} forward {1e3 * row['seconds_forward'][1]:8.1f} ms, "
                f"{row['fraction_of_gemm_rate']:4.0%} of matrix products; attention takes "
                f"{row['attention_over_op_forward']:5.1f}x forward, "
                f"{row['attention_over_op_forward_backward']:5.1f}x with backward"
            )
    return {"gemm_gflops": gemm_rate / 1e9, "rows": rows}


def provenance(device: str) -> dict[str, Any]:
    sources = sorted((ROOT / "ttr" / "ops").glob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {cpu_name()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shape": {"batch": BATCH, "heads": HEADS, "dim": DIM, "chunk": CHUNK, "dtype": "float32"},
        "sources": digest,
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=1.0, help="least time spent on each figure")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    result = provenance(arguments.device) | measure(arguments.lengths, arguments.device, arguments.seconds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"ops.{arguments.device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
