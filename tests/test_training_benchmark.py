"""The benchmark of training and generation: a small run has all figures, and its products are those of a step."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the package

from benchmarks import record, training

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def test_products_are_recorded_with_their_gradients_and_run_again():
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((3, 5), (5, 7)))
    with training.Products() as products:
        (a @ b).sum().backward()
    assert len(products.calls) == 3
    assert products.flops == 3 * 2 * 3 * 5 * 7
    products.replay()


def test_a_small_run_has_its_provenance_and_its_ratios(unchecked_types):
    model = training.MODEL | {"d_model": 16, "num_layers": 1, "num_heads": 2}
    data = {"length": 16, "batch_size": 2, "max_bytes": 1_000_000}
    made = training.made(steps=2, short=2, long=4, model=model, data=data)
    assert set(made) >= {"device", "threads", "cores", "system", "versions", "sources", "commit", "changed", "date"}
    seconds = {name: row["median"] for name, row in made["training"]["seconds"].items()}
    assert 0 < seconds["products"] < seconds["step"]
    assert 0 < seconds["data"] < seconds["step"]
    assert [row["tokens"] for row in made["generation"]["rows"]] == [2, 4]
    assert len(made["ratios"]) == 3
    assert all(name["name"] in training.text(made) for name in made["ratios"])
    assert len(made["sources"]) == 64
    assert made["sources"] != record.digest_of_ops()
