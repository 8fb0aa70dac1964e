# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Kernels: chunks, Triton, the roofline
#
# A memory is written one token after the other. A GPU is fast at large matrix products and at little else.
# How does the recurrence become matrix products, and what limits its speed then?
#
# Cut the sequence into chunks: products inside a chunk, one state between chunks, and for memories that correct
# themselves one triangular system. By our estimate for one GPU, memory traffic then limits a Hebbian sum, and products
# that wait for one another limit the delta rule.
# This chapter derives the chunk forms as a GPU launches them, counts what they compute and move, holds the counts
# against a roofline, writes a Triton kernel and runs it without a GPU, and looks at where digits get lost.
# Nothing is timed here. {doc}`/notebooks/speed` has the measurements.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import ttr
from ttr.book import OKABE_ITO, record, table, use_style

sys.path.insert(0, "..")  # the records of the benchmarks are beside the package, not in it
import benchmarks.record
from benchmarks import estimate, provenance, roofline

use_style()
sizes = {
    "smoke": {"draws": 8, "chunks": (8, 16, 32, 64, 128), "tokens": 4096},
    "full": {"draws": 64, "chunks": (8, 16, 32, 64, 128, 256), "tokens": 16384},
}[scale]
generator = torch.Generator().manual_seed(13)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def identity(size):
    return torch.eye(size, dtype=torch.float64, device=device)


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def kept_bytes(form, *inputs):
    """What autograd keeps beyond the inputs, in bytes a token."""
    own, seen = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        form(*inputs)
    return sum(size for place, size in seen.items() if place not in own) / len(inputs[0])


# %% [markdown]
# ## What limits a kernel
#
# A computation of $F$ operations that moves $B$ bytes between memory and chip takes, on a device with $\pi$
# operations and $b$ bytes a second, at least
#
# ```{math}
# :label: chunk-eq-roofline
# t \;\ge\; \max\Bigl(\frac{F}{\pi},\ \frac{B}{b}\Bigr), \qquad\text{so it runs at}\qquad
# \frac Ft \;\le\; \min\bigl(\pi,\ b\,I\bigr), \quad I = \frac FB .
# ```
#
# $I$ is the **arithmetic intensity**, in operations a byte. Drawn over $I$ the bound is a slope and then a flat roof:
# the roofline of {cite:t}`williams2009roofline`. They meet at $I = \pi / b$.
# To the left of it memory is the limit, and cheaper arithmetic gains nothing.
#
# A recurrence has a third bound. Products that wait for one another take their latency each, whatever their size.
# A GPU runs *programs*, each on one multiprocessor; where not all fit at once, they come in waves.
# With $n$ dependent products of latency $\tau$ in a program, and $w$ waves,
#
# ```{math}
# :label: chunk-eq-latency
# t \;\ge\; w\, n\, \tau .
# ```
#
# Here are the three for an NVIDIA H200 and bfloat16, with $\pi$ and $b$ from its data sheet.
# The latency $\tau$ of a product of $64 \times 64$ tiles is an assumption, the one of `benchmarks/estimate.py`.

# %%
GPU = roofline.PEAKS["H200"]
LATENCY = estimate.PRODUCT_SECONDS


def bounds(flops, moved, programs, products):
    """Three lower bounds in seconds; a chip that is half full has half of its rates."""
    filled = min(1, programs / GPU.multiprocessors)
    waves = math.ceil(programs / GPU.multiprocessors)
    return {
        "products": flops / GPU.half / filled,
        "memory": moved / GPU.bytes / filled,
        "latency": waves * products * LATENCY,
    }


record("chunk_ridge_point", GPU.half / GPU.bytes)

# %% [markdown]
# The two lines meet at {glue:text}`chunk_ridge_point:.0f` operations a byte.
#
# Now take linear attention with a decay as it is defined, $S_t = \alpha_t S_{t-1} + k_t v_t^\top$ and
# $y_t = S_t^\top q_t$, with keys and values of $d$ channels.
# A token takes $4d^2$ operations. If the float32 state goes to memory and back, it moves $8d^2$ bytes, and the
# intensity is one half, at any $d$.
# Kept on the chip, the state moves nothing, but then $T$ tokens wait for one another, each with too little to do.

# %%
d = 128
step = bounds(4 * d**2, 8 * d**2, programs=GPU.multiprocessors, products=1)
assert step["memory"] > 100 * step["products"]

# %% [markdown]
# ## Chunks
#
# {doc}`/notebooks/02_linear_attention` has the three forms of a sum over pairs: a recurrence, one masked product of
# all tokens, and chunks, in a loop over chunks. A GPU wants the loop as small as can be. So let us write the chunk
# form in three phases, of which only the second is serial.
#
# Number the tokens of a chunk $1, \dots, C$, let $S_n$ be the memory that enters chunk $n$, and
# $c_t = \sum_{j \le t} \log \alpha_j$ the decay since the chunk began. Unroll the recurrence inside the chunk:
#
# ```{math}
# :label: chunk-eq-unrolled
# S_t = e^{c_t} S_n + \sum_{j \le t} e^{c_t - c_j}\, k_j v_j^\top .
# ```
#
# With the rows of $Q$, $K$, $V$ for the tokens of the chunk:
#
# ```{math}
# :label: chunk-eq-phases
# \begin{aligned}
# \text{1. totals} \quad & U_n = \bigl(e^{c_C - c} \circ K\bigr)^\top V && \text{all chunks at once,} \\
# \text{2. scan} \quad & S_{n+1} = e^{c_C} S_n + U_n && \text{one after the other,} \\
# \text{3. outputs} \quad & Y = (Q K^\top \circ D)\, V + e^{c} \circ (Q S_n) && \text{all chunks at once,}
# \end{aligned}
# ```
#
# where $D_{tj} = e^{c_t - c_j}$ for $j \le t$ and $0$ else, and $\circ$ multiplies entry by entry, a vector row by row.
# That is the chunk form of {cite:t}`yang2023gated` and {cite:t}`dao2024mamba2`.


# %%
def future(size):
    """True where the column is later than the row."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def chunked(q, k, v, log_decay, C):
    """One head, its length a multiple of C; three phases."""
    Q, K, V = (x.unflatten(0, (-1, C)) for x in (q, k, v))
    c = log_decay.unflatten(0, (-1, C)).cumsum(1)[..., None]
    totals = ((c[:, -1:] - c).exp() * K).mT @ V
    S, starts = torch.zeros_like(totals[0]), []
    for factor, total in zip(c[:, -1:].exp(), totals, strict=True):
        starts.append(S)
        S = factor * S + total
    D = (c - c.mT).masked_fill(future(C), -torch.inf).exp()
    Y = (Q @ K.mT * D) @ V + c.exp() * (Q @ torch.stack(starts))
    return Y.flatten(0, 1), S


# %% [markdown]
# A memory that corrects its errors needs one thing more.
# In {doc}`/notebooks/04_delta_rule` the errors $U$ of a chunk solve a triangular system,
#
# ```{math}
# :label: chunk-eq-triangle
# (I + A)\, U = V - e^{c} \circ (K S_n), \qquad A_{tj} = e^{c_t - c_j}\, k_t^\top g_j \ \text{ for } j < t, \text{ else } 0 ,
# ```
#
# where $g_j$ is the gain, $\beta_j k_j$ for the delta rule. Then {eq}`chunk-eq-phases` holds with $U$ in the place of $V$
# and the rows $g_j$ in the place of the keys.
# The right side needs the state; the matrix does not.
# So the matrix is inverted before the scan, for all chunks at once, and the scan multiplies.
# It is the WY (or UT) form of {cite:t}`yang2024parallelizing`.


# %%
def chunked_delta(q, k, v, gain, log_decay, C):
    """One head: four phases, the inverses first."""
    Q, K, V, G = (x.unflatten(0, (-1, C)) for x in (q, k, v, gain))
    c = log_decay.unflatten(0, (-1, C)).cumsum(1)[..., None]
    D = (c - c.mT).masked_fill(future(C), -torch.inf).exp()
    inverses = torch.linalg.inv(identity(C) + (K @ G.mT * D).tril(-1))
    S, starts, errors = K.new_zeros(K.shape[-1], V.shape[-1]), [], []
    for K_n, V_n, G_n, c_n, inverse in zip(K, V, G, c, inverses, strict=True):
        starts.append(S)
        errors.append(inverse @ (V_n - c_n.exp() * (K_n @ S)))
        S = c_n[-1:].exp() * S + ((c_n[-1:] - c_n).exp() * G_n).mT @ errors[-1]
    Y = (Q @ G.mT * D) @ torch.stack(errors) + c.exp() * (Q @ torch.stack(starts))
    return Y.flatten(0, 1), S


# %% [markdown]
# Both against the ops, and against the one entry point, in float64:

# %%
T, d, C = 192, 16, 32
q, k, v = (randn(1, T, 1, d) for _ in range(3))
k, log_decay = normalize(k, dim=-1), -randn(1, T, 1).square() / 5
beta = 2 * randn(1, T, 1).sigmoid()
gain = ttr.ops.gains.lms(k, beta)


def one_head(*tensors):
    return (x[0, :, 0] for x in tensors)


y, memory = chunked(*one_head(q, k, v, log_decay), C)
fast, state = ttr.regress(ttr.Design(ttr.Decay()), q, k, v, log_decay=log_decay)
assert_close(fast[0, :, 0], y)
assert_close(state.memory[0, 0], memory)
assert_close(ttr.ops.linear_attention(q, k, v, log_decay)[0], fast)

y, memory = chunked_delta(*one_head(q, k, v, gain, log_decay), C)
inputs = {"log_decay": log_decay, "step_size": beta}
fast, state = ttr.regress(ttr.atlas["gated_delta_net"], q, k, v, **inputs)
assert_close(fast[0, :, 0], y)
assert_close(state.memory[0, 0], memory)
assert_close(ttr.ops.delta_rule(q, k, v, gain, log_decay)[0], fast)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "From a recurrence to matrix products. Top: a recurrence has one thin step a token; the quadratic form is a single masked product of all pairs (dark: little decay); chunks keep the masked product on the diagonal and put a state in the place of everything below it. Bottom: the scan, the one serial part, carries the state from chunk to chunk; with few heads the sequence is cut into segments, each found from zero first; the delta rule's triangle is inverted from the diagonal outwards, blocks of one size at once (the number is the round in which an entry is reached).", "name": "chunk-fig-steps"}, "image": {"alt": "Six schematic panels. A row of small boxes joined by arrows; a shaded lower triangle; the same triangle with only blocks on the diagonal shaded and pale blocks marked S below; boxes of chunks that feed a chain of states; chunks in coloured segments in three rows; a lower triangle whose entries are numbered one to three by block size."}}
figure, axes = plt.subplots(2, 3, figsize=(9.6, 6.2))
blue, orange, green, gold = OKABE_ITO[:4]


def box(ax, x, y, width, height, text="", color="white", size=8):
    ax.add_patch(plt.Rectangle((x, y), width, height, facecolor=color, edgecolor="0.3", linewidth=0.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(ax, start, stop, color="0.25"):
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    ax.annotate("", xy=stop, xytext=start, arrowprops=style)


recurrence, quadratic, in_chunks, scan, segments, triangle = axes.flat
for t in range(5):  # the recurrence
    box(recurrence, 1.4 * t, 3, 0.8, 1.2, f"$S_{t}$", "#d6e8f5")
    if t:
        box(recurrence, 1.4 * t - 0.05, 0.8, 0.9, 0.9, f"$k_{t} v_{t}^\\top$", size=7)
        arrow(recurrence, (1.4 * t - 0.6, 3.6), (1.4 * t, 3.6))
        arrow(recurrence, (1.4 * t + 0.4, 1.7), (1.4 * t + 0.4, 3))
        arrow(recurrence, (1.4 * t + 0.4, 4.2), (1.4 * t + 0.4, 5.3))
        recurrence.text(1.4 * t + 0.4, 5.6, f"$y_{t}$", ha="center", fontsize=8)
recurrence.set(xlim=(-0.3, 6.9), ylim=(-1.2, 7.2), title="recurrence: $T$ steps")

size, chunk = 16, 4
decays = torch.linspace(-0.05, -0.2, size)
c = decays.cumsum(0)
D = (c[:, None] - c).exp().tril()
shades = torch.where(future(size).cpu(), torch.nan, D)
block = torch.arange(size) // chunk
for ax, image in ((quadratic, shades), (in_chunks, torch.where(block[:, None] == block, shades, torch.nan))):
    ax.imshow(image, cmap="Blues", vmin=0, vmax=1.4)
    ax.set(xticks=[], yticks=[], xlabel="key $j$", ylabel="query $t$")
quadratic.set_title("quadratic: $(QK^\\top \\circ D)\\,V$")
for row in range(size // chunk):
    in_chunks.add_patch(
        plt.Rectangle((row * chunk - 0.5, row * chunk - 0.5), chunk, chunk, fill=False, edgecolor=blue, linewidth=1.2)
    )
    if row:
        edges = {"facecolor": "#fbe3d3", "edgecolor": orange, "linewidth": 0.8}
        in_chunks.add_patch(plt.Rectangle((-0.5, row * chunk - 0.5), row * chunk, chunk, **edges))
        in_chunks.text(row * chunk / 2 - 0.5, row * chunk + 1.5, f"through $S_{row}$", ha="center", va="center", size=8)
in_chunks.set_title("chunks: blocks, and a state")

for n in range(4):  # the scan
    box(scan, 2.6 * n, 0, 2.0, 1, f"chunk {n}", "#d6e8f5")
    box(scan, 2.6 * n + 0.4, 2, 1.2, 0.9, f"$U_{n}$", size=8)
    box(scan, 2.6 * n + 0.4, 4, 1.2, 0.9, f"$S_{n}$", "#fbe3d3")
    box(scan, 2.6 * n, 6, 2.0, 1, f"$Y_{n}$", "#d6e8f5")
    arrow(scan, (2.6 * n + 1, 1), (2.6 * n + 1, 2))
    arrow(scan, (2.6 * n + 1, 4.9), (2.6 * n + 1, 6))
    if n < 3:
        arrow(scan, (2.6 * n + 1.6, 4.4), (2.6 * n + 3.0, 4.4), orange)
        arrow(scan, (2.6 * n + 1.6, 2.6), (2.6 * n + 3.2, 4.0), orange)
scan.set(xlim=(-0.4, 10.2), ylim=(-0.6, 7.6), title="scan between chunks")

colours = ("#d6e8f5", "#fbe3d3", "#d4efe6", "#fbefd0")
for n in range(8):  # segments
    for level in (0, 5):
        box(segments, 1.2 * n, level, 1.1, 1, "", colours[n // 2])
        if n % 2:
            arrow(segments, (1.2 * n - 0.55, level + 0.5), (1.2 * n + 0.45, level + 0.5))
for s in range(4):
    box(segments, 2.4 * s + 0.7, 2.3, 1.0, 1.0, f"$S_{{{2 * s}}}$", colours[s])
    arrow(segments, (2.4 * s + 1.2, 3.3), (2.4 * s + 0.5, 5))
    if s < 3:
        arrow(segments, (2.4 * s + 1.7, 2.8), (2.4 * s + 3.1, 2.8), orange)
        arrow(segments, (2.4 * s + 1.7, 1.0), (2.4 * s + 3.1, 2.3), orange)
for height, text in ((-0.75, "1. each from zero, at once"), (6.3, "3. each from its own state, at once")):
    segments.text(4.8, height, text, ha="center", fontsize=8)
segments.text(-0.3, 1.5, "2. scan", fontsize=8)
segments.set(xlim=(-0.4, 10), ylim=(-1.2, 7.2), title="segments, for few heads")

place = torch.arange(8)
level = (place[:, None] ^ place).float().clamp_min(1).log2().floor() + 1
level = torch.where(place[:, None] > place, level, torch.nan)
triangle.imshow(level, cmap="YlOrBr", vmin=0, vmax=5)
for row in range(8):
    for column in range(row + 1):
        text = "1" if row == column else f"{level[row, column]:.0f}"
        text = "$I$" if row == column else text
        triangle.text(column, row, text, ha="center", va="center", fontsize=8)
triangle.set(xticks=[], yticks=[], title="$(I + A)^{-1}$, by blocks")
for ax in (recurrence, scan, segments):
    ax.set_axis_off()
for ax in axes.flat:
    ax.grid(False)
    ax.title.set_fontsize(11)
plt.show()

# %% [markdown]
# ## Operations and bytes, as functions of the chunk
#
# How large should $C$ be? Count a token of one head, $d$ channels, elements of $e$ bytes, states in float32.
# A whole tile is multiplied even where half of it is masked, for that is what the hardware does.
#
# | phase | operations | bytes |
# |---|---|---|
# | totals and scan | $2d^2$ | read $k, v$: $2de$; write the states: $4d^2/C$ |
# | outputs | $4dC + 2d^2$ | read $q, k, v$, write $y$: $4de$; read the states: $4d^2/C$ |
#
# ```{math}
# :label: chunk-eq-cost
# F(C) = 4dC + 4d^2, \qquad B(C) = 6de + \frac{8d^2}{C} .
# ```
#
# Operations rise with the chunk, bytes fall.
# The bytes of the states are no longer the larger part from $C = 4d/(3e)$ on.
# PyTorch counts its own products, so the first half of {eq}`chunk-eq-cost` can be checked on the ten lines:

# %%
from torch.utils.flop_counter import FlopCounterMode


def operations(C, d):
    """A token."""
    return 4 * d * C + 4 * d**2


def traffic(C, d, e=2):
    """Bytes a token, with the states written and read once."""
    return 6 * d * e + 8 * d**2 / C


T, d = 256, 32
tensors = [randn(T, d) for _ in range(3)] + [-torch.ones(T, device=device)]
for C in (16, 32, 64):
    with FlopCounterMode(display=False) as counter:
        chunked(*tensors, C)
    assert counter.get_total_flops() == T * operations(C, d)

# %% [markdown]
# The second half was counted elsewhere. The record of the estimate holds what the kernels' launches compute and move
# at the benchmark's shapes, counted under Triton's interpreter.
# It moves what the formula says. It computes more than the formula: where a bfloat16 tile meets a float32 one (a state, a
# score), the kernel takes two products to keep its digits, as the section on digits explains.

# %%
estimated = provenance.load(estimate.RECORDED)
forwards = [row for row in estimated["rows"] if row["direction"] == "forward"]


def a_token(row, number):
    batch, time, heads, _ = row["shape"]
    return number / (batch * time * heads)


plain = next(row for row in forwards if row["op"] == "linear_attention, no decay")
width = plain["shape"][-1]
C = min((64, 128), key=lambda C: abs(traffic(C, width) - a_token(plain, plain["moved"])))
assert abs(a_token(plain, plain["moved"]) / traffic(C, width) - 1) < 0.05
executed = a_token(plain, sum(plain["executed"].values()))
assert operations(C, width) <= executed <= 2 * operations(C, width)

# %% [markdown]
# Where do the two bounds of {eq}`chunk-eq-roofline` meet? With $R = \pi / b$ the equation $F(C) = R\, B(C)$ is
# quadratic in $C$:
#
# ```{math}
# :label: chunk-eq-optimum
# 4d\,C^2 + (4d^2 - 6deR)\,C - 8d^2R = 0 .
# ```

# %%
d, e, R = 128, 2, GPU.half / GPU.bytes
p = 4 * d**2 - 6 * d * e * R
best = (-p + math.sqrt(p**2 + 128 * d**3 * R)) / (8 * d)
assert math.isclose(operations(best, d), R * traffic(best, d), rel_tol=1e-9)
balance = 4 * d / (3 * e)
registers = 65536  # of four bytes, in a multiprocessor
largest = math.isqrt(registers // 2)  # of scores, that fill half of them
intensities = {C: operations(C, d) / traffic(C, d) for C in (1, 16, 64, 128)}
assert largest < best  # memory is the limit for every chunk that fits
assert all(intensity < R for intensity in intensities.values())
record("chunk_optimum", best, rtol=0.01)
record("chunk_balance", balance)
record("chunk_largest", largest)
record("chunk_intensity_128", intensities[128])

# %% [markdown]
# For $d = 128$ they meet at a chunk of {glue:text}`chunk_optimum:.0f` tokens.
# A kernel that holds all scores of a chunk at once cannot have it. They are $C^2$ float32 numbers, and with
# {glue:text}`chunk_largest` tokens they take half of the registers of a multiprocessor.
# So such a kernel is limited by memory at every chunk that fits: at $C = 128$ its intensity is
# {glue:text}`chunk_intensity_128:.0f` operations a byte.
# All one can ask of $C$ is that the traffic of the states does not dominate. It is half of the whole at
# {glue:text}`chunk_balance:.0f` tokens, between the chunks of $64$ and $128$ that kernels have.
#
# There is another way out. If one program walks along a whole sequence with its state in registers, no state is
# written, and $k$ and $v$ are read once: $4de$ bytes, at any $C$.
# The price is {eq}`chunk-eq-latency`: the products of all chunks wait for one another, and there is one program for
# each head and block of values, however long the sequence.
# It is good with many heads and bad with few.
# With few heads, **segments** help: cut the sequence into $s$ pieces, find what each adds to a state that begins at
# zero, scan over the pieces, and walk them again from the right states. The totals are computed twice, and the
# chain of either walk is $s$ times shorter.
#
# ```{prf:theorem} Why a scan may be cut
# :label: chunk-theorem-scan
# Let a chunk act on a state by $f_n(S) = A_n S + U_n$. The composition of two such maps is one of them,
#
# $$(A_2, U_2) \cdot (A_1, U_1) = (A_2 A_1,\; A_2 U_1 + U_2),$$
#
# and it is associative. So the states between segments follow from one pair $(A, U)$ a segment.
# For a Hebbian sum $A$ is the product of the decays; for the delta rule with one decay a head it is
# $A = e^{c_C} \bigl(I - G'^\top (I + A')^{-1} K'\bigr)$, a $d \times d$ matrix, with
# $K'$ and $G'$ the decayed keys and gains and $A'$ the triangle of {eq}`chunk-eq-triangle`.
# ```
#
# ```{prf:proof}
# $A_2(A_1 S + U_1) + U_2 = A_2 A_1 S + (A_2 U_1 + U_2)$, and composing functions is associative.
# For the delta rule put the solution $U$ of {eq}`chunk-eq-triangle` into
# $S_{n+1} = e^{c_C} S_n + \sum_j e^{c_C - c_j} g_j u_j^\top$: it is affine in $S_n$. With the rows
# $k'_t = e^{c_t} k_t$ and $g'_j = e^{-c_j} g_j$ the linear part is as stated.
# ```
#
# The rows $e^{-c_j} g_j$ are for the proof. A kernel uses $e^{c_C - c_j}$, which cannot overflow.
# And it needs no formula for $A$: run the chunk on the identity, with values of zero.

# %%
T, d, C = 128, 8, 16
q, k, v = (randn(T, d) for _ in range(3))
k, log_decay = normalize(k, dim=-1), -randn(T).square() / 5
half = T // 2


def transition(k, gain, log_decay):
    """What a segment does to a state: the delta rule on the identity, nothing written."""
    start, nothing = identity(d)[None, None], torch.zeros_like(k)[None, :, None]
    k, gain, log_decay = (x[None, :, None] for x in (k, gain, log_decay))
    return ttr.ops.delta_rule(k, k, nothing, gain, log_decay, initial_state=start)[1][0, 0]


first, second = (slice(0, half), slice(half, T))
(_, S), (_, added) = (chunked_delta(q[s], k[s], v[s], k[s], log_decay[s], C) for s in (first, second))
_, whole = chunked_delta(q, k, v, k, log_decay, C)
assert_close(transition(k[second], k[second], log_decay[second]) @ S + added, whole)

keys, c = k[:C], log_decay[:C].cumsum(0)[:, None]
A = ((c - c.mT).exp() * (keys @ keys.T)).tril(-1)
middle = torch.linalg.inv(identity(C) + A)
stated = c[-1].exp() * (identity(d) - ((-c).exp() * keys).T @ middle @ (c.exp() * keys))
assert_close(transition(keys, keys, log_decay[:C]), stated)

# %% [markdown]
# The model of {eq}`chunk-eq-roofline` and {eq}`chunk-eq-latency` says when each of the three ways is the best.
# One launch takes the largest of its bounds; launches follow one another.


# %%
def most(*counts):
    return max(bounds(*counts).values())


def one_pass(heads, T, d, C=64, e=2):
    """A program a head and 64 values, four dependent products a chunk."""
    flops, moved = heads * T * operations(C, d), heads * T * 4 * d * e
    return most(flops, moved, heads * d // 64, 4 * T // C)


def two_passes(heads, T, d, C=64, e=2, pieces=1):
    """States, a program a 64 × 64 block of one and a segment; then outputs, a program a chunk."""
    blocks, states = heads * (d // 64) ** 2, 4 * heads * T / C * d**2
    walk = most(heads * T * 2 * d**2, heads * T * 2 * d * e, blocks * pieces, T / C / pieces)
    scan = most(0, 8 * heads * pieces * d**2, blocks, 0) if pieces > 1 else 0
    write = states / GPU.bytes
    outputs = most(heads * T * (4 * d * C + 2 * d**2), heads * T * 4 * d * e + states, heads * T // C, 4)
    return walk * (2 if pieces > 1 else 1) + write + scan + outputs


T, d = 16384, 128
heads = 2 ** torch.arange(0, 10)
ways = {
    "one pass, the state on the chip": [one_pass(int(n), T, d) for n in heads],
    "two passes": [two_passes(int(n), T, d) for n in heads],
    "two passes, 16 segments": [two_passes(int(n), T, d, pieces=16) for n in heads],
}
one, two, cut = (torch.tensor(seconds) for seconds in ways.values())
assert (cut <= two)[:3].all()  # few heads: the chain is the limit
assert one[0] > 3 * cut[0]
assert one[-1] < two[-1] < cut[-1]  # many heads: the traffic is

# %% tags=["hide-input"] mystnb={"figure": {"caption": "A model of linear attention on an H200, bfloat16, d = 128. Left: a token's operations and bytes over the chunk, each as time at the peak rate. The bytes stay above the operations for every chunk whose scores fit into half of the registers (left of the grey area). Right: a sequence of 16384 tokens over the number of heads. With few heads a chain of dependent products is the limit and segments pay; with many heads traffic is, and the way that moves least is the fastest.", "name": "chunk-fig-cost"}, "image": {"alt": "Two log-log plots. Left: time of bytes falls and flattens with the chunk while time of operations rises, crossing inside a grey area of chunks that are too large. Right: time against heads; the curve of one pass is flat and highest for few heads and lowest for many; segments are lowest for few heads."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.9))
chunk = 2.0 ** torch.arange(0, 12.01, 0.25)
left.loglog(chunk, 1e12 * traffic(chunk, d) / GPU.bytes, color=blue, label="bytes")
left.loglog(chunk, 1e12 * operations(chunk, d) / GPU.half, color=orange, linestyle="--", label="operations")
left.axvspan(largest, chunk[-1], color="0.92", zorder=0)
left.axvline(balance, color="0.4", linestyle=":", linewidth=1)
left.text(balance * 0.9, 22, "$C = 4d/3e$", fontsize=9, color="0.3", ha="right")
left.plot(best, 1e12 * traffic(best, d) / GPU.bytes, "o", color="black", markersize=5)
left.set(xlabel="chunk $C$", ylabel="ps a token and head", xlim=(1, chunk[-1]), ylim=(15, 4e4))
left.set_xscale("log", base=2)
left.legend()
for (name, seconds), line, marker in zip(ways.items(), ("-", "--", "-."), "os^", strict=True):
    right.loglog(heads, 1e3 * torch.tensor(seconds), line, marker=marker, markersize=4, label=name)
right.set_xscale("log", base=2)
right.set(xlabel="heads × sequences", ylabel="ms, by the model")
right.legend(fontsize=9)
plt.show()

# %% [markdown]
# This is arithmetic on a data sheet. Caches, launches and the difference between a peak and what a kernel reaches are
# left out, so absolute times may be off by a factor of two; which bound is the largest is a safer statement.
#
# ## The roofline of every op
#
# The same arithmetic for each launch of each kernel of the package, with the operations and bytes as its programs
# execute them and with what the compiler made of its registers, is `python -m benchmarks.estimate`.

# %% tags=["remove-input"]
measured = [path for path in provenance.RESULTS.glob("kernels.*.json") if path != estimate.RECORDED]
found = [provenance.load(path) for path in measured]
lines = [f"**An estimate, not a measurement.** {provenance.sentence(estimated)}"]
lines += [f"**A measurement.** {provenance.sentence(made)}" for made in found]
if not found:
    lines.append("Nobody has measured these kernels on a GPU and added the record: `make bench DEVICE=cuda` does both.")
Markdown("\n\n".join(lines))

# %%
GROUPS = {
    "linear attention": ("linear_attention, no decay", "linear_attention, decay per head"),
    "linear attention, a decay a channel": ("linear_attention, decay per channel",),
    "delta rule, momentum": (
        "delta_rule, no decay",
        "delta_rule, decay per head",
        "momentum_delta_rule, decay per head",
    ),
    "delta rule, a decay a channel": ("delta_rule, decay per channel",),
    "least squares, a ridge that decays": ("least_squares, decay per head",),
    "least squares, a ridge that stays": ("least_squares, decay per head, a ridge that stays",),
    "local linear attention": ("local_linear, no decay", "local_linear, a probe"),
}
points = {
    name: [
        (sum(row["executed"].values()) / row["moved"], sum(row["executed"].values()) / row["seconds"])
        for row in forwards
        if row["op"] in ops
    ]
    for name, ops in GROUPS.items()
}
peaks = estimated["peaks"]


def share(intensity, rate):
    """Of what the roof allows."""
    return rate / min(peaks["half"], peaks["bytes"] * intensity)


shares = {name: torch.tensor([share(*point) for point in group]) for name, group in points.items()}
assert all((x <= 1 + 1e-6).all() for x in shares.values())  # nothing is above its roof
assert all(intensity < GPU.half / GPU.bytes for intensity, _ in points["linear attention"])
assert shares["linear attention"].median() > 0.8  # memory is the limit
assert shares["delta rule, momentum"].max() < 0.75  # and here it is not
assert shares["least squares, a ridge that stays"].max() < 0.2

# %% tags=["hide-input"] mystnb={"figure": {"caption": "ESTIMATE: the roofline of an H200 and the forward of every op at the shapes of the benchmark (a point a shape). Sums of pairs, and least squares whose ridge decays, lie near the slope: they move data about as fast as memory allows. The delta rule lies below it, and conjugate gradients (a ridge that stays) far below their roof, held back by products that wait for one another. Local linear attention compares all pairs: far to the right, under the flat roof.", "name": "chunk-fig-roofline"}, "image": {"alt": "Log-log plot of operations a second against operations a byte: a rising line that turns flat, a dashed lower roof for TF32, and clusters of points for seven groups of ops, the sums of pairs near the slope, the others below it."}}
figure, ax = plt.subplots(figsize=(8.4, 4.6))
intensity = torch.logspace(0.7, 4.2, 200)
ax.loglog(intensity, (peaks["bytes"] * intensity).clamp(max=peaks["half"]) / 1e12, color="black")
ax.loglog(intensity, (peaks["bytes"] * intensity).clamp(max=peaks["tf32"]) / 1e12, color="0.4", linestyle="--", lw=1)
ax.text(2500, peaks["half"] / 1e12 * 1.08, "half-precision products", fontsize=9, ha="left")
ax.text(2500, peaks["tf32"] / 1e12 * 1.08, "TF32 products", fontsize=9, ha="left", color="0.3")
for (name, group), colour, marker in zip(points.items(), OKABE_ITO, "os^Dv<P", strict=True):
    ax.plot(*zip(*group, strict=True), marker, color=colour, label=name, markersize=6, markeredgecolor="white")
    ax.lines[-1].set_ydata([rate / 1e12 for _, rate in group])
ax.set(xlabel="operations a byte", ylabel="10¹² operations a second, estimated", ylim=(20, 1800), xlim=(6, 16000))
ax.legend(fontsize=8, loc="lower right")
plt.show()

# %% tags=["remove-input"]
limits = {"memory": 0, "latency": 0, "products": 0}
for row in forwards:
    slowest = max(row["kernels"].values(), key=lambda kernel: kernel["seconds"])
    limits[slowest["bound"]] += 1
Markdown(
    f"Of the {len(forwards)} forwards, the kernel that takes most of the time is limited by memory in "
    f"{limits['memory']}, by products that wait in {limits['latency']}, and by the rate of products in "
    f"{limits['products']}. In linear attention without a decay the estimate is "
    f"{plain['seconds'] / plain['roofline']:.1f} times the least time."
)

# %% [markdown]
# The least time is that of {eq}`chunk-eq-roofline` with each input read once and each output written once.
# Where the gap to it comes from is now plain: $k$ and $v$ are read twice and the states are written and read.
# The table of all ops is on {doc}`/notebooks/speed`.
#
# What is left of all this on a CPU? No tensor cores, but the same chunks, and a cost in proportion to $T$.

# %%
cpu = benchmarks.record.load()


def growth(op):
    """The slope of log time over log length, from the shortest sequence to the longest."""
    wanted = {"op": op, "batch": 2, "direction": "forward"}
    rows = [row for row in cpu["rows"] if wanted.items() <= row.items()]
    short, long = (pick(rows, key=lambda row: row["time"]) for pick in (min, max))
    seconds = benchmarks.record.median(long) / benchmarks.record.median(short)
    return math.log(seconds) / math.log(long["time"] / short["time"])


linear = (benchmarks.record.HEBBIAN, benchmarks.record.DELTA, benchmarks.record.FADING)
slopes = {op: growth(op) for op in linear}
assert all(slope < 1.25 for slope in slopes.values())
assert growth(benchmarks.record.ATTENTION) > 1.6

# %% tags=["remove-input"]
Markdown(
    f"{benchmarks.record.provenance(cpu)} The slope of log time over log length: "
    + ", ".join(f"{op} {slope:.2f}" for op, slope in slopes.items())
    + f"; softmax attention {growth(benchmarks.record.ATTENTION):.2f}."
)

# %% [markdown]
# ## A kernel, in full
#
# Triton {cite:p}`tillet2019triton` is Python for one block of a computation.
# The function below is one *program*. A grid of programs is launched, each learns its number from `tl.program_id`,
# loads tiles of tensors into registers, and multiplies them with `tl.dot`.
# This is the one-pass form: a program is a head, and its state never leaves the chip.

# %%
KERNEL = """
import triton
import triton.language as tl


@triton.jit
def linear_attention_kernel(
    p_q, p_k, p_v, p_y, T, H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr
):
    i_sequence, i_head = tl.program_id(0) // H, tl.program_id(0) % H
    o_t, o_k, o_v = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    b_state = tl.zeros([K, V], tl.float32)
    for start in range(0, T, C):
        o_row = ((i_sequence * T + start + o_t) * H + i_head)[:, None]
        m_row = (start + o_t < T)[:, None]  # the last chunk may be short
        b_q = tl.load(p_q + o_row * K + o_k, mask=m_row, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_row * K + o_k, mask=m_row, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_row * V + o_v, mask=m_row, other=0.0).to(tl.float32)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_scores = tl.where(o_t[:, None] >= o_t[None, :], b_scores, 0.0)
        b_y = tl.dot(b_q, b_state, input_precision="ieee")
        b_y = tl.dot(b_scores, b_v, b_y, input_precision="ieee")
        b_state = tl.dot(tl.trans(b_k), b_v, b_state, input_precision="ieee")
        tl.store(p_y + o_row * V + o_v, b_y.to(p_y.dtype.element_ty), mask=m_row)


def linear_attention(q, k, v, C=16):
    batch, T, H, K = q.shape
    y = v.new_empty(v.shape)
    linear_attention_kernel[(batch * H,)](q, k, v, y, T, H, K=K, V=v.shape[-1], C=C)
    return y
"""

# %% [markdown]
# Names begin with what they are: `p_` a pointer, `o_` offsets, `m_` a mask, `b_` a block of numbers.
# Sizes of tiles are powers of two, known when the kernel is compiled, and a product takes at least $16$ of each.
#
# No GPU is needed to see that it is right. With `TRITON_INTERPRET=1` in the environment Triton runs every program as
# Python on the CPU, slowly.
# Triton reads a kernel's source from its file, and the variable when it is imported, so we write the text to a file
# and start another process. The same process also runs the package's own kernels, by `backend="triton"`.

# %%
TRIAL = """
from kernel import linear_attention

q, k, v = (torch.randn(2, 75, 3, 32, generator=generator).to(device) for _ in range(3))
k = torch.nn.functional.normalize(k, dim=-1)
decay = -torch.rand(2, 75, 3, 32, generator=generator).to(device)
expected = exact(ttr.ops.linear_attention, q, k, v)
found = {"ours": relative_error(linear_attention(q, k, v), expected)}
for name, op, *tensors in (
    ("no decay", ttr.ops.linear_attention, q, k, v),
    ("a decay a channel", ttr.ops.linear_attention, q, k, v, decay),
    ("delta rule", ttr.ops.delta_rule, q, k, v, k),
):
    found[name] = relative_error(op(*tensors, backend="triton")[0], exact(op, *tensors))
inputs = [x.requires_grad_() for x in (q, k, v)]
found["kept"] = kept_bytes(lambda *x: ttr.ops.linear_attention(*x, backend="triton"), *inputs)
"""

SETTING = """
import json, sys, torch, ttr
device = sys.argv[1]
generator = torch.Generator().manual_seed(0)

def exact(op, *tensors):
    return op(*(x.double() for x in tensors))[0]
"""


def run_triton(kernel, trial):
    """What `trial` leaves in `found`, run beside a file kernel.py."""
    root = Path(ttr.__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": str(int(device == "cpu"))}
    measures = [inspect.getsource(function) for function in (relative_error, kept_bytes)]
    script = "\n".join([SETTING, *measures, trial, "print(json.dumps(found))"])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.py").write_text(kernel)
        Path(folder, "trial.py").write_text(script)
        command = [sys.executable, str(Path(folder, "trial.py")), device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


trial = run_triton(KERNEL, TRIAL)
kept_by_kernel = trial.pop("kept")
for name, error in trial.items():
    print(f"{name}: {error:.0e}")
    assert error < 1e-5

# %% [markdown]
# Our kernel and those of `ttr_kernels` give the numbers of the op in float64, to the digits of float32.
# The package's are longer than ours for reasons the rest of the chapter explains: decays, packed sequences,
# blocks of large heads, a backward pass, bfloat16 that keeps its digits.
#
# ## What the compiler makes of them
#
# Whether a kernel is right can be seen on a CPU, and so can part of whether it is fast.
# The compiler needs no GPU to translate for one, and says how many registers a thread takes, how much shared memory a
# program does, and whether it **spills**: keeps in memory what did not fit into registers.
# The tests compile every launch for four targets, `sm_80` (A100), `sm_90` (H100, H200), `sm_100` (B200) and `gfx942`
# (MI300X), and hold it to the budgets in `tests/kernels/budgets`.

# %%
paths = sorted(Path("../tests/kernels/budgets").glob("*.json"))
budgets = {path.stem: json.loads(path.read_text()) for path in paths}
for target in ("sm_90", "sm_100"):
    for kernel, targets in budgets.items():
        for name, row in targets[target].items():
            if name in ("bf16 D=64, forward", "bf16 D=64, step"):
                assert row["spilled"] == 0, (kernel, target, name)

# %% tags=["remove-input"]
head = ("kernel", "registers", "spilled", "KiB shared", "programs at once", "most spilled elsewhere")
body = []
for kernel, targets in budgets.items():
    own = {name.split(", ")[1]: row for name, row in targets["sm_90"].items() if name.startswith("bf16 D=64")}
    row = own.get("forward") or next(iter(own.values()))
    others = [(row["spilled"], name) for name, rows in targets.items() if name != "sm_90" for row in rows.values()]
    spilled, target = max(others)
    elsewhere = f"{spilled} ({target})" if spilled else "none"
    cells = (row["registers"], row["spilled"], f"{row['shared'] / 1024:.0f}", row["programs"], elsewhere)
    body.append((kernel, *map(str, cells)))
caption = "What the kernels compile to for sm_90 (H100, H200): 64 channels, bfloat16; spills in bytes a thread, programs that a multiprocessor holds, the last column over all sizes of the other targets"
table(caption, head, body)

# %% [markdown]
# On the two targets that have room, no forward kernel spills at this size. The older `sm_80`, with less shared memory
# and other product instructions, does spill, and so do `gfx942` and some of the backward kernels.
# A thread has at most $255$ registers: the kernels that come near it hold a state and a chunk at once, and their
# chunk could not be larger.
#
# ## Digits
#
# The chunk form and the recurrence are equal on paper. Four things make them equal in float32 too.
#
# **No positive exponent.** With one decay a head, $e^{c_t - c_j}$ multiplies a score that is already there.
# With one a channel it stands inside the sum over channels,
#
# ```{math}
# :label: chunk-eq-channels
# A_{tj} = \sum_{i} q_{ti}\, k_{ji}\, e^{c_{ti} - c_{ji}} ,
# ```
#
# and a matrix product needs it factored, $(q_t \circ e^{c_t})^\top (k_j \circ e^{-c_j})$.
# But $-c_j$ is positive. float32 ends at $e^{88}$, which a chunk of $64$ tokens reaches at a log-decay of $-1.4$
# each; float16 ends at $e^{11}$.
# The remedy of {cite:t}`yang2023gated` is a chunk in chunks. Between two blocks of tokens take the decay relative to
# the later block's beginning $r$: $e^{c_t - c_r}$ on the query's side, $e^{c_r - c_j}$ on the key's, none above one.
# Only inside a block are the exponentials taken pair by pair.


# %%
def naive_scores(q, k, log_decay):
    c = log_decay.cumsum(0)
    return ((q * c.exp()) @ (k * (-c).exp()).T).tril()


def safe_scores(q, k, log_decay, block=16):
    c, C = log_decay.double().cumsum(0), len(q)  # in float64: see the last exercise
    scores = q.new_zeros(C, C)
    for r in range(0, C, block):
        rows, start = slice(r, r + block), c[r - 1] if r else 0
        exponents = c[rows] - start, start - c[:r], c[rows, None] - c[None, rows]
        pairs = exponents[2].masked_fill(future(block)[..., None], -torch.inf)
        since, until, pairs = (x.to(q.dtype) for x in (exponents[0], exponents[1], pairs))
        assert all((x <= 0).all() for x in (since, until, pairs))
        scores[rows, :r] = (q[rows] * since.exp()) @ (k[:r] * until.exp()).T
        scores[rows, rows] = torch.einsum("ti,ji,tji->tj", q[rows], k[rows], pairs.exp())
    return scores


C, d = 64, 16
q, k, log_decay = randn(C, d), randn(C, d), -randn(C, d).square() / 5
assert_close(naive_scores(q, k, log_decay), safe_scores(q, k, log_decay))  # in float64, equal

strengths = torch.logspace(-2, 1.3, 12, dtype=torch.float64).tolist()
channel_errors = {"factored": [], "blocks of 16": [], "ttr.ops": []}
for strength in strengths:
    draws = {name: [] for name in channel_errors}
    for _ in range(sizes["draws"]):
        q, k, v = (randn(C, d).float() for _ in range(3))
        log_decay = (-2 * strength * torch.rand(C, d, generator=generator)).to(device)
        exact = safe_scores(q.double(), k.double(), log_decay.double()) @ v.double()
        op, _ = ttr.ops.linear_attention(*(x[None, :, None] for x in (q, k, v, log_decay)))
        draws["factored"].append(relative_error(naive_scores(q, k, log_decay) @ v, exact))
        draws["blocks of 16"].append(relative_error(safe_scores(q, k, log_decay) @ v, exact))
        draws["ttr.ops"].append(relative_error(op[0, :, 0], exact))
    for name, errors in draws.items():
        channel_errors[name].append(torch.tensor(errors))
channel_errors = {name: torch.stack(errors) for name, errors in channel_errors.items()}
assert not channel_errors["factored"][-1].isfinite().any()
for name in ("blocks of 16", "ttr.ops"):
    assert channel_errors[name].max() < 1e-5
overflows = [not errors.isfinite().all() for errors in channel_errors["factored"]]
record("chunk_overflow", -strengths[overflows.index(True)], rtol=0.5)

# %% [markdown]
# **The mask goes inside the exponential.** $D$ is zero above the diagonal. There $c_t - c_j$ is positive, and
# multiplying $e^{c_t - c_j}$ by zero afterwards comes too late: infinity times zero is not a number. Selecting zeros
# afterwards saves the forward pass and not the backward one, where the gradient of the unselected entry is again zero
# times infinity. Set the exponent to $-\infty$ first, and both are right.

# %%
late, early = (torch.full((8, 1), -50.0, requires_grad=True) for _ in range(2))
c = late.cumsum(0)
values = (c - c.mT).exp()
assert (values * torch.ones(8, 8).tril()).isnan().any()
values.tril().sum().backward()  # the forward is finite …
assert values.tril().isfinite().all()
assert late.grad.isnan().any()  # … and the gradient is not

c = early.cumsum(0)
(c - c.mT).masked_fill(future(8).cpu(), -torch.inf).exp().sum().backward()
assert early.grad.isfinite().all()

# %% [markdown]
# **The triangle.** {doc}`/notebooks/04_delta_rule` found that the inverse of $I + A$ as a series,
# $(I - A)(I + A^2)(I + A^4)\cdots$, loses every digit where keys are alike. A GPU would like it, for it consists of
# products. How many digits, and what else consists of products?
#
# ```{prf:proposition} Digits lost by the series
# :label: chunk-proposition-series
# Let $A_{tj} = \rho \in (0, 1)$ for all $j < t$: unit keys of correlation $\rho$ at $\beta = 1$. For $t > j$,
#
# $$\bigl[(I + A)^{-1}\bigr]_{tj} = -\rho\,(1 - \rho)^{t - j - 1}, \qquad
#   \Bigl[\sum_m A^m\Bigr]_{tj} = \rho\,(1 + \rho)^{t - j - 1} .$$
#
# The result has entries of size at most one. The terms $(-A)^m$ that must cancel to give it have absolute values that
# sum to up to $\rho\,(1 + \rho)^{C - 2}$.
# ```
#
# ```{prf:proof}
# Solve $(I + A)x = (1, 0, \dots)^\top$: $x_1 = 1$ and $x_t = -\rho \sum_{j<t} x_j$. The partial sums satisfy
# $s_t = (1 - \rho)\, s_{t-1}$, so $s_t = (1 - \rho)^{t-1}$ and $x_t = -\rho (1 - \rho)^{t-2}$.
# As $A$ is nilpotent, $\sum_m A^m = (I - A)^{-1}$, and the same steps with $-\rho$ for $\rho$ give the second.
# All entries of $A$ have one sign, so this is the sum of the absolute values.
# ```
#
# So each token costs the series about $\log_{10}(1 + \rho)$ digits, of which float32 has seven.
# Inverting **by blocks** is made of products as well. From
#
# ```{math}
# :label: chunk-eq-blocks
# \begin{pmatrix} P & 0 \\ B & R \end{pmatrix}^{-1} =
# \begin{pmatrix} P^{-1} & 0 \\ -R^{-1} B P^{-1} & R^{-1} \end{pmatrix}
# ```
#
# the inverses of all diagonal blocks of one size give those of twice the size: with $X$ the matrix of the former and
# $B$ the squares between neighbours, $X - X B X$. The first sizes are the last panel of {numref}`chunk-fig-steps`.
# After $\log_2 C$ rounds all is inverted. Each round ends with entries of the inverse itself, so nothing large has to
# cancel.
# That is what the kernels do.


# %%
def solved(A):
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)


def doubled(A):
    """(I − A)(I + A²)(I + A⁴)…"""
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    inverse, power = eye - A, A @ A
    while power.any():
        inverse, power = inverse + power @ inverse, power @ power
    return inverse


def by_blocks(A):
    """X − X B X for blocks of 1, 2, 4, … tokens."""
    place, size = torch.arange(len(A), device=A.device), 1
    X = torch.eye(len(A), dtype=A.dtype, device=A.device)
    while size < len(A):
        pair = place[:, None] // (2 * size) == place // (2 * size)
        X = X - X @ (A * (pair & (place[:, None] // size > place // size))) @ X
        size *= 2
    return X


place = torch.arange(16, dtype=torch.float64, device=device)
gap = (place[:, None] - place - 1).clamp_min(0)
A = torch.full((16, 16), 0.3, dtype=torch.float64, device=device).tril(-1)
assert_close(solved(A).tril(-1), (-0.3 * 0.7**gap).tril(-1))
assert_close(solved(-A).tril(-1), (0.3 * 1.3**gap).tril(-1))

rho, methods = 0.5, {"series, doubled": doubled, "by blocks": by_blocks, "triangular solve": solved}
triangle_errors = {name: [] for name in methods}
for C in sizes["chunks"]:
    draws = {name: [] for name in methods}
    for _ in range(sizes["draws"]):
        common, own = (normalize(randn(n, 64), dim=-1) for n in (1, C))
        keys = normalize(rho**0.5 * common + (1 - rho) ** 0.5 * own, dim=-1)
        A = (keys @ keys.T).tril(-1)
        for name, method in methods.items():
            draws[name].append(relative_error(method(A.float()), solved(A)))
    for name, errors in draws.items():
        triangle_errors[name].append(torch.tensor(errors))
triangle_errors = {name: torch.stack(errors) for name, errors in triangle_errors.items()}
at = sizes["chunks"].index(64)
assert triangle_errors["series, doubled"][at].min() > 1  # not one digit is left
for name in ("by blocks", "triangular solve"):
    assert triangle_errors[name].max() < 1e-5
record("chunk_series_digits", triangle_errors["series, doubled"][at].median().log10(), atol=0.7)
record("chunk_blocks_digits", triangle_errors["by blocks"].max().log10(), atol=0.5)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Relative error in float32; lines are medians, bands run from the smallest to the largest draw. Left: the inverse of the delta rule's triangle over the chunk, for unit keys of correlation one half. The series grows at the rate of the proposition (dotted, which leaves out the constant) and is soon wrong in every digit; blocks, which are as much made of products, stay near rounding. Right: linear attention with a decay a channel over the mean decay. The factored form works until it overflows (crosses: not a number); blocks of 16 tokens never do.", "name": "chunk-fig-digits"}, "image": {"alt": "Two plots of relative error on logarithmic scales. Left: the series rises along a dotted line past one while two other curves stay near rounding. Right: three curves near rounding; the factored one ends and continues as crosses at the top."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.9))


def band(ax, x, errors, name, marker, line):
    kept = errors.isfinite().all(1)
    x, errors = torch.tensor(x)[kept], errors[kept]
    (drawn,) = ax.plot(x, errors.median(1).values, marker=marker, markersize=4, linestyle=line, label=name)
    ax.fill_between(x, errors.amin(1), errors.amax(1), color=drawn.get_color(), alpha=0.2, linewidth=0)


for (name, errors), marker, line in zip(triangle_errors.items(), "os^", ("-", "--", "-."), strict=True):
    band(left, sizes["chunks"], errors, name, marker, line)
predicted = torch.tensor(sizes["chunks"], dtype=torch.float64)
left.plot(predicted, 2**-24 * (1 + rho) ** predicted, color="0.4", linestyle=":", label=r"$2^{-24}(1 + \rho)^C$")
left.axhline(1, color="0.7", linewidth=0.8)
left.set(xlabel="chunk $C$", ylabel="relative error, float32", yscale="log", ylim=(1e-8, 1e6))
left.set_xscale("log", base=2)
left.legend(fontsize=8)
for (name, errors), marker, line in zip(channel_errors.items(), "os^", ("-", "--", "-."), strict=True):
    band(right, strengths, errors, name, marker, line)
lost = [strength for strength, failed in zip(strengths, overflows, strict=True) if failed]
right.plot(lost, [3e-3] * len(lost), "x", color=OKABE_ITO[0], markersize=6)
right.text(lost[0], 6e-3, "not a number", fontsize=9, color=OKABE_ITO[0], ha="left")
right.set(xlabel="mean log-decay a token, −ℓ", xscale="log", yscale="log", ylim=(2e-8, 2e-2))
right.legend(fontsize=8, loc="center left")
plt.show()

# %% [markdown]
# On the grid of the right panel the factored form fails first at a mean log-decay of
# {glue:text}`chunk_overflow:.1f`.
# In the left panel, at $C = 64$, the logarithm (base ten) of the series' relative error is
# {glue:text}`chunk_series_digits:.1f`; by blocks it is {glue:text}`chunk_blocks_digits:.1f` at its worst.
# It does happen: a kernel that doubled over a whole chunk in half precision
# [returned infinities](https://github.com/huawei-csl/megagdn-pto/pull/74) for the keys of a trained model.
#
# **States are float32, whatever the inputs are.** A state is a sum over thousands of tokens. In bfloat16, which has
# eight bits, a sum stops growing once a term is below half of its last bit.
# Where a bfloat16 tile meets a float32 state, rounding the state would undo this, and TF32, the format in which
# tensor cores take float32, would keep eleven bits of it.
# The kernels cut the float32 operand into two bfloat16 parts, two products at the fast rate.

# %%
d, T = 16, sizes["tokens"]
k, v = (randn(T, d).abs().bfloat16() for _ in range(2))  # of one sign, so that the sum does grow
S, stuck = k.new_zeros(d, d, dtype=torch.float32), k.new_zeros(d, d)
for k_t, v_t in zip(k, v, strict=True):
    write = torch.outer(k_t.float(), v_t.float())
    S, stuck = S + write, (stuck.float() + write).bfloat16()
exact = k.double().T @ v.double()
accumulated = {"float32": relative_error(S, exact), "bfloat16": relative_error(stuck, exact)}
assert accumulated["float32"] < 1e-5
assert accumulated["bfloat16"] > 0.1
record("chunk_state_bfloat16", accumulated["bfloat16"], atol=0.05)

S = randn(64, 64).float()
q = randn(64, 64).bfloat16()
high = S.bfloat16()
low = (S - high.float()).bfloat16()
exact = q.double() @ S.double()
rounded, split = q.double() @ high.double(), q.double() @ (high.double() + low.double())
bits = {name: -math.log2(relative_error(x, exact)) for name, x in {"one": rounded, "two": split}.items()}
assert bits["two"] > bits["one"] + 7
record("chunk_bits_one", bits["one"], atol=0.5)
record("chunk_bits_two", bits["two"], atol=0.5)

# %% [markdown]
# After $T$ writes the bfloat16 state is wrong by {glue:text}`chunk_state_bfloat16:.2f` of its size, where the float32
# one has rounding errors only. A product with a state in one bfloat16 part is right to
# {glue:text}`chunk_bits_one:.0f` bits, in two parts to {glue:text}`chunk_bits_two:.0f`.
#
# ## The backward pass: keep or recompute
#
# The gradient of a chunk form needs scores and states again. Autograd keeps what the forward made, in float32.
# A kernel with its own backward can keep the inputs alone and make the rest anew, as
# {cite:t}`dao2022flashattention` do for softmax attention. How much is that?


# %%
def recurrent(q, k, v, log_decay):
    S, outputs = k.new_zeros(k.shape[-1], v.shape[-1]), []
    for q_t, k_t, v_t, l_t in zip(q, k, v, log_decay, strict=True):
        S = l_t.exp() * S + torch.outer(k_t, v_t)
        outputs.append(q_t @ S)
    return torch.stack(outputs)


T, d = 1024, 32
inputs = [randn(T, d).float().requires_grad_() for _ in range(3)]
inputs.append((-torch.rand(T, generator=generator)).to(device).requires_grad_())
forms = {
    "recurrent": recurrent,
    "quadratic": lambda *x: chunked(*x, T),
    "chunked": lambda *x: chunked(*x, 64),
    "recomputed": lambda *x: checkpoint(lambda *y: chunked(*y, 64), *x, use_reentrant=False),
}
kept = {name: kept_bytes(form, *inputs) for name, form in forms.items()}
assert kept["recomputed"] < 1 < kept["chunked"] < min(kept["recurrent"], kept["quadratic"]) / 2
assert kept_by_kernel == 0  # of the package's kernel, above
record("chunk_kept_recurrent", kept["recurrent"], rtol=0.5)
record("chunk_kept_quadratic", kept["quadratic"], rtol=0.5)
record("chunk_kept_chunked", kept["chunked"], rtol=0.5)

# %% [markdown]
# At $T = 1024$ and $d = 32$ the recurrence keeps {glue:text}`chunk_kept_recurrent:.0f` bytes a token, most of it a
# state. The quadratic form keeps {glue:text}`chunk_kept_quadratic:.0f`, several numbers for each pair, so more for longer
# sequences; the chunk form {glue:text}`chunk_kept_chunked:.0f`.
# The package's kernel keeps nothing beyond its inputs. It pays with another pass for states and scores, by
# {eq}`chunk-eq-cost` half of a forward's operations, in a computation that waits for memory anyway.
#
# ## Limits
#
# Where the chunk form meets its neighbours: a chunk of one token is the recurrence, a chunk of all is masked
# attention, keys that do not overlap leave the triangle nothing to solve, and a decay to nothing leaves each token
# alone with its own pair.

# %%
T, d = 64, 64
q, k, v = (randn(1, T, 1, d) for _ in range(3))
log_decay = -randn(1, T, 1).square()
y, _ = ttr.ops.linear_attention(q, k, v, log_decay)
assert_close(ttr.ops.linear_attention(q, k, v, log_decay, chunk_size=1)[0], y)
assert_close(recurrent(*one_head(q, k, v, log_decay)), y[0, :, 0])
assert_close(chunked(*one_head(q, k, v, log_decay), T)[0], y[0, :, 0])

summed, _ = ttr.ops.linear_attention(q, k, v)
assert_close((q[0, :, 0] @ k[0, :, 0].T).tril() @ v[0, :, 0], summed[0, :, 0])

basis = torch.linalg.qr(randn(d, d)).Q[None, :, None]
assert_close(ttr.ops.delta_rule(q, basis, v, basis)[0], ttr.ops.linear_attention(q, basis, v)[0])

alone, _ = ttr.ops.linear_attention(q, k, v, torch.full_like(log_decay, -1e4))
assert_close(alone, (q * k).sum(-1, keepdim=True) * v)

# %% [markdown]
# ## Exercises
#
# ```{exercise} A scan of logarithmic depth
# :label: chunk-exercise-scan
# {prf:ref}`chunk-theorem-scan` allows more than two segments. Write the scan over the chunks of a Hebbian sum so that
# $n$ chunks take about $\log_2 n$ rounds, each on all chunks at once.
# How much more does it compute, and when is it worth it?
# ```
#
# ```{solution-start} chunk-exercise-scan
# :class: dropdown
# ```
#
# In round $r$ combine each pair $(A_n, U_n)$ with the one $2^r$ places before it.
# After $\lceil \log_2 n \rceil$ rounds, each holds the composition of all up to itself.
# That is about $n \log_2 n$ combinations in place of $n$. (This is the scan of Hillis and Steele. The tree of
# {cite:t}`blelloch1990prefix` needs about $2n$, in twice the rounds.)
# It is worth it where the chain waits, that is with very few heads; segments need two passes and stop there.

# %%
n, d = 24, 8
factors, totals = randn(n, 1, 1).sigmoid(), randn(n, d, d)
A, U, rounds = factors, totals, 0
while 2**rounds < n:
    shift = 2**rounds
    earlier_A = torch.cat([torch.ones_like(A[:shift]), A[:-shift]])
    earlier_U = torch.cat([torch.zeros_like(U[:shift]), U[:-shift]])
    A, U, rounds = A * earlier_A, A * earlier_U + U, rounds + 1

S, states = torch.zeros_like(totals[0]), []
for factor, total in zip(factors, totals, strict=True):
    S = factor * S + total
    states.append(S)
assert_close(U, torch.stack(states))
assert rounds == math.ceil(math.log2(n))

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A decay for our kernel
# :label: chunk-exercise-decay
# Give the Triton kernel a decay a head: one more pointer, `tl.cumsum`, and the factors of {eq}`chunk-eq-phases`.
# Where must the mask be?
# ```
#
# ```{solution-start} chunk-exercise-decay
# :class: dropdown
# ```
#
# The mask is in the exponent, as $-\infty$. The rows after the end of a short last chunk have a decay of zero, since
# they are loaded as zeros, so `b_all` is right there too.

# %%
decayed = KERNEL
for old, new in {
    "p_y, T, H": "p_y, p_l, T, H",
    "        b_scores = tl.where(o_t[:, None] >= o_t[None, :], b_scores, 0.0)\n": (
        "        m_t = start + o_t < T\n"
        "        b_l = tl.load(p_l + (i_sequence * T + start + o_t) * H + i_head, mask=m_t, other=0.0)\n"
        "        b_c, b_all = tl.cumsum(b_l, axis=0), tl.sum(b_l, axis=0)\n"
        "        m_past = o_t[:, None] >= o_t[None, :]\n"
        '        b_scores *= tl.exp(tl.where(m_past, b_c[:, None] - b_c[None, :], float("-inf")))\n'
        "        b_k *= tl.exp(b_all - b_c)[:, None]\n"
        "        b_q *= tl.exp(b_c)[:, None]\n"
    ),
    "b_v, b_state, input": "b_v, b_state * tl.exp(b_all), input",
    "linear_attention(q, k, v, C=16)": "linear_attention(q, k, v, l, C=16)",
    "(q, k, v, y, T, H": "(q, k, v, y, l, T, H",
}.items():
    assert decayed.count(old) == 1, old
    decayed = decayed.replace(old, new)

trial = """
from kernel import linear_attention

q, k, v = (torch.randn(2, 75, 3, 32, generator=generator).to(device) for _ in range(3))
l = -20 * torch.rand(2, 75, 3, generator=generator).to(device)
found = relative_error(linear_attention(q, k, v, l), exact(ttr.ops.linear_attention, q, k, v, l))
"""
assert run_triton(decayed, trial) < 1e-5

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Small decays after a large one
# :label: chunk-exercise-sums
# A token erases the memory with a log-decay of $-100$; the $63$ tokens after it decay by about $10^{-4}$ each.
# How well does float32 know $c_t - c_j$ between two of the latter?
# Mend it without float64: write each log-decay as a multiple of $2^{-10}$ and a remainder, and sum the two apart.
# ```
#
# ```{solution-start} chunk-exercise-sums
# :class: dropdown
# ```
#
# Around $100$ neighbouring float32 numbers are $2^{-17}$ apart, so a difference of $10^{-4}$ has about four bits.
# Sums of multiples of $2^{-10}$ are exact as long as they stay below $2^{14}$, and the remainders, below $2^{-10}$ each,
# have small sums with small errors. The kernels do this (`_blocks.py`).

# %%
log_decay = torch.full((64,), -1e-4, dtype=torch.float64) * (1 + torch.rand(64, generator=generator))
log_decay[0] = -100
log_decay = log_decay.float()
exact = log_decay.double().cumsum(0)[1:].diff()
plain_sum = log_decay.cumsum(0)[1:].diff()
coarse = (log_decay * 1024).ceil() / 1024
parts = [x.cumsum(0)[1:].diff() for x in (coarse, log_decay - coarse)]
assert relative_error(plain_sum, exact) > 1e-2
assert relative_error(parts[0] + parts[1], exact) < 1e-4

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`williams2009roofline` is the roofline, in a dozen readable pages.
# {cite:t}`dao2022flashattention` made the case that a kernel should be judged by the bytes it moves, and
# {cite:t}`dong2024flex` made softmax attention's kernel programmable.
# {cite:t}`yang2023gated` have chunks, chunks in chunks, and materialised states against recomputed ones for gated
# linear attention; {cite:t}`dao2024mamba2` the same from the side of state-space models;
# {cite:t}`yang2024parallelizing` and {cite:t}`yang2024gateddelta` the delta rule.
# The triangle's form is from {cite:t}`joffrain2006accumulating`, the scan from {cite:t}`blelloch1990prefix`.
# {cite:t}`tillet2019triton` is Triton; {cite:t}`yang2024fla` is the library of such kernels that everyone compares with.
