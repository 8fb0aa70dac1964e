"""`regress` against the oracle: every published design and unnamed ones, whole and in pieces, with their gradients."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

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
    Design(ttr.ComplexDecay() * ttr.InputGate(), optimizer=Hebbian()),
    Design(ttr.ContinuousDecay() * ttr.InputGate(exponential=True), optimizer=Hebbian(normalize=True, floor=0.5)),
    Design(Decay(per="channel"), optimizer=Exact()),
    Design(Decay(per="channel") * ttr.InputGate(), optimizer=Exact(ridge_decays=False)),
    Design(Decay(), Linear(ttr.EluPlusOne()), Exact(ridge_decays=False)),
    Design(Kernel(bandwidth=0.7) * Decay(), LocalPolynomial(1), Exact()),
    Design(Kernel() * ttr.ContinuousDecay(), LocalPolynomial(0), Exact()),
    Design(Kernel(Gaussian()) * Window(5), LocalPolynomial(2), Exact()),
    Design(Kernel(Gaussian(), 0.5) * Window(4) * ttr.InputGate(), LocalPolynomial(1), ttr.Probe()),
]
UNNAMED_SLOW = [
    Design(Decay(), optimizer=GradientDescent(), loss=Huber(0.5)),
    Design(Decay(per="channel"), optimizer=GradientDescent(momentum=True)),
    Design(optimizer=GradientDescent(), loss=ttr.Lp(1.5)),
    Design(Window(4), optimizer=Exact()),
    Design(Window(4)),
    Design(Kernel() * Decay(), optimizer=Exact()),
    Design(Kernel(Gaussian()), Linear(Quadratic()), Exact(ridge_decays=False)),
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
    for name in ("memory", "momentum", "curvature", "log_scale"):
        if getattr(expected_state, name) is not None:
            assert relative_error(getattr(state, name), getattr(expected_state, name)) <= 1e-10

    *single, single_inputs = sample(design, 75, dtype=torch.float32)
    exact = [x.double() for x in single], {name: x.double() for name, x in single_inputs.items()}
    y, _ = ttr.regress(design, *single, **single_inputs)
    # An exact fit that forgets most of what it needs rests on its floor, a rounding unit of float32.
    forgets = isinstance(design.optimizer, Exact) and design.weights != ttr.Uniform()
    assert relative_error(y, ttr.oracle.regress(design, *exact[0], **exact[1])[0]) <= (5e-5 if forgets else 1e-5)


@pytest.mark.parametrize("design", PUBLISHED + UNNAMED_FAST, ids=str)
def test_gradients_equal_those_of_the_definition(design: Design) -> None:
    q, k, v, inputs = sample(design, 9)
    _, start = ttr.regress(design, q, k, v, **inputs)

    def gradients(function: object) -> dict[str, Tensor]:
        leaves = {"q": q, "k": k, "v": v} | inputs
        # A scale is divided out again: by design no gradient flows through it.
        carried = {n: x for n, x in vars(start).items() if isinstance(x, Tensor) and n != "log_scale"}
        if isinstance(design.optimizer, Exact):
            carried = {}  # there the op hands on a memory and the definition the history
        leaves = {name: x.detach().clone().requires_grad_() for name, x in (leaves | carried).items()}
        state = ttr.State(**{name: leaves[name] for name in carried}, log_scale=start.log_scale)
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
    design = Design(optimizer=GradientDescent(NLMS()), loss=Huber(0.123))
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


@pytest.mark.parametrize("log_decay", [-0.05, -1.0, -3.0, -25.0])
@pytest.mark.parametrize("key", [4, 8, 32])
def test_an_exact_fit_that_forgets_stays_bounded(key: int, log_decay: float) -> None:
    """Long after its ridge has faded and with fewer pairs in memory than dimensions, in float32."""
    _, k, v, inputs = sample(Design(Decay(), optimizer=Exact()), 300, key=key, dtype=torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], log_decay)
    gain, _ = ttr.ops.gains.recursive_least_squares(k, inputs["ridge"], inputs["log_decay"])
    kept = 1 - (k * gain).sum(-1)
    assert kept.min() >= -1e-4
    assert kept.max() <= 1 + 1e-4
    y, _ = ttr.regress(Design(Decay(), optimizer=Exact()), k, k, v, **inputs)
    assert y.norm() <= 2 * v.norm()
    if log_decay <= -3:  # little but the newest pair is left, and that is recalled
        assert relative_error(y, v) <= 0.05


@pytest.mark.parametrize(
    ("design", "state", "message"),
    [
        (ttr.atlas["delta_net"], {"momentum": (2, 3, 5, 4)}, "state: expected memory to go on with Design("),
        (
            ttr.atlas["delta_net"],
            {"memory": (2, 3, 5, 9)},
            "state.memory: expected shape (batch=2, heads=3, key=5, value",
        ),
        (Design(Window(4)), {"memory": (2, 3, 5, 4)}, "state: expected history['k'], history['v'] to go on with"),
        (ttr.atlas["delta_net"], None, "state: expected what an earlier call returned, got tensor"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.filterwarnings("ignore::ttr.SlowPathWarning")
def test_states_are_checked(design: Design, state: dict[str, tuple[int, ...]] | None, message: str) -> None:
    *qkv, inputs = sample(design, 3)
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in (state or {}).items()}
    given = ttr.State(**tensors) if state else torch.zeros(1)
    with pytest.raises(ValueError, match=re.escape(message)):
        ttr.regress(design, *qkv, state=given, **inputs)


def test_a_choice_of_ones_own_is_not_run_as_its_parent() -> None:
    @dataclass(frozen=True)
    class Fourth(ttr.SquaredError):
        def __call__(self, error: Tensor) -> Tensor:
            return error**4 / 4

    @dataclass(frozen=True)
    class Half(ttr._choices.Gain):
        pass

    own, squared = (Design(optimizer=GradientDescent(), loss=loss) for loss in (Fourth(), ttr.SquaredError()))
    *qkv, inputs = sample(own, 6)
    with pytest.warns(SlowPathWarning):
        y, _ = ttr.regress(own, *qkv, **inputs)
    assert relative_error(y, ttr.oracle.regress(own, *qkv, **inputs)[0]) == 0
    assert relative_error(y, ttr.regress(squared, *qkv, **inputs)[0]) > 0.1
    with pytest.raises(ValueError, match="gain: expected one that"):
        ttr.oracle.regress(Design(optimizer=GradientDescent(Half())), *qkv, **inputs)


def test_large_kernel_weights_do_not_overflow_and_compare_keys_and_not_features() -> None:
    design = Design(Kernel(), Linear(ttr.EluPlusOne()), Exact())
    q, k, v, inputs = sample(design, 7)
    weight = torch.einsum("bhk,bihk->bhi", q[:, -1], k).exp()
    rows = design.feature_map(k)
    moment = torch.einsum("bhi,bihf,bihg->bhfg", weight, rows, rows) + torch.diag_embed(inputs["ridge"])
    cross = torch.einsum("bhi,bihf,bihv->bhfv", weight, rows, v)
    memory = torch.linalg.solve(moment, cross)
    expected = torch.einsum("bhfv,bhf->bhv", memory, design.feature_map(q[:, -1]))
    assert relative_error(ttr.oracle.regress(design, q, k, v, **inputs)[0][:, -1], expected) <= 1e-10
    y, _ = ttr.oracle.regress(design, 50 * k, 50 * k, v, **inputs)
    assert y.isfinite().all()


@pytest.mark.parametrize("design", [Design(Kernel(), LocalPolynomial(1), Exact()), UNNAMED_SLOW[0]], ids=str)
def test_the_definition_takes_half_precision(design: Design) -> None:
    *qkv, inputs = sample(design, 6)
    half = [x.bfloat16() for x in qkv]
    y, _ = ttr.oracle.regress(design, *half, **{name: x.float() for name, x in inputs.items()})
    assert y.dtype == torch.bfloat16
    exact = ttr.oracle.regress(design, *(x.double() for x in half), **inputs)[0]
    assert relative_error(y, exact) <= 0.01


def test_a_normalised_memory_without_weights_answers_zero() -> None:
    q, k, v = torch.randn(3, 1, 6, 1, 64, generator=torch.Generator().manual_seed(0))
    y, _ = ttr.regress(ttr.atlas["performer"], 9 * q, 9 * k, v)  # every feature underflows
    assert y.eq(0).all()


def _zero_keys(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, torch.zeros_like(k), v


def _one_key(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k[:, :1].expand_as(k), v


def _one_value(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v[:, :1].expand_as(v)


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros_like(x) for x in (q, k, v))  # type: ignore[return-value]


@pytest.mark.parametrize("degenerate", [_zero_keys, _one_key, _one_value, _nothing])
@pytest.mark.parametrize("slug", list(ttr.atlas))
def test_degenerate_sequences_are_answered_and_differentiated(slug: str, degenerate: object) -> None:
    design = ttr.atlas[slug]
    *qkv, inputs = sample(design, 9)
    tensors = [x.detach().clone().requires_grad_() for x in degenerate(*qkv)]  # type: ignore[operator]
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, _ = ttr.regress(design, *tensors, **leaves)
    assert relative_error(y, ttr.oracle.regress(design, *tensors, **leaves)[0]) <= 1e-8
    gradients = torch.autograd.grad(y.sum(), [*tensors, *leaves.values()], allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_a_memory_of_ones_own_may_come_without_momentum() -> None:
    robust = Design(optimizer=GradientDescent(momentum=True), loss=Huber())
    *qkv, inputs = sample(robust, 6)
    memory = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, state = ttr.regress(robust, *qkv, state=ttr.State(memory=memory), **inputs)
    assert relative_error(y, ttr.oracle.regress(robust, *qkv, state=ttr.State(memory=memory), **inputs)[0]) <= 1e-10
    assert state.momentum is not None


def test_a_fitted_map_can_be_read_from_the_state() -> None:
    for design in (Design(optimizer=Exact()), Design(optimizer=Exact(ridge_decays=False)), ttr.atlas["delta_net"]):
        q, k, v, inputs = sample(design, 12)
        y, state = ttr.regress(design, q, k, v, **inputs)
        stays = inputs["ridge"] if design.optimizer == Exact(ridge_decays=False) else None
        assert relative_error(torch.einsum("bhkv,bhk->bhv", state.linear_map(stays), q[:, -1]), y[:, -1]) <= 1e-9
    with pytest.raises(ValueError, match="state: expected that of a linear memory"):
        ttr.State(history={"k": q}).linear_map()
