"""Limits that tie the families together."""

from __future__ import annotations

import pytest
import torch
from sampling import relative_error, sample
from torch.nn.functional import scaled_dot_product_attention

import ttr
from ttr import Decay, Design, Exact, Gaussian, GradientDescent, Kernel, LocalPolynomial, Window

pytestmark = pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")

DELTA = Design(optimizer=GradientDescent())
EXACT = Design(optimizer=Exact())


def orthonormal(heads: int = 3, key: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn(2, heads, key, key, generator=generator, dtype=torch.float64)).Q
    return frames.transpose(1, 2)


def test_orthonormal_keys_make_hebbian_delta_and_least_squares_one() -> None:
    k = orthonormal()
    generator = torch.Generator().manual_seed(1)
    q, v = torch.randn(2, *k.shape, generator=generator, dtype=torch.float64)
    step_size = torch.ones(k.shape[:3], dtype=torch.float64)
    hebbian = ttr.regress(Design(), q, k, v)[0]
    assert relative_error(ttr.regress(DELTA, q, k, v, step_size=step_size)[0], hebbian) <= 1e-12
    small = torch.full((3, 6), 1e-7, dtype=torch.float64)
    assert relative_error(ttr.regress(EXACT, q, k, v, ridge=small)[0], hebbian) <= 1e-6


def test_a_large_ridge_makes_least_squares_linear_attention() -> None:
    q, k, v, _ = sample(EXACT, 20)
    ridge = torch.full((3, 5), 1e9, dtype=torch.float64)
    assert relative_error(1e9 * ttr.regress(EXACT, q, k, v, ridge=ridge)[0], ttr.regress(Design(), q, k, v)[0]) <= 1e-7


@pytest.mark.parametrize("design", [EXACT, Design(Decay(), optimizer=Exact())], ids=str)
def test_the_gain_of_recursive_least_squares_makes_the_delta_rule_exact(design: Design) -> None:
    q, k, v, inputs = sample(design, 40)
    gain, curvature = ttr.ops.gains.recursive_least_squares(k, inputs["ridge"], inputs.get("log_decay"))
    y, memory = ttr.ops.delta_rule(q, k, v, gain)
    assert relative_error(y, ttr.oracle.regress(design, q, k, v, **inputs)[0]) <= 1e-10
    fitted = ttr.regress(design, q, k, v, **inputs)[1]
    assert relative_error(curvature, fitted.curvature) <= 1e-12
    assert relative_error(memory, fitted.linear_map()) <= 1e-9


def test_small_steps_make_the_delta_rule_linear_attention() -> None:
    q, k, v, _ = sample(DELTA, 20)
    step_size = torch.full((2, 20, 3), 1e-8, dtype=torch.float64)
    assert (
        relative_error(1e8 * ttr.regress(DELTA, q, k, v, step_size=step_size)[0], ttr.regress(Design(), q, k, v)[0])
        <= 1e-6
    )


def test_small_implicit_steps_are_plain_ones_and_large_ones_project() -> None:
    q, k, v, _ = sample(DELTA, 20)
    implicit = Design(optimizer=GradientDescent(ttr.Implicit()))
    normalised = Design(optimizer=GradientDescent(ttr.NLMS(1e-12)))
    one = torch.ones(2, 20, 3, dtype=torch.float64)
    small = [ttr.regress(design, q, k, v, step_size=1e-8 * one)[0] for design in (implicit, DELTA)]
    assert relative_error(*small) <= 1e-7
    projected = ttr.regress(normalised, q, k, v, step_size=one)[0]
    assert relative_error(ttr.regress(implicit, q, k, v, step_size=1e9 * one)[0], projected) <= 1e-7
    assert relative_error(projected, ttr.regress(DELTA, q, k, v, step_size=one)[0]) <= 1e-10  # unit keys


def test_a_local_constant_is_softmax_attention() -> None:
    design = Design(Kernel(), LocalPolynomial(0), Exact())
    q, k, v, _ = sample(design, 20)
    attention = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=1.0)
    assert relative_error(ttr.regress(design, q, k, v)[0], attention.transpose(1, 2)) <= 1e-12
    unit = torch.nn.functional.normalize(q, dim=-1)
    gaussian = Design(Kernel(Gaussian()), LocalPolynomial(0), Exact())
    assert relative_error(ttr.regress(gaussian, unit, k, v)[0], ttr.regress(design, unit, k, v)[0]) <= 1e-12


def test_a_wide_kernel_makes_local_linear_a_global_regression_with_intercept() -> None:
    design = Design(Kernel(Gaussian(), bandwidth=1e6), LocalPolynomial(1), Exact())
    q, k, v, _ = sample(design, 30)
    ridge = torch.full((3,), 1e-10, dtype=torch.float64)
    y = ttr.regress(design, q, k, v, ridge=ridge)[0]
    ones = torch.ones_like(k[..., :1])
    rows, query = torch.cat([ones, k], -1).transpose(1, 2), torch.cat([ones, q], -1)
    slope = torch.linalg.lstsq(rows, v.transpose(1, 2)).solution
    last = torch.einsum("bhkv,bhk->bhv", slope, query[:, -1])
    assert relative_error(y[:, -1], last) <= 1e-7


def test_a_large_ridge_makes_local_linear_softmax_attention() -> None:
    linear, constant = (Design(Kernel(), LocalPolynomial(degree), Exact()) for degree in (1, 0))
    q, k, v, _ = sample(linear, 15)
    ridge = torch.full((3,), 1e12, dtype=torch.float64)
    assert relative_error(ttr.regress(linear, q, k, v, ridge=ridge)[0], ttr.regress(constant, q, k, v)[0]) <= 1e-10


def test_local_linear_equals_its_centred_form() -> None:
    """E_w[v] + Cov_w(v,k)(Cov_w(k,k) + λI)⁻¹(q − E_w[k]) is the ridge regression on [1, k − q]."""
    design = Design(Kernel(), LocalPolynomial(1), Exact())
    q, k, v, _ = sample(design, 15)
    y = ttr.regress(design, q, k, v, ridge=torch.full((3,), 0.3, dtype=torch.float64))[0]
    weight = torch.einsum("bhk,bihk->bhi", q[:, -1], k).softmax(-1)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    mean_key, mean_value = (torch.einsum("bhi,bhid->bhd", weight, x) for x in (keys, values))
    centred = keys - mean_key.unsqueeze(2)
    covariance = torch.einsum("bhi,bhid,bhie->bhde", weight, centred, centred)
    cross = torch.einsum("bhi,bhid,bhiv->bhdv", weight, centred, values)
    offset = torch.linalg.solve(covariance + 0.3 * torch.eye(5, dtype=torch.float64), q[:, -1] - mean_key)
    assert relative_error(y[:, -1], mean_value + torch.einsum("bhdv,bhd->bhv", cross, offset)) <= 1e-12


def test_weights_meet_their_limits() -> None:
    q, k, v, _ = sample(Design(), 12)
    zeros = torch.zeros(2, 12, 3, dtype=torch.float64)
    plain = ttr.regress(Design(), q, k, v)[0]
    assert relative_error(ttr.regress(Design(Decay()), q, k, v, log_decay=zeros)[0], plain) <= 1e-14
    assert relative_error(ttr.regress(Design(Window(12)), q, k, v)[0], plain) <= 1e-14
    newest = ttr.regress(Design(Window(1)), q, k, v)[0]
    forgetful = ttr.regress(Design(Decay()), q, k, v, log_decay=zeros - 1000)[0]
    assert relative_error(forgetful, newest) <= 1e-14
    shared = -torch.rand(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    per_channel = ttr.regress(Design(Decay(per="channel")), q, k, v, log_decay=shared.unsqueeze(-1).expand_as(k))[0]
    assert relative_error(per_channel, ttr.regress(Design(Decay()), q, k, v, log_decay=shared)[0]) <= 1e-14
