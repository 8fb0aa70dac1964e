"""Packed sequences are computed as each is alone: outputs, final states, and every gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from sampling import HEADS, KEY, VALUE, relative_error
from torch import Tensor
from torch.nn.functional import normalize

from ttr import ops

LENGTHS = [5, 0, 21, 1, 9, 0]
TIME = sum(LENGTHS)
Named = dict[str, Tensor]


def bounds(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def tensors(*names: str, channels: bool = False, seed: int = 0) -> Named:
    """Those of these names, packed; the initial states have one row a sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pairs, rows = (1, TIME, HEADS), (len(LENGTHS), HEADS)
    a = {"q": normal(*pairs, KEY), "k": normalize(normal(*pairs, KEY), dim=-1), "v": normal(*pairs, VALUE)}
    a |= {"gain": a["k"] * normal(*pairs, 1).sigmoid(), "probe": normal(*pairs, KEY) / 2}
    a |= {name: -normal(*pairs).sigmoid() for name in ("log_decay", "log_momentum")}
    if channels:
        a["log_decay"] = -normal(*pairs, KEY).sigmoid()
    a |= {"weight": normal(*pairs).sigmoid(), "ridge": normal(HEADS).sigmoid()}
    a |= {"initial_state": normal(*rows, KEY, VALUE), "initial_momentum": normal(*rows, KEY, VALUE)}
    root = normal(*rows, KEY, KEY)
    a |= {"curvature": root @ root.mT + torch.eye(KEY), "cross": a["initial_state"]}
    return {name: a[name] for name in ("q", "k", "v", *names)}


def least_squares(curvature: Tensor | None = None, cross: Tensor | None = None, **a: object) -> tuple:
    return ops.least_squares(**a, initial_state=None if curvature is None else (curvature, cross))


def pairs_of(degree: int, **how: object) -> Callable[..., tuple]:
    def op(**a: object) -> tuple:
        y, pairs = ops.local_polynomial(degree=degree, **how, **a)
        return y, () if a.get("cu_seqlens") is None else pairs.cu_seqlens.diff().tolist()

    return op


STATES = ("initial_state", "initial_momentum", "curvature", "cross")
CASES = {
    "linear attention": (ops.linear_attention, tensors("initial_state")),
    "linear attention, decay per channel": (
        ops.linear_attention,
        tensors("log_decay", "initial_state", channels=True),
    ),
    "delta rule": (ops.delta_rule, tensors("gain", "log_decay", "initial_state")),
    "delta rule from zero": (ops.delta_rule, tensors("gain")),
    "delta rule with momentum": (
        ops.momentum_delta_rule,
        tensors("gain", "log_momentum", "log_decay", "initial_state", "initial_momentum"),
    ),
    "momentum from zero": (ops.momentum_delta_rule, tensors("gain", "log_momentum")),
    "least squares": (least_squares, tensors("ridge", "log_decay", "weight")),
    "least squares with a state": (least_squares, tensors("ridge", "curvature", "cross")),
    "least squares, ridge that stays": (
        lambda **a: least_squares(ridge_decays=False, tolerance=1e-14, **a),
        tensors("ridge", "log_decay", "curvature", "cross"),
    ),
    "local constant": (pairs_of(0), tensors()),
    "local linear": (pairs_of(1, window=4), tensors("ridge", "log_decay", "weight")),
    "local linear with a probe": (pairs_of(1), tensors("probe", "log_decay")),
    "local quadratic": (pairs_of(2), tensors("ridge")),
}


def one_by_one(op: Callable[..., tuple], a: Named) -> tuple[Tensor, ...]:
    """Each sequence in a call of its own; its outputs beside the others', its final state below theirs."""
    found = []
    for row, (start, stop) in enumerate(pairwise(bounds().tolist())):
        own = {name: x[:, start:stop] for name, x in a.items() if name not in STATES and name != "ridge"}
        own |= {name: x[row : row + 1] for name, x in a.items() if name in STATES}
        found.append(flat(op(**own, **{name: x for name, x in a.items() if name == "ridge"})))
    y, *states = zip(*found, strict=True)
    return torch.cat(y, 1), *(torch.cat(x) for x in states)


def flat(result: tuple) -> tuple[Tensor, ...]:
    y, state = result
    states = state if isinstance(state, tuple) else (state,)
    return y, *(x for x in states if isinstance(x, Tensor))


@pytest.mark.parametrize("name", CASES)
def test_packed_sequences_are_computed_as_each_alone(name: str) -> None:
    op, a = CASES[name]
    leaves = {name: x.clone().requires_grad_() for name, x in a.items()}

    def run(op: Callable[[Named], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        outputs = op(leaves)
        loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs)
        return *outputs, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    packed = run(lambda a: flat(op(**a, cu_seqlens=bounds(), chunk_size=8)))
    alone = run(lambda a: one_by_one(lambda **own: op(**own, chunk_size=8), a))
    for actual, expected in zip(packed, alone, strict=True):
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_empty_sequence_keeps_its_state_and_one_may_be_all(dtype: torch.dtype) -> None:
    a = tensors("gain", "log_decay", "initial_state")
    _, state = ops.delta_rule(**a, cu_seqlens=bounds(dtype=dtype))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(state[row], a["initial_state"][row]) == (length == 0)
    a["initial_state"] = a["initial_state"][:1]
    whole = ops.delta_rule(**a)
    for actual, expected in zip(ops.delta_rule(**a, cu_seqlens=bounds([TIME], dtype)), whole, strict=True):
        assert torch.equal(actual, expected)


def test_packed_pairs_are_no_state_to_go_on_from_but_each_sequences_are() -> None:
    a = tensors("log_decay")
    y, pairs = ops.local_polynomial(**a, degree=0, cu_seqlens=bounds())
    split = [x.split(LENGTHS, 1) for x in (pairs.k, pairs.v, pairs.log_decay)]
    half = {name: x[:, 5:15] for name, x in a.items()}
    _, past = ops.local_polynomial(**half, degree=0)
    rest = {name: x[:, 15:26] for name, x in a.items()}
    continued, whole = ops.local_polynomial(**rest, degree=0, initial_state=past)
    assert relative_error(continued, y[:, 15:26]) <= 1e-13
    for actual, expected in zip(whole[:3], split, strict=True):
        assert torch.equal(actual, expected[2])
    detached = pairs.map(lambda x: x.float())
    assert detached.k.dtype == torch.float32
    assert detached.cu_seqlens.dtype == torch.int32
    with pytest.raises(ValueError, match="initial_state: expected None with cu_seqlens"):
        ops.local_polynomial(**a, degree=0, initial_state=past, cu_seqlens=bounds())
    with pytest.raises(ValueError, match="initial_state: expected a batch of past pairs, got those of packed"):
        ops.local_polynomial(**a, degree=0, initial_state=pairs)


def call(op: str, **changed: object) -> object:
    names = {
        "linear_attention": (),
        "delta_rule": ("gain",),
        "momentum_delta_rule": ("gain", "log_momentum"),
        "least_squares": ("ridge",),
        "local_polynomial": ("ridge",),
    }
    more = {"degree": 1} if op == "local_polynomial" else {}
    return getattr(ops, op)(**tensors(*names[op]) | more | {"cu_seqlens": bounds()} | changed)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "op", ["linear_attention", "delta_rule", "momentum_delta_rule", "least_squares", "local_polynomial"]
)
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([1, TIME]), f"cu_seqlens: expected bounds from 0 to time={TIME}, got from 1 to {TIME}"),
        (torch.tensor([0, TIME - 1]), f"cu_seqlens: expected bounds from 0 to time={TIME}, got from 0 to {TIME - 1}"),
        (torch.tensor([0, 9, 4, TIME]), "cu_seqlens: expected bounds that never fall, got a sequence of length -5"),
        (torch.tensor([0.0, TIME]), "cu_seqlens: expected int32 or int64 (sequences + 1), got torch.float32 (2,)"),
        (torch.tensor([[0, TIME]]), "cu_seqlens: expected int32 or int64 (sequences + 1), got torch.int64 (1, 2)"),
        (torch.tensor([0]), "cu_seqlens: expected int32 or int64 (sequences + 1), got torch.int64 (1,)"),
        ([0, TIME], "cu_seqlens: expected int32 or int64 (sequences + 1), got <class 'list'>"),
        (torch.tensor([0, TIME], device="meta"), "cu_seqlens: expected the device of q (cpu), got meta"),
    ],
)
def test_bounds_are_checked(op: str, cu_seqlens: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(op, cu_seqlens=cu_seqlens)


@pytest.mark.usefixtures("unchecked_types")
def test_batch_and_states_are_checked() -> None:
    batch = {name: torch.ones(2, TIME, HEADS, KEY) for name in ("q", "k", "v", "gain")}
    with pytest.raises(ValueError, match="cu_seqlens: expected a batch of 1, whose tokens it divides, got 2"):
        ops.delta_rule(**batch, cu_seqlens=bounds())
    message = "initial_state: expected shape (sequences=6, heads=3, key=5, value=4), got (1, 3, 5, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        call("delta_rule", initial_state=torch.ones(1, HEADS, KEY, VALUE))
