"""Networks and mixtures as memories, against the derivatives of their objectives, one token after the other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import BATCH, HEADS, relative_error
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from ttr import ops
from ttr._choices import (
    KL,
    MLP,
    Decay,
    GradientDescent,
    Huber,
    InputGate,
    Linear,
    Lp,
    Lq,
    Mixture,
    Muon,
    NormalizedLinear,
    OnlineEM,
    Quadratic,
    SquaredError,
    Uniform,
)
from ttr._design import Design
from ttr._inputs import Prepared
from ttr._neural_oracle import neural
from ttr._state import State
from ttr.ops import _networks
from ttr.ops.neural_memory import neural_memory
from ttr.ops.online_em import online_em

KEY, MAPS, TIME = 6, 3, 11


class Case(NamedTuple):
    """A design, and how its op is told of it beside the tensors."""

    design: Design
    how: dict[str, Any]


MLP2 = MLP(expansion=2)
IN_BATCHES = GradientDescent(batch=4)
AVERAGED = GradientDescent(batch=4, average=True)
MOMENTUM = GradientDescent(momentum=True)
CUBIC = {"loss": "power", "power": 3.0}
CASES = {
    "ttt_linear": Case(Design(Uniform(), NormalizedLinear(), AVERAGED), {"batch": 4, "average": True}),
    "ttt_mlp": Case(Design(Uniform(), MLP2, AVERAGED), {"batch": 4, "average": True}),
    "titans": Case(Design(Decay(), MLP2, MOMENTUM), {}),
    "titans in batches": Case(Design(Decay(), MLP2, replace(MOMENTUM, batch=4)), {"batch": 4}),
    "moneta": Case(Design(Decay(), MLP2, GradientDescent(), Lp(3.0), Lq()), CUBIC | {"retention": "lq"}),
    "moneta as printed": Case(
        Design(Decay(), MLP2, GradientDescent(), Lp(3.0), Lq(printed=True)), CUBIC | {"retention": "lq_printed"}
    ),
    "moneta in batches": Case(
        Design(Decay(), MLP2, replace(MOMENTUM, batch=4), Lp(3.0), Lq()), CUBIC | {"retention": "lq", "batch": 4}
    ),
    "yaad": Case(Design(Decay(), MLP2, GradientDescent(), Huber(None)), {"loss": "huber"}),
    "yaad with momentum": Case(Design(Decay(), MLP2, MOMENTUM, Huber(None)), {"loss": "huber"}),
    "memora": Case(Design(Decay(), MLP2, GradientDescent(), retention=KL()), {"retention": "kl"}),
    "memora in batches": Case(
        Design(Decay(), MLP2, AVERAGED, retention=KL()), {"retention": "kl", "batch": 4, "average": True}
    ),
    "atlas": Case(
        Design(Decay() * InputGate(), MLP(Quadratic(), expansion=2), Muon(window=3, iterations=3)),
        {"window": 3, "orthogonalize": 3},
    ),
    "muon on a linear map": Case(
        Design(Uniform(), Linear(), Muon(window=2, iterations=2)), {"window": 2, "orthogonalize": 2}
    ),
    "muon under huber": Case(
        Design(Uniform(), Linear(), Muon(window=2, iterations=2), Huber(None)),
        {"window": 2, "orthogonalize": 2, "loss": "huber"},
    ),
    "robust delta rule": Case(Design(Decay(), Linear(), GradientDescent(), Huber(None)), {"loss": "huber"}),
    "delta rule in batches": Case(Design(Decay(), Linear(), IN_BATCHES), {"batch": 4}),
}
each_case = pytest.mark.parametrize("name", CASES)

# What the op calls the inputs of a design.
NAMES = {"input_gate": "weight"}


def sample(design: Design, time: int = TIME, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v and every input of the design's choices; keys of unit norm, steps small enough to stay stable."""
    generator = torch.Generator().manual_seed(seed)
    features = design.regressor.feature_map.size(KEY)
    sizes = {
        "batch": BATCH,
        "time": time,
        "heads": HEADS,
        "key": features,
        "value": KEY,
        "hidden": 2 * KEY,
        "maps": MAPS,
    }

    def draw(axes: str) -> Tensor:
        shape = [sizes.get(axis, KEY) for axis in axes.split()]
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Columns of a softmax near one another would leave the layer norm next to nothing to divide by.
    spread = 2.0 if design.retention == KL() else 0.5
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "log_decay": lambda x: -0.1 * x.abs(),
        "log_momentum": lambda x: -0.5 - x.abs(),
        "step_size": lambda x: x.sigmoid() / KEY,
        "input_gate": torch.sigmoid,
        "threshold": lambda x: 0.5 * x.abs(),
        "norm_scale": lambda x: 1 + 0.1 * x,
        "norm_shift": lambda x: 0.1 * x,
        "w1": lambda x: spread * x,
        "w2": lambda x: spread * x,
    }
    tensors = {name: draw("batch time heads raw") for name in ("q", "k", "v")}
    tensors["k"] = normalize(tensors["k"], dim=-1)
    for choice in design.choices:
        tensors |= {name: kinds.get(name, torch.clone)(draw(axes)) for name, axes in choice.inputs.items()}
    return {name: x.to(dtype) for name, x in tensors.items()}


def pieces(tensors: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    fixed = ("w1", "w2", "norm_scale", "norm_shift")
    return {name: x if name in fixed else x[:, start:stop] for name, x in tensors.items()}


def run(
    case: Case, tensors: dict[str, Tensor], state: dict[str, Tensor] | None = None, **how: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The op, with the key carried around a network."""
    regressor, inputs = case.design.regressor, {NAMES.get(name, name): x for name, x in tensors.items()}
    q, k, v = (inputs.pop(name) for name in "qkv")
    if isinstance(regressor, Linear):
        weights = [k.new_zeros(HEADS, KEY, KEY)]
    else:
        weights = [inputs.pop(name) for name in regressor.weights]
        inputs["norm"] = (inputs.pop("norm_scale"), inputs.pop("norm_shift"))
    carried = 0.0 if isinstance(regressor, Linear) else 1.0
    features = regressor.feature_map
    y, state = neural_memory(
        features(q), features(k), v - carried * k, weights, inputs.pop("step_size"),
        initial_state=state, **inputs, **(case.how | how),
    )  # fmt: skip
    return y + carried * q, state


def define(
    case: Case, tensors: dict[str, Tensor], state: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition."""
    features = case.design.regressor.feature_map
    inputs = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    q, k, v = (tensors[name] for name in "qkv")
    y, after = neural(case.design, Prepared(features(q), features(k), v, inputs, q, k), State(network=state))
    return y, after.network


def total(y: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A number that every output and every tensor of the state moves."""
    return y.sin().sum() + sum(x.square().sum() for x in state.values())


@each_case
def test_equals_its_definition(name: str) -> None:
    case = CASES[name]
    tensors = sample(case.design)
    single = {name: x.float() for name, x in tensors.items()}
    for given_, tolerance in ((tensors, 1e-10), (single, 1e-5)):
        y, state = run(case, given_)
        expected, expected_state = define(case, {name: x.double() for name, x in given_.items()})
        assert y.dtype == given_["q"].dtype
        assert relative_error(y, expected) <= tolerance
        assert state.keys() == expected_state.keys()
        for key, x in state.items():
            assert relative_error(x, expected_state[key]) <= tolerance, key


@each_case
def test_gradients_of_every_input_are_those_of_the_definition(name: str) -> None:
    case = CASES[name]
    tensors = {name: x.requires_grad_() for name, x in sample(case.design).items()}
    leaves = list(tensors.values())
    expected = torch.autograd.grad(total(*define(case, tensors)), leaves)
    # Two stored states: the backward pass computes the others again.
    for chunk_size in (64, 4):
        actual = torch.autograd.grad(total(*run(case, tensors, chunk_size=chunk_size)), leaves)
        for leaf, x, wanted in zip(tensors, actual, expected, strict=True):
            assert relative_error(x, wanted) <= 1e-9, leaf


@each_case
@settings(deadline=None, max_examples=5)
@given(cuts=st.sets(st.integers(0, TIME), max_size=3))
def test_split_anywhere_equals_whole(name: str, cuts: set[int]) -> None:
    case = CASES[name]
    tensors = sample(case.design)
    whole, final = run(case, tensors)
    for on in (run, define):
        state, outputs = None, []
        for start, stop in itertools.pairwise([0, *sorted(cuts), TIME]):
            y, state = on(case, pieces(tensors, start, stop), state)
            outputs.append(y)
        assert relative_error(torch.cat(outputs, 1), whole) <= 1e-10
        for key, x in final.items():
            assert relative_error(state[key], x) <= 1e-10, key


@each_case
def test_token_by_token_in_float32(name: str) -> None:
    case = CASES[name]
    tensors = sample(case.design, dtype=torch.float32)
    state, outputs = None, []
    for t in range(TIME):
        y, state = run(case, pieces(tensors, t, t + 1), state)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), run(case, tensors)[0]) <= 1e-5


@each_case
def test_gradients_reach_an_initial_state(name: str) -> None:
    """A step from the state of an earlier one, in the middle of a batch."""
    case = CASES[name]
    tensors = sample(case.design)
    _, state = run(case, pieces(tensors, 0, 6))
    state = {key: x.detach().requires_grad_() for key, x in state.items()}
    rest = pieces(tensors, 6, TIME)
    actual, expected = (
        torch.autograd.grad(total(*on(case, rest, state)), list(state.values()), allow_unused=True)
        for on in (run, define)
    )
    for key, x, wanted in zip(state, actual, expected, strict=True):
        assert (x is None) == (wanted is None), key
        assert x is None or relative_error(x, wanted) <= 1e-9, key


@each_case
def test_the_future_and_other_sequences_never_matter(name: str) -> None:
    case = CASES[name]
    tensors = {name: x.requires_grad_() for name, x in sample(case.design).items()}
    y, _ = run(case, tensors)
    timed = [name for name, x in tensors.items() if x.shape[:2] == (BATCH, TIME)]
    gradients = torch.autograd.grad(y[0, 6].sum(), [tensors[name] for name in timed])
    for name, gradient in zip(timed, gradients, strict=True):
        assert gradient[1].eq(0).all(), name
        assert gradient[0, 7:].eq(0).all(), name
        assert name == "q" or gradient[0, :6].ne(0).any(), name


@each_case
@pytest.mark.parametrize("keys", ["zero", "repeated"])
def test_degenerate_keys(name: str, keys: str) -> None:
    case = CASES[name]
    tensors = sample(case.design)
    k = torch.zeros_like(tensors["k"]) if keys == "zero" else tensors["k"][:, :1].expand_as(tensors["k"])
    tensors = {name: x.requires_grad_() for name, x in (tensors | {"k": k.clone()}).items()}
    y, state = run(case, tensors)
    assert relative_error(y, define(case, tensors)[0]) <= 1e-10
    for leaf, gradient in zip(tensors, torch.autograd.grad(total(y, state), list(tensors.values())), strict=True):
        assert gradient.isfinite().all(), leaf


@each_case
@pytest.mark.parametrize("time", [0, 1])
def test_short_sequences(name: str, time: int) -> None:
    case = CASES[name]
    tensors = sample(case.design)
    y, state = run(case, pieces(tensors, 0, time))
    expected, expected_state = define(case, pieces(tensors, 0, time))
    assert y.shape == (BATCH, time, HEADS, KEY)
    assert relative_error(y, expected) <= 1e-10
    assert {key: x.shape for key, x in state.items()} == {key: x.shape for key, x in expected_state.items()}
    # From the state of no token at all, as from the beginning.
    assert relative_error(run(case, tensors, run(case, pieces(tensors, 0, 0))[1])[0], run(case, tensors)[0]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_float32_states(dtype: torch.dtype) -> None:
    case = CASES["titans in batches"]
    tensors = {name: x.to(dtype) for name, x in sample(case.design).items()}
    tensors |= {name: tensors[name].float() for name in ("w1", "w2", "norm_scale", "norm_shift")}
    exact = {name: x.float() for name, x in tensors.items()}
    # The key is carried in full precision here: v − k has been rounded in half precision.
    exact["v"] = (tensors["v"] - tensors["k"]).float() + exact["k"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = run(case, tensors)
    assert y.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state.values())
    expected, expected_state = run(case, exact)
    for key, x in state.items():
        assert relative_error(x, expected_state[key]) <= 1e-5, key
    assert relative_error(y, expected) <= 4 * torch.finfo(dtype).eps


def kept_for_the_backward_pass(function: Callable[[], Tensor]) -> int:
    """The numbers that autograd keeps, a tensor's storage counted once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function()
    del y
    return sum(kept.values())


def test_no_token_has_weights_of_its_own_in_memory() -> None:
    """Not where the weights are linear in the steps; where they are not, each token of a batch has."""
    time, key, hidden = 64, 32, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, time, 1, key, generator=generator)
    weights = [torch.randn(1, *shape, generator=generator).requires_grad_() for shape in ((key, hidden), (hidden, key))]
    step_size = torch.full((1, time, 1), 0.01)
    linear, mirrored = (
        kept_for_the_backward_pass(
            lambda retention=retention: neural_memory(q, k, v, weights, step_size, batch=16, retention=retention)[0]
        )
        for retention in ("l2", "kl")
    )
    assert linear < time * key * hidden < mirrored


# Limits


@pytest.mark.parametrize("loss", ["squared", "huber", "power"])
def test_a_linear_map_token_by_token_is_the_delta_rule(loss: str) -> None:
    tensors = sample(Design(Decay(), Linear(), MOMENTUM))
    q, k, v, step_size, log_decay, log_momentum = (
        tensors[name] for name in ("q", "k", "v", "step_size", "log_decay", "log_momentum")
    )
    how = {"squared": {}, "huber": {"threshold": torch.full_like(step_size, 1e6)}, "power": {"power": 2.0}}[loss]
    weights = (torch.zeros(HEADS, KEY, KEY, dtype=q.dtype),)
    gain = ops.gains.lms(k, step_size)
    y, state = neural_memory(q, k, v, weights, step_size, log_decay=log_decay, loss=loss, **how)
    expected, memory = ops.delta_rule(q, k, v, gain, log_decay)
    assert relative_error(y, expected) <= 1e-12
    assert relative_error(state["w1"], memory) <= 1e-12
    both = {"log_decay": log_decay, "log_momentum": log_momentum}
    y, state = neural_memory(q, k, v, weights, step_size, loss=loss, **both, **how)
    expected, (memory, momentum) = ops.momentum_delta_rule(q, k, v, gain, log_momentum, log_decay)
    assert relative_error(y, expected) <= 1e-12
    assert relative_error(state["w1"], memory) <= 1e-12
    assert relative_error(state["momentum.w1"], momentum) <= 1e-12


def test_one_map_is_the_delta_rule() -> None:
    tensors = sample(Design(Decay(), Mixture(), OnlineEM()))
    q, k, v, step_size, log_decay = (tensors[name] for name in ("q", "k", "v", "step_size", "log_decay"))
    logits = tensors["key_logits"][..., :1, :]
    y, maps = online_em(q, k, v, logits, logits, step_size, log_decay)
    expected, memory = ops.delta_rule(q, k, v, ops.gains.lms(k, step_size), log_decay)
    assert relative_error(y, expected) <= 1e-12
    assert relative_error(maps.squeeze(2), memory) <= 1e-12


def test_a_norm_of_order_two_retains_as_the_squared_distance() -> None:
    case = CASES["titans"]
    tensors = sample(case.design)
    y, state = run(case, tensors)
    for retention in ("lq", "lq_printed"):
        other, other_state = run(case, tensors, retention=retention, retention_norm=2.0)
        assert relative_error(other, y) <= 1e-12
        assert relative_error(other_state["w1"], state["w1"]) <= 1e-12


def test_a_long_average_of_one_token_is_its_step() -> None:
    case = CASES["delta rule in batches"]
    tensors = sample(case.design)
    online, _ = run(case, tensors, batch=1)
    assert relative_error(run(case, tensors, batch=1, average=True)[0], online) == 0
    first = run(case, tensors, batch=TIME, average=True)[0][:, 0]
    assert relative_error(first, online[:, 0]) <= 1e-12


# The rules as the papers write them, where ours are written otherwise


def test_memora_is_a_softmax_of_the_decayed_logarithm() -> None:
    """W_t = softmax(α_t log W_{t−1} − η_t ∇ℓ); no weight is negative, and those into a unit sum to one."""
    case = CASES["memora"]
    tensors = sample(case.design)
    weights = {name: tensors[name].softmax(-2).expand(BATCH, -1, -1, -1) for name in ("w1", "w2")}
    scale, shift = tensors["norm_scale"], tensors["norm_shift"]

    def answer(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(torch.einsum("bhk,bhkn->bhn", x, w1), approximate="tanh")
        z = torch.einsum("bhn,bhnv->bhv", hidden, w2)
        return x + layer_norm(z, (KEY,), eps=1e-6) * scale + shift

    outputs = []
    for t in range(TIME):
        decay, size = tensors["log_decay"][:, t].exp()[..., None, None], tensors["step_size"][:, t][..., None, None]
        faded = {name: (decay * x.log()).softmax(-2).requires_grad_() for name, x in weights.items()}
        loss = (tensors["v"][:, t] - answer(tensors["k"][:, t], **faded)).square().sum() / 2
        gradient = dict(zip(faded, torch.autograd.grad(loss, list(faded.values())), strict=True))
        weights = {name: (decay * x.log() - size * gradient[name]).softmax(-2) for name, x in weights.items()}
        outputs.append(answer(tensors["q"][:, t], **weights))
    y, state = run(case, tensors)
    assert relative_error(y, torch.stack(outputs, 1)) <= 1e-10
    for name, x in weights.items():
        assert relative_error(state[name].softmax(-2), x) <= 1e-10


def test_the_mirror_map_scales_and_the_printed_one_does_not() -> None:
    """Halving A halves the weights of the mirror map, and doubles those that the paper prints, at q = 4."""
    a = 1e3 * sample(CASES["moneta"].design)["w1"]
    for retention, factor in (("lq", 0.5), ("lq_printed", 2.0)):
        mirror = _networks.MIRRORS[retention]
        assert relative_error(mirror(a / 2, 4.0), factor * mirror(a, 4.0)) <= 1e-4
    # Conjugate norms: ½‖∇Φ(A)‖_q² and Φ(A) = ½‖A‖_p² are equal.
    weights, p = _networks.MIRRORS["lq"](a, 4.0), 4 / 3
    assert relative_error(weights.norm(4.0, dim=(-2, -1)), a.norm(p, dim=(-2, -1))) <= 1e-4
    assert _networks.MIRRORS["lq"](torch.zeros(2, 3), 4.0).eq(0).all()


def test_newton_schulz_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 4), (4, 6), (5, 5)):
        x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        s = s / s.norm(dim=-1, keepdim=True)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        actual = _networks.orthogonalized(x, 5)
        assert relative_error(actual, u @ torch.diag_embed(s) @ v) <= 1e-6
        assert ((s > 0.5) & (s < 1.5)).all()
    assert _networks.orthogonalized(torch.zeros(2, 3), 5).eq(0).all()


# Closed forms


@pytest.mark.parametrize(
    ("loss", "parameter"),
    [(SquaredError(), {}), (Huber(None), {"threshold": 0.7}), (Lp(1.5), {}), (Lp(3.0), {})],
    ids=str,
)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("with_norm", [False, True])
def test_descent_is_minus_the_gradient(loss: Any, parameter: dict[str, float], layers: int, with_norm: bool) -> None:
    generator = torch.Generator().manual_seed(layers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = [KEY, *[7] * (layers - 1), 3]
    matrices = [normal(1, 1, 1, *size) for size in itertools.pairwise(sizes)]
    norm = _networks.Norm(normal(1, 1, 1, 3), normal(1, 1, 1, 3)) if with_norm else None
    k, v = normal(1, 1, 1, 1, KEY), normal(1, 1, 1, 1, 3)
    kept = 0.8

    def objective(matrices: list[Tensor]) -> Tensor:
        answer = _networks.answer(k, [lambda x, w=w: x @ w for w in matrices], norm)
        given = {name: torch.tensor(x, dtype=v.dtype) for name, x in parameter.items()}
        return loss(v - answer, **given).sum()

    name = {SquaredError: "squared", Huber: "huber", Lp: "power"}[type(loss)]
    threshold = torch.full((1, 1, 1, 1, 1), parameter.get("threshold", 0.0), dtype=v.dtype)

    def influence(error: Tensor) -> Tensor:
        return _networks.INFLUENCES[name](error, threshold, getattr(loss, "p", 2.0))

    expected = torch.func.grad(objective)([kept * w for w in matrices])
    for (entering, back), wanted in zip(
        _networks.descent(k, v, matrices, kept, norm, influence), expected, strict=True
    ):
        assert relative_error(-entering.mT @ back, wanted) <= 1e-12


def test_the_derivative_of_a_power_has_a_derivative_at_zero() -> None:
    for power in (1.0, 1.5, 3.0):
        error = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        pull = _networks.INFLUENCES["power"](error, None, power)
        (gradient,) = torch.autograd.grad(pull.sum(), error)
        assert pull.eq(0).all()
        assert gradient.isfinite().all()


# Outliers


def test_one_wild_value_moves_a_robust_memory_least() -> None:
    """The Huber loss against the squared one against a cube, after one value of a hundred times the size."""
    case = CASES["robust delta rule"]
    tensors = sample(case.design)
    tensors["threshold"] = torch.full_like(tensors["step_size"], 0.5)
    wild = tensors["v"].clone()
    wild[:, 5] *= 100
    moved = {}
    for loss in ("huber", "squared", "power"):
        given_ = {name: x for name, x in tensors.items() if loss == "huber" or name != "threshold"}
        y, spoilt = (run(case, given_ | {"v": v}, loss=loss, power=3.0)[0][:, 5] for v in (tensors["v"], wild))
        moved[loss] = relative_error(spoilt, y)
    assert moved["huber"] < 1 < moved["squared"] < moved["power"]


# The mixture


def mixture(time: int = TIME) -> dict[str, Tensor]:
    return sample(Design(Decay(), Mixture(MAPS), OnlineEM()), time)


def define_mixture(tensors: dict[str, Tensor], memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, k, v = (tensors[name] for name in "qkv")
    inputs = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    y, state = neural(Design(Decay(), Mixture(MAPS), OnlineEM()), Prepared(q, k, v, inputs, q, k), State(memory))
    return y, state.memory


def test_online_em_climbs_the_likelihood() -> None:
    tensors = mixture()
    initial = torch.randn(BATCH, HEADS, MAPS, KEY, KEY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = {name: x.requires_grad_() for name, x in (tensors | {"initial_state": initial}).items()}
    y, maps = online_em(**leaves, chunk_size=4)
    rest = {name: x for name, x in leaves.items() if name != "initial_state"}
    expected, expected_maps = define_mixture(rest, leaves["initial_state"])
    assert relative_error(y, expected) <= 1e-12
    assert relative_error(maps, expected_maps) <= 1e-12
    actual, wanted = (
        torch.autograd.grad(y.sin().sum() + maps.square().sum(), list(leaves.values()))
        for y, maps in ((y, maps), (expected, expected_maps))
    )
    for leaf, x, other in zip(leaves, actual, wanted, strict=True):
        assert relative_error(x, other) <= 1e-10, leaf
    single, _ = online_em(**{name: x.detach().float() for name, x in leaves.items()})
    assert relative_error(single, y) <= 1e-5


@settings(deadline=None, max_examples=10)
@given(cut=st.integers(0, TIME))
def test_online_em_split_anywhere_equals_whole(cut: int) -> None:
    tensors = mixture()
    whole, final = online_em(**tensors)
    first, state = online_em(**pieces(tensors, 0, cut))
    second, state = online_em(**pieces(tensors, cut, TIME), initial_state=state)
    assert relative_error(torch.cat([first, second], 1), whole) <= 1e-13
    assert relative_error(state, final) <= 1e-13


def test_online_em_looks_neither_ahead_nor_aside() -> None:
    tensors = {name: x.requires_grad_() for name, x in mixture().items()}
    y, _ = online_em(**tensors)
    for name, gradient in zip(tensors, torch.autograd.grad(y[0, 6].sum(), list(tensors.values())), strict=True):
        assert gradient[1].eq(0).all(), name
        assert gradient[0, 7:].eq(0).all(), name


def test_each_map_learns_what_the_others_do_not() -> None:
    """Two values for one key, told apart by the logits, are both kept; the delta rule keeps their mean."""
    k = torch.zeros(1, 400, 1, KEY, dtype=torch.float64)
    k[..., 0] = 1
    sign = torch.where(torch.arange(400) % 2 == 0, 1.0, -1.0).double()[None, :, None, None]
    v = sign * torch.ones_like(k)
    logits = 4 * torch.stack([sign, -sign], dim=3).expand(1, 400, 1, 2, KEY)
    step_size = torch.full((1, 400, 1), 0.1, dtype=torch.float64)
    y, _ = online_em(k, k, v, logits, logits, step_size)
    assert relative_error(y[:, -2:], v[:, -2:]) <= 0.1
    assert relative_error(ops.delta_rule(k, k, v, ops.gains.lms(k, step_size))[0][:, -2:], v[:, -2:]) >= 0.5


# Wrong arguments


def arguments(**changed: Any) -> dict[str, Any]:
    q = torch.ones(2, 6, 3, 4)
    weights = (torch.ones(3, 4, 8), torch.ones(3, 8, 5))
    return {"q": q, "k": q, "v": torch.ones(2, 6, 3, 5), "weights": weights, "step_size": torch.ones(2, 6, 3)} | changed


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.ones(2, 5, 3, 4)}, "k: expected shape (batch=2, time=6, heads=3, key=4), got (2, 5, 3, 4)"),
        ({"weights": ()}, "weights: expected at least one matrix, got none"),
        ({"weights": (torch.ones(3, 4, 4),)}, "w1: expected shape (heads=3, key=4, value=5), got (3, 4, 4)"),
        (
            {"weights": (torch.ones(3, 4, 8), torch.ones(3, 7, 5))},
            "w2: expected shape (heads=3, hidden_1=8, value=5), got (3, 7, 5)",
        ),
        ({"norm": (torch.ones(3, 4), torch.ones(3, 5))}, "norm_scale: expected shape (heads=3, value=5), got (3, 4)"),
        ({"step_size": -torch.ones(2, 6, 3)}, "step_size: expected finite values in [0, inf)"),
        ({"log_decay": torch.ones(2, 6, 3)}, "log_decay: expected finite values in (-inf, 0]"),
        ({"log_momentum": torch.ones(2, 6, 3)}, "log_momentum: expected finite values in (-inf, 0]"),
        ({"weight": -torch.ones(2, 6, 3)}, "weight: expected finite values in [0, inf)"),
        ({"loss": "huber", "threshold": -torch.ones(2, 6, 3)}, "threshold: expected finite values in [0, inf)"),
        ({"loss": "huber"}, "threshold: expected with the Huber loss and no other, got loss='huber'"),
        (
            {"threshold": torch.ones(2, 6, 3)},
            "threshold: expected with the Huber loss and no other, got loss='squared'",
        ),
        ({"loss": "hinge"}, "loss: expected one of squared, huber, power, got 'hinge'"),
        ({"retention": "l1"}, "retention: expected one of l2, lq, lq_printed, kl, got 'l1'"),
        ({"power": 0.5}, "power: expected a finite number of at least 1, got 0.5"),
        ({"retention_norm": 1.0}, "retention_norm: expected a finite number above 1, got 1.0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"orthogonalize": -1}, "orthogonalize: expected at least 0, got -1"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"average": True, "log_momentum": -torch.ones(2, 6, 3)}, "average: expected False with a log_momentum"),
        (
            {"retention": "lq_printed", "weights": (torch.ones(3, 4, 8), torch.zeros(3, 8, 5))},
            "norm of w2: expected finite values in (0, inf)",
        ),
        ({"initial_state": {"w1": torch.ones(2, 3, 4, 8)}}, "initial_state: expected w1, w2, got w1"),
        (
            {"initial_state": {"w1": torch.ones(2, 3, 4, 8), "w2": torch.ones(2, 3, 8, 4)}},
            "initial_state['w2']: expected shape (batch=2, heads=3, hidden_1=8, value=5), got (2, 3, 8, 4)",
        ),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        neural_memory(**arguments(**changed))


@pytest.mark.usefixtures("unchecked_types")
def test_a_batch_that_has_ended_has_not_started() -> None:
    _, state = neural_memory(**arguments(), batch=7)
    with pytest.raises(ValueError, match=re.escape("initial_state: expected from 0 to 3 started tokens, got 6")):
        neural_memory(**arguments(), batch=4, initial_state=state)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"key_logits": torch.ones(2, 6, 3, 2, 4)},
            "key_logits: expected shape (batch=2, time=6, heads=3, maps, value=5)",
        ),
        ({"query_logits": torch.ones(2, 6, 3, 3, 5)}, "query_logits: expected shape (batch=2, time=6, heads=3, maps=2"),
        ({"step_size": -torch.ones(2, 6, 3)}, "step_size: expected finite values in [0, inf)"),
        ({"log_decay": torch.ones(2, 6, 3)}, "log_decay: expected finite values in (-inf, 0]"),
        (
            {"initial_state": torch.ones(2, 3, 2, 5, 4)},
            "initial_state: expected shape (batch=2, heads=3, maps=2, key=4",
        ),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_online_em(changed: dict[str, Any], message: str) -> None:
    a = arguments(key_logits=torch.ones(2, 6, 3, 2, 5), query_logits=torch.ones(2, 6, 3, 2, 5))
    del a["weights"]
    with pytest.raises(ValueError, match=re.escape(message)):
        online_em(**(a | changed))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Huber(0.0), "Huber.delta: expected a positive finite number, got 0.0"),
        (lambda: Lq(1.0), "Lq.q: expected a finite number above 1, got 1.0"),
        (lambda: MLP(expansion=0), "MLP.expansion: expected an integer of at least 1, got 0"),
        (lambda: Mixture(0), "Mixture.maps: expected an integer of at least 1, got 0"),
        (lambda: GradientDescent(batch=0), "GradientDescent.batch: expected an integer of at least 1, got 0"),
        (lambda: Muon(window=0), "Muon.window: expected an integer of at least 1, got 0"),
        (lambda: Muon(iterations=0), "Muon.iterations: expected an integer of at least 1, got 0"),
    ],
)
def test_choices_check_their_numbers(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
