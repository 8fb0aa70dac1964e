"""Exact least squares: the regression on all pairs so far, solved anew at every token.

    G_t = α_t G_{t−1} + w_t k_t k_tᵀ ,    C_t = α_t C_{t−1} + w_t k_t v_tᵀ ,    y_t = C_tᵀ (G_t + Λ)⁻¹ q_t

is linear attention with whitened queries x_t = (G_t + Λ)⁻¹ q_t. The curvatures that enter chunks are linear attention's
states with keys for values, and all chunks are solved at once: `_whiten` exactly, `_conjugate_gradients` where a ridge
stays.

The gradient of a solve is a solve. With z_t = (G_t + Λ)⁻¹ ∂x_t, the rest is the gradient of −Σ_t x_tᵀ (G_t + Λ) z_t for
constant x and z: that of linear attention which reads keys for values by x, with the cotangent −z.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ttr_kernels._conjugate_gradients import whiten_by_conjugate_gradients
from ttr_kernels._gradients import gradients
from ttr_kernels._launch import check
from ttr_kernels._outputs import outputs
from ttr_kernels._packing import Packing
from ttr_kernels._states import chunk_states
from ttr_kernels._whiten import whiten_by_chunks, whiten_by_tokens
from ttr_kernels.linear_attention import arranged, like_states, linear_attention, present

Solver = Literal["auto", "chunk", "conjugate_gradients", "direct"]

FEW_TOKENS = 4  # are solved one by one
MAX_KEY_SIZE = 128


def least_squares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    log_decay: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ridge_decays: bool = True,
    solver: Solver = "auto",
    steps: int = 200,
    tolerance: float = 10 * torch.finfo(torch.float32).eps,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Predict by the exact weighted ridge regression on all pairs so far.

    G_t = exp(log_decay_t) G_{t−1} + w_t k_t k_tᵀ,  C_t = exp(log_decay_t) C_{t−1} + w_t k_t v_tᵀ,
    y_t = C_tᵀ (G_t + Λ)⁻¹ q_t. A ridge that decays is G_0 = Diag(ridge) and Λ = 0; one that stays is Λ = Diag(ridge).

    Args:
        q: queries, (batch, time, heads, key); float32, float16 or bfloat16, as k and v. Products are in float32.
        k: keys, (batch, time, heads, key); at most 128 channels.
        v: values, (batch, time, heads, value).
        ridge: > 0, float32, (heads, key) or (heads). With an initial state and `ridge_decays` it has no effect.
        log_decay: ≤ 0, float32, (batch, time, heads); None for no decay.
        weight: ≥ 0, float32, (batch, time, heads); None for one.
        ridge_decays: whether the ridge fades with the data.
        solver: "chunk" for a ridge that decays, "conjugate_gradients", or "direct", a factorisation a token. "auto" is
            the first of these that may be, and "direct" for a few tokens.
        steps: the most steps that conjugate gradients take.
        tolerance: the residual, relative to its right-hand side, at which they stop.
        initial_state: (G_0, C_0), float32, (batch, heads, key, key) and (batch, heads, key, value).
        cu_seqlens: int32 (sequences + 1), where sequences packed into a batch of one begin and end. States then have
            the sequences in the place of the batch.

    Returns:
        The outputs, like v; the final state (G, C), float32; and, of shape (1), the largest relative residual where
        conjugate gradients used up their steps, else 0. Outputs and states are differentiable in all tensors.

    Raises:
        ValueError: for a shape, dtype, device or head size that the kernels do not take, a solver that does not solve
            this problem, and for tensors on the CPU without Triton's interpreter.

    Plackett (1950) and Haykin (2002) for a ridge that decays; von Oswald et al. 2025 (arXiv 2506.05233) for one that
    stays.
    """
    curvature, cross = initial_state or (None, None)
    sizes = check(
        "q",
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch time heads key"),
        v=(v, "batch time heads value"),
        ridge=(ridge, "heads" if ridge.ndim == 1 else "heads key"),
        log_decay=(log_decay, "batch time heads"),
        weight=(weight, "batch time heads"),
        **{
            "initial_state[0]": (curvature, "sequences heads key key"),
            "initial_state[1]": (cross, "sequences heads key value"),
        },
    )
    if sizes["key"] > MAX_KEY_SIZE:
        raise ValueError(f'key: expected a head size from 1 to {MAX_KEY_SIZE}, got {sizes["key"]}; use backend="torch"')
    solvers: list[Solver] = ["chunk", "conjugate_gradients", "direct"]
    if not ridge_decays:
        solvers.remove("chunk")
    if solver == "auto":
        solver = "direct" if cu_seqlens is None and sizes["time"] <= FEW_TOKENS else solvers[0]
    if solver not in solvers:
        names = ", ".join(f'"{name}"' for name in ("auto", *solvers))
        problem = f"a ridge that {'decays' if ridge_decays else 'stays'}"
        raise ValueError(f"solver: expected one of {names} for {problem}, got {solver!r}")

    out = v.dtype
    q, k, v = (x.float() for x in (q, k, v))
    ridge = ridge.reshape(sizes["heads"], -1).expand(-1, sizes["key"])
    if curvature is None and ridge_decays:
        curvature = torch.diag_embed(ridge).expand(sizes["sequences"], -1, -1, -1)
    x, curvature, residual = _whiten(
        q, k, weight, log_decay, curvature, None if ridge_decays else ridge, cu_seqlens, solver, steps, tolerance
    )
    y, cross = linear_attention(x, weighted(k, weight), v, log_decay, initial_state=cross, cu_seqlens=cu_seqlens)
    return y.to(out), (curvature, cross), residual


def weighted(k: Tensor, weight: Tensor | None) -> Tensor:
    return k if weight is None else weight.unsqueeze(-1) * k


def _solve(
    right: Tensor,
    k: Tensor,
    weight: Tensor | None,
    log_decay: Tensor | None,
    curvature: Tensor | None,
    ridge: Tensor | None,
    packed: Packing,
    solver: str,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The solution, the curvatures that enter chunks, the last one, and the largest residual."""
    root = k if weight is None else weight.sqrt().unsqueeze(-1) * k
    starts, curvature = chunk_states(root, root, log_decay, curvature, packed)
    residual = right.new_zeros(1)
    if solver == "chunk":
        x = whiten_by_chunks(right, root, log_decay, starts, packed)
    elif solver == "direct":
        x = whiten_by_tokens(right, root, log_decay, starts, ridge, packed)
    else:
        x, residuals = whiten_by_conjugate_gradients(
            right, root, log_decay, starts, ridge, packed, steps=steps, tolerance=tolerance
        )
        if residuals.numel():
            residual = residuals.amax().reshape(1)
    return x, starts, curvature, residual


@torch.library.custom_op("ttr_kernels::whiten", mutates_args=())
def _whiten(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    log_decay: Tensor | None,
    curvature: Tensor | None,
    ridge: Tensor | None,
    cu_seqlens: Tensor | None,
    solver: str,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, weight, log_decay, curvature, ridge), packed = arranged(
        cu_seqlens, q, k, weight, log_decay, curvature, ridge
    )
    with torch.cuda.device_of(q):
        x, _, curvature, residual = _solve(q, k, weight, log_decay, curvature, ridge, packed, solver, steps, tolerance)
    return x, curvature, residual


@torch.library.custom_op("ttr_kernels::whiten_backward", mutates_args=())
def _backward(
    to_x: Tensor,
    to_curvature: Tensor,
    x: Tensor,
    k: Tensor,
    weight: Tensor | None,
    log_decay: Tensor | None,
    curvature: Tensor | None,
    ridge: Tensor | None,
    cu_seqlens: Tensor | None,
    solver: str,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (to_x, to_curvature, x, k, weight, log_decay, curvature, ridge), packed = arranged(
        cu_seqlens, to_x, to_curvature, x, k, weight, log_decay, curvature, ridge
    )
    keys = weighted(k, weight)
    with torch.cuda.device_of(x):
        z, states, _, _ = _solve(to_x, k, weight, log_decay, curvature, ridge, packed, solver, steps, tolerance)
        to_image = -z
        to_states, to_start = chunk_states(x, to_image, log_decay, to_curvature, packed, backwards=True)
        to_values = k.new_empty(k.shape)
        outputs(keys, x, None, to_image, log_decay, to_states, to_values, packed, transposed=True)
        _, to_keys, to_log_decay = gradients(x, keys, k, to_image, log_decay, states, to_states, packed)
    to_k = to_values + weighted(to_keys, weight)
    to_weight = None if weight is None else (to_keys * k).sum(-1)
    to_ridge = None if ridge is None else (to_image * x).sum((0, 1))
    return z, to_k, present(to_weight, x), present(to_log_decay, x), to_start, present(to_ridge, x)


@_whiten.register_fake
def _(q, k, weight, log_decay, curvature, ridge, cu_seqlens, solver, steps, tolerance):  # type: ignore[no-untyped-def]
    x = torch.empty_like(q, memory_format=torch.contiguous_format)
    return x, like_states(q, k, cu_seqlens), q.new_empty(1)


@_backward.register_fake
def _(to_x, to_curvature, x, k, weight, log_decay, curvature, ridge, cu_seqlens, solver, steps, tolerance):  # type: ignore[no-untyped-def]
    to_q, to_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (to_x, k))
    scalars = [
        x.new_empty(0) if scalar is None else torch.empty_like(scalar, memory_format=torch.contiguous_format)
        for scalar in (weight, log_decay)
    ]
    to_ridge = x.new_empty(0 if ridge is None else ridge.shape)
    return to_q, to_k, *scalars, like_states(x, k, cu_seqlens), to_ridge


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], *inputs[1:7])
    ctx.how = inputs[7:]


def _differentiate(ctx: Any, to_x: Tensor, to_curvature: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(to_x, to_curvature, *ctx.saved_tensors, *ctx.how)
    # A gradient that autograd did not ask for is dropped by it.
    given = (None if x is None else g for x, g in zip(ctx.saved_tensors[:6], found, strict=True))
    return *given, None, None, None, None


_whiten.register_autograd(_differentiate, setup_context=_setup)
