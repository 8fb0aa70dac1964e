"""Training on vectors, and on all tokens from one vector: what counts in the loss."""

import pytest
import torch

from ttr.models import RegressionAutoencoder
from ttr.training import TokenReconstruction, ValueRegression

TINY = {"d_model": 8, "num_layers": 1, "num_heads": 1}


def test_the_loss_is_the_mean_square_where_the_target_is_a_number():
    module = ValueRegression(input_size=3, output_size=2, **TINY)
    x, targets = torch.randn(2, 5, 3), torch.full((2, 5, 2), torch.nan)
    targets[:, 3] = 0.5
    measured, answers = module.measure((x, targets))
    expected = (module(x)[:, 3] - 0.5).square().mean()
    torch.testing.assert_close(measured, {"loss": expected})
    assert answers == 4
    measured["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


def test_reconstruction_trains_an_autoencoder():
    module = TokenReconstruction(vocab_size=5, **TINY)
    assert isinstance(module.model, RegressionAutoencoder)
    tokens = torch.randint(5, (2, 4))
    measured, answers = module.measure((tokens, tokens))
    assert set(measured) == {"loss", "accuracy"}
    assert answers == 8


@pytest.mark.parametrize(
    ("kind", "sizes", "name"),
    [(ValueRegression, {"input_size": 3, "output_size": None}, "output_size"), (TokenReconstruction, {}, "vocab_size")],
)
def test_a_size_that_no_task_gives_is_named(kind, sizes, name):
    with pytest.raises((ValueError, TypeError), match=name):
        kind(**sizes, **TINY)
