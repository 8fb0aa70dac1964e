"""The two recurrent families against their recurrences in float64, and the properties they must have."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import BATCH, HEADS, KEY, VALUE, relative_error
from torch import Tensor
from torch.nn.functional import normalize

from ttr import ops
from ttr.ops import _chunks

Arguments = dict[str, Tensor | None]


def recurrence(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """S̄ = αS, u = v − S̄ᵀk (v itself for a Hebbian write), M = ηM + g uᵀ, S = S̄ + M, y = Sᵀq."""
    q, k, v, gain = a["q"], a["k"], a["v"], a.get("gain")
    state = a["initial_state"]
    momentum = a.get("initial_momentum", torch.zeros_like(state))
    outputs = []
    for t in range(q.shape[1]):
        if a["log_decay"] is not None:
            decay = a["log_decay"][:, t].exp()
            state = (decay if decay.ndim == 3 else decay.unsqueeze(-1)).unsqueeze(-1) * state
        error = v[:, t] if gain is None else v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        write = torch.einsum("bhk,bhv->bhkv", k[:, t] if gain is None else gain[:, t], error)
        keep = a["log_momentum"][:, t].exp()[..., None, None] if "log_momentum" in a else 0.0
        momentum = keep * momentum + write
        state = state + momentum
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state, momentum


def arguments(op: str, decay: str, time: int, *, strength: float = 1.0, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def log_factor(*shape: int) -> Tensor:
        return -strength * torch.rand(shape, generator=generator, dtype=torch.float64)

    pairs = (BATCH, time, HEADS)
    log_decay = {"none": None, "head": log_factor(*pairs), "channel": log_factor(*pairs, KEY)}[decay]
    k = normalize(normal(*pairs, KEY), dim=-1)
    a: Arguments = {"q": normal(*pairs, KEY), "k": k, "v": normal(*pairs, VALUE), "log_decay": log_decay}
    a["initial_state"] = normal(BATCH, HEADS, KEY, VALUE)
    if op != "linear_attention":
        # A gain of its own, not a multiple of the key, as the ops promise.
        a["gain"] = k * torch.rand(*pairs, 1, generator=generator, dtype=torch.float64) + 0.1 * normal(*pairs, KEY)
    if op == "momentum_delta_rule":
        a |= {"log_momentum": -0.5 + log_factor(*pairs), "gain": 0.5 * a["gain"]}
        a["initial_momentum"] = normal(BATCH, HEADS, KEY, VALUE)
    return a


def is_state(name: str) -> bool:
    return name.startswith("initial")


def on_sequences(a: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with the function applied to all that have a time axis."""
    return {name: x if x is None or is_state(name) else function(x) for name, x in a.items()}


def run(op: str, a: Arguments, **how: object) -> tuple[Tensor, ...]:
    y, state = getattr(ops, op)(**a, **how)
    return (y, *state) if isinstance(state, tuple) else (y, state)


OPS = ["linear_attention", "delta_rule", "momentum_delta_rule"]
CASES = [(op, decay) for op in OPS for decay in ("none", "head", "channel") if (op, decay) != (OPS[2], "channel")]
each_case = pytest.mark.parametrize(("op", "decay"), CASES)


@each_case
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
@pytest.mark.parametrize("time", [1, 64, 75])
def test_equals_its_recurrence(op: str, decay: str, chunk_size: int, time: int) -> None:
    a = arguments(op, decay, time)
    expected = recurrence(a)
    for actual, wanted in zip(run(op, a, chunk_size=chunk_size), expected, strict=False):
        assert relative_error(actual, wanted) <= 1e-13
    single = {name: None if x is None else x.float() for name, x in a.items()}
    exact = {name: None if x is None else x.double() for name, x in single.items()}
    for actual, wanted in zip(run(op, single, chunk_size=chunk_size), recurrence(exact), strict=False):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted) <= 2e-6


@each_case
def test_gradients_of_every_argument(op: str, decay: str) -> None:
    a = arguments(op, decay, 17)  # two chunks and a single token
    a = on_sequences(a, lambda x: x[:1, :, :1]) | {name: x[:1, :1] for name, x in a.items() if is_state(name)}
    names = [name for name, x in a.items() if x is not None]
    leaves = [a[name].clone().requires_grad_() for name in names]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return run(op, a | dict(zip(names, leaves, strict=True)), chunk_size=8)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@each_case
def test_float32_gradients_equal_those_of_the_recurrence(op: str, decay: str) -> None:
    a = arguments(op, decay, 75)
    names = [name for name, x in a.items() if x is not None]

    def gradients(function: Callable[[Arguments], tuple[Tensor, ...]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [a[name].float().to(dtype).requires_grad_() for name in names]
        outputs = function(a | dict(zip(names, leaves, strict=True)))
        return torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)

    count = len(run(op, a))
    expected = gradients(lambda a: recurrence(a)[:count], torch.float64)
    for name, actual, wanted in zip(names, gradients(lambda a: run(op, a), torch.float32), expected, strict=True):
        assert relative_error(actual, wanted) <= 1e-5, name


@each_case
def test_a_few_chunks_at_a_time_equal_all_at_once(op: str, decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is treated at once depends on the sizes of caches: a chunk each, and all of them."""
    a = arguments(op, decay, 75)
    names = [name for name, x in a.items() if x is not None]

    def outputs_and_gradients(cached: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(_chunks, "CACHED", cached)
        leaves = [a[name].clone().requires_grad_() for name in names]
        outputs = run(op, a | dict(zip(names, leaves, strict=True)), chunk_size=16)
        return *outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)

    for few, many in zip(outputs_and_gradients(1), outputs_and_gradients(2**30), strict=True):
        assert relative_error(few, many) <= 1e-13


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_keys_that_are_nearly_one_lose_no_digit(decay: str) -> None:
    """Full corrections along one direction: powers of A reach 10¹⁰ and more where (I + A)⁻¹ is of size one."""
    a = arguments("delta_rule", decay, 128, strength=0.01)
    k = normalize(a["k"][:, :1] + 0.05 * a["k"], dim=-1)
    single = {name: None if x is None else x.float() for name, x in (a | {"k": k, "gain": k}).items()}
    exact = {name: None if x is None else x.double() for name, x in single.items()}
    for actual, wanted in zip(run("delta_rule", single), recurrence(exact), strict=False):
        assert relative_error(actual, wanted) <= 2e-6


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize("where", ["middle", "everywhere", "erased"])
def test_strong_decay_loses_no_digit(op: str, decay: str, where: str) -> None:
    """−25 in the middle of a chunk of weak decays, −20 at every token, and everything erased once a chunk."""
    a = arguments(op, decay, 128, strength=0.01)
    if where == "everywhere":
        a["log_decay"] = a["log_decay"] - 20
    else:
        a["log_decay"][:, 37::64] = -25 if where == "middle" else -1000
    single = {name: x.float().requires_grad_() for name, x in a.items()}
    exact = {name: x.detach().double() for name, x in single.items()}
    y, state = run(op, single)
    expected_y, expected_state, _ = recurrence(exact)
    for t in range(128):  # each token on its own scale: a lost digit may not hide behind large neighbours
        assert relative_error(y[:, t], expected_y[:, t]) <= 3e-6
    assert relative_error(state, expected_state) <= 2e-6
    for gradient in torch.autograd.grad(y.sum() + state.sum(), list(single.values())):
        assert gradient.isfinite().all()


@each_case
@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(0, 40), max_size=4), chunk_size=st.integers(1, 20))
def test_split_anywhere_equals_whole(op: str, decay: str, cuts: set[int], chunk_size: int) -> None:
    a = arguments(op, decay, 40)
    whole, *final = run(op, a)
    states = {name: x for name, x in a.items() if is_state(name)}
    outputs = []
    edges = [0, *sorted(cuts), 40]
    for start, stop in itertools.pairwise(edges):
        part = on_sequences(a, lambda x, span=slice(start, stop): x[:, span])
        y, *after = run(op, part | states, chunk_size=chunk_size)
        states = dict(zip(states, after, strict=True))
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) <= 1e-12
    for actual, wanted in zip(states.values(), final, strict=True):
        assert relative_error(actual, wanted) <= 1e-12


@each_case
def test_the_future_and_other_sequences_never_matter(op: str, decay: str) -> None:
    a = arguments(op, decay, 20)
    leaves = {name: x.clone().requires_grad_() for name, x in a.items() if x is not None}
    y = run(op, a | leaves, chunk_size=8)[0]
    gradients = torch.autograd.grad(y[0, 11].sum(), list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient[1].eq(0).all(), name
        if not is_state(name):
            assert gradient[0, 12:].eq(0).all(), name
            assert name == "q" or gradient[0, :11].ne(0).any(), name


@each_case
def test_degenerate_keys_and_lengths(op: str, decay: str) -> None:
    a = arguments(op, decay, 12)
    y, *states = run(op, on_sequences(a, lambda x: x[:, :0]))
    assert y.shape == (BATCH, 0, HEADS, VALUE)
    for name, state in zip(filter(is_state, a), states, strict=True):
        assert state.equal(a[name])

    for k in (torch.zeros_like(a["k"]), a["k"][:, :1].expand_as(a["k"])):
        changed = a | {"k": k} | ({"gain": k.clone()} if "gain" in a else {})
        assert relative_error(run(op, changed)[0], recurrence(changed)[0]) <= 1e-13
    one_head = on_sequences(a, lambda x: x[:, :, :1]) | {name: x[:, :1] for name, x in a.items() if is_state(name)}
    assert relative_error(run(op, one_head)[0], run(op, a)[0][:, :, :1]) <= 1e-13
    strided = on_sequences(a, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1))
    assert not strided["k"].is_contiguous()
    assert relative_error(run(op, strided)[0], run(op, a)[0]) <= 1e-13


def test_reflections_stay_bounded() -> None:
    """β = 2 on unit keys reflects: the error-free memory keeps its norm over a long sequence, in float32 too."""
    a = arguments("delta_rule", "none", 4096)
    a |= {"gain": 2 * a["k"], "v": torch.zeros_like(a["v"])}
    a = {name: None if x is None else x.float() for name, x in a.items()}
    _, state = run("delta_rule", a)
    assert relative_error(state.norm(dim=-2), a["initial_state"].norm(dim=-2)) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_case
def test_half_precision_inputs_keep_float32_states(op: str, decay: str, dtype: torch.dtype) -> None:
    a = arguments(op, decay, 75)
    half = on_sequences(a, lambda x: x.to(dtype)) | {name: x.float() for name, x in a.items() if is_state(name)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state, *_ = run(op, half)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    exact = {n: None if x is None else x.double() for n, x in half.items()}
    assert relative_error(state, recurrence(exact)[1]) <= 2e-6
    assert relative_error(y, recurrence(exact)[0]) <= torch.finfo(dtype).eps


def test_order_does_not_matter_without_decay() -> None:
    a = arguments("linear_attention", "none", 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    permuted = a | {"k": a["k"][:, order], "v": a["v"][:, order]}
    assert relative_error(run("linear_attention", permuted)[1], run("linear_attention", a)[1]) <= 1e-14


@pytest.mark.parametrize("trailing", [(), (1,), (KEY,)])
@pytest.mark.parametrize("time", [0, 1, 13])
def test_decayed_sum(trailing: tuple[int, ...], time: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, time, *trailing, generator=generator, dtype=torch.float64)
    log_decay = -30 * torch.rand(BATCH, time, *[1] * len(trailing), generator=generator, dtype=torch.float64)
    total = torch.randn(BATCH, *trailing, generator=generator, dtype=torch.float64)
    actual = ops.decayed_sum(x, log_decay, total)
    for t in range(time):
        total = log_decay[:, t].exp() * total + x[:, t]
        torch.testing.assert_close(actual[:, t], total)
    assert actual.shape == x.shape
