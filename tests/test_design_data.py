"""A design as plain data: every one comes back, and what names nothing is refused."""

import json
from dataclasses import dataclass

import pytest
from jsonargparse import ArgumentParser

import ttr
from ttr import Decay, Design, FeatureMap, GradientDescent, Kernel, Linear, LocalPolynomial, Window
from ttr._design_data import from_data, to_data

COMPOSED = {
    "numbers": Design(optimizer=GradientDescent(ttr.NLMS(1e-7), batch=1)),
    "product": Design(Kernel(ttr.Gaussian(), 0.3) * Decay() * Window(7), LocalPolynomial(2), ttr.Exact()),
    "nested": Design(regressor=Linear(ttr.PositiveRandom(17, seed=3)), optimizer=ttr.Hebbian(normalize=True)),
    "none": Design(Decay(), ttr.MLP(expansion=2), GradientDescent(momentum=True), ttr.Huber(None), ttr.Lq(3.5)),
}
PUBLISHED = {f"{slug} {n}": d for slug in ttr.atlas for n, d in enumerate([ttr.atlas[slug], *ttr.atlas.row(slug).also])}


@pytest.mark.parametrize("design", [*PUBLISHED.values(), *COMPOSED.values()], ids=[*PUBLISHED, *COMPOSED])
def test_a_design_comes_back_from_json(design):
    assert from_data(json.loads(json.dumps(to_data(design), allow_nan=False))) == design


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("design", COMPOSED.values(), ids=COMPOSED)
def test_a_configuration_reads_the_same_data(design):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--design", type=Design)
    made = parser.instantiate_classes(parser.parse_object({"design": to_data(design)}))
    assert made.design == design


def test_a_slug_and_choices_without_their_defaults_are_data():
    assert from_data("gated_delta_net") == ttr.atlas["gated_delta_net"]
    assert from_data({"weights": {"class_path": "ttr.Decay"}}) == Design(Decay())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("delta_ned", "did you mean delta_net"),
        ({"weight": {"class_path": "ttr.Decay"}}, "design: expected a slug, or choices on weights"),
        ({"weights": {"class_path": "ttr.Decoy"}}, "weights: expected class_path and init_args of one of"),
        ({"weights": {"class_path": "os.system", "init_args": {}}}, "got 'os.system'"),
        ({"weights": {"class_path": "elsewhere.Decay"}}, "got 'elsewhere.Decay'"),
        ({"weights": {"class_path": "ttr.Decay", "init_args": {"pre": "head"}}}, r"arguments of Decay \(per, fixed\)"),
        ({"weights": {"class_path": "ttr.Window"}}, "weights: expected Window with its size"),
        ({"weights": {"class_path": "ttr.Window", "init_args": {"size": 0}}}, "Window.size: expected"),
        ({"weights": {"class_path": "ttr.Kernel"}}, "clashes"),
        (3, "got 3"),
    ],
)
def test_what_names_nothing_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        from_data(data)


def test_a_choice_of_ones_own_has_no_name_in_a_file():
    @dataclass(frozen=True)
    class Identity(FeatureMap):
        def size(self, key: int) -> int:
            return key

        def __call__(self, x):
            return x

    with pytest.raises(ValueError, match="expected choices of ttr"):
        to_data(Design(regressor=Linear(Identity())))
