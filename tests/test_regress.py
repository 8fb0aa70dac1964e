"""`regress` against the oracle: every published design and unnamed ones, whole and in pieces, with their gradients."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from sampling import piece, relative_error, sample
from torch import Tensor

import ttr
from ttr import (
    NLMS,
    Decay,
    Design,
    Exact,
    Gaussian,
    GradientDescent,
    Hebbian,
    Huber,
    Kernel,
    Linear,
    LocalPolynomial,
    Quadratic,
    SlowPathWarning,
    Window,
)
from ttr._regress import _warn_slow

PUBLISHED = [design for slug in ttr.atlas for design in (ttr.atlas.row(slug).design, *ttr.atlas.row(slug).also)]
UNNAMED_FAST = [
    Design(regressor=Linear(Quadratic()), optimizer=GradientDescent()),
    Design(ttr.ContinuousDecay() * Decay(per="channel"), optimizer=GradientDescent(NLMS(), steps=3)),
    Design(Decay(), optimizer=GradientDescent(ttr.DiagonalNewton(), momentum=True)),
    Design(ttr.ContinuousDecay(), optimizer=Exact()),
    Design(ttr.ContinuousDecay(), optimizer=GradientDescent(ttr.DiagonalNewton(), steps=2)),
    Design(ttr.ContinuousDecay(), optimizer=GradientDescent(ttr.Implicit())),
]
UNNAMED_SLOW = [
    Design(Decay(), optimizer=GradientDescent(), loss=Huber(0.5)),
    Design(Decay(per="channel"), optimizer=GradientDescent(momentum=True)),
    Design(optimizer=GradientDescent(), loss=ttr.Lp(1.5)),
    Design(Window(4), optimizer=Exact()),
    Design(Window(4)),
    Design(Decay(), optimizer=Exact(ridge_decays=False)),
    Design(Kernel(), LocalPolynomial(0), Exact()),
    Design(Kernel(bandwidth=0.7) * Decay(), LocalPolynomial(1), Exact()),
    Design(Kernel(Gaussian()) * Window(5), LocalPolynomial(2), Exact()),
    Design(Kernel() * Decay(), optimizer=Exact()),
]


@pytest.mark.parametrize("design", PUBLISHED + UNNAMED_FAST, ids=str)
def test_the_op_equals_the_definition(design: Design) -> None:
    tensors = sample(design, 23)
    *qkv, inputs = tensors
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        y, state = ttr.regress(design, *qkv, chunk_size=8, **inputs)
    expected, expected_state = ttr.oracle.regress(design, *qkv, **inputs)
    assert relative_error(y, expected) <= 1e-10
    for name in ("memory", "momentum", "curvature"):
        if getattr(expected_state, name) is not None:
            assert relative_error(getattr(state, name), getattr(expected_state, name)) <= 1e-10

    *single, single_inputs = sample(design, 75, dtype=torch.float32)
    exact = [x.double() for x in single], {name: x.double() for name, x in single_inputs.items()}
    y, _ = ttr.regress(design, *single, **single_inputs)
    assert relative_error(y, ttr.oracle.regress(design, *exact[0], **exact[1])[0]) <= 1e-5


@pytest.mark.parametrize("design", PUBLISHED + UNNAMED_FAST, ids=str)
def test_gradients_equal_those_of_the_definition(design: Design) -> None:
    q, k, v, inputs = sample(design, 9)
    _, start = ttr.regress(design, q, k, v, **inputs)

    def gradients(function: object) -> dict[str, Tensor]:
        leaves = {"q": q, "k": k, "v": v} | inputs
        carried = {n: x for n, x in vars(start).items() if isinstance(x, Tensor)}
        if isinstance(design.optimizer, Exact):
            carried = {}  # there the op hands on a memory and the definition the history
        leaves = {name: x.detach().clone().requires_grad_() for name, x in (leaves | carried).items()}
        state = ttr.State(**{name: leaves[name] for name in carried})
        y, _ = function(design, *(leaves[n] for n in "qkv"), state=state, **{n: leaves[n] for n in inputs})
        return dict(zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True))

    expected = gradients(ttr.oracle.regress)
    for name, actual in gradients(ttr.regress).items():
        assert relative_error(actual, expected[name]) <= 1e-9, name


@pytest.mark.parametrize("design", PUBLISHED + UNNAMED_FAST + UNNAMED_SLOW, ids=str)
@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_pieces_equal_the_whole_down_to_one_token(design: Design) -> None:
    tensors = sample(design, 12)
    *qkv, inputs = tensors
    whole, final = ttr.regress(design, *qkv, **inputs)
    state, outputs = None, []
    for start, stop in [(0, 5), (5, 5), *((t, t + 1) for t in range(5, 12))]:
        *part, part_inputs = piece(design, tensors, start, stop)
        y, state = ttr.regress(design, *part, state=state, **part_inputs)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) <= 1e-10
    if final.memory is not None:
        assert relative_error(state.memory, final.memory) <= 1e-10


@pytest.mark.parametrize("design", UNNAMED_SLOW, ids=str)
@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_the_fallback_keeps_dtype_and_causality_and_differentiates(design: Design) -> None:
    *qkv, inputs = sample(design, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in [*qkv, *inputs.values()]]
    y, _ = ttr.regress(design, *qkv, **inputs)
    assert y.dtype == torch.float32
    gradients = torch.autograd.grad(y[:, 4].square().sum(), leaves)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.isfinite().all()
        if leaf.shape[1:2] == (8,):
            assert gradient[:, 5:].eq(0).all()


def test_a_design_without_an_op_says_so_once() -> None:
    design = Design(optimizer=GradientDescent(), loss=Huber(0.123))
    *qkv, inputs = sample(design, 3)
    _warn_slow.cache_clear()
    with pytest.warns(SlowPathWarning, match=re.escape("loss=Huber(delta=0.123)")):
        ttr.regress(design, *qkv, **inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttr.regress(design, *qkv, **inputs)


@pytest.mark.parametrize("design", [*PUBLISHED[:3], ttr.atlas["kda"], *UNNAMED_SLOW], ids=str)
@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_an_empty_sequence_is_an_empty_answer(design: Design) -> None:
    *qkv, inputs = sample(design, 0)
    y, _ = ttr.regress(design, *qkv, **inputs)
    assert y.shape == qkv[2].shape


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step_size": None}, "step_size: missing input for Design(weights=Decay()"),
        ({"ridge": torch.ones(3, 5)}, "ridge: unknown input for Design(weights=Decay()"),
        ({"ridge": torch.ones(3, 5)}, "which takes log_decay (batch time heads), step_size (batch time heads)"),
        ({"step_size": -torch.ones(2, 6, 3, dtype=torch.float64)}, "step_size: expected finite values in [0, inf)"),
        ({"log_decay": torch.zeros(2, 6, dtype=torch.float64)}, "log_decay: expected shape (batch=2, time=6, heads=3)"),
        ({"q": torch.zeros(2, 6, 3, 9, dtype=torch.float64)}, "k: expected shape (batch=2, time=6, heads=3, key=9)"),
    ],
)
def test_inputs_are_checked(changed: dict[str, Tensor | None], message: str) -> None:
    design = ttr.atlas["gated_delta_net"]
    q, k, v, inputs = sample(design, 6)
    arguments = {"q": q, "k": k, "v": v} | inputs | changed
    arguments = {name: x for name, x in arguments.items() if x is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        ttr.regress(design, **arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        ttr.oracle.regress(design, **arguments)


def test_the_number_of_steps_is_checked() -> None:
    q, k, v, inputs = sample(Design(optimizer=GradientDescent(steps=3)), 4)
    with pytest.raises(ValueError, match=re.escape("k: expected 2 steps a token, got 3")):
        ttr.regress(Design(optimizer=GradientDescent(steps=2)), q, k, v, **inputs)


def test_order_of_the_past_does_not_matter_where_weights_are_uniform_and_the_fit_exact() -> None:
    design = Design(optimizer=Exact())
    q, k, v, inputs = sample(design, 20)
    order = torch.cat([torch.randperm(19, generator=torch.Generator().manual_seed(0)), torch.tensor([19])])
    last = ttr.regress(design, q, k, v, **inputs)[0][:, -1]
    permuted = ttr.regress(design, q, k[:, order], v[:, order], **inputs)[0][:, -1]
    assert relative_error(permuted, last) <= 1e-12


def test_normalised_hebbian_memories_are_kernel_smoothers() -> None:
    """Σ φ(q)ᵀφ(k) v / Σ φ(q)ᵀφ(k), written out over all pairs."""
    design = Design(regressor=Linear(ttr.Taylor()), optimizer=Hebbian(normalize=True))
    q, k, v, _ = sample(design, 11)
    product = torch.einsum("bthk,bihk->bhti", q, k)
    weight = (1 + product + product**2 / 2).tril()
    expected = torch.einsum("bhti,bihv->bthv", weight / weight.sum(-1, keepdim=True), v)
    assert relative_error(ttr.regress(design, q, k, v)[0], expected) <= 1e-12
