"""Decayed linear attention in Triton against the recurrence, one token at a time in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from ttr_kernels import linear_attention_forward

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
if ON_GPU:
    TOLERANCES[torch.bfloat16] = 2e-2
MARGIN = 4096
SENTINEL = 1234.0


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, time, heads, key_size = q.shape
    state = torch.zeros(batch, heads, key_size, v.shape[-1], dtype=torch.float64, device=q.device)
    if initial_state is not None:
        state = initial_state.double()
    outputs = []
    for t in range(time):
        if log_decay is not None:
            state = log_decay[:, t, :, None, None].double().exp() * state
        state = state + k[:, t, :, :, None].double() * v[:, t, :, None, :].double()
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t].double()))
    return torch.stack(outputs, dim=1), state


def assert_matches_recurrence(outputs: tuple[Tensor, Tensor], *inputs: Tensor | None) -> None:
    """Each number's error is relative to the sum of its terms' magnitudes: terms may cancel."""
    q, k, v, log_decay, initial_state = inputs
    magnitudes = [tensor if tensor is None else tensor.abs() for tensor in (q, k, v, initial_state)]
    expected = recurrence(q, k, v, log_decay, initial_state)
    scales = recurrence(*magnitudes[:3], log_decay, magnitudes[3])
    for actual, exact, scale in zip(outputs, expected, scales, strict=True):
        assert torch.isfinite(actual).all()
        error = (actual.double() - exact).abs() / scale
        assert error.max() <= TOLERANCES[q.dtype], f"relative error {error.max():.1e}"


def in_nan(tensor: Tensor) -> Tensor:
    """The same tensor, with NaN before and after it in memory."""
    buffer = tensor.new_full((tensor.numel() + 2 * MARGIN,), math.nan)
    buffer[MARGIN:-MARGIN] = tensor.flatten()
    return buffer[MARGIN:-MARGIN].view(tensor.shape)


def draw(batch: int, time: int, heads: int, key_size: int, value_size: int, dtype: torch.dtype = torch.float32):
    """q, k, v, log_decay and initial_state, each surrounded by NaN."""
    generator = torch.Generator().manual_seed(time)
    shapes = [(batch, time, heads, size) for size in (key_size, key_size, value_size)]
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    log_decay = -torch.rand(batch, time, heads, generator=generator).to(DEVICE)
    initial_state = torch.randn(batch, heads, key_size, value_size, generator=generator).to(DEVICE)
    return [in_nan(tensor) for tensor in (q, k, v, log_decay, initial_state)]


@pytest.fixture
def guarded_outputs(monkeypatch):
    """What the kernels write to starts as NaN between two margins, and the margins must survive."""
    buffers = []
    allocate = Tensor.new_empty

    def new_empty(tensor, size, dtype=None, **options):
        if options:  # the interpreter's own
            return allocate(tensor, size, dtype=dtype, **options)
        buffer = torch.full((math.prod(size) + 2 * MARGIN,), SENTINEL, device=tensor.device)
        buffer = buffer.to(dtype or tensor.dtype)
        buffer[MARGIN:-MARGIN] = math.nan
        buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(size)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield
    assert len(buffers) == 4, "y, the last state, the states of the chunks, their decays"
    for buffer in buffers:
        assert (buffer[:MARGIN] == SENTINEL).all()
        assert (buffer[-MARGIN:] == SENTINEL).all()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("with_decay", [True, False], ids=["decay", "no decay"])
@pytest.mark.parametrize("with_state", [True, False], ids=["initial state", "no initial state"])
@pytest.mark.parametrize(
    ("shape", "chunk_size"),
    [
        ((1, 1, 1, 1, 1), 64),
        ((2, 15, 1, 3, 5), 16),
        ((1, 64, 2, 64, 16), 64),
        ((1, 100, 2, 20, 40), 32),
        ((1, 150, 1, 72, 33), 64),
    ],
    ids=str,
)
def test_matches_the_recurrence(shape, chunk_size, with_state, with_decay, dtype, guarded_outputs):
    q, k, v, log_decay, initial_state = draw(*shape, dtype)
    inputs = [q, k, v, log_decay if with_decay else None, initial_state if with_state else None]
    y, final_state = linear_attention_forward(*inputs, chunk_size=chunk_size)
    assert y.dtype == dtype
    assert final_state.dtype == torch.float32
    assert_matches_recurrence((y, final_state), *inputs)


@pytest.mark.parametrize(("key_size", "value_size"), [(256, 24), (24, 256)])
def test_largest_heads(key_size, value_size, guarded_outputs):
    inputs = draw(1, 20, 1, key_size, value_size)
    assert_matches_recurrence(linear_attention_forward(*inputs, chunk_size=16), *inputs)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize(
    "pattern",
    [
        {"every": 1, "large": -20.0, "small": 0.0},
        {"every": 41, "large": -25.0, "small": 0.0},
        {"every": 3, "large": -25.0, "small": -1e-3},
        {"every": 20, "large": -1e4, "small": -1e-3},
        {"every": 20, "large": -math.inf, "small": -1e-3},
        {"every": 300, "large": 0.0, "small": -1e-6},
    ],
    ids=lambda pattern: "{large} every {every}, else {small}".format(**pattern),
)
def test_strong_decay_loses_no_digit(pattern, chunk_size, guarded_outputs):
    q, k, v, log_decay, initial_state = draw(1, 130, 2, 16, 16)
    log_decay.mul_(-pattern["small"]).add_(pattern["small"])
    log_decay[:, pattern["every"] // 2 :: pattern["every"]] = pattern["large"]
    inputs = (q, k, v, log_decay, initial_state)
    assert_matches_recurrence(linear_attention_forward(*inputs, chunk_size=chunk_size), *inputs)


def test_nothing_is_forgotten_without_decay():
    q, k, v, log_decay, initial_state = draw(1, 70, 1, 16, 16)
    zero = linear_attention_forward(q, k, v, torch.zeros_like(log_decay), initial_state)
    none = linear_attention_forward(q, k, v, None, initial_state)
    for with_zeros, without in zip(zero, none, strict=True):
        assert torch.equal(with_zeros, without)


@pytest.mark.parametrize("splits", [(1, 69), (35, 35), (64, 5, 1)], ids=str)
def test_pieces_with_the_state_handed_on_equal_the_whole(splits):
    q, k, v, log_decay, state = draw(1, 70, 2, 16, 24)
    whole = linear_attention_forward(q, k, v, log_decay, state, chunk_size=32)
    outputs = []
    for q_piece, k_piece, v_piece, decay_piece in zip(
        *(tensor.split(splits, dim=1) for tensor in (q, k, v, log_decay)), strict=True
    ):
        y, state = linear_attention_forward(q_piece, k_piece, v_piece, decay_piece, state, chunk_size=32)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole[1], rtol=1e-5, atol=1e-5)


def test_future_tokens_do_not_matter():
    inputs = draw(1, 100, 1, 16, 16)
    before, _ = linear_attention_forward(*inputs)
    for tensor in inputs[:4]:
        tensor[:, 45:] *= 3
    after, _ = linear_attention_forward(*inputs)
    assert torch.equal(before[:, :45], after[:, :45])
    assert not torch.isclose(before[:, 45:], after[:, 45:]).any()


def test_batch_elements_are_independent():
    inputs = draw(2, 40, 1, 16, 16)
    both = linear_attention_forward(*inputs)
    for i in range(2):
        alone = linear_attention_forward(*(tensor[i : i + 1] for tensor in inputs))
        for of_both, of_one in zip(both, alone, strict=True):
            assert torch.equal(of_both[i : i + 1], of_one)


def test_inputs_need_not_be_contiguous():
    q, k, v, log_decay, initial_state = draw(1, 40, 2, 16, 16)
    q_view, k_view, v_view = torch.cat((q, k, v), dim=-1).split(16, dim=-1)
    decay_view = log_decay.mT.contiguous().mT
    state_view = initial_state.mT.contiguous().mT
    views = (q_view, k_view, v_view, decay_view, state_view)
    assert not any(tensor.is_contiguous() for tensor in views)
    expected = linear_attention_forward(q, k, v, log_decay, initial_state)
    for actual, exact in zip(linear_attention_forward(*views), expected, strict=True):
        assert torch.equal(actual, exact)


def test_an_empty_sequence_keeps_the_state():
    q, k, v, log_decay, initial_state = draw(2, 0, 1, 4, 6)
    y, final_state = linear_attention_forward(q, k, v, log_decay, initial_state)
    assert y.shape == (2, 0, 1, 6)
    assert torch.equal(final_state, initial_state)
    assert final_state.data_ptr() != initial_state.data_ptr()
    _, final_state = linear_attention_forward(q, k, v)
    assert torch.equal(final_state, torch.zeros_like(initial_state))


def test_an_empty_batch_is_empty():
    y, final_state = linear_attention_forward(*draw(0, 5, 1, 4, 6))
    assert y.shape == (0, 5, 1, 6)
    assert final_state.shape == (0, 1, 4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 2, 8)}, r"q: expected \(batch, time, heads, size\), got shape \(4, 2, 8\)"),
        ({"q": torch.zeros(1, 4, 2, 8).double()}, r"q: expected dtype torch.float32, .*got torch.float64"),
        ({"k": torch.zeros(1, 4, 2, 9)}, r"k: expected shape \(1, 4, 2, 8\), got \(1, 4, 2, 9\)"),
        ({"k": torch.zeros(1, 4, 2, 8).half()}, "k: expected dtype torch.float32, got torch.float16"),
        ({"k": torch.zeros(1, 4, 2, 8, device="meta")}, "k: expected device .*that of q, got meta"),
        ({"v": torch.zeros(1, 5, 2, 8)}, r"v: expected shape \(1, 4, 2, 8\), got \(1, 5, 2, 8\)"),
        ({"v": torch.zeros(1, 4, 2, 257)}, "v: expected a head size from 1 to 256, got 257"),
        ({"q": torch.zeros(1, 4, 2, 0), "k": torch.zeros(1, 4, 2, 0)}, "q: expected a head size .*got 0"),
        ({"log_decay": torch.zeros(1, 4, 2, 8)}, r"log_decay: expected shape \(1, 4, 2\), got"),
        ({"log_decay": torch.zeros(1, 4, 2).half()}, "log_decay: expected dtype torch.float32"),
        ({"initial_state": torch.zeros(1, 2, 8, 4)}, r"initial_state: expected shape \(1, 2, 8, 8\), got"),
        ({"v": torch.zeros(1, 4, 2, 8).requires_grad_()}, "v: expected no gradient"),
        ({"chunk_size": 48}, r"chunk_size: expected one of \(16, 32, 64\), got 48"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change, message):
    inputs = {name: torch.zeros(1, 4, 2, 8) for name in ("q", "k", "v")} | change
    inputs = {
        name: value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in inputs.items()
    }
    with pytest.raises(ValueError, match=message):
        linear_attention_forward(**inputs)


@pytest.mark.skipif(ON_GPU, reason="the interpreter is used only where there is no GPU")
def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(ValueError, match="q: expected no bfloat16"):
        linear_attention_forward(*draw(1, 4, 1, 8, 8, torch.bfloat16))


def test_cpu_tensors_need_the_interpreter():
    program = (
        "import torch, ttr_kernels\n"
        "x = torch.zeros(1, 4, 1, 8)\n"
        "try:\n"
        "    ttr_kernels.linear_attention_forward(x, x, x)\n"
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
