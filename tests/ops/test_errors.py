"""Wrong arguments are named where they are made."""

from __future__ import annotations

import re

import pytest
import torch

from ttr import ops

pytestmark = pytest.mark.usefixtures("unchecked_types")


def arguments(**changed: object) -> dict[str, object]:
    shape = (2, 6, 3, 4)
    tensors: dict[str, object] = {name: torch.ones(shape) / 2 for name in ("q", "k", "v", "gain")}
    return tensors | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.ones(2, 6, 4)}, "q: expected shape (batch, time, heads, key), got (2, 6, 4)"),
        ({"k": torch.ones(3, 6, 3, 4)}, "k: expected shape (batch=2, time=6, heads=3, key=4), got (3, 6, 3, 4)"),
        ({"k": torch.ones(2, 5, 3, 4)}, "k: expected shape (batch=2, time=6, heads=3, key=4), got (2, 5, 3, 4)"),
        ({"v": torch.ones(2, 6, 2, 4)}, "v: expected shape (batch=2, time=6, heads=3, value), got (2, 6, 2, 4)"),
        ({"gain": torch.ones(2, 6, 3, 5)}, "gain: expected shape (batch=2, time=6, heads=3, key=4), got (2, 6, 3, 5)"),
        ({"log_decay": -torch.ones(2, 6)}, "log_decay: expected shape (batch=2, time=6, heads=3), got (2, 6)"),
        ({"log_decay": -torch.ones(2, 6, 3, 9)}, "log_decay: expected shape (batch=2, time=6, heads=3, key=4)"),
        ({"initial_state": torch.ones(2, 3, 4, 9)}, "initial_state: expected shape (batch=2, heads=3, key=4, value=4)"),
        ({"k": torch.ones(2, 6, 3, 4, dtype=torch.float64)}, "k: expected the dtype of q (torch.float32)"),
        ({"v": torch.ones(2, 6, 3, 4, dtype=torch.int64)}, "v: expected a floating-point tensor, got torch.int64"),
        ({"k": torch.ones(2, 6, 3, 4, device="meta")}, "k: expected the device of q (cpu), got meta"),
        (
            {"log_decay": torch.full((2, 6, 3), 0.1)},
            "log_decay: expected finite values in (-inf, 0], got",
        ),
        (
            {"log_decay": torch.full((2, 6, 3), -torch.inf)},
            "log_decay: expected finite values in (-inf, 0], got",
        ),
        ({"log_decay": torch.full((2, 6, 3), torch.nan)}, "log_decay: expected finite values in (-inf, 0], got"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"backend": "cuda"}, 'backend: expected "auto", "torch" or "triton", got \'cuda\''),
    ],
)
def test_delta_rule(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.delta_rule(**arguments(**changed))


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [(129, torch.bfloat16, "128 channels in torch.bfloat16"), (33, torch.float32, "32 channels")],
)
def test_momentum_has_no_kernel_for_large_keys(size: int, dtype: torch.dtype, reason: str) -> None:
    x = torch.ones(1, 2, 1, size, dtype=dtype)
    with pytest.raises(ValueError, match=f"momentum with keys of more than {reason}.*, which has no kernel"):
        ops.momentum_delta_rule(x, x, x, x, -torch.ones(1, 2, 1), backend="triton")


def test_momentum_takes_a_decay_per_head_only() -> None:
    a = arguments(log_momentum=-torch.ones(2, 6, 3), log_decay=-torch.ones(2, 6, 3, 4))
    with pytest.raises(ValueError, match=re.escape("log_decay: expected shape (batch=2, time=6, heads=3)")):
        ops.momentum_delta_rule(**a)


@pytest.mark.parametrize(
    ("gain", "changed", "message"),
    [
        ("lms", {"step_size": -torch.ones(1, 2, 3)}, "step_size: expected finite values in [0, inf)"),
        ("nlms", {"epsilon": 0.0}, "epsilon: expected a positive number, got 0.0"),
        ("implicit", {"step_size": torch.full((1, 2, 3), torch.inf)}, "step_size: expected finite values"),
        ("diagonal_newton", {"ridge": torch.zeros(3, 4)}, "ridge: expected finite values in (0, inf)"),
        ("recursive_least_squares", {"ridge": torch.zeros(3, 4)}, "ridge: expected finite values in (0, inf)"),
        ("recursive_least_squares", {"ridge": torch.ones(3, 5)}, "ridge: expected shape (heads=3, key=4), got (3, 5)"),
    ],
)
def test_gains(gain: str, changed: dict[str, object], message: str) -> None:
    a: dict[str, object] = {"k": torch.ones(1, 2, 3, 4), "step_size": torch.ones(1, 2, 3), "ridge": torch.ones(3, 4)}
    takes = {"diagonal_newton": ("k", "step_size", "ridge"), "recursive_least_squares": ("k", "ridge")}
    a = {name: a[name] for name in takes.get(gain, ("k", "step_size"))} | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ops.gains, gain)(**a)


def test_values_are_not_read_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value check would break the graph; it must be skipped, not fail, where `torch.compile` traces."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ops.delta_rule(**arguments(log_decay=torch.full((2, 6, 3), 0.1)))
