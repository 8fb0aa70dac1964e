"""Training and generation of the byte-level model: `python -m benchmarks.training`, a part of `make bench`.

A step of `ttr fit` is held against its own matrix products: the same shapes and strides, forward and backward, by
themselves, timed in turns with the steps. What a step takes beyond them is memory traffic, short convolutions, the
optimizer, data and Python.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from benchmarks.memory import UNIT
from benchmarks.provenance import on_this_cpu
from ttr.models import RegressionLM
from ttr.tasks import StandardLibraryText
from ttr.training import TokenPrediction

RECORDED = record.ROOT / "benchmarks" / "results" / "training.cpu.json"
MODEL: dict[str, Any] = {"d_model": 128, "num_layers": 4, "num_heads": 4, "design": "gated_delta_net"}
DATA: dict[str, Any] = {"length": 256, "batch_size": 16}
WARM_UP = 3  # steps that load libraries and find their memory
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}
DISTRIBUTIONS = ("torch", "numpy", "lightning")
SOURCES = ("ops", "layers", "models", "tasks", "training")
SHORT, LONG = 100, 10_000  # tokens to generate


class Products(TorchDispatchMode):
    """Keeps the matrix products of what runs under it: functions of no argument, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Tensor]] = []
        self.flops = 0
        self._inputs: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            inputs = [self._like(x, place) if isinstance(x, Tensor) else x for place, x in enumerate(args)]
            self.calls.append(lambda: func(*inputs, **(kwargs or {})))
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))

    def _like(self, x: Tensor, place: int) -> Tensor:
        key = (place, tuple(x.shape), x.stride(), x.dtype)
        if key not in self._inputs:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            self._inputs[key] = torch.randn(extent, dtype=x.dtype).as_strided(x.shape, x.stride())
        return self._inputs[key]

    def replay(self) -> None:
        with torch.no_grad():
            for call in self.calls:
                call()


class TimedText(StandardLibraryText):
    """The task, with the seconds that its batches take."""

    seconds = 0.0

    def draw(self, split: str, index: int) -> Any:
        begin = time.perf_counter()
        batch = super().draw(split, index)
        self.seconds += time.perf_counter() - begin
        return batch


class InTurns(Callback):
    """After a step of training, its matrix products alone."""

    def __init__(self, data: TimedText) -> None:
        self.data = data
        self.products: Products | None = None
        self.step: list[float] = []
        self.loading: list[float] = []
        self.alone: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        with Products() as products:
            loss = module.training_step(self.data.draw("train", 0))
            assert isinstance(loss, Tensor)
            loss.backward()
        module.zero_grad()
        self.products = products
        self._begin()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.step.append(time.perf_counter() - self.begin)
        self.loading.append(self.data.seconds)
        assert self.products is not None
        begin = time.perf_counter()
        self.products.replay()
        self.alone.append(time.perf_counter() - begin)
        self._begin()

    def _begin(self) -> None:
        self.data.seconds = 0.0
        self.begin = time.perf_counter()


def training(steps: int, model: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, of loading its data, and of its matrix products alone."""
    seed_everything(0, verbose=False)
    task = TimedText(**data, num_train=steps + WARM_UP, num_val=1)
    module = TokenPrediction(vocab_size=task.vocab_size, **model)
    turns = InTurns(task)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[turns],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, task)
    assert turns.products is not None
    return {
        "model": model,
        "data": data,
        "steps": steps,
        "products": len(turns.products.calls),
        "flops": turns.products.flops,
        "seconds": {
            "step": quartiles(turns.step[WARM_UP:]),
            "products": quartiles(turns.alone[WARM_UP:]),
            "data": quartiles(turns.loading[WARM_UP:]),
        },
    }


def quartiles(seconds: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"min": min(seconds), "q1": q1, "median": median, "q3": q3}


def generation(short: int, long: int, model: dict[str, Any]) -> dict[str, Any]:
    """Resident bytes and seconds after so many tokens of one stream."""
    torch.manual_seed(0)
    stream = RegressionLM(256, **model).stream(torch.zeros(1, 1, dtype=torch.long))
    rows, generated, begin = [], 0, time.perf_counter()
    for tokens in (short, long):
        for _ in islice(stream, tokens - generated):
            pass
        generated = tokens
        peak = UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows.append({"tokens": tokens, "peak_bytes": peak, "seconds": time.perf_counter() - begin})
    return {"model": model, "rows": rows}


def made(steps: int, short: int, long: int, model: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The record. Generation comes first: a peak of training would hide its own."""
    generated = generation(short, long, model)
    trained = training(steps, model, data)
    seconds = {name: row["median"] for name, row in trained["seconds"].items()}
    first, last = (row["peak_bytes"] for row in generated["rows"])
    ratios = [
        ("training: its matrix products alone / a step", seconds["products"] / seconds["step"], {"at_least": 0.6}),
        ("training: loading data / a step", seconds["data"] / seconds["step"], {"at_most": 0.05}),
        (f"generation: resident after {long} tokens / after {short}", last / first, {"at_most": 1.01}),
    ]
    return {
        **on_this_cpu(DISTRIBUTIONS, SOURCES),
        "threads": torch.get_num_threads(),
        "training": trained,
        "generation": generated,
        "ratios": [{"name": n, "value": v, "at_least": None, "at_most": None} | bound for n, v, bound in ratios],
    }


def text(made: dict[str, Any]) -> str:
    trained, generated = made["training"], made["generation"]
    per_second = trained["data"]["batch_size"] * trained["data"]["length"] / trained["seconds"]["step"]["median"]
    lines = [f"{name}: {1e3 * row['median']:.1f} ms" for name, row in trained["seconds"].items()]
    lines.append(f"{per_second:.0f} bytes a second trained on, {made['threads']} threads")
    lines += [f"{row['tokens']} tokens: {row['peak_bytes'] / 2**20:.1f} MiB" for row in generated["rows"]]
    met = [
        (r["name"], f"{r['value']:.3g}", record.bound(r), "yes" if record.reached(r) else "NO") for r in made["ratios"]
    ]
    return "\n".join([*lines, record.table(("ratio", "value", "to reach", "reached"), met)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of training, after some to warm up")
    parser.add_argument("--out", type=Path, default=RECORDED)
    arguments = parser.parse_args()
    result = made(arguments.steps, SHORT, LONG, MODEL, DATA)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text(result))


if __name__ == "__main__":
    main()
