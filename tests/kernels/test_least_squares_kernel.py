"""The kernels of least squares against the PyTorch rung in float64: solvers, states, gradients, packing.

Least squares loses digits to the condition of its problem, so a bound is relative to the rung's own error in float32.
The same tests run on a GPU where there is one.
"""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from guards import in_nan
from sampling import relative_error
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
import ttr_kernels
from ttr_kernels import _states, _whiten
from ttr_kernels._packing import packing
from ttr_kernels._roots import inverse_roots

from ttr import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Inputs = dict[str, Tensor]
STAYS = {"ridge_decays": False}
PROBLEMS = {
    "chunks": {"solver": "chunk"},
    "gradients, a ridge that decays": {"solver": "conjugate_gradients"},
    "gradients, a ridge that stays": {"solver": "conjugate_gradients"} | STAYS,
    "tokens": {"solver": "direct"},
    "tokens, a ridge that stays": {"solver": "direct"} | STAYS,
}
each_problem = pytest.mark.parametrize("how", PROBLEMS.values(), ids=PROBLEMS)
each_ridge = pytest.mark.parametrize("how", [{}, STAYS], ids=["decays", "stays"])


def draw(
    time: int, *, batch: int = 1, heads: int = 2, key: int = 20, value: int = 24, sequences: int | None = None,
    strength: float | None = 0.1, weight: bool = True, state: bool = True,
) -> Inputs:  # fmt: skip
    """Decays from 0 to −strength; without a strength, none."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    pairs = (batch, time, heads)
    x = {"q": normal(*pairs, key), "k": normalize(normal(*pairs, key), dim=-1), "v": normal(*pairs, value)}
    x["ridge"] = 0.25 + uniform(heads, key)
    if strength is not None:
        x["log_decay"] = -strength * uniform(*pairs)
    if weight:
        x["weight"] = 0.1 + uniform(*pairs)
    if state:
        root = normal(sequences or batch, heads, key, key)
        x["curvature"] = root @ root.mT / key + 0.5 * torch.eye(key)
        x["cross"] = normal(sequences or batch, heads, key, value)
    return {name: tensor.to(DEVICE) for name, tensor in x.items()}


def call(function: Any, inputs: Inputs, **how: Any) -> list[Tensor]:
    """y, G and C."""
    inputs = dict(inputs)
    curvature, cross = inputs.pop("curvature", None), inputs.pop("cross", None)
    state = None if curvature is None else (curvature, cross)
    y, states, *_ = function(**inputs, initial_state=state, **how)
    return [y, *states]


def results(function: Any, inputs: Inputs, **how: Any) -> Inputs:
    """Outputs, final states and the gradient of every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return with_gradients(call(function, leaves, **how), leaves)


def with_gradients(outputs: list[Tensor], leaves: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = dict(zip(("y", "curvature", "cross"), (x.detach() for x in outputs), strict=True))
    return found | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True) if x is not None}


def rung(**arguments: Any) -> Any:
    return ops.least_squares(**arguments, backend="torch")


def exactly(inputs: Inputs, **how: Any) -> Inputs:
    """In float64, by a factorisation a token."""
    return results(rung, {name: x.double() for name, x in inputs.items()}, **how | {"solver": "direct"})


def assert_as_exact_as_the_rung(actual: Inputs, inputs: Inputs, **how: Any) -> None:
    exact, single = exactly(inputs, **how), results(rung, inputs, **how)
    assert actual.keys() >= exact.keys()
    for name, expected in exact.items():
        error, allowed = relative_error(actual[name], expected), relative_error(single[name], expected) + 1e-5
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.1e}"


@each_problem
@pytest.mark.parametrize("full", [True, False], ids=["decay, weight, state", "none of these"])
def test_equals_the_pytorch_rung(how: dict[str, Any], full: bool, guarded_memory: Any) -> None:
    time, key = (18, 5) if how["solver"] == "direct" else (75, 20)
    inputs = draw(time, key=key, heads=2 if full else 1, strength=0.1 if full else None, weight=full, state=full)
    actual = results(ttr_kernels.least_squares, {name: in_nan(x) for name, x in inputs.items()}, **how)
    assert_as_exact_as_the_rung(actual, inputs, **how)


@pytest.mark.parametrize(("strength", "key", "time"), [(0.3, 20, 70), (1.0, 4, 40)])
def test_chunks_that_lose_digits_are_cut(strength: float, key: int, time: int, guarded_memory: Any) -> None:
    inputs = draw(time, key=key, value=5, heads=1, strength=strength, state=False)
    assert_as_exact_as_the_rung(results(ttr_kernels.least_squares, inputs), inputs)


@pytest.mark.parametrize("log_decay", [-0.1, -3.0, -20.0, -1000.0, -math.inf])
def test_a_fit_that_forgets_stays_bounded(log_decay: float, guarded_memory: Any) -> None:
    """Long after its ridge has faded and with fewer pairs in memory than dimensions."""
    inputs = draw(24, key=5, value=4, heads=1, weight=False, state=False)
    inputs |= {"q": inputs["k"], "log_decay": torch.full_like(inputs["log_decay"], log_decay)}
    found = results(ttr_kernels.least_squares, inputs)
    assert found["y"].norm() <= 2 * inputs["v"].norm()
    if log_decay <= -3:  # little but the newest pair is left, and that is recalled
        assert relative_error(found["y"], inputs["v"]) <= 0.05
    for name, x in found.items():
        assert x.isfinite().all(), name


def test_keys_that_do_not_span_the_space_stay_bounded() -> None:
    inputs = draw(130, key=16, value=4, heads=1, weight=False, state=False)
    keys = inputs["k"][..., :3] @ torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs |= {"k": normalize(keys, dim=-1), "log_decay": torch.full_like(inputs["log_decay"], -0.2)}
    y, *_ = call(ttr_kernels.least_squares, inputs)
    assert y.isfinite().all()
    assert y.norm() <= 10 * inputs["v"].norm()


@pytest.mark.parametrize("log_decay", [-20.0, -1000.0])
@pytest.mark.parametrize("where", ["middle", "everywhere"])
def test_strong_decay_beside_a_ridge_that_stays(log_decay: float, where: str) -> None:
    inputs = draw(70, key=8, value=5, heads=1, strength=0.01)
    inputs["log_decay"][:, 37 if where == "middle" else slice(None)] = log_decay
    assert_as_exact_as_the_rung(results(ttr_kernels.least_squares, inputs, **STAYS), inputs, **STAYS)


@pytest.mark.parametrize(("key", "time"), [(8, 70), (40, 20)])
def test_sixteen_tokens_by_woodbury(key: int, time: int, guarded_memory: Any) -> None:
    """The second level alone: every chunk is said to have lost its digits."""
    inputs = draw(time, key=key, heads=1, weight=False)
    packed = packing(1, time, None, inputs["q"].device)
    starts, _ = _states.chunk_states(inputs["k"], inputs["k"], inputs["log_decay"], inputs["curvature"], packed)
    queries, keys, x = (inputs["q"].new_empty(inputs["q"].shape) for _ in range(3))
    loss = torch.full(starts.shape[:2], 2.0, device=DEVICE)
    sequences = (inputs["q"], inputs["k"], inputs["log_decay"])
    _whiten._by_tokens(*sequences, starts, None, loss, queries, keys, x, packed)
    assert queries.isfinite().all()
    by_tokens = _whiten.whiten_by_tokens(*(y.contiguous() for y in sequences), starts, None, packed)
    assert relative_error(x, by_tokens) <= 1e-5


@pytest.mark.parametrize("size", [5, 33, 128])
def test_inverse_roots(size: int, guarded_memory: Any) -> None:
    factor = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    matrices = factor @ factor.mT / size + 0.1 * torch.eye(size, device=DEVICE)
    matrices[1, :, 1] = matrices[1, :, 0]
    matrices[1, :, :, 1] = matrices[1, :, :, 0]
    loss = torch.full((2, 1), math.nan, device=DEVICE)
    roots = inverse_roots(matrices, loss, packing(2, 1, None, loss.device).chunks, limit=2.0, first=True).tril()
    cholesky = torch.linalg.cholesky(matrices[0].double())
    assert relative_error(roots[0], torch.linalg.inv(cholesky)) <= 1e-6
    pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
    ratio = (matrices[0].diagonal(dim1=-2, dim2=-1) / pivots).amax() / 2
    torch.testing.assert_close(loss[0, 0], ratio.float(), rtol=1e-4, atol=0)
    # Two equal rows leave no second pivot: infinitely much is lost, and nothing grows.
    assert loss[1, 0] == math.inf
    assert roots.isfinite().all()


@each_ridge
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "in segments"])
def test_packed_sequences_equal_each_alone(
    how: dict[str, Any], segments: bool, monkeypatch: pytest.MonkeyPatch, guarded_memory: Any
) -> None:
    if segments:
        monkeypatch.setattr(_states, "ENOUGH_PROGRAMS", 10**6)
        monkeypatch.setattr(_states, "SHORTEST_SEGMENT", 1)
    bounds = [0, 0, 1, 66, 100]
    inputs = draw(100, heads=1, key=8, value=5, sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    packed = results(ttr_kernels.least_squares, inputs, cu_seqlens=cu_seqlens, **how)
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    alone = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        part = {name: x[:, start:stop] for name, x in leaves.items()}
        part |= {"ridge": leaves["ridge"], "curvature": leaves["curvature"][i : i + 1]}
        alone.append(call(rung, part | {"cross": leaves["cross"][i : i + 1]}, solver="direct", **how))
    y, *states = zip(*alone, strict=True)
    expected = with_gradients([torch.cat(y, 1), *(torch.cat(x) for x in states)], leaves)
    for name, x in expected.items():
        assert relative_error(packed[name], x) <= 2e-5, name


@each_ridge
def test_pieces_with_the_state_handed_on_equal_the_whole(how: dict[str, Any], guarded_memory: Any) -> None:
    inputs = draw(70, heads=1, key=8, value=5, state=False)
    whole = call(ttr_kernels.least_squares, inputs, **how)
    outputs, state = [], {}
    for start, stop in pairwise([0, 1, 2, 66, 70]):
        piece = {name: x if name == "ridge" else x[:, start:stop] for name, x in inputs.items()}
        y, curvature, cross = call(ttr_kernels.least_squares, piece | state, **how)
        state = {"curvature": curvature, "cross": cross}
        outputs.append(y)
    for actual, expected in zip((torch.cat(outputs, 1), *state.values()), whole, strict=True):
        assert relative_error(actual, expected) <= 1e-5


@each_problem
def test_no_weight_is_no_pair(how: dict[str, Any]) -> None:
    inputs = draw(12, heads=1, key=4, value=3, batch=2)
    inputs["weight"][0] = 0
    inputs["weight"][1, ::2] = 0
    assert_as_exact_as_the_rung(results(ttr_kernels.least_squares, inputs, **how), inputs, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_ridge
def test_half_precision_is_solved_in_float32(how: dict[str, Any], dtype: torch.dtype, guarded_memory: Any) -> None:
    inputs = draw(40, heads=1, key=8, value=5)
    half = inputs | {name: inputs[name].to(dtype) for name in ("q", "k", "v")}
    actual = results(ttr_kernels.least_squares, half, **how)
    assert actual["y"].dtype == actual["gradient of k"].dtype == dtype
    assert actual["curvature"].dtype == torch.float32
    for name, expected in exactly(half, **how).items():
        rounding = torch.finfo(dtype).eps if actual[name].dtype == dtype else 0
        assert relative_error(actual[name], expected) <= rounding + 2e-5 + 2 * torch.finfo(dtype).eps * (name != "y")


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e15])
def test_queries_of_any_size_are_solved(size: float) -> None:
    inputs = draw(40, key=16, state=False)
    usual, _ = ops.least_squares(**inputs, **STAYS, solver="conjugate_gradients", backend="triton")
    scale = torch.where(torch.arange(40, device=DEVICE) % 3 == 1, size, 1.0)[:, None, None]
    inputs["q"] = scale * inputs["q"]
    y, _ = ops.least_squares(**inputs, **STAYS, solver="conjugate_gradients", backend="triton")
    torch.testing.assert_close(y / scale, usual, rtol=1e-4, atol=1e-5)


@each_ridge
def test_the_future_and_other_sequences_never_matter(how: dict[str, Any]) -> None:
    inputs = draw(80, batch=2, heads=1, key=8, value=5, state=False)
    before = call(ttr_kernels.least_squares, inputs, **how)[0]
    for name, x in inputs.items():
        if name != "ridge":
            x[:, 70:] *= 1.5
            x[1] *= 1.5
    after = call(ttr_kernels.least_squares, inputs, **how)[0]
    # Conjugate gradients take the steps of a block of tokens together, and so round them together.
    assert torch.equal(before[0, :64], after[0, :64])
    assert relative_error(after[0, 64:70], before[0, 64:70]) <= 1e-5
    assert not torch.isclose(before[0, 70:], after[0, 70:]).all()


@each_ridge
def test_nothing_is_an_empty_answer(how: dict[str, Any]) -> None:
    inputs = draw(0)
    y, *states = call(ttr_kernels.least_squares, inputs, **how)
    assert y.shape == inputs["v"].shape
    for name, state in zip(("curvature", "cross"), states, strict=True):
        assert torch.equal(state, inputs[name])
        assert state.data_ptr() != inputs[name].data_ptr()


@each_ridge
def test_largest_heads(how: dict[str, Any], guarded_memory: Any) -> None:
    inputs = draw(66, heads=1, key=128, value=16)
    exact = call(rung, {name: x.double() for name, x in inputs.items()}, **how)
    for actual, expected in zip(call(ttr_kernels.least_squares, inputs, **how), exact, strict=True):
        assert relative_error(actual, expected) <= 1e-5


def test_a_ridge_a_head_is_one_a_channel() -> None:
    inputs = draw(10, key=4, value=3, state=False)
    per_channel = inputs | {"ridge": inputs["ridge"][:, :1].expand(-1, 4)}
    expected = call(ttr_kernels.least_squares, per_channel)
    for actual, wanted in zip(
        call(ttr_kernels.least_squares, inputs | {"ridge": inputs["ridge"][:, 0]}), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("solver", ["auto", "conjugate_gradients"])
def test_one_graph_forwards_and_backwards(solver: str) -> None:
    inputs = draw(6, heads=1, key=4, value=3)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        return call(ttr_kernels.least_squares, given, solver=solver, ridge_decays=solver == "auto")[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (function, compiled):
        y = run(*leaves.values())
        gradients.append([y.detach(), *torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True)])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("solver", ["chunk", "conjugate_gradients"])
def test_opcheck(solver: str, packed: bool) -> None:
    inputs = draw(6, heads=1, key=4, value=3)
    bounds = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE) if packed else None
    tensors = [inputs[name].requires_grad_() for name in ("q", "k", "weight", "log_decay", "curvature")]
    ridge = None if solver == "chunk" else inputs["ridge"].requires_grad_()
    torch.library.opcheck(torch.ops.ttr_kernels.whiten.default, (*tensors, ridge, bounds, solver, 50, 1e-6))


def test_the_op_calls_its_kernels_and_says_where_they_stop_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTR_CHECK", "1")
    inputs = draw(30, key=8, value=5)
    through_kernel, through_torch = (
        results(ops.least_squares, inputs, **STAYS, backend=backend) for backend in ("triton", "torch")
    )
    for name, expected in through_torch.items():
        assert relative_error(through_kernel[name], expected) <= 1e-5, name
    with pytest.warns(ops.ConvergenceWarning, match=r"residual .* after 2 steps"):
        call(ops.least_squares, inputs, **STAYS, steps=2, backend="triton")


BAD = [
    ({"q": torch.zeros(4, 2, 8)}, "q: expected shape (batch, time, heads, key), got (4, 2, 8)"),
    ({"k": torch.zeros(1, 4, 2, 9)}, "k: expected shape (batch=1, time=4, heads=2, key=8), got (1, 4, 2, 9)"),
    ({"ridge": torch.ones(3)}, "ridge: expected shape (heads=2), got (3,)"),
    ({"ridge": torch.ones(2, 8).half()}, "ridge: expected dtype torch.float32"),
    ({"log_decay": torch.zeros(1, 4, 2, 8)}, "log_decay: expected shape (batch=1, time=4, heads=2)"),
    ({"weight": torch.zeros(1, 4, 3)}, "weight: expected shape (batch=1, time=4, heads=2)"),
    ({"solver": "chunk"} | STAYS, 'solver: expected one of "auto", "conjugate_gradients", "direct" for a ridge that'),
    ({"solver": "newton"}, 'solver: expected one of "auto", "chunk", "conjugate_gradients", "direct"'),
    ({"initial_state": (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8, 8))}, "initial_state[0]: expected shape"),
    ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected int32"),
    (
        {name: torch.zeros(1, 4, 2, 129) for name in ("q", "k")} | {"ridge": torch.ones(2, 129)},
        "key: expected a head size from 1 to 128, got 129",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message.partition(":")[0] for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    inputs = {name: torch.zeros(1, 4, 2, 8) for name in ("q", "k", "v")} | {"ridge": torch.ones(2, 8)} | change
    inputs = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        ttr_kernels.least_squares(**inputs)
