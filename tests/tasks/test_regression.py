"""In-context regression: functions recovered from the tokens, and errors known in closed form."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from ttr.tasks import DriftingRegression, LinearRegression, PiecewiseRegression, SystemIdentification


def pairs(task, index=0):
    """Inputs (batch, pairs, d), shown values without the last (batch, pairs − 1), targets (batch, pairs)."""
    tokens, targets = task.draw("train", index)
    x, y = tokens[:, ::2], tokens[:, 1::2]
    assert not x[..., -1].any()
    assert not y[..., :-1].any()
    assert targets[:, 1::2].isnan().all()
    return x[..., :-1], y[..., -1], targets[:, ::2, 0]


def fit(x, y):
    return torch.linalg.lstsq(x.double(), y.double()[..., None]).solution


def missed(x, w, target):
    return ((x.double() @ w).squeeze(-1) - target).square().mean().item()


def test_linear_regression_is_linear_and_asks_for_the_queries_alone():
    task = LinearRegression(dim=5, num_pairs=9, num_queries=4, noise=0.0, batch_size=50)
    x, y, target = pairs(task)
    assert x.shape == (50, 13, 5)
    assert target[:, :9].isnan().all()
    assert torch.equal(target[:, 9:12], y[:, 9:])
    assert missed(x[:, 9:], fit(x[:, :9], y[:, :9]), target[:, 9:]) < 1e-9


def test_least_squares_and_one_gradient_step_miss_what_theory_says():
    task = LinearRegression(noise=0.2, batch_size=30_000)
    x, y, target = pairs(task)
    assert target[:, 16].square().mean().item() == pytest.approx(1, rel=0.05)
    shown, query = x[:, :16], x[:, 16:]
    assert missed(query, fit(shown, y), target[:, 16:]) == pytest.approx(0.2**2 * 8 / 7, rel=0.05)
    step = (shown * y[..., None]).sum(1, keepdim=True) / (16 + 8 + 1 + 8 * 0.2**2)
    assert missed(query, step.mT.double(), target[:, 16:]) == pytest.approx(9 / 25, rel=0.06)


def test_noise_is_on_what_is_shown_and_not_on_what_is_asked_for():
    x, y, target = pairs(PiecewiseRegression(dim=4, num_segments=1, segment=500, noise=0.3))
    assert missed(x, fit(x, target), target) < 1e-9
    assert (y - target[:, :-1]).std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("cone", [None, 0.4])
def test_each_segment_has_a_function_of_its_own(cone):
    task = PiecewiseRegression(dim=6, num_segments=3, segment=20, cone=cone, noise=0.0, batch_size=200)
    x, _, target = (z.unflatten(1, (3, 20)) for z in (pairs(task)[0], torch.empty(200, 60), pairs(task)[2]))
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(200, 3, 20))
    w = fit(x, target)
    assert missed(x, w, target) < 1e-8
    assert missed(x, w.roll(1, 1), target) > 0.5
    center = x.mean(2).norm(dim=-1).mean().item()
    assert center == pytest.approx(1 / math.sqrt(1 + 0.4**2) if cone else 0.2, abs=0.05)


def test_a_drifting_function_takes_its_steps():
    task = DriftingRegression(dim=1, length=300, drift=0.2, noise=0.0, batch_size=2000)
    x, _, target = pairs(task)
    w = target / x[..., 0]
    assert w[:, [0, 299]].square().mean(0).tolist() == pytest.approx([1, 1], rel=0.15)
    steps = w[:, 1:] - math.sqrt(1 - 0.2**2) * w[:, :-1]
    assert steps.square().mean().item() == pytest.approx(0.2**2, rel=0.02)
    assert (steps[:, 1:] * steps[:, :-1]).mean().abs().item() < 1e-3


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_a_function_may_stay_or_be_another_every_time(drift):
    x, _, target = pairs(DriftingRegression(dim=1, length=6, drift=drift, noise=0.0, batch_size=3000))
    w = target / x[..., 0]
    correlation = (w[:, 0] * w[:, 5]).mean().item()
    assert correlation == pytest.approx(1 - drift, abs=0.08)


@pytest.mark.parametrize("saturation", [None, 1.1])
def test_a_token_shows_the_last_inputs_the_latest_first(saturation):
    x, _, _ = pairs(SystemIdentification(length=30, lags=4, window=6, saturation=saturation))
    assert torch.equal(x[:, 1:, 1:], x[:, :-1, :-1])


def test_a_linear_system_is_a_filter_of_its_lags():
    task = SystemIdentification(length=60, lags=4, window=6, noise=0.0)
    x, _, target = pairs(task)
    h = fit(x, target)
    assert missed(x, h, target) < 1e-9
    assert h[:, 4:].abs().max() < 1e-5
    torch.testing.assert_close(h.squeeze(-1).norm(dim=1), torch.ones(64).double(), rtol=1e-5, atol=0)
    shorter = SystemIdentification(length=60, lags=4, window=1, noise=0.0).draw("train", 0)[0]
    assert shorter.shape[2] == 2


def test_a_wiener_hammerstein_system_is_two_filters_around_a_saturation():
    """Steep saturation: the middle is a sign, so that an output is a sum of the second filter's taps with signs."""
    task = SystemIdentification(length=400, lags=4, window=4, saturation=1e4, noise=0.0, batch_size=20)
    x, _, target = pairs(task)
    for outputs in target:
        assert len(outputs.mul(1e4).round().unique()) <= 2**3
    torch.testing.assert_close(target.square().mean(), torch.tensor(1.0), rtol=0.2, atol=0)
    assert missed(x, fit(x, target), target) > 0.2
    softer = SystemIdentification(length=400, lags=4, window=4, saturation=1e-3, noise=0.0, batch_size=20)
    x, _, target = pairs(softer)
    assert missed(x, fit(x, target), target) < 1e-4
    assert normalize(target).isfinite().all()
