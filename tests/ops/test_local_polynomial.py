"""Local polynomials against weighted ridge regressions on stacked monomials, and the properties they must have."""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import BATCH, HEADS, KEY, VALUE, relative_error, sample
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from ttr import Decay, Design, Exact, Gaussian, Kernel, LocalPolynomial, oracle
from ttr.ops._convergence import ConvergenceWarning
from ttr.ops.local_polynomial import PastPairs, local_polynomial

PAIRWISE = ("q", "k", "v", "log_decay", "weight", "probe")
PAST = ("k", "v", "log_decay", "weight")


def regression(a: dict[str, object]) -> Tensor:
    """For every query: `lstsq` on the rows √p_i [1, x, x_a x_b (√2 of it off the diagonal)], x = k_i − q, and on √λ.

    All a and b ≤ a in turn; a probe replaces the slope of the centred fit.
    """
    q, k, v, degree = a["q"], a["k"], a["v"], a["degree"]
    first = k.shape[1] - q.shape[1]
    y = q.new_zeros(*q.shape[:3], v.shape[-1])
    for batch, t, head in itertools.product(*map(range, q.shape[:3])):
        now = first + t
        seen = slice(max(0, now + 1 - (a.get("window") or now + 1)), now + 1)
        query, keys, values = q[batch, t, head], k[batch, seen, head], v[batch, seen, head]
        dot = a.get("similarity", "exponential") == "exponential"
        log_weight = (keys @ query if dot else -(keys - query).square().sum(-1) / 2) / a.get("bandwidth", 1.0) ** 2
        if a.get("log_decay") is not None:
            decay = a["log_decay"][batch, seen, head]
            log_weight = log_weight + torch.stack([decay[i + 1 :].sum() for i in range(len(decay))])
        p = log_weight.exp()
        if a.get("weight") is not None:
            p = p * a["weight"][batch, seen, head]
        p = p / p.sum()
        if a.get("probe") is not None:
            y[batch, t, head] = p @ values + a["probe"][batch, t, head] @ (keys - p @ keys).T @ torch.diag(p) @ values
            continue
        x = keys - query
        columns = [torch.ones_like(x[:, 0])]
        if degree >= 1:
            columns += x.unbind(1)
        if degree == 2:
            columns += [x[:, i] * x[:, j] * (1 if i == j else 2**0.5) for i in range(len(query)) for j in range(i + 1)]
        rows = torch.stack(columns, 1) * p.sqrt()[:, None]
        penalty = torch.eye(len(columns), dtype=q.dtype)[1:] * (a["ridge"][head].sqrt() if degree else 1)
        right = torch.cat([values * p.sqrt()[:, None], values.new_zeros(len(penalty), values.shape[1])])
        y[batch, t, head] = torch.linalg.lstsq(torch.cat([rows, penalty]), right).solution[0]
    return y


def arguments(degree: int, time: int, *, factors: bool = True, probe: bool = False, seed: int = 0) -> dict[str, object]:
    """Arguments in float64; with `factors` also a decay, weights, a Gaussian kernel and a window."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    pairs = (BATCH, time, HEADS)
    a: dict[str, object] = {"q": normal(*pairs, KEY), "k": normal(*pairs, KEY), "v": normal(*pairs, VALUE)}
    a |= {"degree": degree, "bandwidth": 1.3}
    if probe:
        a["probe"] = normal(*pairs, KEY) / 2
    elif degree:
        a["ridge"] = uniform(HEADS) + 0.1
    if factors:
        a |= {"log_decay": -uniform(*pairs) / 4, "weight": uniform(*pairs) + 0.1}
        a |= {"similarity": "gaussian", "window": 11}
    return a


def mapped(a: dict[str, object], function, names: tuple[str, ...] = (*PAIRWISE, "ridge")) -> dict[str, object]:
    return {name: function(x) if name in names and isinstance(x, Tensor) else x for name, x in a.items()}


def past_of(a: dict[str, object], function) -> PastPairs:
    return PastPairs(*(function(a[name]) if name in a else None for name in PAST))


CASES = [(degree, probe, factors) for degree, probe in ((0, False), (1, False), (1, True), (2, False))
         for factors in (False, True)]  # fmt: skip
each_case = pytest.mark.parametrize(("degree", "probe", "factors"), CASES)


@each_case
@pytest.mark.parametrize("solver", ["auto", "conjugate_gradients"])
@pytest.mark.parametrize(("time", "chunk_size"), [(1, 128), (37, 1), (37, 8), (37, 128)])
def test_equals_the_regression(
    degree: int, probe: bool, factors: bool, solver: str, time: int, chunk_size: int
) -> None:
    a = arguments(degree, time, factors=factors, probe=probe)
    expected = regression(a)
    how = {"solver": solver, "chunk_size": chunk_size}
    assert relative_error(local_polynomial(**a, **how)[0], expected) <= 1e-12
    single = mapped(a, Tensor.float)
    y, _ = local_polynomial(**single, **how)
    assert y.dtype == torch.float32
    assert relative_error(y, regression(mapped(single, Tensor.double))) <= 3e-6


@pytest.mark.parametrize("degree", [1, 2])
def test_equals_the_definition_of_the_design(degree: int) -> None:
    design = Design(Kernel(Gaussian(), bandwidth=1.5) * Decay(), LocalPolynomial(degree), Exact())
    q, k, v, inputs = sample(design, 20)
    expected, _ = oracle.regress(design, q, k, v, **inputs)
    y, _ = local_polynomial(q, k, v, degree, 1.5, similarity="gaussian", **inputs)
    assert relative_error(y, expected) <= 1e-12


@each_case
def test_gradients_of_every_argument(degree: int, probe: bool, factors: bool) -> None:
    """Of the pairs before the first, too."""
    past = 3
    a = mapped(arguments(degree, past + 5, factors=factors, probe=probe), lambda x: x[:1, :, :1], PAIRWISE)
    a |= {"window": 4, "ridge": a["ridge"][:1]} if degree and not probe else {"window": 4}
    new = mapped(a, lambda x: x[:, past:], PAIRWISE)
    names = [name for name, x in new.items() if isinstance(x, Tensor)]
    before = [x for x in past_of(a, lambda x: x[:, :past]) if x is not None]
    leaves = [x.clone().requires_grad_() for x in (*(new[name] for name in names), *before)]

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=False))
        return local_polynomial(**new | given, initial_state=PastPairs(*leaves[len(names) :]), chunk_size=2)[0]

    assert torch.autograd.gradcheck(function, leaves)


@each_case
def test_float32_gradients(degree: int, probe: bool, factors: bool) -> None:
    a = arguments(degree, 75, factors=factors, probe=probe)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = mapped(a, lambda x: x.float().to(dtype).requires_grad_())
        y, _ = local_polynomial(**leaves)
        return torch.autograd.grad(y.square().sum(), [x for x in leaves.values() if isinstance(x, Tensor)])

    for actual, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert relative_error(actual, expected) <= 1e-5


@each_case
@settings(deadline=None, max_examples=10)
@given(cuts=st.sets(st.integers(0, 30), max_size=4), chunk_size=st.integers(1, 20))
def test_split_anywhere_equals_whole(degree: int, probe: bool, factors: bool, cuts: set[int], chunk_size: int) -> None:
    whole = arguments(degree, 30, factors=factors, probe=probe)
    expected, final = local_polynomial(**whole)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        a = mapped(whole, lambda x, dtype=dtype: x.to(dtype))
        outputs, state = [], None
        for start, stop in itertools.pairwise([0, *sorted(cuts), 30]):
            piece = mapped(a, lambda x, span=slice(start, stop): x[:, span], PAIRWISE)
            y, state = local_polynomial(**piece, initial_state=state, chunk_size=chunk_size)
            outputs.append(y)
        assert relative_error(torch.cat(outputs, 1), expected) <= tolerance
        for actual, wanted in zip(state, final, strict=True):
            assert (actual is None and wanted is None) or actual.double().allclose(wanted)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_one_token_at_a_time(degree: int) -> None:
    a = mapped(arguments(degree, 25), Tensor.float)
    expected, _ = local_polynomial(**a)
    state = None
    for t in range(25):
        token = mapped(a, lambda x, t=t: x[:, t : t + 1], PAIRWISE)
        y, state = local_polynomial(**token, initial_state=state)
        assert relative_error(y, expected[:, t : t + 1]) <= 1e-5
    assert state.k.shape[1] == a["window"] - 1


@each_case
def test_the_future_and_other_sequences_never_matter(degree: int, probe: bool, factors: bool) -> None:
    a = arguments(degree, 20, factors=factors, probe=probe)
    leaves = mapped(a, lambda x: x.clone().requires_grad_(), PAIRWISE)
    y, _ = local_polynomial(**leaves, chunk_size=8)
    tensors = {name: x for name, x in leaves.items() if name in PAIRWISE}
    for name, gradient in zip(
        tensors, torch.autograd.grad(y[0, 13].sum(), list(tensors.values()), allow_unused=True), strict=True
    ):
        assert gradient[1].eq(0).all(), name
        assert gradient[0, 14:].eq(0).all(), name
        assert gradient[0, 13].ne(0).any() or name == "log_decay", name
        if factors:  # the decay's gradient is a running sum, which ends at zero up to rounding
            bound = 1e-15 if name == "log_decay" else 0
            assert (gradient[0, : 14 - a["window"]].abs() <= bound).all(), name
    changed = mapped(a, lambda x: torch.cat([x[:, :14], 1e3 * x[:, 14:]], 1), ("q", "k", "v", "probe"))
    assert relative_error(local_polynomial(**changed, chunk_size=8)[0][:, :14], y[:, :14]) <= 1e-12


@each_case
def test_degenerate_keys_and_lengths(degree: int, probe: bool, factors: bool) -> None:
    a = arguments(degree, 12, factors=factors, probe=probe)
    y, state = local_polynomial(**mapped(a, lambda x: x[:, :0], PAIRWISE))
    assert y.shape == (BATCH, 0, HEADS, VALUE)
    assert state.k.shape == (BATCH, 0, HEADS, KEY)

    for k in (torch.zeros_like(a["k"]), a["k"][:, :1].expand_as(a["k"])):
        leaves = mapped(a | {"k": k}, lambda x: x.float().clone().requires_grad_())
        y, _ = local_polynomial(**leaves)
        assert relative_error(y, regression(mapped(a | {"k": k}, lambda x: x.float().double()))) <= 3e-6
        tensors = [x for x in leaves.values() if isinstance(x, Tensor)]
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), tensors))
    constant, _ = local_polynomial(**a | {"v": torch.full_like(a["v"], 3)})
    torch.testing.assert_close(constant, torch.full_like(a["v"], 3))

    one_head = mapped(a, lambda x: x[:, :, :1], PAIRWISE) | ({"ridge": a["ridge"][:1]} if "ridge" in a else {})
    whole, _ = local_polynomial(**a)
    assert relative_error(local_polynomial(**one_head)[0], whole[:, :, :1]) <= 1e-12
    strided = mapped(a, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), PAIRWISE)
    assert not strided["k"].is_contiguous()
    assert relative_error(local_polynomial(**strided)[0], whole) <= 1e-12


@each_case
@pytest.mark.parametrize("strength", [-20, -1000])
def test_strong_decay_loses_no_digit(degree: int, probe: bool, factors: bool, strength: int) -> None:
    """At every token, and only in a stretch of the middle, behind which weak decays must keep their digits."""
    a = mapped(arguments(degree, 64, factors=factors, probe=probe), Tensor.float)
    weak = -torch.rand(BATCH, 64, HEADS, generator=torch.Generator().manual_seed(1)) / 10
    middle = weak.clone()
    middle[:, 20:40] = strength
    for log_decay in (torch.full_like(weak, strength), middle):
        leaves = mapped(a | {"log_decay": log_decay}, lambda x: x.clone().requires_grad_())
        y, _ = local_polynomial(**leaves)
        expected = regression(mapped(a | {"log_decay": log_decay}, Tensor.double))
        assert relative_error(y, expected) <= 3e-6
        tensors = [x for x in leaves.values() if isinstance(x, Tensor)]
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), tensors))


@each_case
def test_a_pair_of_no_weight_is_left_out(degree: int, probe: bool, factors: bool) -> None:
    a = arguments(degree, 24, factors=factors, probe=probe)
    a["window"] = None
    given = torch.arange(24) % 3 == 1
    a["weight"] = a.get("weight", torch.ones(BATCH, 24, HEADS, dtype=torch.float64)) * given[:, None]
    leaves = mapped(a, lambda x: x.clone().requires_grad_())
    y, _ = local_polynomial(**leaves, chunk_size=5)
    assert y[:, 0].eq(0).all()
    if not factors:
        kept = mapped({name: x for name, x in a.items() if name != "weight"}, lambda x: x[:, given], PAIRWISE)
        assert relative_error(y[:, given], local_polynomial(**kept)[0]) <= 1e-12
    gradients = torch.autograd.grad(y.sum(), [x for x in leaves.values() if isinstance(x, Tensor)])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_half_precision_computes_in_float32(degree: int, dtype: torch.dtype) -> None:
    half = mapped(arguments(degree, 40), lambda x: x.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = local_polynomial(**half)
    assert y.dtype == state.k.dtype == dtype
    assert relative_error(y, regression(mapped(half, Tensor.double))) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("similarity", ["exponential", "gaussian"])
def test_a_large_common_part_of_the_keys_costs_no_digits(similarity: str) -> None:
    """Differences of single-precision keys around 512 are exact, and only they count."""
    a = mapped(arguments(1, 40, factors=False) | {"similarity": similarity}, Tensor.float)
    away = a | {"k": a["k"] + 512, "q": a["q"] + 512}
    if similarity == "exponential":
        away["bandwidth"] = 50.0  # h² near ‖q‖, so that weights neither vanish nor coincide
    exact = mapped(away, Tensor.double)
    assert relative_error(local_polynomial(**away)[0], regression(exact)) <= 1e-5


def test_a_large_ridge_leaves_the_mean_and_a_large_bandwidth_the_global_fit() -> None:
    a = arguments(1, 40)
    mean, _ = local_polynomial(**{name: x for name, x in a.items() if name != "ridge"} | {"degree": 0})
    stiff, _ = local_polynomial(**a | {"ridge": torch.full((HEADS,), 1e9, dtype=torch.float64)})
    assert relative_error(stiff, mean) <= 1e-7

    b = arguments(1, 40, factors=False) | {"bandwidth": 1e5}
    y, _ = local_polynomial(**b)
    k, v, q = (b[name][0, :, 0] for name in ("k", "v", "q"))
    centred = k - k.mean(0)
    slope = torch.linalg.solve(centred.T @ centred / 40 + b["ridge"][0] * torch.eye(KEY), centred.T @ v / 40)
    assert relative_error(y[0, -1, 0], v.mean(0) + (q[-1] - k.mean(0)) @ slope) <= 1e-8


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_kernels_coincide_for_keys_of_one_norm(degree: int) -> None:
    a = arguments(degree, 30, factors=False)
    a["k"] = normalize(a["k"], dim=-1)
    both = [local_polynomial(**a, similarity=similarity)[0] for similarity in ("exponential", "gaussian")]
    assert relative_error(*both) <= 1e-12


@pytest.mark.parametrize(
    ("dtype", "ridge", "tolerance"),
    [(torch.float32, 1.0, 1e-5), (torch.float64, 1.0, 1e-13), (torch.float64, 1e-3, 1e-10)],
)
def test_solvers_agree(dtype: torch.dtype, ridge: float, tolerance: float) -> None:
    """At a size where "auto" begins with conjugate gradients; with the small ridge it has to end by factorising."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 150, 2, 24)
    q, k, v, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4))
    results = []
    for solver in ("conjugate_gradients", "direct", "auto"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, torch.full((2,), ridge, dtype=dtype))]
        y, _ = local_polynomial(*leaves[:3], 1, 24**0.25, leaves[3], solver=solver, steps=400)
        results.append([y, *torch.autograd.grad(y, leaves, gradient)])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert relative_error(actual, expected) <= tolerance


def test_too_few_steps_warn_with_the_residual() -> None:
    a = arguments(1, 30) | {"ridge": torch.full((HEADS,), 1e-6, dtype=torch.float64)}
    with pytest.warns(ConvergenceWarning, match=r"relative residual \d\.\de[-+]\d\d after 2 steps, tolerance 1.0e-10"):
        local_polynomial(**a, solver="conjugate_gradients", steps=2, tolerance=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local_polynomial(**a, solver="direct", steps=4, tolerance=1e-10)


class _Largest(TorchDispatchMode):
    """The most numbers in one tensor that anything made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.numbers = max([self.numbers, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)])
        return result


@pytest.mark.parametrize(("degree", "probe"), [(0, False), (1, False), (1, True)])
def test_nothing_is_quadratic_in_time(degree: int, probe: bool) -> None:
    """Doubling the time doubles the largest tensor that forward and backward make."""
    numbers = []
    for time in (256, 512):
        a = arguments(degree, time, probe=probe) | {"window": None}
        leaves = mapped(a, lambda x: x.float().requires_grad_())
        with _Largest() as largest:
            y, _ = local_polynomial(**leaves, chunk_size=16)
            y.sum().backward()
        numbers.append(largest.numbers)
    assert numbers[1] <= 2.1 * numbers[0]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.ones(2, 6, 4)}, "q: expected shape (batch, time, heads, key), got (2, 6, 4)"),
        ({"k": torch.ones(2, 6, 3, 5)}, "k: expected shape (batch=2, time=6, heads=3, key=4), got (2, 6, 3, 5)"),
        ({"degree": 3}, "degree: expected 0, 1 or 2, got 3"),
        ({"bandwidth": 0.0}, "bandwidth: expected a positive finite number, got 0.0"),
        ({"bandwidth": float("nan")}, "bandwidth: expected a positive finite number, got nan"),
        ({"window": 0}, "window: expected at least 1, or None, got 0"),
        ({"similarity": "cosine"}, 'similarity: expected "exponential" or "gaussian", got \'cosine\''),
        ({"solver": "lu"}, "solver: expected"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance: expected a positive finite number, or None, got 0.0"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"ridge": torch.zeros(3)}, "ridge: expected finite values in (0, inf)"),
        ({"ridge": torch.ones(4)}, "ridge: expected shape (heads=3), got (4,)"),
        ({"ridge": None}, "ridge: expected a tensor (heads) at degree 1, got None"),
        ({"degree": 0}, "ridge: expected None at degree 0, got"),
        ({"probe": torch.ones(2, 6, 3, 4)}, "ridge: expected None at degree 1 with a probe, got"),
        ({"degree": 2, "probe": torch.ones(2, 6, 3, 4)}, "probe: expected None at degree 2, got a tensor"),
        ({"log_decay": torch.ones(2, 6, 3)}, "log_decay: expected finite values in (-inf, 0]"),
        ({"weight": -torch.ones(2, 6, 3)}, "weight: expected finite values in [0, inf)"),
        ({"backend": "triton", "solver": "direct"}, "for local polynomials by the direct solver, which has no kernel"),
        (
            {"initial_state": PastPairs(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), -torch.ones(2, 1, 3))},
            "initial_state.log_decay: expected None, as log_decay, got a tensor",
        ),
        (
            {"initial_state": PastPairs(torch.ones(2, 1, 3, 5), torch.ones(2, 1, 3, 4))},
            "initial_state.k: expected shape (batch=2, past, heads=3, key=4), got (2, 1, 3, 5)",
        ),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, object], message: str) -> None:
    a: dict[str, object] = {name: torch.ones(2, 6, 3, 4) / 2 for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=re.escape(message)):
        local_polynomial(**a | {"degree": 1, "ridge": torch.ones(3)} | changed)


def test_degree_two_says_what_memory_it_would_need() -> None:
    x = torch.ones(1, 128, 4, 64)
    with pytest.raises(ValueError, match=r"degree: expected 0 or 1 for 64 channels, .* 17\.6 GiB"):
        local_polynomial(x, x, x, 2, ridge=torch.ones(4))
