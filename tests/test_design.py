"""Designs: names, inputs, equations, citations, and the choices that clash."""

from __future__ import annotations

import re

import pytest

import ttr
from ttr import (
    NLMS,
    ComplexDecay,
    Decay,
    Design,
    EluPlusOne,
    Exact,
    Gaussian,
    GradientDescent,
    Hebbian,
    Huber,
    Implicit,
    InputGate,
    Kernel,
    Linear,
    LocalPolynomial,
    Lp,
    PositiveRandom,
    Probe,
    Taylor,
    Uniform,
    Window,
)
from ttr._design import CLASHES
from ttr._references import bibtex

CELLS = list(ttr.atlas.cells())


def test_a_design_reads_as_in_the_papers() -> None:
    design = Design(weights=Decay(), regressor=Linear(), optimizer=GradientDescent())
    assert design.name == "Gated DeltaNet"
    assert design.inputs == {"log_decay": "batch time heads", "step_size": "batch time heads"}
    assert design == ttr.atlas["gated_delta_net"]
    assert "yang2024gateddelta" in design.citation()
    assert "wang2025testtime" in design.citation()
    assert r"\bar S_t &= \alpha_t\,S_{t-1}" in design.update_rule()


@pytest.mark.parametrize(
    ("design", "name"),
    [
        (Design(), "Linear attention"),
        (Design(optimizer=GradientDescent(steps=3)), "DeltaProduct"),
        (Design(Decay(), optimizer=GradientDescent(steps=5)), "DeltaProduct"),
        (Design(optimizer=GradientDescent(NLMS(epsilon=0.1))), "Normalised LMS"),
        (Design(regressor=Linear(PositiveRandom(7)), optimizer=Hebbian(normalize=True)), "Performer"),
        (Design(regressor=Linear(Taylor()), optimizer=Hebbian(normalize=True)), "Based"),
        (Design(Decay(fixed=True)), "RetNet"),
        (Design(optimizer=Exact()), "Recursive least squares"),
        (Design(optimizer=GradientDescent(), loss=Huber()), None),
        (Design(Window(4), optimizer=Exact()), None),
        (Design(Kernel() * Decay(), LocalPolynomial(1), Exact()), None),
    ],
)
def test_names_follow_the_structure_and_not_its_numbers(design: Design, name: str | None) -> None:
    assert design.name == name


def test_weights_multiply() -> None:
    assert Kernel() * Decay() == Decay() * Kernel()
    assert Uniform() * Decay() == Decay() == Decay() * Uniform()
    assert Uniform() * Uniform() == Uniform()
    assert (Kernel() * Decay() * Window(3)).inputs == {"log_decay": "batch time heads"}
    with pytest.raises(ValueError, match=re.escape("weights: expected each kind once in a product, got Decay * Decay")):
        Decay() * Decay()


SMOOTHED = Hebbian(normalize=True, floor=1.0)
CLASHING = [
    ({"weights": Kernel()}, "weights=Kernel() clashes with optimizer=Hebbian()"),
    (
        {"weights": Kernel(), "optimizer": GradientDescent()},
        "weights=Kernel() clashes with optimizer=GradientDescent()",
    ),
    ({"weights": Window(3), "optimizer": GradientDescent()}, "weights=Window(size=3) clashes with optimizer"),
    ({"weights": ComplexDecay(), "optimizer": Exact()}, "weights=ComplexDecay() clashes with optimizer=Exact()"),
    ({"weights": ComplexDecay(), "optimizer": SMOOTHED}, "weights=ComplexDecay() clashes with optimizer=Hebbian"),
    ({"weights": ComplexDecay(), "regressor": Linear(Taylor())}, "weights=ComplexDecay() clashes with regressor"),
    ({"weights": InputGate(exponential=True)}, "weights of any size overflow unless their sum is divided by"),
    (
        {"weights": Decay(per="channel") * Kernel(), "regressor": LocalPolynomial(1), "optimizer": Exact()},
        "a local fit weighs pairs and not their channels",
    ),
    (
        {"weights": Kernel(), "regressor": LocalPolynomial(1), "optimizer": Exact(ridge_decays=False)},
        "clashes with optimizer=Exact(ridge_decays=False): a local fit's ridge",
    ),
    ({"regressor": ttr.MLP()}, "regressor=MLP() clashes with optimizer=Hebbian(): a network has no closed form"),
    ({"regressor": ttr.Mixture()}, "regressor=Mixture() clashes with optimizer=Hebbian(): shares of an error"),
    ({"regressor": ttr.MLP(), "optimizer": GradientDescent(NLMS())}, "this step is that of a linear map"),
    (
        {"weights": Decay(per="channel"), "regressor": ttr.MLP(), "optimizer": GradientDescent()},
        "a step is weighed as a whole",
    ),
    ({"optimizer": GradientDescent(batch=2, average=True, momentum=True)}, "two ways to smooth"),
    ({"optimizer": GradientDescent(), "retention": ttr.KL()}, "regressor=Linear() clashes with retention=KL()"),
    ({"optimizer": Probe()}, "regressor=Linear() clashes with optimizer=Probe()"),
    ({"regressor": LocalPolynomial(1)}, "regressor=LocalPolynomial(degree=1) clashes with optimizer=Hebbian()"),
    (
        {"regressor": LocalPolynomial(1), "optimizer": Exact()},
        "weights=Uniform() clashes with regressor=LocalPolynomial",
    ),
    ({"loss": Huber()}, "optimizer=Hebbian() clashes with loss=Huber()"),
    ({"optimizer": Exact(), "loss": Lp(1.0)}, "optimizer=Exact() clashes with loss=Lp(p=1.0)"),
    ({"optimizer": GradientDescent(Implicit()), "loss": Huber()}, "clashes with loss=Huber()"),
    ({"optimizer": GradientDescent(steps=2, momentum=True)}, "momentum over several steps"),
    ({"optimizer": Hebbian(normalize=True)}, "regressor=Linear() clashes with optimizer=Hebbian(normalize=True)"),
]


@pytest.mark.parametrize(("choices", "message"), CLASHING)
def test_choices_that_clash_are_named(choices: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Design(**choices)


def test_every_clash_is_tested() -> None:
    def triggered(choices: dict[str, object]) -> str:
        with pytest.raises(ValueError, match="clash") as error:
            Design(**choices)
        return str(error.value)

    messages = [triggered(choices) for choices, _ in CLASHING]
    assert all(any(clash.why in message for message in messages) for clash in CLASHES)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Design(weights=Linear()), "weights: expected Weights, got Linear"),
        (lambda: Design(optimizer="hebbian"), "optimizer: expected an Optimizer, got 'hebbian'"),
        (lambda: Decay(per="layer"), "Decay.per: expected 'head' or 'channel', got 'layer'"),
        (lambda: Window(2.5), "Window.size: expected an integer of at least 1, got 2.5"),
        (lambda: GradientDescent(NLMS), "GradientDescent.gain: expected a gain such as NLMS(), got <class"),
        (lambda: Linear("elu"), "Linear.feature_map: expected a feature map such as Taylor(), got 'elu'"),
        (lambda: Kernel(Gaussian), "Kernel.similarity: expected a similarity such as Gaussian(), got <class"),
        (lambda: Window(0), "Window.size: expected an integer of at least 1, got 0"),
        (lambda: Kernel(Gaussian(), bandwidth=0.0), "Kernel.bandwidth: expected a positive finite number, got 0.0"),
        (lambda: Kernel(Gaussian(), bandwidth=float("nan")), "Kernel.bandwidth: expected a positive finite number"),
        (lambda: LocalPolynomial(3), "LocalPolynomial.degree: expected 0, 1 or 2, got 3"),
        (lambda: NLMS(0.0), "NLMS.epsilon: expected a positive finite number, got 0.0"),
        (lambda: GradientDescent(steps=0), "GradientDescent.steps: expected an integer of at least 1, got 0"),
        (lambda: Huber(-1.0), "Huber.delta: expected a positive finite number, got -1.0"),
        (lambda: Lp(0.5), "Lp.p: expected a finite number of at least 1, got 0.5"),
        (lambda: PositiveRandom(0), "PositiveRandom.number: expected at least 1, got 0"),
        (lambda: ttr.atlas["deltanet"], "got 'deltanet'; did you mean delta_net"),
    ],
)
def test_wrong_choices_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()  # type: ignore[operator]


def test_every_cell_reads_as_equations_and_cites() -> None:
    for design in CELLS:
        rule = design.update_rule()
        assert rule.count("{") == rule.count("}"), design
        assert rule.count(r"\begin") == rule.count(r"\end") == 1, design
        assert rule.count(r"\bigl") == rule.count(r"\bigr"), design
        assert "%" not in rule, design
        assert design.citation().startswith("@"), design
        # What a design prints makes it again.
        assert eval(str(design), vars(ttr)) == design


def test_the_atlas() -> None:
    assert len(ttr.atlas) == len({ttr.atlas[slug].structure for slug in ttr.atlas})
    for slug in ttr.atlas:
        row = ttr.atlas.row(slug)
        for design in (row.design, *row.also):
            assert design.publication == row.publication
    assert "gated_delta_net" in str(ttr.atlas.table())
    assert "<td>gated_delta_net</td>" in ttr.atlas.table()._repr_html_()
    named = {design.name for design in CELLS} - {None}
    assert named == {ttr.atlas.row(slug).publication.name for slug in ttr.atlas}
    assert sum(design.name is None for design in CELLS) > 100


@pytest.mark.usefixtures("unchecked_types")
def test_a_design_is_identified_by_its_kind_and_its_neighbours() -> None:
    windowed = Design(Kernel() * Window(7), LocalPolynomial(0), Exact())
    assert ttr.identify(windowed).publication.slug == "sliding_window_attention"
    robust = ttr.identify(Design(Decay(), optimizer=GradientDescent(), loss=Huber()))
    assert robust.publication is None
    assert robust.nearest["gated_delta_net"] == ("loss",)
    assert "gated_delta_net: another loss" in str(robust)
    assert "Gated DeltaNet where the threshold grows without bound" in str(robust)
    # Nearest by the closest of the forms that go by a name: DeltaProduct with a decay, not without.
    assert ttr.identify(Design(Decay(), optimizer=GradientDescent(NLMS()))).nearest["delta_product"] == ("optimizer",)
    with pytest.raises(ValueError, match="design: expected a Design"):
        ttr.identify("gla")


def test_a_layer_outside_the_framework_says_why() -> None:
    orchid = ttr.atlas.baselines["orchid"]
    assert hasattr(ttr.layers, orchid.layer)
    assert "nothing is fitted" in orchid.why
    assert "Orchid" in str(ttr.atlas.table())
    assert bibtex((orchid.publication.cite,)).startswith("@inproceedings{karami2024orchid")


def test_feature_maps_are_the_kernels_they_claim() -> None:
    import torch

    q, k = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 3
    product = (q * k).sum(-1)
    for feature_map, kernel in [
        (ttr.Identity(), product),
        (ttr.Quadratic(), product**2),
        (Taylor(), 1 + product + product**2 / 2),
    ]:
        torch.testing.assert_close((feature_map(q) * feature_map(k)).sum(-1), kernel)
    for feature_map in (ttr.Identity(), ttr.Quadratic(), Taylor(), EluPlusOne(), PositiveRandom(32)):
        assert feature_map(q).shape[-1] == feature_map.size(5)
    many = PositiveRandom(20_000)
    torch.testing.assert_close((many(q) * many(k)).sum(-1), product.exp(), rtol=0.05, atol=0.0)
