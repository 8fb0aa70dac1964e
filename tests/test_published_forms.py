"""Atlas rows against the recurrences and formulas that their papers print, written out token by token."""

from __future__ import annotations

import pytest
import torch
from sampling import piece, relative_error, sample
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

import ttr

TIME = 14


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1.0, 40.0, 600.0])
def test_mlstm_with_its_stabiliser(size: float) -> None:
    """Beck et al. (2024), eq. 19–27: the memory C, the normaliser n and the stabiliser m."""
    q, k, v, inputs = sample(ttr.atlas["mlstm"], TIME)
    log_gate = size * normal(*q.shape[:3])
    log_forget = inputs["log_decay"]
    memory, total = torch.zeros(2, 3, 5, 4, dtype=torch.float64), torch.zeros(2, 3, 5, dtype=torch.float64)
    largest, expected = torch.full((2, 3), -torch.inf, dtype=torch.float64), []
    for t in range(TIME):
        before, largest = largest, torch.maximum(log_forget[:, t] + largest, log_gate[:, t])
        forget, write = (log_forget[:, t] + before - largest).exp(), (log_gate[:, t] - largest).exp()
        memory = forget[..., None, None] * memory + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        total = forget[..., None] * total + write[..., None] * k[:, t]
        answer = torch.einsum("bhkv,bhk->bhv", memory, q[:, t])
        divisor = torch.maximum((total * q[:, t]).sum(-1).abs(), (-largest).exp())
        expected.append(answer / divisor[..., None])
    expected = torch.stack(expected, 1)
    assert expected.isfinite().all()
    for function in (ttr.regress, ttr.oracle.regress):
        y, _ = function(ttr.atlas["mlstm"], q, k, v, log_decay=log_forget, log_input_gate=log_gate)
        assert relative_error(y, expected) <= 1e-12
    single = [x.float() for x in (q, k, v, log_forget, log_gate)]
    y, _ = ttr.regress(ttr.atlas["mlstm"], *single[:3], log_decay=single[3], log_input_gate=single[4])
    exact, _ = ttr.regress(
        ttr.atlas["mlstm"],
        *(x.double() for x in single[:3]),
        log_decay=single[3].double(),
        log_input_gate=single[4].double(),
    )
    assert relative_error(y, exact) <= 1e-4 * max(1.0, size / 40)


def test_s4d_is_the_convolution_with_its_complex_kernel() -> None:
    """Gu et al. (2022), section 2: y = K̄ * u with K̄_l = Re Σ_n C_n Ā_n^l B̄_n, one input channel a value."""
    time, pairs = 50, 4
    log_decay, frequency = -0.1 * normal(2, pairs).abs(), 3 * normal(2, pairs, seed=1)
    b, c = normal(2, 2 * pairs, seed=2), normal(2, 2 * pairs, seed=3)
    u = normal(3, time, 2, 5, seed=4)
    to_complex = lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # noqa: E731
    powers = torch.exp(torch.complex(log_decay, frequency) * torch.arange(time)[:, None, None])
    kernel = (to_complex(c).conj() * powers * to_complex(b)).sum(-1).real
    spectrum = torch.fft.rfft(kernel, n=2 * time, dim=0)[None, :, :, None] * torch.fft.rfft(u, n=2 * time, dim=1)
    expected = torch.fft.irfft(spectrum, n=2 * time, dim=1)[:, :time]
    k, q = (x.expand(3, time, 2, 2 * pairs) for x in (b, c))
    y, state = ttr.regress(ttr.atlas["s4d"], q, k, u, log_decay=log_decay, frequency=frequency)
    assert relative_error(y, expected) <= 1e-12
    half, state = ttr.regress(
        ttr.atlas["s4d"], q[:, :23], k[:, :23], u[:, :23], log_decay=log_decay, frequency=frequency
    )
    rest, _ = ttr.regress(
        ttr.atlas["s4d"], q[:, 23:], k[:, 23:], u[:, 23:], state=state, log_decay=log_decay, frequency=frequency
    )
    assert relative_error(torch.cat([half, rest], 1), expected) <= 1e-12


def test_turns_keep_their_accuracy_far_into_a_sequence() -> None:
    """In float32, thousands of radians on."""
    time = 4096
    q, k = (normalize(normal(1, time, 1, 4, seed=i), dim=-1) for i in range(2))
    v = normal(1, time, 1, 2, seed=3)
    inputs = {"log_decay": torch.full((1, 2), -0.01), "frequency": torch.tensor([[2.9, 0.3]])}
    y, _ = ttr.regress(ttr.atlas["s4d"], q.float(), k.float(), v.float(), **inputs)
    doubled = {name: x.double() for name, x in inputs.items()}
    single = (x.float().double() for x in (q, k, v))
    assert relative_error(y, ttr.regress(ttr.atlas["s4d"], *single, **doubled)[0]) <= 1e-5


def heads_first(x: Tensor) -> Tensor:
    return x.movedim(1, 2)


def test_softmax_attention_is_torchs() -> None:
    q, k, v, _ = sample(ttr.atlas["softmax_attention"], TIME)
    expected = scaled_dot_product_attention(*map(heads_first, (q, k, v)), is_causal=True, scale=1.0)
    assert relative_error(ttr.regress(ttr.atlas["softmax_attention"], q, k, v)[0], heads_first(expected)) <= 1e-12


def test_forgetting_attention_adds_the_sum_of_log_gates() -> None:
    """Lin et al. (2025): softmax(QKᵀ + D) V with D_ij = Σ_{l=j+1}^i log f_l."""
    q, k, v, _ = sample(ttr.atlas["forgetting_attention"], TIME)
    log_forget = logsigmoid(normal(2, TIME, 3))
    total = heads_first(log_forget.cumsum(1))
    scores = torch.einsum("bthk,bihk->bhti", q, k) + total.unsqueeze(-1) - total.unsqueeze(-2)
    future = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    expected = torch.einsum("bhti,bihv->bthv", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    y, _ = ttr.regress(ttr.atlas["forgetting_attention"], q, k, v, log_decay=log_forget)
    assert relative_error(y, expected) <= 1e-12


def test_sliding_window_attention_sees_its_window() -> None:
    design = ttr.Design(ttr.Kernel() * ttr.Window(4), ttr.LocalPolynomial(0), ttr.Exact())
    assert design.name == "Sliding-window attention"
    q, k, v, _ = sample(design, TIME)
    age = torch.arange(TIME)[:, None] - torch.arange(TIME)
    seen = (age >= 0) & (age < 4)
    expected = scaled_dot_product_attention(*map(heads_first, (q, k, v)), attn_mask=seen, scale=1.0)
    assert relative_error(ttr.regress(design, q, k, v)[0], heads_first(expected)) <= 1e-12


def test_mesa_net_solves_with_a_ridge_that_stays() -> None:
    """von Oswald et al. (2025): H_t = γH + βkkᵀ, G_t = γG + βvkᵀ, o = G (H + Λ)⁻¹ q."""
    design = ttr.atlas["mesa_net"]
    tensors = sample(design, TIME)
    q, k, v, inputs = tensors
    moment, cross = torch.zeros(2, 3, 5, 5, dtype=torch.float64), torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    expected = []
    for t in range(TIME):
        keep, gate = inputs["log_decay"][:, t].exp()[..., None, None], inputs["input_gate"][:, t][..., None, None]
        key = k[:, t].unsqueeze(-2)
        moment = keep * moment + gate * key.mT * key
        cross = keep * cross + gate * v[:, t].unsqueeze(-1) * key
        probe = torch.linalg.solve(moment + torch.diag_embed(inputs["ridge"]), q[:, t])
        expected.append((cross @ probe.unsqueeze(-1)).squeeze(-1))
    y, _ = ttr.regress(design, q, k, v, **inputs)
    assert relative_error(y, torch.stack(expected, 1)) <= 1e-9


def test_parallax_reads_the_covariance_along_its_probe() -> None:
    """Zuo et al. (2026): softmax attention plus Cov(v, k) r."""
    q, k, v, inputs = sample(ttr.atlas["parallax"], TIME)
    weight = torch.einsum("bthk,bihk->bhti", q, k)
    weight = weight.masked_fill(torch.ones(TIME, TIME, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    mean_key, mean_value = (torch.einsum("bhti,bihd->bthd", weight, x) for x in (k, v))
    along = torch.einsum("bihk,bthk->bhti", k, inputs["probe"])
    along = along - heads_first((mean_key * inputs["probe"]).sum(-1)).unsqueeze(-1)
    expected = torch.einsum("bhti,bihv->bthv", weight * (1 + along), v)
    assert relative_error(ttr.regress(ttr.atlas["parallax"], q, k, v, **inputs)[0], expected) <= 1e-12
    assert expected.sub(mean_value).norm() > 0.1


def test_decays_per_channel_fit_each_channels_own_equation() -> None:
    """Exact × decay a channel: noiseless values of a linear map are fitted to the letter, as the ridge goes to zero."""
    design = ttr.Design(ttr.Decay(per="channel"), optimizer=ttr.Exact(ridge_decays=False))
    tensors = sample(design, 40)
    q, k, _, inputs = tensors
    teacher = normal(2, 3, 5, 4, seed=7)
    v = torch.einsum("bhkv,bthk->bthv", teacher, k)
    inputs = {"log_decay": inputs["log_decay"] / 10, "ridge": torch.full((3, 5), 1e-9, dtype=torch.float64)}
    y, _ = ttr.regress(design, q, k, v, **inputs)
    assert relative_error(y[:, 12:], torch.einsum("bhkv,bthk->bthv", teacher, q)[:, 12:]) <= 1e-5


@pytest.mark.parametrize("slug", list(ttr.atlas))
def test_every_row_decodes_token_by_token_in_single_precision(slug: str) -> None:
    design = ttr.atlas[slug]
    tensors = sample(design, 33, dtype=torch.float32)
    q, k, v, inputs = tensors
    whole, _ = ttr.regress(design, q, k, v, **inputs)
    state, outputs = None, []
    for t in range(33):
        *qkv, part = piece(design, tensors, t, t + 1)
        y, state = ttr.regress(design, *qkv, state=state, **part)
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), whole) <= 1e-5
