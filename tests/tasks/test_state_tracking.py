"""State tracking: groups by their definition, products by one multiplication after the other."""

import math

import pytest
import torch

from ttr.tasks import StateTracking, group_elements

ORDERS = {"parity": 2, "S3": 6, "S4": 24, "A5": 60}


def compose(a, b):
    return tuple(a[i] for i in b)


def sign(permutation):
    matrix = torch.eye(len(permutation))[list(permutation)]
    return round(torch.linalg.det(matrix).item())


@pytest.mark.parametrize(("group", "order"), ORDERS.items())
def test_the_elements_are_a_group_with_the_identity_first(group, order):
    elements = group_elements(group)
    assert elements[0] == tuple(range(len(elements[0])))
    assert len(set(elements)) == order
    assert {compose(a, b) for a in elements for b in elements} == set(elements)
    if group == "A5":
        assert all(sign(element) == 1 for element in elements)
    else:
        assert order == math.factorial(len(elements[0]))


@pytest.mark.parametrize("elements", ["all", "generators"])
@pytest.mark.parametrize("group", ORDERS)
def test_a_target_is_the_product_of_all_tokens_up_to_it(group, elements):
    task = StateTracking(group, length=33, batch_size=5, elements=elements)
    names = group_elements(group)
    for tokens, targets in zip(*(x.tolist() for x in task.draw("train", 0)), strict=True):
        product = names[0]
        for token, target in zip(tokens, targets, strict=True):
            product = compose(product, names[token])
            assert names[target] == product


def test_parity_is_the_parity_of_ones():
    tokens, targets = StateTracking("parity").draw("train", 0)
    assert torch.equal(targets, tokens.cumsum(1) % 2)


@pytest.mark.parametrize("group", ORDERS)
def test_generators_generate(group):
    task = StateTracking(group, elements="generators")
    assert len(task.drawn) < task.vocab_size or group == "parity"
    reached = {0}
    while (further := reached | {task.table[a, b].item() for a in reached for b in task.drawn}) != reached:
        reached = further
    assert len(reached) == ORDERS[group] == task.vocab_size


def test_every_state_is_as_likely_at_every_place():
    _, targets = StateTracking("S3", length=8, batch_size=6000).draw("train", 0)
    for place in range(8):
        share = targets[:, place].bincount(minlength=6) / 6000
        assert (share - 1 / 6).abs().max() < 4 * (5 / 36 / 6000) ** 0.5


def test_validation_may_be_longer():
    task = StateTracking(length=8, val_length=20)
    assert [task.draw(split, 0)[0].shape[1] for split in ("train", "val", "test")] == [8, 20, 20]
