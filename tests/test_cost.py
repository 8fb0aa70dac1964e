"""The costs that a design states, against the states it hands on and the operations that are counted."""

from __future__ import annotations

import pytest
import torch
from sampling import sample
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ttr
from ttr import Design

# A mini-batch of 16 is then one token short of full, where its state is largest.
BATCH, HEADS, SIZE, TIME = 2, 3, 6, 206


def numbers(state: ttr.State) -> int:
    tensors = [x for x in vars(state).values() if isinstance(x, Tensor)]
    for named in vars(state).values():
        tensors += list(named.values()) if isinstance(named, dict) else []
    return sum(x.numel() for x in tensors)


def sizes(design: Design, time: int, key: int) -> dict[str, int]:
    window = next((factor.size for factor in design.weights.factors if isinstance(factor, ttr.Window)), 0)
    return {"T": time, "d": key, "f": design.feature_map.size(key), "C": 64, "n": 10, "w": window}


@pytest.mark.parametrize("slug", list(ttr.atlas))
def test_the_state_has_the_size_that_is_stated(slug: str) -> None:
    design = ttr.atlas[slug]
    q, k, v, inputs = sample(design, TIME + 1, batch=BATCH, heads=HEADS, key=SIZE, value=SIZE)
    _, state = ttr.regress(design, q, k, v, **inputs)
    stated = design.cost().at(**sizes(design, TIME + 1, SIZE))[1]
    assert stated is not None
    # Beside the leading terms: a scale a head, a gate a pair, and a window's newest pair, which is no past.
    assert stated / 1.1 <= numbers(state) / (BATCH * HEADS) <= 1.2 * stated


@pytest.mark.parametrize("slug", [s for s in ttr.atlas if ttr.atlas[s].weights.recursive and "em" not in s])
def test_the_operations_are_about_those_that_are_counted(slug: str) -> None:
    """The counter sees matrix products and no solves; the rest is within a factor of two."""
    design = ttr.atlas[slug]
    time = 512
    tensors = sample(design, time, batch=1, heads=2, key=16, value=16, dtype=torch.float32)
    *qkv, inputs = tensors
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ttr.regress(design, *qkv, **inputs)
    stated = design.cost().at(**sizes(design, time, 16))[0]
    assert stated is not None
    assert 0.4 <= counter.get_total_flops() / 2 / stated <= 2


def test_a_design_that_only_the_definition_computes_states_no_operations() -> None:
    cost = Design(ttr.Window(9)).cost()
    assert cost.flops is None
    assert cost.memory is None
    assert str(cost.state) == "2*d*w"


def test_a_cost_without_all_sizes_names_the_missing_one() -> None:
    with pytest.raises(ValueError, match=r"sizes: expected one for each of C, T, d, got none for \['d'\]"):
        ttr.atlas["delta_net"].cost().at(T=10, C=4)
