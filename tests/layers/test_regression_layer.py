"""One layer class for every design: it declares what it needs, trains, and decodes with the numbers of the whole."""

from __future__ import annotations

import re

import pytest
import torch
from sampling import relative_error

import ttr
from ttr import Decay, Design, Exact, Gaussian, GradientDescent, Huber, Kernel, LocalPolynomial
from ttr.layers import RegressionLayer, ShortConvolution

# Nobody has named these; each is a neighbour of what somebody has.
UNNAMED = [
    Design(Decay(per="channel", fixed=True), optimizer=GradientDescent(ttr.NLMS())),
    Design(ttr.Window(4), optimizer=Exact()),
    Design(Kernel(Gaussian()) * Decay(), LocalPolynomial(1), Exact()),
    Design(Decay(), optimizer=GradientDescent(), loss=Huber()),
    Design(Decay(per="channel"), optimizer=Exact()),
    Design(Decay(), optimizer=GradientDescent(ttr.DiagonalNewton(), momentum=True)),
    Design(regressor=ttr.Linear(ttr.Quadratic()), optimizer=GradientDescent()),
    Design(Kernel(Gaussian()), LocalPolynomial(2), Exact()),
    Design(Decay(), ttr.MLP(), GradientDescent(momentum=True), Huber(None)),
]


def is_network(design: Design | str) -> bool:
    regressor = (ttr.atlas[design] if isinstance(design, str) else design).regressor
    return isinstance(regressor, ttr._choices.Network)


@pytest.mark.parametrize("design", [*ttr.atlas, *UNNAMED], ids=str)
@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_every_design_is_a_layer_that_trains_and_decodes(design: Design | str) -> None:
    torch.manual_seed(0)
    layer = RegressionLayer(design, 24, 2, key_dim=6, value_dim=6 if is_network(design) else 4, gate=True)
    assert set(layer.inputs) == set(layer.design.inputs)
    x = torch.randn(2, 9, 24)
    y = layer(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name

    cache, outputs = None, []
    for token in x.unbind(1):
        output, cache = layer.step(token, cache)
        outputs.append(output)
    assert relative_error(torch.stack(outputs, 1), y) <= 1e-5


@pytest.mark.parametrize("slug", ttr.atlas)
def test_mixed_precision_stays_near_single(slug: str) -> None:
    torch.manual_seed(0)
    layer = RegressionLayer(slug, 32, 2)
    x = torch.randn(2, 40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.isfinite().all()
    assert relative_error(y, layer(x)) <= 0.05


def test_a_slug_brings_the_published_options() -> None:
    s4d, own = RegressionLayer("s4d", 16, 2), RegressionLayer("s4d", 16, 2, fixed="")
    assert set(s4d.convolutions) == {"v"}
    assert set(own.convolutions) == {"q", "k", "v"}
    assert not RegressionLayer("softmax_attention", 16, 2).unit
    assert RegressionLayer(ttr.atlas["softmax_attention"], 16, 2).unit


def test_s4d_is_time_invariant() -> None:
    torch.manual_seed(0)
    layer = RegressionLayer("s4d", 8, 2).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    shifted = torch.cat([torch.zeros(1, 5, 8, dtype=torch.float64), x], dim=1)
    assert relative_error(layer(shifted)[:, 5:], layer(x)) <= 1e-10


def test_the_short_convolution_is_causal_and_goes_on() -> None:
    torch.manual_seed(0)
    convolution = ShortConvolution(6, 4)
    x = torch.randn(2, 10, 6)
    whole, _ = convolution(x)
    first, past = convolution(x[:, :1])
    rest, _ = convolution(x[:, 1:], past)
    assert relative_error(torch.cat([first, rest], 1), whole) <= 1e-6
    changed = x.clone()
    changed[:, 7:] = 0
    assert convolution(changed)[0][:, :7].equal(whole[:, :7])
    taps = convolution.filter.weight.squeeze(1)  # newest tap last
    expected = torch.nn.functional.silu(sum(taps[:, 3 - j] * x[:, 5 - j] for j in range(4)))
    assert relative_error(whole[:, 5], expected) <= 1e-6


def test_a_step_size_of_two_is_reachable_only_where_allowed() -> None:
    for largest in (1.0, 2.0):
        layer = RegressionLayer("delta_net", 8, 2, max_step_size=largest)
        torch.nn.init.constant_(layer.inputs["step_size"].bias, 20.0)
        seen = layer.inputs["step_size"](torch.randn(1, 3, 8))
        torch.testing.assert_close(seen, torch.full((1, 3, 2), largest), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads: expected a divisor of d_model=24, got 5"),
        ({"num_heads": 0}, "num_heads: expected a divisor of d_model=24, got 0"),
        ({"conv_on": "qx"}, "conv_on: expected letters of \"qkv\", got 'qx'"),
        ({"conv_width": 0}, "width: expected at least 1, got 0"),
        ({"fixed": "kv"}, "fixed: expected letters of \"qk\", got 'kv'"),
        ({"design": "s4d", "key_dim": 5}, "key_dim: expected an even number for ComplexDecay(), got 5"),
        ({"max_step_size": 3.0}, "max_step_size: expected a number in (0, 2], got 3.0"),
        ({"design": "delta"}, "design: expected one of linear_attention"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RegressionLayer(**({"design": "delta_net", "d_model": 24, "num_heads": 2} | options))


@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_every_cell_starts_stable() -> None:
    """Freshly made, on a sequence far longer than the key size, no memory of the design space grows without bound."""
    plain = (d for d in ttr.atlas.cells() if d.loss == ttr.SquaredError() and d.retention == ttr.L2())
    for design in (*plain, *ttr.atlas.values()):
        torch.manual_seed(0)
        streaming = design.weights.recursive and not design.descends_networks
        with torch.no_grad():
            y, cache = RegressionLayer(design, 16, 2).extend(torch.randn(1, 256 if streaming else 12, 16))
        assert y.isfinite().all(), design
        if cache.state.memory is not None:
            assert cache.state.memory.abs().max() < 1e3, design


def test_an_empty_stretch_leaves_the_cache() -> None:
    torch.manual_seed(0)
    layer, x = RegressionLayer("gated_delta_net", 16, 2), torch.randn(1, 5, 16)
    y, cache = layer.extend(x)
    nothing, cache = layer.extend(x[:, :0], cache)
    assert nothing.shape == (1, 0, 16)
    again, _ = layer.extend(x, cache)
    both, _ = layer.extend(torch.cat([x, x], dim=1))
    assert relative_error(torch.cat([y, again], dim=1), both) <= 1e-5


def test_a_layer_knows_its_shapes_without_values() -> None:
    layer = RegressionLayer("kda", 16, 2).to("meta")
    assert layer(torch.empty(2, 9, 16, device="meta")).shape == (2, 9, 16)


@pytest.mark.parametrize("gain", [ttr.LMS(), ttr.NLMS()], ids=str)
def test_a_step_of_one_stores_the_newest_pair_whatever_the_features(gain: ttr._choices.Gain) -> None:
    torch.manual_seed(0)
    design = Design(regressor=ttr.Linear(ttr.EluPlusOne()), optimizer=GradientDescent(gain))
    layer = RegressionLayer(design, 16, 2, conv_on="")
    torch.nn.init.constant_(layer.inputs["step_size"].bias, 20.0)  # β = 1
    x = torch.randn(1, 1, 16)
    _, cache = layer.extend(x)
    k, v = (layer.projections[name](x).unflatten(-1, (2, 8)) for name in "kv")
    k = torch.nn.functional.normalize(k, dim=-1) * (layer.log_temperature / 2).exp()
    answer = torch.einsum("bhkv,bthk->bthv", cache.state.memory, design.feature_map(k))
    assert relative_error(answer, v) <= 1e-4
