"""Published layers give the same numbers and gradients through kernels as through PyTorch."""

import pytest
import torch
from sampling import relative_error, sample
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
import ttr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECURRENT = [
    slug
    for slug, design in ttr.atlas.items()
    if design.weights.recursive
    and isinstance(design.regressor, ttr.Linear)
    and isinstance(design.optimizer, ttr.Hebbian | ttr.GradientDescent | ttr.Exact)
]


@pytest.mark.parametrize("slug", RECURRENT)
def test_the_atlas_through_kernels(slug: str) -> None:
    design = ttr.atlas[slug]
    q, k, v, inputs = sample(design, 20, batch=1, heads=2, dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v} | inputs
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in tensors.items()}
    found = []
    for backend in ("triton", "torch"):
        y, state = ttr.regress(design, **leaves, backend=backend)
        states = [x for x in vars(state).values() if isinstance(x, Tensor)]
        wanted = [x for x in leaves.values() if x.is_leaf]
        gradients = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
        found.append([y, *states, *gradients])
    for through_kernel, through_torch in zip(*found, strict=True):
        if through_torch is not None:
            assert relative_error(through_kernel, through_torch) <= 2e-5
