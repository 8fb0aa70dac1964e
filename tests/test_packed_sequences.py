"""`regress` on packed sequences: every design as each sequence alone, whole and in pieces."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from sampling import HEADS, KEY, VALUE, relative_error, sample
from torch import Tensor

import ttr
from ttr import Decay, Design, Exact, GradientDescent, Hebbian, Kernel, LocalPolynomial, State, Window


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


PUBLISHED = [ttr.atlas[slug] for slug in ttr.atlas]
OWN = [
    Design(Window(4), optimizer=Exact()),
    Design(Kernel() * Window(4), LocalPolynomial(0), Exact()),
    Design(Decay(), optimizer=GradientDescent(ttr.DiagonalNewton(), momentum=True)),
    Design(ttr.ContinuousDecay() * ttr.InputGate(exponential=True), optimizer=Hebbian(normalize=True, floor=0.5)),
    Design(Decay(per="channel"), optimizer=GradientDescent(momentum=True)),
]


@pytest.mark.parametrize("design", PUBLISHED + OWN, ids=str)
@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_any_design_takes_packed_sequences_whole_and_in_pieces(design: Design) -> None:
    """Two calls, each of which has an empty sequence and lengths of its own, against every sequence in one call."""
    lengths = [[3, 0, 7, 2], [4, 5, 0, 3]]
    q, k, v, inputs = sample(design, sum(map(sum, lengths)), batch=1)
    timed = {"q": q, "k": k, "v": v} | {n: x for n, x in inputs.items() if "time" in design.inputs[n].split()}
    fixed = {name: x for name, x in inputs.items() if name not in timed}
    pieces = {name: x.split(lengths[0] + lengths[1], dim=1) for name, x in timed.items()}
    state, outputs = None, []
    for call in range(2):
        packed = {name: torch.cat(xs[4 * call : 4 * call + 4], 1) for name, xs in pieces.items()}
        y, state = ttr.regress(design, **packed, **fixed, cu_seqlens=bounds(lengths[call]), state=state)
        outputs.append(y.split(lengths[call], dim=1))
    for row, own in enumerate(state.split()):
        alone = {name: torch.cat([xs[row], xs[4 + row]], 1) for name, xs in pieces.items()}
        expected, final = ttr.regress(design, **alone, **fixed)
        assert relative_error(torch.cat([outputs[0][row], outputs[1][row]], 1), expected) <= 1e-10
        more = {name: x[:, :1] for name, x in timed.items()}
        answers = [ttr.regress(design, **more, **fixed, state=s)[0] for s in (own, final)]
        assert relative_error(*answers) <= 1e-9


def test_gradients_flow_through_packed_states() -> None:
    design = ttr.atlas["gated_delta_net"]
    lengths = [5, 0, 21, 1]
    q, k, v, inputs = sample(design, sum(lengths), batch=1)
    memory = torch.randn(len(lengths), HEADS, KEY, VALUE, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v, *inputs.values())]
    y, state = ttr.regress(design, q, k, v, cu_seqlens=bounds(lengths), state=State(memory=memory), **inputs)
    found = torch.autograd.grad(y.square().sum() + state.memory.square().sum(), [*leaves, memory])
    expected = torch.zeros_like(memory)
    for row, (start, stop) in enumerate(pairwise(bounds(lengths).tolist())):
        own = [x[:, start:stop] for x in (q, k, v)]
        more = {name: x[:, start:stop] for name, x in inputs.items()}
        y, state = ttr.regress(design, *own, state=State(memory=memory[row : row + 1]), **more)
        expected += torch.autograd.grad(y.square().sum() + state.memory.square().sum(), memory)[0]
    assert all(gradient.isfinite().all() for gradient in found)
    assert relative_error(found[-1], expected) <= 1e-12


def test_states_of_one_size_go_on_as_a_batch_and_others_do_not() -> None:
    streaming, local = ttr.atlas["linear_attention"], Design(Kernel(), LocalPolynomial(0), Exact())
    q, k, v, _ = sample(streaming, 9, batch=1)
    one_more = [x[:, :2].transpose(0, 1) for x in (q, k, v)]
    _, state = ttr.regress(streaming, q, k, v, cu_seqlens=bounds([3, 6]))
    y, _ = ttr.regress(streaming, *one_more, state=state)
    assert y.shape == (2, 1, HEADS, VALUE)
    _, state = ttr.regress(local, q, k, v, cu_seqlens=bounds([3, 6]))
    assert state.lengths == state.map(Tensor.detach).lengths == (3, 6)
    with pytest.raises(ValueError, match=re.escape("state: expected a batch, got sequences that keep (3, 6) tokens")):
        ttr.regress(local, *one_more, state=state)
    _, state = ttr.regress(local, q, k, v, cu_seqlens=bounds([3, 3, 3]))
    assert state.lengths is None
    assert state.history["k"].shape[:2] == (3, 3)


@pytest.mark.usefixtures("unchecked_types")
def test_packed_states_are_checked() -> None:
    design = ttr.atlas["delta_net"]
    q, k, v, inputs = sample(design, 9, batch=1)
    memory = torch.zeros(3, HEADS, KEY, VALUE, dtype=torch.float64)
    for state, message in (
        (State(memory=memory), "state: expected that of 2 sequences, got that of 3"),
        (State(memory=memory[:2, :, :, :1]), "state.memory: expected shape (batch=1, heads=3, key=5, value=4)"),
        (State(memory=memory, momentum=memory[:2]), "state: expected one batch in all fields, got {'memory': 3"),
        (memory, "state: expected what an earlier call returned, got tensor"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ttr.regress(design, q, k, v, state=state, cu_seqlens=bounds([3, 6]), **inputs)
    with pytest.raises(ValueError, match="cu_seqlens: expected bounds from 0 to time=9, got from 0 to 8"):
        ttr.regress(design, q, k, v, cu_seqlens=bounds([8]), **inputs)
    y, _ = ttr.regress(design, q, k, v, state=State(), cu_seqlens=bounds([3, 6]), **inputs)
    assert y.shape == v.shape
    for states in ([], [State(memory=memory)], [State(memory=memory[:1]), State(cross=memory[:1])]):
        with pytest.raises(ValueError, match="states: expected one sequence each, and the same fields"):
            State.join(states)
