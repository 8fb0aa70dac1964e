"""Local linear attention: to every query's weighted past a line is fitted, and read at the query.

    y = Σ p_i (1 + u·(k_i − μ)) v_i ,    (C + λI) u = target − μ ,    μ = Σ p k ,   C = Σ p (k − μ)(k − μ)ᵀ ,

with p the weights of a query, a softmax. Parallax learns u instead, the probe, and nothing is solved. The kernels are
in `_local_linear_forward` and `_local_linear_backward`; here is what they are launched with. Memory is O(time · key).
"""

import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttr_kernels import _local_linear_backward as backwards
from ttr_kernels import _local_linear_forward as forwards
from ttr_kernels._launch import architecture, block, check, precision
from ttr_kernels._packing import Packing, Spans, packing
from ttr_kernels.linear_attention import present

MAX_HEAD_SIZE = 128
LOG2E = 1.4426950408889634
STRONGEST = -1e4  # no log-decay counts as less: its weights are zero by far, and sums with it keep their digits
# Relative residuals, where no other is asked for: what rounding leaves of the solution.
TOLERANCES = {torch.float32: 10 * torch.finfo(torch.float32).eps, torch.float16: 1e-4, torch.bfloat16: 1e-3}


class Tiles(NamedTuple):
    """How a kernel cuts its work: queries and pairs of a tile, warps, stages of the pipeline."""

    queries: int
    pairs: int
    warps: int = 8
    stages: int = 2


FEW_QUERIES = Tiles(16, 64, warps=4)  # in half precision
# By whether the inputs are half precision and heads wider than 64: of the kernels that have no others, and these.
TILES = {
    (True, False): {"": Tiles(128, 64), "keys": Tiles(32, 128)},
    (True, True): {
        "": Tiles(128, 64), "solve": Tiles(64, 32), "pulls": Tiles(128, 32), "queries": Tiles(128, 32),
        "keys": Tiles(32, 64)
    },
    (False, False): {
        "": Tiles(64, 32), "solve": Tiles(64, 32, stages=1), "queries": Tiles(32, 32), "keys": Tiles(16, 32)
    },
    (False, True): {"": Tiles(16, 16, stages=1)},
}  # fmt: skip
# Where registers or shared memory are fewer: before sm_90, on sm_12x, and on gfx.
SMALLER = {
    (True, False): {"": Tiles(64, 32, warps=4), "keys": Tiles(32, 64, warps=4)},
    (True, True): {"": Tiles(64, 32), "keys": Tiles(32, 64)},
    (False, False): {"": Tiles(32, 32), "keys": Tiles(16, 32)},
    (False, True): {"": Tiles(16, 16, stages=1)},
}


def _tiles(kernel: str, half: bool, wide: bool, architecture: str) -> Tiles:
    """The largest that spill no register, with few exceptions in float32."""
    if architecture.startswith("sm_10") and half and kernel == "solve":
        return Tiles(64, 32, stages=1) if wide else Tiles(128, 32)
    table = (TILES if architecture in ("cpu", "sm_90") or architecture.startswith("sm_10") else SMALLER)[half, wide]
    tiles = table.get(kernel, table[""])
    return tiles._replace(warps=4, stages=1) if architecture.startswith("gfx") else tiles


def local_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: Tensor | None = None,
    ridge: Tensor | None = None,
    probe: Tensor | None = None,
    log_decay: Tensor | None = None,
    log_weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    window: int | None = None,
    steps: int = 200,
    tolerance: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit a line to each query's weighted past, and read it at the target; or take its slope from a probe.

    y_t = Σ p_ti (1 + u_t·(k_i − μ_t)) v_i,  (C_t + λI) u_t = target_t − μ_t,
    p_ti ∝ exp(scale q_t·k_i + log_weight_i + log_decay_{i+1} + … + log_decay_t) over the pairs i ≤ t in the window.

    Args:
        q: queries, (batch, time, heads, key); float32, float16 or bfloat16, as all that follows unless it says so.
        k: keys, (batch, pairs, heads, key). The last of the pairs belong to the queries, the others precede them.
        v: values, (batch, pairs, heads, value).
        target: where the line is read, shaped like q. Needed without a probe.
        ridge: λ > 0, float32, (heads). Needed without a probe.
        probe: u, shaped like q.
        log_decay: ≤ 0, float32, (batch, pairs, heads); None for no decay. −inf forgets all that is before.
        log_weight: float32, (batch, pairs, heads). −inf leaves a pair out; a query that sees no other pair reads 0.
        scale: of the scores q·k.
        window: how many pairs, the newest included, a query sees; None is all of them.
        steps: the most steps of conjugate gradients.
        tolerance: where they stop, the residual relative to the right side; None suits the dtype.
        cu_seqlens: int32 (sequences + 1), where sequences packed into a batch of one begin and end, queries and pairs
            alike.

    Returns:
        The outputs, (batch, time, heads, value), differentiable in all tensors, and the largest relative residual.

    Raises:
        ValueError: for a shape, dtype, device or head size that the kernels do not take, a target or ridge missing or
            beside a probe, and for tensors on the CPU without Triton's interpreter.

    Warns:
        UserWarning: where the solve of the gradient used up its steps, if that can be read at no cost: on the CPU, or
            under TTR_CHECK=1.

    Zuo et al. 2025 (local linear attention); Zuo et al. 2026 (Parallax).
    """
    sizes = check(
        "q",
        cu_seqlens,
        q=(q, "batch time heads key"),
        k=(k, "batch pairs heads key"),
        v=(v, "batch pairs heads value"),
        target=(target, "batch time heads key"),
        ridge=(ridge, "heads"),
        probe=(probe, "batch time heads key"),
        log_decay=(log_decay, "batch pairs heads"),
        log_weight=(log_weight, "batch pairs heads"),
    )
    for axis in ("key", "value"):
        if sizes[axis] > MAX_HEAD_SIZE:
            raise ValueError(
                f'{axis}: expected a head size from 1 to {MAX_HEAD_SIZE}, got {sizes[axis]}; use backend="torch"'
            )
    for name, given in (("target", target), ("ridge", ridge)):
        if (given is None) == (probe is None):
            expected = "a tensor without a probe" if probe is None else "None beside a probe"
            raise ValueError(f"{name}: expected {expected}, got {'None' if given is None else 'a tensor'}")
    past = sizes["pairs"] - sizes["time"]
    if past < 0 or (past and cu_seqlens is not None):
        expected = f"{'at least ' if cu_seqlens is None else ''}{sizes['time']}, those of the queries"
        raise ValueError(f"k: expected pairs to be {expected}, got {sizes['pairs']}")
    for option, value, least in (("window", window, 1), ("steps", steps, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option}: expected at least {least}, got {value}")
    if tolerance is None:
        tolerance = TOLERANCES[q.dtype]
    y, _, _, _, residual = _forward(
        q, k, v, target, ridge, probe, log_decay, log_weight, cu_seqlens, scale, window, steps, tolerance
    )
    return y, residual


class _Sight(NamedTuple):
    """Which pairs the queries see, with what weight, and in what tiles."""

    q: Tensor
    k: Tensor
    v: Tensor
    fade: Tensor | None
    bias: Tensor | None
    queries: Packing
    pairs: Packing
    scale: float
    window: int | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, log_weight: Tensor | None,
        cu_seqlens: Tensor | None, scale: float, window: int | None,
    ) -> "_Sight":  # fmt: skip
        fade, bias = None, None if log_weight is None else log_weight * LOG2E
        if log_decay is not None:
            # In float32 alone, what has elapsed would lose the digits of small decays after large ones.
            elapsed = log_decay.double().clamp_min(STRONGEST).cumsum(1) * LOG2E
            fade = elapsed.float()
            rest = (fade.double() - elapsed).float()
            bias = rest if bias is None else bias + rest
        queries, pairs = (packing(len(q), x.shape[1], cu_seqlens, q.device) for x in (q, k))
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        fade, bias = (None if x is None else x.contiguous() for x in (fade, bias))
        return cls(q, k, v, fade, bias, queries, pairs, scale * LOG2E, window)

    def tiles(self, kernel: str) -> Tiles:
        """Those of a kernel, with no more queries than there are."""
        half, wide = self.q.dtype != torch.float32, max(self.q.shape[-1], self.v.shape[-1]) > 64
        tiles = _tiles(kernel, half, wide, architecture(self.q.device))
        longest = self.queries.longest
        if longest is None or longest > tiles.queries // 2 or kernel == "keys":
            return tiles
        return FEW_QUERIES if half and longest <= 16 else tiles._replace(queries=block(longest))

    def launch(self, kernel: Any, tiles: Tiles, blocks: Spans, *, values: bool = True, **others: Any) -> None:
        """A program for every span and head."""
        key, value, heads = self.q.shape[-1], self.v.shape[-1], self.q.shape[2]
        of_values = {"p_v": self.v, "V": value, "BLOCK_V": block(value)} if values else {}
        with torch.cuda.device_of(self.q):
            kernel[(blocks.number * heads,)](
                p_q=self.q, p_k=self.k, **of_values, p_fade=self.fade, p_bias=self.bias, p_spans=blocks.table,
                p_bounds=self.queries.bounds, past=self.k.shape[1] - self.q.shape[1], H=heads, scale=self.scale,
                window=self.window, **others, K=key, BLOCK_K=block(key), BLOCK_T=tiles.queries, BLOCK_N=tiles.pairs,
                PRECISION=precision(self.q.dtype, self.q.device), num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip

    def over_queries(self, kernel: Any, name: str, **others: Any) -> None:
        tiles = self.tiles(name)
        spans = self.queries.cut(tiles.queries)
        self.launch(kernel, tiles, spans, spans=spans.number, **others)

    def empty(self, *sizes: int) -> Tensor:
        """Of each query so many numbers, float32."""
        return self.q.new_empty((*self.q.shape[:3], *sizes), dtype=torch.float32)

    def solve(self, x: Tensor, mean: Tensor, norm: Tensor, ridge: Tensor, steps: int, tolerance: float) -> Tensor:
        """x ← (C + λI)^{-1} x; the largest relative residual."""
        tiles = self.tiles("solve")
        spans = self.queries.cut(tiles.queries)
        residual = self.q.new_empty((spans.number, self.q.shape[2]), dtype=torch.float32)
        self.launch(
            forwards.local_solve_kernel, tiles, spans, spans=spans.number, values=False, p_x=x, p_mean=mean,
            p_norm=norm, p_ridge=ridge.contiguous(), p_residual=residual, steps=steps, tolerance=tolerance,
        )  # fmt: skip
        return residual.amax()


@torch.library.custom_op("ttr_kernels::local_linear", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target: Tensor | None,
    ridge: Tensor | None,
    probe: Tensor | None,
    log_decay: Tensor | None,
    log_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, u, μ, the log-sums and the residual."""
    sight = _Sight.of(q, k, v, log_decay, log_weight, cu_seqlens, scale, window)
    y = v.new_empty((*q.shape[:3], v.shape[-1]))
    mean, norm = sight.empty(q.shape[-1]), sight.empty()
    residual = mean.new_zeros(())
    if q.numel() == 0:
        return y, present(None, q), mean, norm, residual
    u = probe.contiguous() if probe is not None else sight.empty(q.shape[-1])
    sight.over_queries(
        forwards.local_moments_kernel, "moments", values=False, p_mean=mean, p_norm=norm,
        p_target=None if target is None else target.contiguous(), p_right=None if target is None else u,
    )  # fmt: skip
    if ridge is not None:
        residual = sight.solve(u, mean, norm, ridge, steps, tolerance)
    sight.over_queries(forwards.local_output_kernel, "output", p_u=u, p_mean=mean, p_norm=norm, p_y=y)
    return y, present(None, q) if probe is not None else u.to(q.dtype), mean, norm, residual


@torch.library.custom_op("ttr_kernels::local_linear_backward", mutates_args=())
def _backward(
    to_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor | None,
    y: Tensor,
    u: Tensor,
    mean: Tensor,
    norm: Tensor,
    log_decay: Tensor | None,
    log_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int | None,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, of the target or the probe, of the ridge and the log-weights; the residual."""
    sight = _Sight.of(q, k, v, log_decay, log_weight, cu_seqlens, scale, window)
    to_q, to_k, to_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    to_bias = q.new_empty(k.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        found = to_q, to_k, to_v, torch.empty_like(q), torch.empty_like(present(ridge, q)), to_bias, norm.new_empty(())
        return tuple(x.zero_() for x in found)  # type: ignore[return-value]
    y, u, to_y = y.contiguous(), u.contiguous(), to_y.contiguous()
    pull, x, rows = sight.empty(), sight.empty(q.shape[-1]), sight.empty(3)
    sight.over_queries(
        backwards.local_pulls_kernel, "pulls",
        p_y=None if ridge is None else y, p_to_y=to_y, p_mean=mean, p_norm=norm, p_pull=pull, p_right=x,
    )  # fmt: skip
    w, residual, to_ridge = None, norm.new_zeros(()), present(None, q)
    if ridge is not None:
        residual = sight.solve(x, mean, norm, ridge, steps, tolerance)
        to_ridge = (x * u).sum((0, 1, 3))
        w = x.to(q.dtype)
    shared: dict[str, Any] = {"p_u": u, "p_w": w, "p_to_y": to_y, "p_norm": norm, "p_rows": rows}
    sight.over_queries(
        backwards.local_query_gradient_kernel, "queries", p_mean=mean, p_pull=pull, p_to_q=to_q, **shared
    )
    tiles = sight.tiles("keys")
    sight.launch(
        backwards.local_key_gradient_kernel, tiles, sight.pairs.cut(tiles.pairs),
        p_to_k=to_k, p_to_v=to_v, p_to_bias=to_bias, **shared,
    )  # fmt: skip
    return to_q, to_k, to_v, (-x).to(q.dtype), to_ridge, to_bias, residual


@_forward.register_fake
def _(q, k, v, target, ridge, probe, log_decay, log_weight, cu_seqlens, *_):  # type: ignore[no-untyped-def]
    mean, norm = q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)
    u = present(None, q) if probe is not None else q.new_empty(q.shape)
    return v.new_empty((*q.shape[:3], v.shape[-1])), u, mean, norm, norm.new_empty(())


@_backward.register_fake
def _(to_y, q, k, v, ridge, y, u, mean, norm, *_):  # type: ignore[no-untyped-def]
    to_ridge = present(None, q) if ridge is None else ridge.new_empty(ridge.shape)
    like = [x.new_empty(x.shape) for x in (q, k, v, q)]
    return *like, to_ridge, q.new_empty(k.shape[:3], dtype=torch.float32), norm.new_empty(())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, ridge, probe, log_decay, log_weight, cu_seqlens, *ctx.settings = inputs
    y, u, mean, norm, residual = output
    ctx.mark_non_differentiable(u, mean, norm, residual)
    u = u if probe is None else probe
    ctx.save_for_backward(q, k, v, ridge, y, u, mean, norm, log_decay, log_weight, cu_seqlens)


def _differentiate(ctx: Any, to_y: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, _, ridge, *_, log_decay, log_weight, _ = ctx.saved_tensors
    to_q, to_k, to_v, to_slope, to_ridge, to_bias, residual = _backward(to_y, *ctx.saved_tensors, *ctx.settings)
    _warn_unless_converged(residual, *ctx.settings[2:])
    to_target, to_probe = (None, to_slope) if ridge is None else (to_slope, None)
    # A decay counts for all pairs before it. The gradients of a query's log-weights sum to zero, so that those of its
    # own sequence sum to what they do from its pair on, and those of the next sequences to nothing.
    to_log_decay = None if log_decay is None else -to_bias.double().flip(1).cumsum(1).flip(1).float()
    return (
        to_q, to_k, to_v, to_target, None if ridge is None else to_ridge, to_probe, to_log_decay,
        None if log_weight is None else to_bias, *[None] * 5,
    )  # fmt: skip


def _warn_unless_converged(residual: Tensor, steps: int, tolerance: float) -> None:
    """Warn where values may be read: not on a GPU, which would wait, nor of tensors that a compiler traces."""
    traced = torch.compiler.is_compiling() or type(residual) is not Tensor
    if traced or (residual.is_cuda and os.environ.get("TTR_CHECK") != "1"):
        return
    largest = residual.item()
    if largest > tolerance:
        warnings.warn(
            f"conjugate gradients, of a gradient: relative residual {largest:.1e} after {steps} steps, "
            f"tolerance {tolerance:.1e}",
            stacklevel=2,
        )


_forward.register_autograd(_differentiate, setup_context=_setup)
