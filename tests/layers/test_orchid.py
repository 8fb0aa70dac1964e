"""The baseline outside the framework: shift-equivariant, trainable, and not causal."""

from __future__ import annotations

import pytest
import torch
from sampling import relative_error

from ttr.layers import OrchidLayer


def test_a_shifted_sequence_is_filtered_alike() -> None:
    torch.manual_seed(0)
    layer = OrchidLayer(6).double()
    x, by = torch.randn(2, 2, 15, 6, dtype=torch.float64)
    shifted = layer.convolve(x.roll(4, 1), by.roll(4, 1))
    assert relative_error(shifted, layer.convolve(x, by).roll(4, 1)) <= 1e-12


def test_the_convolution_is_the_sum_it_stands_for() -> None:
    torch.manual_seed(0)
    layer = OrchidLayer(3).double()
    x, by = torch.randn(2, 1, 8, 3, dtype=torch.float64)
    impulse = torch.zeros(1, 8, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    response = layer.convolve(impulse, by)
    expected = sum(response.roll(i, 1) * x[:, i : i + 1] for i in range(8))
    assert relative_error(layer.convolve(x, by), expected) <= 1e-12


@pytest.mark.parametrize("time", [0, 1, 2, 7])
def test_it_trains_at_any_length(time: int) -> None:
    layer = OrchidLayer(4)
    x = torch.randn(2, time, 4)
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_the_past_sees_the_future() -> None:
    torch.manual_seed(0)
    layer = OrchidLayer(4)
    x = torch.randn(1, 9, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[:, 0].sum(), x)
    assert gradient[:, 5:].ne(0).any()


@pytest.mark.parametrize(("sizes", "message"), [((0,), "d_model: expected at least 1"), ((4, 2), "width: expected an")])
def test_sizes_are_checked(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrchidLayer(*sizes)
