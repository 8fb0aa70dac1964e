"""The kernels of local linear attention against the PyTorch rung in float64: outputs, gradients, packing, past pairs.

The same tests run on a GPU where there is one.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from guards import in_nan
from sampling import relative_error
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from ttr_kernels import local_linear

from ttr import ops
from ttr.ops import ConvergenceWarning
from ttr.ops.local_polynomial import PastPairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BANDWIDTH = 2.0
Inputs = dict[str, Tensor]


def draw(
    *factors: str, time: int = 100, past: int = 0, batch: int = 1, heads: int = 2, key: int = 20, value: int = 24,
    dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    """Queries, pairs and, of `factors`, what else decides the fit; a probe in the place of a ridge."""
    generator = torch.Generator().manual_seed(time + past)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pairs = (batch, past + time, heads)
    size = 2 * key**-0.25  # so that scores are of size one
    x = {"q": size * normal(batch, time, heads, key), "k": 0.3 + size * normal(*pairs, key), "v": normal(*pairs, value)}
    if "probe" in factors:
        x["probe"] = normal(*x["q"].shape)
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    if "probe" not in factors:
        x["ridge"] = 0.5 + torch.rand(heads, generator=generator)
    if "log_decay" in factors:
        x["log_decay"] = -0.2 * torch.rand(pairs, generator=generator)
    if "log_weight" in factors:
        x["log_weight"] = normal(*pairs).where(normal(*pairs) > -0.5, -math.inf)
        x["log_weight"][:, :2] = -math.inf  # what the first queries see
    return {name: tensor.to(DEVICE) for name, tensor in x.items()}


def with_gradients(y: Tensor, leaves: Inputs) -> Inputs:
    # With y in the cotangent what all tokens say of the ridge adds up; of random signs only rounding would be left.
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) + 2 * y.detach()
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach()} | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def in_kernel(inputs: Inputs, **others: Any) -> Inputs:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    target = None if "probe" in leaves else leaves["q"]
    return with_gradients(local_linear(**leaves, target=target, scale=BANDWIDTH**-2, **others)[0], leaves)


def in_torch(inputs: Inputs, **others: Any) -> Inputs:
    """The same in float64, the pairs before the queries handed over as a state."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    x = dict(leaves)
    if "log_weight" in x:
        x["weight"] = x.pop("log_weight").exp()
    past = x["k"].shape[1] - x["q"].shape[1]
    names = [name for name in ("k", "v", "log_decay", "weight") if name in x]
    state = PastPairs(**{name: x[name][:, :past] for name in names}) if past else None
    x |= {name: x[name][:, past:] for name in names}
    y, _ = ops.local_polynomial(
        **x, degree=1, bandwidth=BANDWIDTH, initial_state=state, solver="direct", backend="torch", **others
    )
    return with_gradients(y, leaves)


def assert_close(actual: Inputs, expected: Inputs, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in actual}
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.1e}"


@pytest.mark.parametrize(
    ("factors", "sizes", "window"),
    [
        ("", {"time": 150, "heads": 1, "value": 40}, None),
        ("log_decay", {"time": 70, "batch": 2, "heads": 1, "key": 33, "value": 16}, 40),
        ("log_weight", {"time": 75}, None),
        ("log_decay log_weight", {"time": 90, "heads": 1, "key": 3, "value": 70}, 3),
        ("probe", {"time": 100, "key": 16, "value": 16}, None),
        ("probe log_decay log_weight", {"time": 75, "past": 40}, 33),
        ("log_decay", {"time": 20, "past": 90}, None),
        ("log_decay log_weight", {"time": 1, "past": 70, "batch": 2}, None),
        ("log_weight", {"time": 1, "past": 70, "batch": 2}, 40),
        ("", {"time": 1, "heads": 1, "key": 1, "value": 1}, None),
    ],
    ids=str,
)
def test_equals_the_pytorch_rung(factors: str, sizes: dict[str, int], window: int | None, guarded_memory: Any) -> None:
    inputs = draw(*factors.split(), **sizes)
    actual = in_kernel({name: in_nan(x) for name, x in inputs.items()}, window=window)
    if sizes == {"time": 1, "heads": 1, "key": 1, "value": 1}:  # nothing varies: only v has a gradient
        assert torch.equal(actual["y"], inputs["v"])
        assert all(actual[f"gradient of {name}"].abs().max() < 1e-6 for name in ("q", "k", "ridge"))
        return
    assert_close(actual, in_torch(inputs, window=window), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("factors", ["log_decay log_weight", "probe log_decay"])
def test_half_precision(factors: str, dtype: torch.dtype, tolerance: float, guarded_memory: Any) -> None:
    inputs = draw(*factors.split(), time=75, dtype=dtype)
    actual = in_kernel({name: in_nan(x) for name, x in inputs.items()})
    assert actual["y"].dtype == actual["gradient of q"].dtype == dtype
    assert_close(actual, in_torch(inputs), tolerance)


def test_wide_heads() -> None:
    inputs = draw(time=40, heads=1, key=128, value=100)
    assert_close(in_kernel(inputs), in_torch(inputs), 1e-5)


@pytest.mark.parametrize("large", [-25.0, -1e4, -math.inf])
def test_strong_decay_loses_no_digit(large: float) -> None:
    """−25 and more in the middle of weak decays: each token on its own scale."""
    inputs = draw("log_decay", time=130, heads=1)
    inputs["log_decay"] *= 0.05
    inputs["log_decay"][:, 20::41] = large
    actual = in_kernel(inputs)
    expected = in_torch(inputs | {"log_decay": inputs["log_decay"].clamp_min(-1e4)})
    for t in range(130):
        assert relative_error(actual["y"][:, t], expected["y"][:, t]) <= 1e-5
    assert_close(actual, expected, 1e-5)


def test_a_query_without_pairs_reads_nothing() -> None:
    inputs = draw("log_weight", time=40)
    inputs["log_weight"][:, 20:30] = -math.inf
    found = in_kernel(inputs, window=4)
    assert (found["y"][:, :2] == 0).all()
    assert (found["y"][:, 23:30] == 0).all()
    left_out = inputs["log_weight"].isneginf()
    for name in ("k", "v", "log_weight"):
        assert (found[f"gradient of {name}"][left_out] == 0).all()
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("factors", ["log_decay log_weight", "probe log_decay"])
def test_packed_sequences_equal_each_alone(factors: str, guarded_memory: Any) -> None:
    bounds = [0, 0, 1, 66, 140]
    inputs = draw(*factors.split(), time=140, heads=1)
    if "log_weight" in inputs:
        inputs["log_weight"][:, [0, 1, 66]] = 0.0  # the first of a sequence, which the others see
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    for window in (None, 40):
        packed = in_kernel({name: in_nan(x) for name, x in inputs.items()}, cu_seqlens=cu_seqlens, window=window)
        leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
        outputs = []
        for start, stop in pairwise(bounds):
            x = {name: x if name == "ridge" else x[:, start:stop] for name, x in leaves.items()}
            if "log_weight" in x:
                x["weight"] = x.pop("log_weight").exp()
            outputs.append(ops.local_polynomial(**x, degree=1, bandwidth=BANDWIDTH, window=window, backend="torch")[0])
        assert_close(packed, with_gradients(torch.cat(outputs, 1), leaves), 1e-5)


@pytest.mark.parametrize("similarity", ["exponential", "gaussian"])
def test_the_op_is_the_same_through_its_kernel(similarity: str) -> None:
    """Keys far from zero: only their differences count, of which float32 keeps a digit less."""
    inputs = draw("log_decay", time=60)
    inputs["weight"] = torch.rand(inputs["v"].shape[:3]).to(DEVICE)
    inputs["k"] += 10.0
    found = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        y, after = ops.local_polynomial(
            **leaves, degree=1, bandwidth=3.0, window=50, similarity=similarity, backend=backend
        )
        assert after.k.shape[1] == 49
        found.append(with_gradients(y, leaves))
    assert_close(*found, 3e-5)


def test_pieces_with_the_state_handed_on_equal_the_whole() -> None:
    inputs = draw("log_decay", time=70, heads=1)
    ridge = inputs.pop("ridge")
    options: dict[str, Any] = {"degree": 1, "bandwidth": BANDWIDTH, "ridge": ridge, "window": 40, "backend": "triton"}
    with torch.no_grad():
        whole, _ = ops.local_polynomial(**inputs, **options)
        state, outputs = None, []
        for start, stop in pairwise([0, 1, 2, 66, 70]):
            piece = {name: x[:, start:stop] for name, x in inputs.items()}
            y, state = ops.local_polynomial(**piece, **options, initial_state=state)
            outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) <= 1e-5


def test_the_future_and_other_sequences_never_matter() -> None:
    inputs = draw("log_decay", "log_weight", time=80, batch=2, heads=1)
    before, _ = local_linear(**inputs, target=inputs["q"])
    for name, x in inputs.items():
        if name != "ridge":
            x[:, 45:] *= 1.5
            x[1] *= 1.5
    after, _ = local_linear(**inputs, target=inputs["q"])
    assert torch.equal(before[0, :45], after[0, :45])
    assert not torch.isclose(before[0, 45:], after[0, 45:]).all()


def test_an_infinite_ridge_is_softmax_attention() -> None:
    x = draw(time=50)
    y, _ = local_linear(x["q"], x["k"], x["v"], x["q"], torch.full_like(x["ridge"], 1e9))
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    assert relative_error(y, softmax.transpose(1, 2)) <= 1e-6


@pytest.mark.parametrize("time", [0, 3])
def test_nothing_is_an_empty_answer(time: int) -> None:
    batch = 0 if time else 1
    found = in_kernel(draw("log_decay", time=time, batch=batch))
    assert found["y"].shape == (batch, time, 2, 24)
    assert (found["gradient of ridge"] == 0).all()


def test_too_few_steps_are_told() -> None:
    x = {name: x.requires_grad_() for name, x in draw(time=20).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTR_CHECK", "1")
        with pytest.warns(ConvergenceWarning, match="after 2 steps, tolerance 1.0e-06"):
            y, _ = ops.local_polynomial(**x, degree=1, steps=2, tolerance=1e-6, backend="triton")
        with pytest.warns(UserWarning, match="of a gradient: relative residual .* after 2 steps, tolerance 1.0e-06"):
            y.sum().backward()


def test_one_graph_forwards_and_backwards() -> None:
    leaves = {name: x.requires_grad_() for name, x in draw("log_decay", time=10, heads=1, key=4, value=3).items()}

    def function(*tensors: Tensor) -> Tensor:
        x = dict(zip(leaves, tensors, strict=True))
        return local_linear(**x, target=x["q"], window=7)[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (function, compiled):
        y = run(*leaves.values())
        gradients.append([y.detach(), *torch.autograd.grad(y.sum(), list(leaves.values()))])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("factors", ["log_decay log_weight", "probe"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_opcheck(factors: str, packed: bool) -> None:
    """Schemas, fake implementations and autograd, as torch's own checker sees them."""
    x = {name: x.requires_grad_() for name, x in draw(*factors.split(), time=10, heads=1, key=4, value=3).items()}
    target = None if "probe" in x else x["q"].detach().clone().requires_grad_()
    tensors = [x["q"], x["k"], x["v"], target, *map(x.get, ("ridge", "probe", "log_decay", "log_weight"))]
    bounds = torch.tensor([0, 10], dtype=torch.int32, device=DEVICE) if packed else None
    torch.library.opcheck(torch.ops.ttr_kernels.local_linear.default, (*tensors, bounds, 1.0, 5, 50, 1e-6))


ZEROS = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ZEROS.double()}, r'q: expected dtype .*got torch.float64; use backend="torch"'),
        ({"k": ZEROS.half()}, "k: expected dtype torch.float32, got torch.float16"),
        ({"v": torch.zeros(1, 5, 2, 8)}, r"v: expected shape .*pairs=4.*, got \(1, 5, 2, 8\)"),
        ({"target": torch.zeros(1, 4, 2, 9)}, r"target: expected shape .*key=8\), got \(1, 4, 2, 9\)"),
        ({"ridge": torch.zeros(3)}, r"ridge: expected shape \(heads=2\), got \(3,\)"),
        ({"ridge": None}, "ridge: expected a tensor without a probe, got None"),
        ({"target": None}, "target: expected a tensor without a probe, got None"),
        ({"probe": ZEROS}, "target: expected None beside a probe, got a tensor"),
        ({"log_decay": torch.zeros(1, 4, 2).half()}, "log_decay: expected dtype torch.float32"),
        ({"log_weight": torch.zeros(1, 5, 2)}, r"log_weight: expected shape .*pairs=4.*got \(1, 5, 2\)"),
        ({"q": torch.zeros(1, 6, 2, 8), "target": torch.zeros(1, 6, 2, 8)}, "k: expected pairs .* at least 6, .*got 4"),
        ({"v": torch.zeros(1, 4, 2, 129)}, "value: expected a head size from 1 to 128, got 129"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8), "cu_seqlens": torch.tensor([0, 4]).int()},
         "k: expected pairs to be 4, those of the queries, got 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    inputs = dict.fromkeys(("q", "k", "v", "target"), ZEROS) | {"ridge": torch.ones(2)} | change
    inputs = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=message):
        local_linear(**inputs)


def test_wider_heads_have_no_kernel() -> None:
    x = torch.ones(1, 2, 1, 130, device=DEVICE)
    with pytest.raises(ValueError, match="for local polynomials of more than 128 channels, which has no kernel"):
        ops.local_polynomial(x, x, x, 1, ridge=x.new_ones(1), backend="triton")
