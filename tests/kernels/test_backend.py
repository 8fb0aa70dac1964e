"""The op gives the same numbers and gradients through its kernel as through PyTorch."""

import pytest
import torch
from sampling import relative_error

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from ttr import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("with_decay", [True, False], ids=["decay", "no decay"])
def test_linear_attention_is_the_same_through_its_kernel(with_decay):
    torch.manual_seed(0)
    shapes = {"q": (1, 40, 2, 16), "k": (1, 40, 2, 16), "v": (1, 40, 2, 24), "initial_state": (1, 2, 16, 24)}
    inputs = {name: torch.randn(shape, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}
    if with_decay:
        inputs["log_decay"] = (-torch.rand(1, 40, 2, device=DEVICE)).requires_grad_()
    results = []
    for backend in ("triton", "torch"):
        y, final_state = ops.linear_attention(**inputs, chunk_size=16, backend=backend)
        gradients = torch.autograd.grad((y**2).sum() + (final_state**2).sum(), list(inputs.values()))
        results.append((y, final_state, *gradients))
    for through_kernel, through_torch in zip(*results, strict=True):
        assert relative_error(through_kernel, through_torch) <= 1e-5
