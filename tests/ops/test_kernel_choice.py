"""Which rung computes a call, and what is said where a kernel was expected or asked for and there is none."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sampling import sample
from torch import Tensor

import ttr
from ttr import ops
from ttr.ops import KernelFallbackWarning, _backend


def qkv(size: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.ones(1, 3, 2, size, dtype=dtype) for name in "qkv"}


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    _backend._warn.cache_clear()
    _backend._failure.cache_clear()
    yield
    _backend._failure.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of kernels that can be imported, and is never called here."""
    monkeypatch.setitem(sys.modules, "ttr_kernels", type(sys)("ttr_kernels"))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors count as those of a GPU."""
    monkeypatch.setattr(_backend, "_wants_kernel", lambda x: True)


def test_a_cpu_tensor_goes_to_pytorch_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ttr_kernels", None)  # importing it would raise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64):
            ops.linear_attention(**qkv(dtype=dtype))
            ops.delta_rule(**qkv(dtype=dtype), gain=qkv(dtype=dtype)["k"])


@pytest.mark.usefixtures("kernels", "on_gpu")
def test_a_gpu_tensor_goes_to_the_kernel_that_takes_it() -> None:
    for dtype in _backend.DTYPES:
        x = torch.ones(1, 3, 2, 256, dtype=dtype)
        assert _backend.uses_triton("auto", x, x)
        assert _backend.uses_triton("triton", x, x)
        assert not _backend.uses_triton("torch", x, x)


@pytest.mark.usefixtures("kernels", "on_gpu")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (qkv(dtype=torch.float64), "torch.float64 (kernels take float32, float16 and bfloat16)"),
        (qkv(257), "keys of 257 channels (kernels take 1 to 256)"),
        (qkv() | {"v": torch.ones(1, 3, 2, 300)}, "values of 300 channels (kernels take 1 to 256)"),
    ],
)
def test_what_no_kernel_takes_falls_back_with_one_warning_and_cannot_be_forced(
    arguments: dict[str, Tensor], reason: str
) -> None:
    with pytest.warns(
        KernelFallbackWarning, match=re.escape(f"there is no Triton kernel for {reason}; PyTorch computes")
    ):
        y, _ = ops.linear_attention(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear_attention(**arguments)
    assert torch.equal(y, ops.linear_attention(**arguments, backend="torch")[0])
    with pytest.raises(ValueError, match=re.escape(f'expected "auto" or "torch" for {reason}, which has no kernel')):
        ops.linear_attention(**arguments, backend="triton")


@pytest.mark.usefixtures("kernels", "on_gpu")
def test_every_reason_is_said() -> None:
    for arguments in (qkv(dtype=torch.float64), qkv(300)):
        with pytest.warns(KernelFallbackWarning) as said:
            ops.linear_attention(**arguments)
        assert len(said) == 1


@pytest.fixture(params=["too old", "absent"])
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Kernels that cannot be imported, and what is said of them."""
    old = "triton: expected 3.4 or newer, got 3.1.0; upgrade it with torch"
    error, message = {
        "too old": (f"ImportError({old!r})", old),
        "absent": (
            "ModuleNotFoundError('No module named triton', name='triton')",
            'triton is not installed, and kernels need it: pip install "test-time-regression[triton]"',
        ),
    }[request.param]
    (tmp_path / "ttr_kernels.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ttr_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    return message


@pytest.mark.usefixtures("on_gpu")
def test_kernels_that_cannot_be_imported(failing: str) -> None:
    with pytest.raises(ImportError, match=re.escape(failing)):
        ops.linear_attention(**qkv(), backend="triton")
    with pytest.warns(KernelFallbackWarning, match=re.escape(failing)):
        ops.linear_attention(**qkv())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear_attention(**qkv())


def test_a_triton_too_old_is_named_when_the_kernels_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    monkeypatch.delitem(sys.modules, "ttr_kernels._launch", raising=False)
    with pytest.raises(ImportError, match=re.escape("triton: expected 3.4 or newer, got 3.1.0; upgrade it with torch")):
        importlib.import_module("ttr_kernels._launch")


@pytest.mark.usefixtures("kernels", "on_gpu")
def test_a_compiler_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear_attention(**qkv(dtype=torch.float64))


@pytest.mark.usefixtures("on_gpu", "unchecked_types")
@pytest.mark.parametrize("slug", ["titans", "swila", "softmax_attention", "local_quadratic_attention"])
def test_what_has_no_kernel_by_design_is_not_warned_about_and_cannot_be_forced(slug: str) -> None:
    design = ttr.atlas[slug]
    *tensors, inputs = sample(design, 3, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttr.regress(design, *tensors, **inputs)
    with pytest.raises(ValueError, match=r'backend: expected "auto" or "torch" for .*, which has no kernel'):
        ttr.regress(design, *tensors, backend="triton", **inputs)
    with pytest.raises(ValueError, match=re.escape('backend: expected "auto", "torch" or "triton", got \'cuda\'')):
        ttr.regress(design, *tensors, backend="cuda", **inputs)


# In a process of its own: the type checker of the tests wraps every function.
SCRIPT = """
import sys, warnings
import torch
from ttr import ops
from ttr.ops import _backend

sys.modules["ttr_kernels"] = None
_backend._wants_kernel = lambda x: True
x = torch.randn(1, 20, 2, 4, requires_grad=True)
with warnings.catch_warnings():
    warnings.simplefilter("error", ops.KernelFallbackWarning)
    y, _ = torch.compile(ops.linear_attention, backend="eager", fullgraph=True)(x, x, x)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    torch.testing.assert_close(y, ops.linear_attention(x, x, x)[0])
(warning,) = said
assert warning.category is ops.KernelFallbackWarning and warning.filename == "<string>", warning
"""


def test_the_choice_is_no_break_in_a_compiled_graph_and_is_explained_where_the_user_calls() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
