"""bfloat16 in a kernel is bfloat16: the same numbers as torch's, under the interpreter as on a GPU."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
import triton
import triton.language as tl
from guards import in_nan

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SIZE = 64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


@triton.jit
def arithmetic_kernel(p_a, p_b, p_sum, p_product, p_half, p_least, p_negative, N, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_a = tl.load(p_a + o, mask=o < N, other=0.5)
    b_b = tl.load(p_b + o, mask=o < N, other=0.25)
    tl.store(p_sum + o, b_a + b_b)
    tl.store(p_product + o, b_a * b_b, mask=o < N)
    tl.store(p_half + o, b_a * 0.3)
    tl.store(p_least + o, tl.where(b_a < b_b, b_a, tl.abs(b_b)))
    tl.store(p_negative + o, -b_a + tl.full([BLOCK], 1.0, tl.bfloat16))


def test_loads_arithmetic_and_stores_are_those_of_torch(guarded_memory):
    a, b = (guarded_memory(draw(SIZE - 5, seed=seed)) for seed in (0, 1))
    total, product, part, least, negative = (a.new_empty(SIZE) for _ in range(5))
    arithmetic_kernel[(1,)](a, b, total, product, part, least, negative, SIZE - 5, BLOCK=SIZE)
    inside = slice(0, SIZE - 5)
    assert torch.equal(total[inside], a + b)
    assert (total[SIZE - 5 :] == 0.75).all()
    assert torch.equal(product[inside], a * b)
    assert product[SIZE - 5 :].isnan().all()
    assert torch.equal(part[inside], (a * a.new_tensor(0.3)))
    assert torch.equal(least[inside], torch.where(a < b, a, b.abs()))
    assert torch.equal(negative[inside], 1 - a)


@triton.jit
def cast_kernel(p_x, p_narrow, p_wide, p_bits, p_smaller, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_narrow = tl.load(p_x + o).to(tl.bfloat16)
    tl.store(p_narrow + o, b_narrow)
    tl.store(p_wide + o, b_narrow.to(tl.float32))
    tl.store(p_bits + o, b_narrow.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True))
    tl.store(p_smaller + o, (b_narrow < tl.load(p_x + o)).to(tl.float32))


def test_casts_round_to_the_nearest_even():
    tie, last = 1 + 2**-8, 2**-7
    numbers = [tie, tie + last, -tie, 1 + 2**-8 + 2**-23, 1 + 2**-8 - 2**-23, 0.0, -0.0, 3.4e38, -3.4e38]
    numbers += [math.inf, -math.inf, math.nan, 1e-40, 2**-133, 2**-134, 1.5 * 2**-133, 1e-3]
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    x[: len(numbers)] = torch.tensor(numbers)
    x = x.to(DEVICE)
    narrow, bits = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(2))
    wide, smaller = (torch.empty_like(x) for _ in range(2))
    cast_kernel[(1,)](x, narrow, wide, bits, smaller, BLOCK=SIZE)
    expected = x.to(torch.bfloat16)
    for actual in (narrow, bits, wide.to(torch.bfloat16)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(narrow.signbit() & ~x.isnan(), expected.signbit() & ~x.isnan())
    assert torch.equal(smaller, (expected < x).float())


@triton.jit
def reduction_kernel(p_x, p_sum, p_running, p_most, p_wide, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o[:, None] * BLOCK + o[None, :])
    tl.store(p_sum + o, tl.sum(b_x, axis=1))
    tl.store(p_running + o[:, None] * BLOCK + o[None, :], tl.cumsum(b_x, axis=1))
    tl.store(p_most + o, tl.max(b_x, axis=1))
    tl.store(p_wide + o, tl.sum(b_x.to(tl.float32), axis=1))


def test_sums_and_maxima():
    x = draw(SIZE, SIZE)
    total, most, wide = x.new_empty(SIZE), x.new_empty(SIZE), x.new_empty(SIZE, dtype=torch.float32)
    running = torch.empty_like(x)
    reduction_kernel[(1,)](x, total, running, most, wide, BLOCK=SIZE)
    sums, magnitudes = (tensor.double().cumsum(1) for tensor in (x, x.abs()))
    rounding = 2**-8 * (math.log2(SIZE) if ON_GPU else 1)  # a GPU rounds each partial sum
    assert ((running.double() - sums).abs() <= rounding * magnitudes).all()
    assert ((total.double() - sums[:, -1]).abs() <= rounding * magnitudes[:, -1]).all()
    assert torch.equal(most, x.max(1).values)
    torch.testing.assert_close(wide, x.float().sum(1), rtol=1e-5, atol=1e-5)
    if not ON_GPU:
        torch.testing.assert_close(total, sums[:, -1].to(torch.bfloat16), rtol=2**-7, atol=0)


@triton.jit
def product_kernel(p_a, p_b, p_wide, p_narrow, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_square = o[:, None] * BLOCK + o[None, :]
    b_a = tl.load(p_a + o_square)
    b_b = tl.load(p_b + o_square)
    b_product = tl.dot(b_a, tl.trans(b_b))
    b_product = tl.dot((b_a * 0.5).to(b_a.dtype), b_b, b_product)
    tl.store(p_wide + o_square, b_product)
    tl.store(p_narrow + o_square, b_product.to(p_narrow.dtype.element_ty))


def test_products_accumulate_in_float32():
    a, b = (in_nan(draw(SIZE, SIZE, seed=seed)) for seed in (0, 1))
    wide, narrow = torch.empty_like(a, dtype=torch.float32), torch.empty_like(a)
    product_kernel[(1,)](a, b, wide, narrow, BLOCK=SIZE)
    exact = a.double() @ b.double().mT + 0.5 * a.double() @ b.double()
    torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(narrow, wide.to(torch.bfloat16))


@triton.jit
def add_atomically_kernel(p_x):
    tl.atomic_add(p_x, tl.full([], 1.0, tl.bfloat16))


@pytest.mark.skipif(ON_GPU, reason="a GPU has atomic operations on bfloat16")
def test_what_the_interpreter_cannot_do_it_refuses():
    with pytest.raises(Exception, match="atomic operation on bfloat16"):
        add_atomically_kernel[(1,)](draw(1))


def test_the_interpreter_is_left_alone_where_there_is_a_gpu():
    from triton.runtime import interpreter

    assert (type(interpreter.interpreter_builder) is interpreter.InterpreterBuilder) == ON_GPU
