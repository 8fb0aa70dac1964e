"""Every limit that a design claims is executed: near it, the two memories give the same answers."""

from __future__ import annotations

import pytest
import torch
from sampling import relative_error, sample

import ttr
from ttr._limits import ROWS, Call, Limit

TIME = 9
POWER = ttr.Design(optimizer=ttr.GradientDescent(), loss=ttr.Lp(3.0))
DESIGNS = {design.structure: design for design in (*ttr.atlas.values(), *ttr.atlas.cells(), POWER)}
CLAIMS = [(design, limit) for design in DESIGNS.values() for limit in design.limits()]
# Every claim of a design that has a name; of the others each kind of claim once, and some more.
NAMED = [(design, limit) for design, limit in CLAIMS if design.name]
REST = [(design, limit) for design, limit in CLAIMS if not design.name]
ONCE = {limit.when: (design, limit) for design, limit in reversed(REST)}
OTHERS = [*ONCE.values(), *REST[::9]]


def answers(call: Call) -> torch.Tensor:
    return ttr.regress(call.design, call.q, call.k, call.v, **call.inputs)[0]


def difference(design: ttr.Design, limit: Limit) -> float:
    q, k, v, inputs = sample(design, TIME)
    near, there, factor = limit.approach(Call(design, q, k, v, inputs))
    assert there.design == limit.becomes
    return relative_error(factor * answers(near), answers(there))


@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
@pytest.mark.parametrize(("design", "limit"), NAMED + OTHERS, ids=str)
def test_the_limit_is_reached(design: ttr.Design, limit: Limit) -> None:
    assert difference(design, limit) <= limit.within


def test_every_limit_of_the_table_is_executed() -> None:
    assert {row.when for row in ROWS} == {limit.when for _, limit in NAMED + OTHERS}


def test_a_limit_reads_as_a_sentence() -> None:
    texts = [str(limit) for limit in ttr.atlas["parallax"].limits()]
    assert "Softmax attention where the probe is 0" in texts
    assert ttr.atlas["linear_attention"].limits() == []
