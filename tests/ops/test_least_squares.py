"""Exact least squares against its normal equations in float64, and the properties it must have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import BATCH, HEADS, KEY, VALUE, relative_error
from torch import Tensor
from torch.nn.functional import normalize

from ttr import ops

Arguments = dict[str, Tensor | None]
SEQUENCES = ("q", "k", "v", "log_decay", "weight")


def definition(a: Arguments, *, ridge_decays: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Every token's normal equations, from the sum over all pairs and the time that each of them has decayed."""
    q, k, v, ridge = a["q"], a["k"], a["v"], a["ridge"]
    elapsed = torch.zeros_like(k) if a["log_decay"] is None else a["log_decay"].reshape(*k.shape[:3], -1).expand_as(k)
    weight = torch.ones_like(k[..., 0]) if a["weight"] is None else a["weight"]
    matrix = torch.diag_embed(ridge if ridge.ndim == 2 else ridge.unsqueeze(-1).expand(k.shape[2:]))
    if a["curvature"] is None:
        curvature = matrix if ridge_decays else torch.zeros_like(matrix)
        curvature, cross = curvature.expand(len(k), *matrix.shape), k.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    else:
        curvature, cross = a["curvature"], a["cross"]
    outputs = []
    curvature_t, cross_t = curvature, cross
    for t in range(q.shape[1]):
        since = elapsed[:, : t + 1].flip(1).cumsum(1).flip(1)
        left = (since - elapsed[:, : t + 1]).exp() * weight[:, : t + 1].unsqueeze(-1) * k[:, : t + 1]
        old = since[:, 0].exp().unsqueeze(-1)
        curvature_t = old * curvature + torch.einsum("bthi,bthj->bhij", left, k[:, : t + 1])
        cross_t = old * cross + torch.einsum("bthk,bthv->bhkv", left, v[:, : t + 1])
        memory = torch.linalg.solve(curvature_t + (0.0 if ridge_decays else matrix), cross_t)
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return torch.stack(outputs, 1), curvature_t, cross_t


def arguments(decay: str, time: int, *, strength: float = 0.1, key: int = KEY, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pairs = (BATCH, time, HEADS)
    log_decay = {"none": None, "head": -strength * uniform(*pairs), "channel": -strength * uniform(*pairs, key)}[decay]
    root = normal(BATCH, HEADS, key, key)
    return {
        "q": normal(*pairs, key),
        "k": normalize(normal(*pairs, key), dim=-1),
        "v": normal(*pairs, VALUE),
        "log_decay": log_decay,
        "weight": 0.1 + uniform(*pairs),
        "ridge": 0.25 + uniform(HEADS, key),
        "curvature": root @ root.mT / key + 0.5 * torch.eye(key),
        "cross": normal(BATCH, HEADS, key, VALUE),
    }


def on_sequences(a: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    return {name: function(x) if name in SEQUENCES and x is not None else x for name, x in a.items()}


def run(a: Arguments, **how: object) -> tuple[Tensor, Tensor, Tensor]:
    a = dict(a)
    curvature, cross = a.pop("curvature"), a.pop("cross")
    state = None if curvature is None else (curvature, cross)
    how = {"initial_state": state} | a | how
    y, state = ops.least_squares(**how)
    return (y, *state)


CASES = [
    ("none", True, "chunk"),
    ("head", True, "chunk"),
    ("head", True, "direct"),
    ("head", True, "conjugate_gradients"),
    ("none", False, "conjugate_gradients"),
    ("head", False, "conjugate_gradients"),
    ("head", False, "direct"),
    ("channel", True, "direct"),
    ("channel", False, "direct"),
]
each_case = pytest.mark.parametrize(("decay", "ridge_decays", "solver"), CASES)
each_problem = pytest.mark.parametrize(
    ("decay", "ridge_decays"), [("none", True), ("head", True), ("head", False), ("channel", True), ("channel", False)]
)


@each_case
@pytest.mark.parametrize("from_state", [False, True])
@pytest.mark.parametrize(("time", "chunk_size"), [(1, 64), (64, 16), (75, 1), (75, 7), (75, 64)])
def test_equals_its_definition(
    decay: str, ridge_decays: bool, solver: str, from_state: bool, time: int, chunk_size: int
) -> None:
    a = arguments(decay, time)
    if not from_state:
        a |= {"curvature": None, "cross": None}
    how = {"ridge_decays": ridge_decays, "solver": solver, "chunk_size": chunk_size}
    for actual, wanted in zip(run(a, **how), definition(a, ridge_decays=ridge_decays), strict=True):
        assert relative_error(actual, wanted) <= 1e-10
    single = {name: None if x is None else x.float() for name, x in a.items()}
    exact = {name: None if x is None else x.double() for name, x in single.items()}
    for actual, wanted in zip(run(single, **how), definition(exact, ridge_decays=ridge_decays), strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted) <= 1e-5


@pytest.mark.parametrize("ridge_decays", [True, False])
def test_minimises_the_weighted_squares(ridge_decays: bool) -> None:
    """One sequence's last answer by lstsq on its stacked rows, the ridge's rows first."""
    a = arguments("head", 30) | {"curvature": None, "cross": None}
    y = run(a, ridge_decays=ridge_decays)[0]
    elapsed = a["log_decay"][0, :, 0].sum() - a["log_decay"][0, :, 0].cumsum(0)
    root = (elapsed.exp() * a["weight"][0, :, 0]).sqrt().unsqueeze(-1)
    prior = a["ridge"][0] * (a["log_decay"][0, :, 0].sum().exp() if ridge_decays else 1)
    rows = torch.cat([prior.sqrt().diag(), root * a["k"][0, :, 0]])
    values = torch.cat([torch.zeros(KEY, VALUE, dtype=torch.float64), root * a["v"][0, :, 0]])
    memory = torch.linalg.lstsq(rows, values, driver="gelsd").solution
    assert relative_error(y[0, -1, 0], a["q"][0, -1, 0] @ memory) <= 1e-12


@each_case
@pytest.mark.parametrize("from_state", [False, True])
def test_gradients_of_every_argument(decay: str, ridge_decays: bool, solver: str, from_state: bool) -> None:
    a = {name: None if x is None else x[:1] for name, x in arguments(decay, 4, key=2).items()}
    a = on_sequences(a, lambda x: x[:, :, :1]) | {"curvature": a["curvature"][:, :1], "cross": a["cross"][:, :1]}
    if not from_state:
        a |= {"curvature": None, "cross": None}
    names = [name for name, x in a.items() if x is not None]
    leaves = [a[name].clone().requires_grad_() for name in names]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = a | dict(zip(names, leaves, strict=True))
        if from_state:  # a curvature that stays symmetric
            given["curvature"] = (given["curvature"] + given["curvature"].mT) / 2
        return run(given, ridge_decays=ridge_decays, solver=solver, chunk_size=3)

    assert torch.autograd.gradcheck(function, leaves)


@each_case
def test_float32_gradients_equal_those_of_the_definition(decay: str, ridge_decays: bool, solver: str) -> None:
    a = arguments(decay, 75)
    names = [name for name, x in a.items() if x is not None]

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [a[name].float().to(dtype).requires_grad_() for name in names]
        given = a | dict(zip(names, leaves, strict=True))
        if dtype == torch.float64:
            outputs = definition(given, ridge_decays=ridge_decays)
        else:
            outputs = run(given, ridge_decays=ridge_decays, solver=solver)
        return torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves, allow_unused=True)

    expected = gradients(torch.float64)
    for name, actual, wanted in zip(names, gradients(torch.float32), expected, strict=True):
        if wanted is None:  # a ridge that decays, behind a state that contains it
            assert name == "ridge"
            assert actual is None or actual.eq(0).all()
        else:
            assert relative_error(actual, wanted) <= 1e-4, name


@pytest.mark.parametrize("solver", ["conjugate_gradients", "direct"])
@pytest.mark.parametrize("log_decay", [-20.0, -1000.0])
@pytest.mark.parametrize("where", ["middle", "everywhere"])
def test_strong_decay_beside_a_ridge_that_stays(solver: str, log_decay: float, where: str) -> None:
    a = arguments("head", 70, strength=0.01)
    a["log_decay"][:, 37 if where == "middle" else slice(None)] = log_decay
    single = {name: x.float().requires_grad_() for name, x in a.items()}
    exact = {name: x.detach().double() for name, x in single.items()}
    y, *state = run(single, ridge_decays=False, solver=solver)
    expected = definition(exact, ridge_decays=False)
    for t in range(70):
        assert relative_error(y[:, t], expected[0][:, t]) <= 1e-5
    for actual, wanted in zip(state, expected[1:], strict=True):
        assert relative_error(actual, wanted) <= 1e-5
    for gradient in torch.autograd.grad(y.sum(), list(single.values())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("solver", ["chunk", "direct"])
def test_a_strong_decay_among_weak_ones(solver: str) -> None:
    """It leaves little of the past. Until new keys span the space, that little is what decides, and costs digits."""
    a = arguments("head", 70, strength=0.01)
    a["log_decay"][:, 37] = -12
    y, *_ = run(a, solver=solver)
    expected = definition(a, ridge_decays=True)[0]
    spanned = 37 + 2 * KEY
    assert relative_error(y[:, :37], expected[:, :37]) <= 1e-12
    assert relative_error(y[:, 37:spanned], expected[:, 37:spanned]) <= 1e-8
    assert relative_error(y[:, spanned:], expected[:, spanned:]) <= 1e-10
    single = run({name: x.float() for name, x in a.items()}, solver=solver)[0]
    assert relative_error(single[:, :37], expected[:, :37]) <= 1e-5
    assert relative_error(single[:, spanned:], expected[:, spanned:]) <= 1e-4


@pytest.mark.parametrize("solver", ["chunk", "direct"])
@pytest.mark.parametrize("log_decay", [-0.05, -1.0, -3.0, -25.0, -1000.0])
@pytest.mark.parametrize("key", [4, 32])
def test_a_fit_that_forgets_stays_bounded(solver: str, log_decay: float, key: int) -> None:
    """Long after its ridge has faded and with fewer pairs in memory than dimensions, in float32."""
    a = {name: x.float() for name, x in arguments("head", 300, key=key).items()}
    a |= {"q": a["k"], "log_decay": torch.full_like(a["log_decay"], log_decay), "curvature": None, "cross": None}
    a["v"].requires_grad_()
    a["k"].requires_grad_()
    y, *_ = run(a, solver=solver)
    assert y.norm() <= 2 * a["v"].norm()
    if log_decay <= -3:  # little but the newest pair is left, and that is recalled
        assert relative_error(y, a["v"]) <= 0.05
    for gradient in torch.autograd.grad(y.square().sum(), (a["v"], a["k"])):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("strength", [1.2, 2.0])
def test_where_float32_resolves_nothing_chunks_are_no_worse_than_tokens(strength: float) -> None:
    """Random queries, 32 dimensions and one to two effective pairs in memory: only the size of the answer is left."""
    a = {name: x.float() for name, x in arguments("head", 256, key=32, strength=strength).items()}
    a |= {"weight": None, "curvature": None, "cross": None}
    assert run(a, solver="chunk")[0].norm() <= 2 * run(a, solver="direct")[0].norm()


@pytest.mark.parametrize("ridge_decays", [True, False])
def test_does_not_wind_up(ridge_decays: bool) -> None:
    """10,000 steps on keys of rank 3 in 8 dimensions: with a ridge that stays, float32 still has the answer."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 8, generator=generator)
    k = normalize(torch.randn(1, 10_000, 2, 3, generator=generator) @ basis, dim=-1)
    q, v = torch.randn(1, 10_000, 2, 8, generator=generator), torch.randn(1, 10_000, 2, 4, generator=generator)
    log_decay = torch.full((1, 10_000, 2), 0.95).log()
    y, state = ops.least_squares(q, k, v, torch.full((2,), 0.25), log_decay, ridge_decays=ridge_decays)
    assert all(x.isfinite().all() for x in (y, *state))
    if ridge_decays:
        assert y.norm() <= 10 * v.norm()
        return
    recent = slice(-1000, None)  # older pairs have decayed to nothing
    last = {"q": q, "k": k, "v": v, "log_decay": log_decay, "weight": None}
    last = {name: None if x is None else x[:, recent].double() for name, x in last.items()}
    last |= {"ridge": torch.full((2,), 0.25, dtype=torch.float64), "curvature": None, "cross": None}
    elapsed = last["log_decay"].flip(1).cumsum(1).flip(1) - last["log_decay"]
    keys = elapsed.exp().unsqueeze(-1) * last["k"]
    matrix = torch.einsum("bthi,bthj->bhij", keys, last["k"]) + 0.25 * torch.eye(8)
    memory = torch.linalg.solve(matrix, torch.einsum("bthk,bthv->bhkv", keys, last["v"]))
    assert relative_error(y[:, -1], torch.einsum("bhkv,bhk->bhv", memory, last["q"][:, -1])) <= 1e-5


@each_problem
@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(0, 40), max_size=4), chunk_size=st.integers(1, 20))
def test_split_anywhere_equals_whole(decay: str, ridge_decays: bool, cuts: set[int], chunk_size: int) -> None:
    a = arguments(decay, 40) | {"curvature": None, "cross": None}
    whole = run(a, ridge_decays=ridge_decays)
    outputs, state = [], (None, None)
    for start, stop in itertools.pairwise([0, *sorted(cuts), 40]):
        part = on_sequences(a, lambda x, span=slice(start, stop): x[:, span])
        part |= {"curvature": state[0], "cross": state[1]}
        y, *state = run(part, ridge_decays=ridge_decays, chunk_size=chunk_size)
        outputs.append(y)
    for actual, wanted in zip((torch.cat(outputs, 1), *state), whole, strict=True):
        assert relative_error(actual, wanted) <= 1e-11


@each_problem
def test_token_by_token_equals_whole(decay: str, ridge_decays: bool) -> None:
    a = arguments(decay, 20)
    outputs, state = [], (a["curvature"], a["cross"])
    for t in range(20):
        part = on_sequences(a, lambda x, t=t: x[:, t : t + 1]) | {"curvature": state[0], "cross": state[1]}
        y, *state = run(part, ridge_decays=ridge_decays)
        outputs.append(y)
    for actual, wanted in zip((torch.cat(outputs, 1), *state), run(a, ridge_decays=ridge_decays), strict=True):
        assert relative_error(actual, wanted) <= 1e-11


@each_case
def test_the_future_and_other_sequences_never_matter(decay: str, ridge_decays: bool, solver: str) -> None:
    a = arguments(decay, 20)
    leaves = {name: x.clone().requires_grad_() for name, x in a.items() if x is not None}
    if ridge_decays:
        leaves.pop("ridge")
    y = run(a | leaves, ridge_decays=ridge_decays, solver=solver, chunk_size=8)[0]
    gradients = torch.autograd.grad(y[0, 11].sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        if name != "ridge":
            assert gradient[1].eq(0).all(), name
        if name in SEQUENCES:
            assert gradient[0, 12:].eq(0).all(), name
            assert name == "q" or gradient[0, :11].ne(0).any(), name


@each_problem
def test_degenerate_lengths_and_layouts(decay: str, ridge_decays: bool) -> None:
    a = arguments(decay, 12)
    how = {"ridge_decays": ridge_decays}
    y, *states = run(on_sequences(a, lambda x: x[:, :0]), **how)
    assert y.shape == (BATCH, 0, HEADS, VALUE)
    for state, given_state in zip(states, (a["curvature"], a["cross"]), strict=True):
        assert state.equal(given_state)
    one_head = on_sequences(a, lambda x: x[:, :, :1]) | {name: a[name][:, :1] for name in ("curvature", "cross")}
    one_head["ridge"] = a["ridge"][:1]
    assert relative_error(run(one_head, **how)[0], run(a, **how)[0][:, :, :1]) <= 1e-12
    strided = on_sequences(a, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
    assert not strided["k"].is_contiguous()
    assert relative_error(run(strided, **how)[0], run(a, **how)[0]) <= 1e-12


@each_case
@pytest.mark.parametrize("change", ["zero keys", "one key", "no weight"])
def test_degenerate_keys_and_weights(decay: str, ridge_decays: bool, solver: str, change: str) -> None:
    a = arguments(decay, 40) | {"curvature": None, "cross": None}
    a |= {
        "zero keys": {"k": torch.zeros_like(a["k"])},
        "one key": {"k": a["k"][:, :1].expand_as(a["k"])},
        "no weight": {"weight": torch.zeros_like(a["weight"])},
    }[change]
    leaves = {name: x.clone().requires_grad_() for name, x in a.items() if x is not None}
    y, *_ = run(a | leaves, ridge_decays=ridge_decays, solver=solver, chunk_size=16)
    expected = definition(a, ridge_decays=ridge_decays)[0]
    assert (y - expected).norm() <= 1e-10 * (1 + expected.norm())
    for gradient in torch.autograd.grad(y.square().sum() + y.sum(), list(leaves.values())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("ridge_decays", [True, False])
def test_equal_channels_are_one_head(ridge_decays: bool) -> None:
    a = arguments("head", 30) | {"curvature": None, "cross": None}
    per_head = a | {"ridge": a["ridge"][:, 0]}
    per_channel = per_head | {"ridge": a["ridge"][:, :1].expand(-1, KEY)}
    expected = run(per_head, ridge_decays=ridge_decays)[0]
    assert relative_error(run(per_channel, ridge_decays=ridge_decays)[0], expected) <= 1e-12
    per_channel["log_decay"] = a["log_decay"].unsqueeze(-1).expand_as(a["k"])
    assert relative_error(run(per_channel, ridge_decays=ridge_decays)[0], expected) <= 1e-11


def test_a_linear_map_is_recovered_whatever_each_channel_forgets() -> None:
    a = arguments("channel", 60, strength=0.3) | {"curvature": None, "cross": None}
    exact = torch.randn(KEY, VALUE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a |= {"v": a["k"] @ exact, "ridge": torch.full((HEADS,), 1e-12, dtype=torch.float64)}
    assert relative_error(run(a)[0][:, -20:], (a["q"] @ exact)[:, -20:]) <= 1e-9


def test_no_matrix_a_token_is_kept_for_backward() -> None:
    a = arguments("head", 256, key=32)
    leaves = {name: x.requires_grad_() for name, x in a.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        run(leaves, solver="chunk", chunk_size=64)
    assert max(saved) <= BATCH * HEADS * 256 * 64


def test_half_precision_keeps_its_dtype_and_a_wide_state() -> None:
    a = arguments("head", 40)
    half = {name: x.float() if name in ("curvature", "cross") else x.bfloat16() for name, x in a.items()}
    exact = {name: x.double() for name, x in half.items()}
    y, *state = run(half)
    assert y.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in state)
    assert relative_error(y, definition(exact, ridge_decays=True)[0]) <= 0.01


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e15])
def test_queries_of_any_size_are_solved(size: float) -> None:
    """Gradients of tokens that hardly matter are as small, and the backward pass solves for them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    options = {"ridge": torch.full((2, 16), 0.3), "ridge_decays": False, "solver": "conjugate_gradients"}
    usual, _ = ops.least_squares(q, k, v, **options)
    scale = torch.where(torch.arange(40) % 3 == 1, size, 1.0)[:, None, None]
    y, _ = ops.least_squares(scale * q, k, v, **options)
    torch.testing.assert_close(y / scale, usual, rtol=1e-4, atol=1e-5)


def test_says_when_it_has_not_converged() -> None:
    a = arguments("head", 20)
    with pytest.warns(ops.ConvergenceWarning, match=r"residual .* after 2 steps"):
        run(a, ridge_decays=False, steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": torch.zeros(HEADS)}, "ridge: expected finite values in (0, inf), got"),
        ({"ridge": torch.ones(HEADS + 1)}, f"ridge: expected shape (heads={HEADS}), got ({HEADS + 1},)"),
        ({"ridge": 0.25}, "ridge: expected a tensor of axes (heads key), got 0.25"),
        ({"weight": torch.full((BATCH, 4, HEADS), -1.0)}, "weight: expected finite values in [0, inf)"),
        ({"log_decay": torch.ones(BATCH, 4, HEADS)}, "log_decay: expected finite values in (-inf, 0]"),
        ({"log_decay": torch.full((BATCH, 4, HEADS), float("nan"))}, "log_decay: expected finite values"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance: expected a positive number, got 0.0"),
        ({"solver": "newton"}, 'solver: expected one of "auto", "chunk", "conjugate_gradients", "direct"'),
        ({"solver": "chunk", "ridge_decays": False}, "for a ridge that stays, got 'chunk'"),
        (
            {"solver": "conjugate_gradients", "log_decay": torch.zeros(BATCH, 4, HEADS, KEY)},
            'solver: expected one of "auto", "direct" for a decay per channel, got \'conjugate_gradients\'',
        ),
        (
            {"backend": "triton", "log_decay": torch.zeros(BATCH, 4, HEADS, KEY)},
            'backend: expected "auto" or "torch" for least squares with a decay per channel',
        ),
        ({"curvature": torch.ones(BATCH, HEADS, KEY)}, "initial_state[0]: expected shape (batch="),
        ({"cross": torch.ones(BATCH, HEADS, KEY, VALUE + 1)}, "initial_state[1]: expected shape (batch="),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    a = {name: x.float() for name, x in arguments("head", 4).items()} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        run(a)


def test_a_large_ridge_is_linear_attention() -> None:
    a = arguments("head", 30) | {"weight": None, "ridge": torch.full((HEADS,), 1e8, dtype=torch.float64)}
    a |= {"curvature": None, "cross": None}
    expected, _ = ops.linear_attention(a["q"], a["k"], a["v"], a["log_decay"])
    assert relative_error(1e8 * run(a, ridge_decays=False)[0], expected) <= 1e-6
