"""The kernels of linear attention and the delta rules against the PyTorch rung in float64: states, gradients, packing.

The same tests run on a GPU where there is one.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
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
from ttr_kernels import _states
from ttr_kernels._packing import packing

from ttr import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of outputs and gradients that are rounded to the inputs' dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [
    (op, decay)
    for op in ("linear_attention", "delta_rule", "momentum_delta_rule")
    for decay in ("none", "head", "channel")
    if (op, decay) != ("momentum_delta_rule", "channel")
]
each_case = pytest.mark.parametrize(("op", "decay"), CASES)
Inputs = dict[str, Tensor]


def draw(
    op: str, decay: str, time: int, *, batch: int = 1, heads: int = 2, key: int = 20, value: int = 24,
    sequences: int | None = None, dtype: torch.dtype = torch.float32, strength: float = 1.0,
) -> Inputs:  # fmt: skip
    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    pairs = (batch, time, heads)
    state = (sequences or batch, heads, key, value)
    x = {"q": normal(*pairs, key), "k": normalize(normal(*pairs, key), dim=-1), "v": normal(*pairs, value)}
    if op != "linear_attention":
        step = 0.5 if op == "momentum_delta_rule" else 1.0
        x["gain"] = step * (x["k"] * uniform(*pairs, 1) + 0.1 * normal(*pairs, key))
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    if op == "momentum_delta_rule":
        x["log_momentum"] = -0.5 - uniform(*pairs)
        x["initial_momentum"] = normal(*state)
    if decay != "none":
        x["log_decay"] = -strength * uniform(*pairs, *[key] * (decay == "channel"))
    x["initial_state"] = normal(*state)
    return {name: tensor.to(DEVICE) for name, tensor in x.items()}


def results(function: Callable[..., Any], inputs: Inputs, **others: Any) -> dict[str, Tensor]:
    """Outputs, final states and the gradient of every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, states = function(**leaves, **others)
    outputs = (y, *states) if isinstance(states, tuple) else (y, states)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    names = ("y", "final state", "final momentum")[: len(outputs)]
    found = dict(zip(names, (x.detach() for x in outputs), strict=True))
    return found | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def reference(op: str, inputs: Inputs, **others: Any) -> dict[str, Tensor]:
    exact = {name: x.double() for name, x in inputs.items()}
    return results(getattr(ops, op), exact, backend="torch", **others)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.1e}"


@each_case
@pytest.mark.parametrize(
    "sizes",
    [
        {"time": 150, "batch": 1, "heads": 2, "key": 20, "value": 40},
        {"time": 64, "batch": 2, "heads": 1, "key": 31, "value": 16},
        {"time": 9, "batch": 1, "heads": 1, "key": 5, "value": 3},
    ],
    ids=str,
)
def test_equals_the_pytorch_rung(op: str, decay: str, sizes: dict[str, int], guarded_memory: Any) -> None:
    inputs = draw(op, decay, **sizes)
    actual = results(getattr(ttr_kernels, op), {name: in_nan(x) for name, x in inputs.items()})
    assert_close(actual, reference(op, inputs), 1e-5)


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(op: str, decay: str, dtype: torch.dtype, guarded_memory: Any) -> None:
    inputs = draw(op, decay, 75, dtype=dtype)
    actual = results(getattr(ttr_kernels, op), {name: in_nan(x) for name, x in inputs.items()})
    assert actual["y"].dtype == actual["gradient of q"].dtype == dtype
    assert actual["final state"].dtype == torch.float32
    assert_close(actual, reference(op, inputs), TOLERANCES[dtype])


def cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make segments as short as they can be."""
    for name, value in (("ENOUGH_PROGRAMS", 10**6), ("SHORTEST_SEGMENT", 1), ("FEWEST_SEGMENTS", 1)):
        monkeypatch.setattr(_states, name, value)
    assert _states.segments(packing(1, 200, None, torch.device(DEVICE)), 1).number == 4


@each_case
def test_segments_equal_the_whole(op: str, decay: str, monkeypatch: pytest.MonkeyPatch, guarded_memory: Any) -> None:
    """Where programs are few, sequences are cut, and the states between the segments found first."""
    cut_into_chunks(monkeypatch)
    inputs = draw(op, decay, 200, heads=1)
    assert_close(results(getattr(ttr_kernels, op), inputs), reference(op, inputs), 1e-5)


@each_case
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in segments"])
def test_packed_sequences_equal_each_alone(
    op: str, decay: str, cut: bool, monkeypatch: pytest.MonkeyPatch, guarded_memory: Any
) -> None:
    if cut:
        cut_into_chunks(monkeypatch)
    bounds = [0, 0, 1, 66, 150]
    inputs = draw(op, decay, 150, heads=1, sequences=4)
    packed = results(getattr(ttr_kernels, op), inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32).to(DEVICE))
    for i, (start, stop) in enumerate(pairwise(bounds)):
        alone = {n: x[i : i + 1] if n.startswith("initial") else x[:, start:stop] for n, x in inputs.items()}
        leaves = {name: x.double() for name, x in alone.items()}
        y, states = getattr(ops, op)(**leaves, backend="torch")
        state = states[0] if isinstance(states, tuple) else states
        if stop > start:
            assert relative_error(packed["y"][:, start:stop], y) <= 1e-5
        assert relative_error(packed["final state"][i : i + 1], state) <= 1e-5
    # The gradients of all, by one sum over the sequences.
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    outputs = [[], [], []]
    for i, (start, stop) in enumerate(pairwise(bounds)):
        alone = {n: x[i : i + 1] if n.startswith("initial") else x[:, start:stop] for n, x in leaves.items()}
        y, states = getattr(ops, op)(**alone, backend="torch")
        for of_all, of_one in zip(outputs, (y, *(states if isinstance(states, tuple) else (states,))), strict=False):
            of_all.append(of_one)
    joined = [torch.cat(outputs[0], 1), *(torch.cat(x) for x in outputs[1:] if x)]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype) for x in joined]
    gradients = torch.autograd.grad(joined, list(leaves.values()), cotangents)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative_error(packed[f"gradient of {name}"], gradient) <= 1e-5, name


@each_case
@pytest.mark.parametrize("time", [1, 3])
def test_a_few_tokens_equal_the_pytorch_rung(op: str, decay: str, time: int, guarded_memory: Any) -> None:
    inputs = draw(op, decay, time, batch=2, value=40)
    with torch.no_grad():  # decoding: momentum has a kernel of its own where nothing is differentiated
        y, states = getattr(ttr_kernels, op)(**{name: in_nan(x) for name, x in inputs.items()})
        exact_y, exact = getattr(ops, op)(**{name: x.double() for name, x in inputs.items()}, backend="torch")
    assert relative_error(y, exact_y) <= 1e-6
    for actual, expected in zip(
        states if isinstance(states, tuple) else [states], exact if isinstance(exact, tuple) else [exact], strict=True
    ):
        assert relative_error(actual, expected) <= 1e-6


@each_case
def test_pieces_with_the_state_handed_on_equal_the_whole(op: str, decay: str) -> None:
    inputs = draw(op, decay, 70, heads=1)
    state_names = [name for name in ("initial_state", "initial_momentum") if name in inputs]
    whole, _ = getattr(ttr_kernels, op)(**inputs)
    states = {name: inputs[name] for name in state_names}
    outputs = []
    for start, stop in pairwise([0, 1, 2, 66, 70]):
        piece = {name: x[:, start:stop] for name, x in inputs.items() if name not in state_names}
        y, after = getattr(ttr_kernels, op)(**piece, **states)
        states = dict(zip(state_names, after if isinstance(after, tuple) else (after,), strict=True))
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) <= 1e-6


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
@pytest.mark.parametrize("large", [-25.0, -1e4, -math.inf])
def test_strong_decay_loses_no_digit(op: str, decay: str, large: float) -> None:
    """−25 and more in the middle of weak decays: each token on its own scale."""
    inputs = draw(op, decay, 130, heads=1, strength=0.01)
    inputs["log_decay"][:, 20::41] = large
    finite = {name: x.clamp_min(-1e5) for name, x in inputs.items()}
    actual, expected = results(getattr(ttr_kernels, op), inputs), reference(op, finite)
    for t in range(130):
        assert relative_error(actual["y"][:, t], expected["y"][:, t]) <= 1e-5
    assert relative_error(actual["final state"], expected["final state"]) <= 1e-5
    for name, gradient in actual.items():
        assert gradient.isfinite().all(), name
        if name not in ("gradient of initial_state", "gradient of log_decay"):  # next to nothing is left of these
            assert relative_error(gradient, expected[name]) <= 1e-5, name


def test_keys_that_are_nearly_one_lose_no_digit() -> None:
    """Full corrections along one direction: powers of A reach 10¹⁰ where (I + A)⁻¹ is of size one."""
    inputs = draw("delta_rule", "none", 128, heads=1)
    k = normalize(inputs["k"][:, :1] + 0.05 * inputs["k"], dim=-1)
    inputs |= {"k": k, "gain": k.clone()}
    assert_close(results(ttr_kernels.delta_rule, inputs), reference("delta_rule", inputs), 1e-5)


def test_reflections_stay_bounded() -> None:
    """β = 2 on unit keys reflects: a memory that is told nothing keeps its norm."""
    inputs = draw("delta_rule", "none", 256, heads=1)
    inputs |= {"gain": 2 * inputs["k"], "v": torch.zeros_like(inputs["v"])}
    _, state = ttr_kernels.delta_rule(**inputs)
    assert relative_error(state.norm(dim=-2), inputs["initial_state"].norm(dim=-2)) <= 1e-5


@each_case
def test_the_future_and_other_sequences_never_matter(op: str, decay: str) -> None:
    inputs = draw(op, decay, 80, batch=2, heads=1)
    before = getattr(ttr_kernels, op)(**inputs)[0]
    states = ("initial_state", "initial_momentum")
    for name, x in inputs.items():
        if name not in states:
            x[:, 45:] *= 1.5
        x[1] *= 1.5
    after = getattr(ttr_kernels, op)(**inputs)[0]
    assert torch.equal(before[0, :45], after[0, :45])
    assert not torch.isclose(before[0, 45:], after[0, 45:]).all()


@each_case
def test_nothing_is_an_empty_answer(op: str, decay: str) -> None:
    inputs = draw(op, decay, 0)
    y, states = getattr(ttr_kernels, op)(**inputs)
    assert y.shape == inputs["v"].shape
    final = states if isinstance(states, tuple) else (states,)
    for name, state in zip(("initial_state", "initial_momentum"), final, strict=False):
        assert torch.equal(state, inputs[name])
        assert state.data_ptr() != inputs[name].data_ptr()


def test_views_equal_their_copies() -> None:
    inputs = draw("delta_rule", "channel", 30, key=16, value=16)
    views = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in views.values())
    expected = results(ttr_kernels.delta_rule, inputs)
    for name, x in results(ttr_kernels.delta_rule, views).items():
        assert torch.equal(x, expected[name]), name


@each_case
def test_one_graph_forwards_and_backwards(op: str, decay: str) -> None:
    inputs = draw(op, decay, 10, heads=1, key=4, value=3)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def function(*tensors: Tensor) -> Any:
        return getattr(ttr_kernels, op)(**dict(zip(leaves, tensors, strict=True)))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (function, compiled):
        y = run(*leaves.values())[0]
        gradients.append([y.detach(), *torch.autograd.grad(y.sum(), list(leaves.values()))])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_opcheck(op: str, packed: bool) -> None:
    """Schemas, fake implementations and autograd, as torch's own checker sees them."""
    inputs = draw(op, "head", 10, heads=1, key=4, value=3)
    bounds = torch.tensor([0, 10], dtype=torch.int32, device=DEVICE) if packed else None
    names = ["q", "k", "v", *(["gain"] if op == "delta_rule" else []), "log_decay", "initial_state"]
    tensors = [inputs[name].requires_grad_() for name in names]
    torch.library.opcheck(getattr(torch.ops.ttr_kernels, op).default, (*tensors, bounds))


BAD = [
    ({"q": torch.zeros(4, 2, 8)}, r"q: expected shape \(batch, time, heads, key\), got \(4, 2, 8\)"),
    ({"q": torch.zeros(1, 4, 2, 8).double()}, r"q: expected dtype .*got torch.float64"),
    ({"k": torch.zeros(1, 4, 2, 9)}, r"k: expected shape .*key=8\), got \(1, 4, 2, 9\)"),
    ({"k": torch.zeros(1, 4, 2, 8).half()}, "k: expected dtype torch.float32, got torch.float16"),
    ({"k": torch.zeros(1, 4, 2, 8, device="meta")}, "k: expected device .*that of q, got meta"),
    ({"v": torch.zeros(1, 5, 2, 8)}, r"v: expected shape .*time=4.*got \(1, 5, 2, 8\)"),
    ({"v": torch.zeros(1, 4, 2, 257)}, "value: expected a head size from 1 to 256, got 257"),
    ({"q": torch.zeros(1, 4, 2, 0), "k": torch.zeros(1, 4, 2, 0)}, "key: expected a head size .*got 0"),
    ({"log_decay": torch.zeros(1, 4, 3)}, r"log_decay: expected shape .*heads=2\), got"),
    ({"log_decay": torch.zeros(1, 4, 2).half()}, "log_decay: expected dtype torch.float32"),
    ({"initial_state": torch.zeros(1, 2, 8, 4)}, r"initial_state: expected shape .*value=8\), got"),
    ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens: expected int32 .*got torch.int64"),
    ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, r"cu_seqlens: expected int32 \(sequences \+ 1\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_named(change: Inputs, message: str) -> None:
    inputs = {name: torch.zeros(1, 4, 2, 8) for name in ("q", "k", "v")} | change
    inputs = {name: x.to(DEVICE) if x.device.type == "cpu" else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=message):
        ttr_kernels.linear_attention(**inputs)


def test_momentum_says_which_keys_are_too_large() -> None:
    inputs = draw("momentum_delta_rule", "none", 2, key=33)
    with pytest.raises(ValueError, match=r"key: expected a head size from 1 to 32 in torch.float32, got 33"):
        ttr_kernels.momentum_delta_rule(**inputs)


def test_packed_sequences_stand_in_a_batch_of_one() -> None:
    x = torch.zeros(2, 4, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected a batch of 1, .*got 2"):
        ttr_kernels.linear_attention(x, x, x, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32, device=DEVICE))


def test_cpu_tensors_need_the_interpreter() -> None:
    program = (
        "import torch, ttr_kernels\n"
        "x = torch.zeros(1, 4, 1, 8)\n"
        "try:\n"
        "    ttr_kernels.linear_attention(x, x, x)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "set TRITON_INTERPRET=1" in result.stdout
    assert 'backend="torch"' in result.stdout
