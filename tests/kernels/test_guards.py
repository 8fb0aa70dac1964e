"""The guards around memory notice what they are there for."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
import triton
import triton.language as tl
from guards import MARGIN, guarded, in_nan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def double_kernel(p_x, p_y, N, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, 2 * tl.load(p_x + o), mask=o < N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_a_write_outside_of_an_output_is_noticed(dtype, monkeypatch):
    x = torch.arange(16, device=DEVICE).to(dtype)
    with guarded(monkeypatch):
        y = x.new_empty(3, 4)
        double_kernel[(1,)](x, y, 12, BLOCK=16)
        assert torch.equal(y.flatten(), 2 * x[:12])
    with pytest.raises(AssertionError, match="outside of its output"), guarded(monkeypatch):
        double_kernel[(1,)](x, x.new_empty((12,)), 13, BLOCK=16)


def test_what_is_not_written_is_nan(guarded_memory):
    x = torch.ones(16, device=DEVICE)
    y = x.new_empty((16,), dtype=torch.float16)
    double_kernel[(1,)](x, y, 12, BLOCK=16)
    assert y.isnan().tolist() == [False] * 12 + [True] * 4


def test_what_is_read_outside_of_an_input_is_nan():
    x = in_nan(torch.ones(12, device=DEVICE, requires_grad=True))
    assert (x.is_leaf, x.requires_grad, x.data_ptr() % 16) == (True, True, 0)
    y = torch.empty(16, device=DEVICE)
    double_kernel[(1,)](x.detach(), y, 16, BLOCK=16)
    assert y.isnan().tolist() == [False] * 12 + [True] * 4
    assert x.detach().as_strided((MARGIN,), (1,), 0).isnan().all()
