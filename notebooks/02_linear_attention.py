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
# # Linear attention
#
# Linear attention adds up outer products of keys and values, and answers a query with one matrix product.
# It has no inverse, no iteration, no error that it tries to correct.
# How can a memory that never looks at what it has already stored be a regression at all?
# What does it take for granted, and what does that cost?
#
# {doc}`/notebooks/01_associative_recall` showed that recall is least squares.
# This chapter starts from that solution, finds the one matrix that linear attention leaves out,
# and computes the price: first exactly, in a theorem, then by experiment.
# It also shows what is bought: one sum that can be computed in three ways.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import math
import textwrap

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
torch.manual_seed(2)
torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits

sizes = {
    "smoke": {
        "correlation": {"key": 64, "pairs": 32, "draws": 20},
        "capacity": {"key": 32, "codebook": 1024, "draws": 16},
    },
    "full": {
        "correlation": {"key": 128, "pairs": 64, "draws": 64},
        "capacity": {"key": 64, "codebook": 4096, "draws": 32},
    },
}[scale]


def normal(*shape):
    return torch.randn(*shape, device=device)


def unit(*shape):
    """Independent directions, uniform on the unit sphere of the last axis."""
    return torch.nn.functional.normalize(normal(*shape), dim=-1)


def eye(size):
    return torch.eye(size, device=device)


# %% [markdown]
# ## The regression it skips
#
# Stack $n$ keys as the rows of $K \in \mathbb R^{n\times d}$ and their values as the rows of $V$.
# A linear memory is a matrix $S$ that should answer key $k_i$ with value $v_i$.
# The least-squares memory, with a ridge $\Lambda$ that keeps the inverse finite, is
#
# ```{math}
# :label: lin-eq-least-squares
# S_{\mathrm{ls}} = \operatorname*{arg\,min}_S \tfrac12 \sum_{i=1}^n \lVert v_i - S^\top k_i \rVert^2
#   + \tfrac12 \operatorname{tr}(S^\top \Lambda S)
#   = (K^\top K + \Lambda)^{-1} K^\top V .
# ```
#
# Linear attention keeps the second factor and takes the first for the identity:
#
# ```{math}
# :label: lin-eq-hebbian
# S = K^\top V = \sum_{i=1}^n k_i v_i^\top .
# ```
#
# Strengthening a connection whenever both its ends are active is Hebb's rule, so we call this the Hebbian memory.
# It is the correlation matrix memory of {cite:t}`kohonen1972correlation`.
# That linear attention is {eq}`lin-eq-least-squares` with $K^\top K \approx I$ is how
# {cite:t}`wang2025testtime` read it.
#
# There is a second way to arrive at the same matrix, and it does not mention an inverse.
# Set $\Lambda = 0$ and start gradient descent on the sum of squares in {eq}`lin-eq-least-squares` from the
# empty memory.
# Its gradient is
#
# ```{math}
# :label: lin-eq-gradient
# \nabla_S\, \tfrac12 \lVert V - K S \rVert^2 = -K^\top (V - K S), \qquad \text{which at } S = 0 \text{ is }
# -K^\top V .
# ```
#
# One step of size 1 lands on {eq}`lin-eq-hebbian`. The memory stops there.
# At $S = 0$ every prediction is zero, so the error of each pair is its whole value:
# no pair is told what the others have already explained.


# %%
def hebbian(k, v):
    return k.mT @ v


def least_squares(k, v, ridge=1e-10):
    return torch.linalg.solve(k.mT @ k + ridge * eye(k.shape[-1]), k.mT @ v)


def sum_of_squares(S, k, v):
    return (v - k @ S).square().sum() / 2


k, v = normal(12, 8), normal(12, 5)
empty = k.new_zeros(8, 5)
gradient = torch.func.grad(sum_of_squares)(empty, k, v)
assert_close(empty - gradient, hebbian(k, v))

even = torch.linalg.qr(k).Q  # KᵀK = I: the keys use every direction equally
assert_close(least_squares(even, v), hebbian(even, v))

# %% [markdown]
# So $K^\top K = I$ is an assumption about how the keys fill their space.
# It needs at least $d$ keys. Where it holds, and without a ridge, both memories are the same matrix.
# With fewer keys than dimensions $K^\top K$ cannot be the identity, but the two ways of writing the ridge
# solution,
#
# ```{math}
# :label: lin-eq-push-through
# (K^\top K + \lambda I)^{-1} K^\top = K^\top (K K^\top + \lambda I)^{-1},
# ```
#
# say what takes its place: the Gram matrix $K K^\top$, whose entries are the inner products of the keys.
# (Multiply both sides from the left by $K^\top K + \lambda I$ and from the right by $K K^\top + \lambda I$.)
# Linear attention treats whichever of the two matrices can be inverted as the identity.
#
# ## What an answer is made of
#
# Ask the Hebbian memory for one of its own keys. The answer can be written out in full.
#
# ```{prf:theorem} Interference
# :label: lin-theorem-interference
# Let $S = \sum_i k_i v_i^\top$ and $y_j = S^\top k_j$. Then
#
# $$
# y_j - \lVert k_j \rVert^2 v_j = \sum_{i \ne j} (k_i^\top k_j)\, v_i .
# $$
#
# 1. Recall is exact, $y_j = v_j$ for all $j$ and whatever the values are, if and only if the keys are orthonormal.
# 2. If the keys are independent and uniform on the unit sphere of $\mathbb R^d$, then for any fixed values
#    $\mathbb E \lVert y_j - v_j \rVert^2 = \frac1d \sum_{i \ne j} \lVert v_i \rVert^2$;
#    for values of unit length this is $(n - 1)/d$.
# 3. If the keys are given, of unit length, and the values are independent with mean zero and
#    $\mathbb E\lVert v_i \rVert^2 = 1$, then for every scale $c$
#
#    $$
#    \mathbb E \lVert c\, y_j - v_j \rVert^2 = (1 - c)^2 + c^2 m_j, \qquad m_j = \sum_{i \ne j} (k_i^\top k_j)^2 .
#    $$
#
#    The best scale for all $n$ answers together is $c = 1/(1 + \bar m)$, with $\bar m$ the mean of the $m_j$.
#    It leaves $\bar m / (1 + \bar m)$ a pair.
# ```
#
# ```{prf:proof}
# $y_j = \sum_i v_i\, (k_i^\top k_j)$; take the term $i = j$ to the left.
#
# *1.* All answers together are $KS = G V$ with the Gram matrix $G = K K^\top$.
# $G V = V$ for every $V$ says $G = I$, and $G_{ij} = k_i^\top k_j$.
#
# *2.* Fix $k_j$ and write $g_i = k_i^\top k_j$. The $g_i$, $i \ne j$, are independent with mean zero, so
# $\mathbb E \lVert \sum_{i\ne j} g_i v_i \rVert^2 = \sum_{i \ne j} \mathbb E[g_i^2] \lVert v_i \rVert^2$.
# The squared coordinates of a unit vector sum to 1 and no direction is preferred, so
# $\mathbb E[k_i k_i^\top] = I/d$ and
# $\mathbb E[g_i^2] = k_j^\top k_j / d = 1/d$.
#
# *3.* $c\,y_j - v_j = (c - 1) v_j + c \sum_{i\ne j} g_i v_i$.
# The values are uncorrelated, so the squared lengths add up.
# The mean over $j$ is $(1-c)^2 + c^2 \bar m$, a parabola in $c$ with its minimum where stated.
# ```
#
# The error has nothing to do with how well each pair was stored.
# It comes from the other pairs, and each adds its share.
# At $n = d + 1$ random keys the expected error is as large as the value itself:
# an empty memory, which answers zero, does as well.
#
# The theorem suggests a way to look at any memory that is linear in the values.
# Its answers are $Y = H V$, where $H$ depends on the keys only. Perfect recall is $H = I$;
# off the diagonal is interference.
# Statisticians call $H$ the hat matrix. We do not need a formula for it: store $V = I$, and the memory prints it.
#
# `ttr.regress` works on whole sequences, with the axes (batch, time, heads, channels).
# Its `state` after all pairs holds the matrix $S$. Handed back, it lets the memory read the pairs once more.


# %%
def recall(design, k, v, passes=1, **inputs):
    """What a memory that has read all pairs answers to its own keys."""
    state = None
    for _ in range(passes):
        _, state = ttr.regress(design, k, k, v, state=state, **inputs)
    return torch.einsum("bthk,bhkv->bthv", design.feature_map(k), state.linear_map())


linear_attention = ttr.Design()  # uniform weights, linear maps, Hebbian
delta_rule = ttr.Design(optimizer=ttr.GradientDescent())
exact = ttr.Design(optimizer=ttr.Exact())
print(linear_attention.name, "|", delta_rule.name, "|", exact.name)


# %% [markdown]
# What keys should it be tried on? Random directions are the kind case.
# Keys that come out of one projection can share components: a bias, a mean, the direction of a frequent token.
# The simplest model of that is one common direction,
#
# ```{math}
# :label: lin-eq-common
# k_i = \bigl(\sqrt\rho,\;
# \sqrt{1 - \rho}\, u_i\bigr), \qquad u_i \text{ uniform on the unit sphere of } \mathbb R^{d-1} .
# ```
#
# All keys have unit length, and any two have the expected inner product $\rho$.
# (That the common direction is the first axis is no loss:
# rotating all keys and queries changes none of these memories.)


# %%
def correlated_keys(correlation, *shape):
    *shape, d = shape
    common = correlation.sqrt().expand(shape).unsqueeze(-1)
    own = (1 - correlation).sqrt().unsqueeze(-1) * unit(*shape, d - 1)
    return torch.cat([common, own], dim=-1)


d, n = sizes["correlation"]["key"], sizes["correlation"]["pairs"]
two_correlations = torch.tensor([0.0, 0.5], device=device)  # a head each
k = correlated_keys(two_correlations, 1, n, 2, d)
v = eye(n)[None, :, None].expand(1, n, 2, n)
step_size, ridge = k.new_ones(1, n, 2), k.new_full((2, d), 1e-6)
hats = {
    "linear attention": recall(linear_attention, k, v),
    "delta rule": recall(delta_rule, k, v, step_size=step_size),
    "least squares": recall(exact, k, v, ridge=ridge),
}

gram = torch.einsum("bthk,bihk->bthi", k, k)
assert_close(hats["linear attention"], gram)  # as the proof says
assert_close(hats["least squares"], v, atol=1e-4, rtol=0)

# %% mystnb={"figure": {"caption": "The recall matrix: how much of each stored value is in the answer to each key. Linear attention answers with the Gram matrix of its keys, so a common direction puts every value into every answer. The delta rule is exact for the newest pair; the answers to older keys fill up with what was written last. Least squares answers with the identity.", "name": "fig-lin-recall-matrix"}, "image": {"alt": "Six heat maps of recall matrices, for uncorrelated keys above and correlated keys below. Linear attention shows a diagonal on a noisy, then on an almost solid background; the delta rule has a fading diagonal and, for correlated keys, a strong band at the newest values; least squares is a clean diagonal."}} tags=["hide-input"]
fig, axes = plt.subplots(2, 3, figsize=(7.6, 4.9), sharex=True, sharey=True)
for column, (label, hat) in enumerate(hats.items()):
    for ax, matrix in zip(axes[:, column], hat[0].unbind(1), strict=True):
        image = ax.imshow(matrix.cpu(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.grid(False)
    axes[0, column].set_title(label)
    axes[1, column].set_xlabel("value stored, $i$")
for ax, correlation in zip(axes[:, 0], two_correlations.tolist(), strict=True):
    ax.set_ylabel(f"$\\rho = {correlation:g}$\nkey asked, $j$")
fig.colorbar(image, ax=axes, label="weight of value $i$ in answer $j$", shrink=0.8)
plt.show()

# %% [markdown]
# ## Correlated keys
#
# How large is the price in numbers?
# The measure is the squared error of all answers relative to the squared length of all values.
# An empty memory scores 1.
#
# Four memories compete with linear attention on the keys of {eq}`lin-eq-common`.
# The first is linear attention with the one scale $c$ that suits these data best, which it could not know:
# the most that any rescaling can do.
# The second is the delta rule of {doc}`/notebooks/04_delta_rule` with step size 1, which stores the error
# of a pair and not its value.
# The third is the same rule after ten passes over the pairs. The last is exact least squares with a small ridge.


# %%
def error(y, v):
    """Squared error of all answers, relative to the values: (batch, heads)."""
    return (y - v).square().sum((1, 3)) / v.square().sum((1, 3))


def best_scaled(y, v):
    scale = (y * v).sum((1, 3), keepdim=True) / y.square().sum((1, 3), keepdim=True)
    return scale * y


correlations = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95], device=device).double()
shape = (sizes["correlation"]["draws"], n, len(correlations))
k, v = correlated_keys(correlations, *shape, d), unit(*shape, d)
step_size, ridge = k.new_ones(shape), k.new_full((len(correlations), d), 1e-6)

answer = recall(linear_attention, k, v)
errors = {
    "linear attention": error(answer, v),
    "linear attention, best scale": error(best_scaled(answer, v), v),
    "delta rule": error(recall(delta_rule, k, v, step_size=step_size), v),
    "delta rule, ten passes": error(recall(delta_rule, k, v, 10, step_size=step_size), v),
    "least squares": error(recall(exact, k, v, ridge=ridge), v),
}

# %% [markdown]
# {prf:ref}`lin-theorem-interference` predicts the first two.
# Here $k_i^\top k_j = \rho + (1 - \rho)\, u_i^\top u_j$, and the $u_i$ live in $d - 1$ dimensions, so
#
# ```{math}
# :label: lin-eq-interference-correlated
# \mathbb E\, m_j = (n - 1) \Bigl( \rho^2 + \frac{(1 - \rho)^2}{d - 1} \Bigr) .
# ```
#
# The first term does not fall with $d$. Random interference can be diluted by more dimensions;
# a shared direction cannot.

# %%
m = (n - 1) * (correlations**2 + (1 - correlations) ** 2 / (d - 1))
mean = {label: e.mean(0) for label, e in errors.items()}

assert_close(mean["linear attention"], m, rtol=0.15, atol=0)
assert_close(mean["linear attention, best scale"], m / (1 + m), rtol=0.05, atol=0)
assert (mean["least squares"] < 1e-7).all()
assert (mean["delta rule"] < mean["linear attention"]).all()
assert mean["delta rule"][-1] > 1  # worse than an empty memory
assert mean["delta rule, ten passes"][0] < 0.01
assert mean["delta rule, ten passes"][-1] > 0.5  # little help where it is needed most

# %% tags=["hide-cell"]
names = dict(zip(mean, ("hebbian", "scaled_hebbian", "delta", "ten_delta_passes", "ridge"), strict=True))
for label, name in names.items():
    rtol = 0.1 if name == "ridge" else 1e-3
    record(f"lin_{name}_error_by_correlation", mean[label], rtol=rtol)
    record(f"lin_{name}_error_most", mean[label][-1], rtol=rtol)
half = correlations.tolist().index(0.5)
record("lin_hebbian_error_uncorrelated", mean["linear attention"][0])
record("lin_ten_delta_passes_error_uncorrelated", mean["delta rule, ten passes"][0])
record("lin_hebbian_error_half", mean["linear attention"][half])
record("lin_delta_error_half", mean["delta rule"][half])

# %% mystnb={"figure": {"caption": "Recall error against the correlation of the keys; lines are means over draws, bands the middle four fifths of them. The dashed black curves are the theorem. Rescaling saves linear attention from answers that are too long, and no more. Least squares, in the panel below, is exact throughout.", "name": "fig-lin-correlated"}, "image": {"alt": "Error on a logarithmic axis against correlation. Linear attention climbs far above one; its best scaling climbs to one; the delta rule lies between; ten passes start small and end near one; least squares stays many orders of magnitude below in a separate panel."}} tags=["hide-input"]
fig, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True, height_ratios=(4, 1))
for index, (label, e) in enumerate(errors.items()):
    ax = bottom if label == "least squares" else top
    low, high = torch.quantile(e, torch.tensor([0.1, 0.9], device=device), dim=0).cpu()
    ax.fill_between(correlations.cpu(), low, high, color=f"C{index}", alpha=0.2, linewidth=0)
    ax.plot(correlations.cpu(), mean[label].cpu(), marker="o", markersize=4, color=f"C{index}", label=label)
for curve in (m, m / (1 + m)):
    top.plot(correlations.cpu(), curve.cpu(), "k--", linewidth=1)
top.axhline(1, color="0.5", linewidth=1)
top.text(0.36, 1.15, "empty memory", color="0.35", ha="center", fontsize=9)
top.set(yscale="log", ylabel="relative squared error", ylim=(5e-4, 60))
bottom.set(yscale="log", xlabel=r"correlation of the keys, $\rho$", ylabel="error", ylim=(1e-12, 1e-7))
fig.legend(loc="outside upper center", ncols=3, fontsize=9)
plt.show()

# %% [markdown]
# With uncorrelated keys linear attention errs by {glue:text}`lin_hebbian_error_uncorrelated:.2f`, close to $n/d$.
# At $\rho = 1/2$ it errs by {glue:text}`lin_hebbian_error_half:.2g` and at the strongest correlation by
# {glue:text}`lin_hebbian_error_most:.3g`:
# the answer is mostly the sum of all values.
# The best scale brings that down to {glue:text}`lin_scaled_hebbian_error_most:.2f`, which is hardly better
# than silence.
# One pass of the delta rule gives {glue:text}`lin_delta_error_half:.2f` at $\rho = 1/2$ and
# {glue:text}`lin_delta_error_most:.2f` at the end;
# ten passes go from {glue:text}`lin_ten_delta_passes_error_uncorrelated:.1g` to
# {glue:text}`lin_ten_delta_passes_error_most:.2f`.
# Least squares never exceeds {glue:text}`lin_ridge_error_most:.0e`, and even that is the price of the ridge.
#
# Nothing was lost for want of room:
# as long as the keys are linearly independent an exact memory exists, and it is a matrix of the same size.
# What is missing is the other matrix, the one that tells the keys apart.
# You can see it happen in <a href="../book/explorer.html#memory=linear-attention&amp;beta=1">one dimension</a>:
# overlapping features add up, and the curve leaves its points.
#
# ## What it buys: one sum, three orders of summation
#
# Why would anybody skip the inverse? Because a sum is associative.
# At time $t$ the memory holds the pairs up to $t$,
#
# ```{math}
# :label: lin-eq-recurrent
# S_t = S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t = \sum_{i \le t} (q_t^\top k_i)\, v_i ,
# ```
#
# and the two expressions for $y_t$ are two algorithms.
# The first is a recurrent network with a matrix for a state. The second is attention without the softmax,
# $Y = \operatorname{tril}(Q K^\top)\, V$, all tokens at once.
# The third cuts the sequence into chunks of $C$ tokens: attention inside a chunk, the state between chunks.
# The duality of the first two is due to {cite:t}`katharopoulos2020transformers`;
# chunks of this kind are what {cite:t}`yang2023gated` train with.


# %%
def recurrent(q, k, v):
    S, y = k.new_zeros(k.shape[-1], v.shape[-1]), []
    for q_t, k_t, v_t in zip(*(x.split(1) for x in (q, k, v)), strict=True):
        S = S + k_t.mT @ v_t
        y.append(q_t @ S)
    return torch.cat(y)


def parallel(q, k, v):
    return (q @ k.mT).tril() @ v


def chunkwise(q, k, v, chunk_size):
    S, y = k.new_zeros(k.shape[-1], v.shape[-1]), []
    chunks = (x.split(chunk_size) for x in (q, k, v))
    for q_c, k_c, v_c in zip(*chunks, strict=True):
        y.append(q_c @ S + parallel(q_c, k_c, v_c))
        S = S + k_c.mT @ v_c
    return torch.cat(y)


T, K, V, C = 200, 24, 40, 16  # T is no multiple of C, and need not be
q, k, v = normal(T, K), normal(T, K), normal(T, V)
y = recurrent(q, k, v)
assert_close(parallel(q, k, v), y)
assert_close(chunkwise(q, k, v, C), y)

q, k, v = (x[None, :, None] for x in (q, k, v))  # one batch element, one head
fast, state = ttr.regress(linear_attention, q, k, v, chunk_size=C)
assert_close(fast[0, :, 0], y)
assert_close(state.memory[0, 0], hebbian(k[0, :, 0], v[0, :, 0]))

# %% [markdown]
# They give the same numbers and cost different amounts.
# A product of an $a \times b$ and a $b \times c$ matrix takes $2abc$ operations. So, with $K$ and $V$ for the sizes of
# a key and a value,
#
# | form | operations | steps that must wait for each other |
# |---|---|---|
# | recurrent | $4\,T K V$ | $T$ |
# | parallel | $2\,T^2 (K + V)$ | 1 |
# | chunkwise | $2\,T C (K + V) + 4\,T K V$ | $T / C$ |
#
# PyTorch can count its own products, so the table is checked and not believed.

# %%
from torch.utils.flop_counter import FlopCounterMode


def operations(form, *arguments):
    with FlopCounterMode(display=False) as counter:
        form(*arguments)
    return counter.get_total_flops()


T = 12 * C
q, k, v = normal(T, K), normal(T, K), normal(T, V)
assert operations(recurrent, q, k, v) == 4 * T * K * V
assert operations(parallel, q, k, v) == 2 * T**2 * (K + V)
assert operations(chunkwise, q, k, v, C) == 2 * T * C * (K + V) + 4 * T * K * V

# %% [markdown]
# By this count the recurrent form is the cheapest from $T = 2KV/(K + V)$ tokens on, and chunks only add to it.
# Then why do they exist?
#
# Because operations are not what the recurrent form waits for.
# A step reads the state, $KV$ numbers, adds to it, and writes it back:
# $4KV$ operations for $2KV$ numbers moved, two operations a number.
# An accelerator can do hundreds in the time that it moves one.
# And each of the $T$ steps has to wait for the one before.
#
# A chunk moves the same $2KV$ numbers of state once in $C$ tokens, with its own $2C(K + V)$ numbers of $q$,
# $k$, $v$ and $y$.
# At $C = K = V = d$ that makes $8d^3$ operations for $6d^2$ numbers, $\tfrac43 d$ a number, all of them in
# matrix products.
# The chunk size is the dial between the two costs: large enough to keep the arithmetic units busy,
# small enough that the $TC$ term stays below the $TKV$ term, which at $K = V = d$ means $C \le d$.
#
# The other price is paid when the model generates.
# Softmax attention keeps every key and value, $T(K + V)$ numbers a head.
# A linear memory keeps $S$: $KV$ numbers, whatever $T$ is. At $K = V = d$ the two are equal at $T = d/2$ tokens.

# %% mystnb={"figure": {"caption": "Cost of one head with keys and values of equal size. Left: operations a token; a single chunk is the parallel form; from the second chunk on the cost a token is constant. Right: numbers that must be kept to generate the next token. Features buy a larger state (here degree-two features of the whole key), and it is still constant.", "name": "fig-lin-cost"}, "image": {"alt": "Two log-log plots against sequence length. Operations a token: parallel grows linearly, recurrent and chunkwise are flat. Numbers kept: softmax attention grows linearly and crosses the two flat lines of linear attention."}} tags=["hide-input"]
K = V = C = 64
lengths = 2 ** torch.arange(3, 17)
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6))
left.loglog(lengths, 2 * lengths * (K + V), label="parallel")
inside, between = 2 * lengths.clamp(max=C) * (K + V), 4 * K * V * (lengths > C)
left.loglog(lengths, inside + between, label="chunkwise")
left.loglog(lengths, torch.full_like(lengths, 4 * K * V), label="recurrent")
left.set(xlabel="sequence length $T$ (tokens)", ylabel="operations a token")
right.loglog(lengths, lengths * (K + V), label="softmax attention: keys and values")
right.loglog(lengths, torch.full_like(lengths, K * V), label="linear attention: $S$")
right.loglog(lengths, torch.full_like(lengths, ttr.Quadratic().size(K) * V), label="with degree-two features")
right.set(xlabel="tokens read", ylabel="numbers kept a head")
for ax in (left, right):
    ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Feature maps: two regressions in one formula
#
# If raw keys overlap too much, let the memory see something else of them:
# features $\phi(k)$, $p$ numbers instead of $d$.
# The memory is then linear in the features, and all of the above holds with $\phi(k)$ for $k$.
# Written as attention, only an inner product is left:
#
# ```{math}
# :label: lin-eq-kernel
# y_t = \sum_{i \le t} \kappa(q_t, k_i)\, v_i, \qquad \kappa(q, k) = \phi(q)^\top \phi(k) .
# ```
#
# {cite:t}`katharopoulos2020transformers` divide by the sum of the weights,
#
# ```{math}
# :label: lin-eq-normalised
# y_t = \frac{\sum_{i\le t} \kappa(q_t, k_i)\, v_i}{\sum_{i\le t} \kappa(q_t, k_i)}
#     = \frac{S_t^\top \phi(q_t)}{z_t^\top \phi(q_t)}, \qquad z_t = z_{t-1} + \phi(k_t) .
# ```
#
# This looks like a detail, a matter of scale. It is another regression.
#
# ```{prf:proposition}
# :label: lin-prop-smoothing
# Where $\sum_{i \le t} \kappa(q_t, k_i) > 0$ and no weight is negative, {eq}`lin-eq-normalised` is the
# exact solution of
#
# $$
# y_t = \operatorname*{arg\,min}_{c} \sum_{i \le t} \kappa(q_t, k_i)\, \lVert v_i - c \rVert^2 .
# $$
# ```
#
# ```{prf:proof}
# The objective is convex in $c$, and its gradient, $-2 \sum_i \kappa(q_t, k_i)(v_i - c)$, is zero where $c$
# is the weighted mean.
# ```
#
# So without the division, linear attention is the first gradient step of a *linear* fit in feature space,
# the same fit for all queries.
# With it, linear attention is the exact fit of a *constant*, anew for every query, with the kernel for weights:
# the smoother of {cite:t}`nadaraya1964estimating` and {cite:t}`watson1964smooth`.
# Softmax attention is that smoother with $\kappa(q, k) = e^{q^\top k}$, which no finite number of features gives.


# %%
def smooth(kernel, q, k, v, normalize):
    weights = kernel(q, k).tril()
    return weights @ v / (weights.sum(-1, keepdim=True) if normalize else 1)


def elu_kernel(q, k):
    elu = torch.nn.functional.elu
    return (elu(q) + 1) @ (elu(k) + 1).mT


def taylor_kernel(q, k):
    return 1 + q @ k.mT + (q @ k.mT) ** 2 / 2


def run(design, q, k, v, **inputs):
    """The answers to one sequence: one batch element, one head."""
    y, _ = ttr.regress(design, *(x[None, :, None] for x in (q, k, v)), **inputs)
    return y[0, :, 0]


q, k, v = normal(50, 6), normal(50, 6), normal(50, 3)
for feature_map, kernel in ((ttr.EluPlusOne(), elu_kernel), (ttr.Taylor(), taylor_kernel)):
    for optimizer in (ttr.Hebbian(), ttr.Hebbian(normalize=True)):
        design = ttr.Design(regressor=ttr.Linear(feature_map), optimizer=optimizer)
        y = smooth(kernel, q, k, v, optimizer.normalize)
        assert_close(run(design, q, k, v), y)

# %% [markdown]
# The sum $z_t$ costs one more column of $S$, the one for a value that is always 1.
# A mean needs weights that are not negative. The identity does not give such weights, and the package says so.

# %%
try:
    ttr.Design(optimizer=ttr.Hebbian(normalize=True))
except ValueError as refusal:
    print(textwrap.fill(str(refusal), 76))

# %% [markdown]
# ### Which kernel do you get?
#
# Three feature maps are in common use.
# The map $\operatorname{elu}(x) + 1$ has as many features as the key has channels.
# The second-order Taylor map of {cite:t}`arora2024based` has $1 + d + d(d+1)/2$, with the kernel
# $1 + x + x^2/2 = \tfrac12 + \tfrac12 (1 + x)^2 \ge \tfrac12$ at $x = q^\top k$.
# The positive random features of {cite:t}`choromanski2020performers` have as many as you ask for:
#
# ```{math}
# :label: lin-eq-random
# \phi(x)_r = \tfrac{1}{\sqrt m}\, e^{\omega_r^\top x - \lVert x \rVert^2 / 2}, \qquad \omega_1, \dots,
# \omega_m \sim \mathcal N(0, I) .
# ```
#
# ```{prf:proposition}
# :label: lin-prop-random
# $\mathbb E\, \phi(q)^\top \phi(k) = e^{q^\top k}$.
# If the $\omega_r$ are independent, the variance of $\phi(q)^\top \phi(k)$
# relative to its squared mean is $\bigl(e^{\lVert q + k \rVert^2} - 1\bigr) / m$.
# ```
#
# ```{prf:proof}
# One term of $m\,\phi(q)^\top\phi(k)$ is $e^{\omega^\top (q + k) - (\lVert q \rVert^2 + \lVert k \rVert^2)/2}$.
# Since $\mathbb E\, e^{\omega^\top a} = e^{\lVert a \rVert^2 / 2}$ and
# $\lVert q + k \rVert^2 = \lVert q \rVert^2 + \lVert k \rVert^2 + 2 q^\top k$, its mean is $e^{q^\top k}$.
# Its square has the mean
# $e^{2 \lVert q + k \rVert^2 - \lVert q \rVert^2 - \lVert k \rVert^2} = e^{\lVert q + k \rVert^2}\, e^{2 q^\top k}$.
# The mean of $m$ independent terms has $1/m$ of a term's variance.
# ```
#
# This is a version of lemmas 1 and 2 of {cite:t}`choromanski2020performers`.
# The sum in the exponent deserves a second look.
# Among queries and keys of one length the estimate is noisiest where $q + k$ is longest, which is at $q = k$:
# the very pair that recall is about.
# There the number of features needed grows like $e^{4\lVert k\rVert^2}$.
# Directions that are orthogonal and not independent keep the mean and lower the noise;
# `ttr.PositiveRandom` uses such.


# %%
def relative_estimates(q, k, number, draws=300):
    """φ(q)ᵀφ(k) / exp(qᵀk) for independent draws of the random features."""
    maps = [ttr.PositiveRandom(number, seed=seed) for seed in range(draws)]
    return torch.stack([phi(q) @ phi(k) for phi in maps]) / (q @ k).exp()


q, other = unit(16), unit(16)
for length in (0.5, 1.0):
    for k in (other, q):
        estimates = relative_estimates(length * q, length * k, number=64)
        standard_error = estimates.std() / len(estimates) ** 0.5
        assert (estimates.mean() - 1).abs() < 4 * standard_error  # unbiased

noise = relative_estimates(q / 2, q / 2, number=64).std()
independent = math.sqrt(math.expm1((q / 2 + q / 2).square().sum()) / 64)
assert noise < independent  # orthogonal directions help

# %% tags=["hide-cell"]
lengths, numbers = (0.5, 1.0, 1.5), (16, 64, 256, 1024)
levels = torch.tensor([0.1, 0.5, 0.9], device=device)
bands = {
    length: torch.stack([relative_estimates(length * q, length * q, m).quantile(levels) for m in numbers])
    for length in lengths
}
record("lin_random_feature_noise", noise, rtol=0.02)
record("lin_random_feature_noise_independent", independent)
record("lin_random_feature_median", bands[1.5][0, 1], rtol=0.02)

# %% mystnb={"figure": {"caption": "Left: weight that a stored pair gets, relative to the weight of the pair whose key is the query; the band of elu + 1 is over directions. A kernel that stays high on the way to the left listens to everybody. The Taylor kernel rises again for opposite keys. Right: positive random features at the pair that should be recalled, the median draw and the middle four fifths of the draws. The mean of all draws is right; the typical draw for long keys is far too small.", "name": "fig-lin-kernels"}, "image": {"alt": "Left: kernels against the inner product of query and key: exponential falls fast to zero, Taylor less and turns up at the left, elu plus one hardly falls, the identity is a straight line. Right: estimate over truth against the number of random features for three key lengths; the spread narrows around one, slower for longer keys, whose median starts far below one."}} tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8))
length, samples = 2.0, 400
cosine = torch.linspace(-1, 1, 81, device=device)
query, other = unit(samples, 1, 16), normal(samples, 1, 16)
across = torch.nn.functional.normalize(other - (other * query).sum(-1, keepdim=True) * query, dim=-1)
key = length * (cosine[:, None] * query + (1 - cosine**2).sqrt()[:, None] * across)
query = length * query
inner = length**2 * cosine.cpu()
left.plot(inner, (inner - length**2).exp(), color="C6", label=r"$e^{q^\top k}$")
for color, (label, feature_map) in enumerate(
    {"elu + 1": ttr.EluPlusOne(), "Taylor": ttr.Taylor(), "identity": ttr.Identity()}.items()
):
    features, at_query = feature_map(key), feature_map(query)
    weight = ((at_query * features).sum(-1) / at_query.square().sum(-1)).cpu()
    low, high = weight.quantile(torch.tensor([0.1, 0.9]), dim=0)
    left.fill_between(inner, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
    left.plot(inner, weight.mean(0), color=f"C{color}", label=label)
left.set(xlabel=r"$q^\top k$, with $\|q\| = \|k\| = 2$", ylabel="relative weight", ylim=(-0.6, 1.1))
left.legend(fontsize=9)
for length, band in bands.items():
    low, median, high = band.mT.cpu()
    shifted = torch.tensor(numbers) * 1.12 ** (2 * length - 2)
    spread = torch.stack([median - low, high - median])
    right.errorbar(shifted, median, spread, marker="o", markersize=4, capsize=3, label=rf"$\|k\| = {length:g}$")
right.axhline(1, color="0.5", linewidth=1)
right.set(xscale="log", xlabel="random features $m$", ylabel=r"$\phi(k)^\top\phi(k)\,/\,e^{k^\top k}$", ylim=(0, 2.2))
right.set_xticks(numbers, [str(number) for number in numbers])
right.minorticks_off()
right.legend(fontsize=9)
plt.show()

# %% [markdown]
# With 64 features and $\lVert k \rVert = 1/2$ the relative noise is {glue:text}`lin_random_feature_noise:.2f`;
# independent directions would give {glue:text}`lin_random_feature_noise_independent:.2f`.
# At $\lVert k \rVert = 3/2$ and the smallest $m$, half of all draws give the matching pair less than
# {glue:text}`lin_random_feature_median:.2f` of its weight. Unbiased is not the same as good.
#
# ## How much fits in?
#
# A feature map changes the kernel, and it changes the size of the regression.
# Both readings of linear attention predict how many pairs a memory can hold.
#
# ```{prf:proposition} Capacity
# :label: lin-prop-capacity
# Let $n$ keys be independent and uniform on the unit sphere of $\mathbb R^d$, with $\phi$ scaled so that
# $\kappa(k, k) = 1$,
# and let the values be independent with mean zero and $\mathbb E \lVert v_i \rVert^2 = 1$.
# The expected error a pair is
#
# - for least squares, as the ridge goes to zero, $\max(0,\, 1 - p/n)$, if any $\min(n, p)$ of the
#   $\phi(k_i)$ are linearly independent;
# - for the Hebbian memory $(n - 1)\, \mathbb E\, \kappa(k, k')^2$, which is $(n-1)/d$ for the identity
#   and $3(n-1)/(d(d+2))$ for all products of two channels, $\kappa = (k^\top k')^2$;
# - for the Hebbian memory at the one best scale for all draws, $m / (1 + m)$ with $m$ the line above.
# ```
#
# ```{prf:proof}
# Least squares answers $P V$ with $P$ the orthogonal projection on the column space of the feature matrix,
# whose rank is $\min(n, p)$.
# The error is $\mathbb E \lVert (I - P) V \rVert^2 = \operatorname{tr}(I - P) = n - \min(n, p)$ for all $n$ pairs.
# The Hebbian memory is part 3 of {prf:ref}`lin-theorem-interference` with $\kappa$ for the inner product.
# A coordinate $x$ of a uniform unit vector has $\mathbb E\, x^2 = 1/d$ and $\mathbb E\, x^4 = 3/(d(d+2))$.
# ```
#
# Least squares holds one pair a feature, exactly, and then falls off a cliff. The Hebbian memory has no cliff:
# it is never exact and fades from the start.
# For many pairs the identity at its best scale errs by $(n-1)/(d+n-1)$, and least squares by $1 - d/n$.
# What they still hold, $d/(d + n - 1)$ and $d/n$, then agrees in ratio.
# This is where $K^\top K \approx (n/d)\, I$ becomes true, and where linear attention takes nothing for
# granted but a scale.
# By then both have forgotten almost everything.
#
# To see what an error means for a model, the values are now symbols: unit vectors from a random codebook.
# An answer counts as right if the nearest code vector is the stored one.
#
# The exact fit is taken at the end of the sequence only, and from the smaller of the two matrices in
# {eq}`lin-eq-push-through`.
# (`ttr.regress` with `Exact()` fits after every token, which is more than we need here.)


# %%
def dual_least_squares(k, v, ridge=1e-10):
    return k.mT @ torch.linalg.solve(k @ k.mT + ridge * eye(k.shape[-2]), v)


d, codebook, draws = (sizes["capacity"][name] for name in ("key", "codebook", "draws"))
feature_maps = {"key": ttr.Identity(), "products": ttr.Quadratic()}
features = {name: phi.size(d) for name, phi in feature_maps.items()}
multiples = {features["key"]: (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 5 / 4, 2, 4, 8)}
multiples |= {features["products"]: (0.75, 0.95, 1, 1.05, 1.25, 1.5)}
counts = sorted({int(p * share) for p in multiples for share in multiples[p]} | {codebook})


def table(*fits):
    return {(name, fit): torch.zeros(draws, len(counts)) for name in features for fit in fits}


errors = table("Hebbian", "best scale", "least squares")
accuracy = table("Hebbian", "least squares")
symbols = unit(draws, codebook, d)
for column, n in enumerate(counts):
    k, v = unit(draws, n, d), symbols[:, :n]
    for name, phi in feature_maps.items():
        x = phi(k)
        exact_fit = least_squares if n > features[name] else dual_least_squares
        for fit, S in {"Hebbian": hebbian(x, v), "least squares": exact_fit(x, v)}.items():
            y = x @ S
            recalled = (y @ symbols.mT).argmax(-1) == torch.arange(n, device=device)
            errors[name, fit][:, column] = error(y[:, :, None], v[:, :, None])[:, 0]
            accuracy[name, fit][:, column] = recalled.double().mean(-1)
        rescaled = best_scaled((x @ hebbian(x, v))[:, :, None], v[:, :, None])
        errors[name, "best scale"][:, column] = error(rescaled, v[:, :, None])[:, 0]

# %%
n = torch.tensor(counts).double()
second_moments = {"key": 1 / d, "products": 3 / (d * (d + 2))}
for name, p in features.items():
    m = (n - 1) * second_moments[name]
    error_of = {fit: errors[name, fit].mean(0) for fit in ("Hebbian", "best scale", "least squares")}
    many, over = n >= d, n > p
    assert_close(error_of["Hebbian"][many], m[many], rtol=0.15, atol=0)
    assert_close(error_of["best scale"][many], (m / (1 + m))[many], rtol=0.15, atol=0)
    assert_close(error_of["least squares"][over], 1 - p / n[over], rtol=0.05, atol=0)
    assert (error_of["least squares"][n < p] < 1e-9).all()
    assert (accuracy[name, "least squares"][:, n <= p] == 1).all()

# %% tags=["hide-cell"]
for (name, fit), values in errors.items():
    kind = fit.replace(" ", "_").lower()
    record(f"lin_capacity_error_{name}_{kind}", values.mean(0), atol=1e-6)
for (name, fit), values in accuracy.items():
    kind = fit.replace(" ", "_").lower()
    record(f"lin_capacity_accuracy_{name}_{kind}", values.mean(0), atol=0.005)
record("lin_capacity_pairs", counts)
record("lin_error_scaled_past", errors["key", "best scale"].mean(0)[counts.index(4 * d)])
record("lin_key_size", features["key"])
record("lin_products_size", features["products"])
where = {"full": (("key", "Hebbian"), d), "past": (("key", "Hebbian"), 4 * d)}
where |= {"exact_past": (("key", "least squares"), 4 * d)}
where |= {"products_full": (("products", "Hebbian"), features["products"])}
for name, (memory, pairs) in where.items():
    record(f"lin_error_{name}", errors[memory].mean(0)[counts.index(pairs)])
    record(f"lin_accuracy_{name}", accuracy[memory].mean(0)[counts.index(pairs)], atol=0.005)

# %% mystnb={"figure": {"caption": "How much fits into a linear memory. Left: recall error; bands are the middle four fifths of the draws, dashed curves the proposition, vertical lines the number of features. Least squares is exact up to one pair a feature and then falls off a cliff; the Hebbian memory fades from the first pair, and for raw keys, far beyond their cliff, its best scale ends where least squares does. Right: how often the nearest code vector is the stored one.", "name": "fig-lin-capacity"}, "image": {"alt": "Two plots against the number of stored pairs on a logarithmic axis. Error: for raw keys and for products of two channels, least squares stays at zero up to the number of features and rises after it, the Hebbian memory rises steadily from the start. Accuracy: the mirror image, with least squares falling later than the Hebbian memory and products later than raw keys."}} tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2))
dense = torch.logspace(math.log10(counts[0]), math.log10(counts[-1]), 400)
colors = {"key": "C0", "products": "C1"}
labels = {"key": "keys", "products": "products"}
quantiles = torch.tensor([0.1, 0.9])
line_styles = {"Hebbian": ":", "best scale": "-.", "least squares": "-"}
for ax, curves in ((left, errors), (right, accuracy)):
    for (name, fit), values in curves.items():
        style = {"color": colors[name], "linestyle": line_styles[fit], "marker": "o", "markersize": 3}
        ax.fill_between(n, *values.quantile(quantiles, dim=0), color=colors[name], alpha=0.2, linewidth=0)
        ax.plot(n, values.mean(0), label=f"{labels[name]}, {fit}", **style)
for name, second_moment in second_moments.items():
    m = (dense - 1) * second_moment
    left.plot(dense, m, "k--", linewidth=0.6)
    left.plot(dense, m / (1 + m), "k--", linewidth=0.6)
    left.plot(dense, (1 - features[name] / dense).clamp_min(0), "k--", linewidth=0.6)
    for ax in (left, right):
        ax.axvline(features[name], color=colors[name], linewidth=0.8, alpha=0.6)
left.set(ylim=(-0.05, 1.6), ylabel="relative squared error")
right.set(ylim=(-0.03, 1.03), ylabel="fraction of symbols recalled")
for ax in (left, right):
    ax.set(xscale="log", xlabel="stored pairs $n$")
handles, names = left.get_legend_handles_labels()
fig.legend(handles, names, loc="outside upper center", ncols=3, fontsize=9)
plt.show()

# %% [markdown]
# With {glue:text}`lin_key_size` pairs for as many channels the Hebbian error is
# {glue:text}`lin_error_full:.2f`, about that of an empty memory.
# Yet {glue:text}`lin_accuracy_full:.0%` of the symbols come out right.
# The interference is large, but it is spread over all directions, and only its part along a code vector can
# mislead.
# Linear attention is better at *which* than at *how much*.
#
# At four times as many pairs most symbols are gone:
# linear attention has {glue:text}`lin_accuracy_past:.0%` of them right,
# least squares {glue:text}`lin_accuracy_exact_past:.0%`.
# Their errors, {glue:text}`lin_error_past:.2g` and {glue:text}`lin_error_exact_past:.2f`,
# look further apart than they are: the best scale alone would bring linear attention to
# {glue:text}`lin_error_scaled_past:.2f`, and the nearest code vector does not depend on scale.
#
# Products of two channels move the cliff to {glue:text}`lin_products_size` pairs.
# They have as many features as that: the capacity is paid for in state.
# The Hebbian memory does not even get what it pays for.
# Its error there is {glue:text}`lin_error_products_full:.2f`,
# towards $\tfrac32$ as $d$ grows, where raw keys at their own cliff have 1.
# Squares have a mean, so these features share a common direction, and correlated keys are what this memory
# cannot take.
#
# ## What about forgetting?
#
# A decay makes old pairs count less: $\gamma_i^{(t)} = \alpha_{i+1} \cdots \alpha_t$ in the sum of squares.
# The gradient at $S = 0$ is then $-\sum_i \gamma_i^{(t)} k_i v_i^\top$, so that one step from zero gives
# $S_t = \alpha_t S_{t-1} + k_t v_t^\top$.
# This is RetNet {cite:p}`sun2023retnet` with fixed factors, and Mamba-2 {cite:p}`dao2024mamba2` with factors
# that depend on the token; its time step also scales what is written.
# Gated linear attention {cite:p}`yang2023gated` has a factor a channel,
# $S_t = \operatorname{Diag}(\alpha_t) S_{t-1} + k_t v_t^\top$.
# No weight on whole pairs gives that, so it is read as this recursion and not as a weighted sum of squares.
# A decay weakens interference by forgetting the pairs that it comes from, and in no other way.
# {doc}`/notebooks/03_state_space_models` is about these weights; here is the one line that they add to the parallel
# form.

# %%
q, k, v, log_decay = normal(50, 6), normal(50, 6), normal(50, 3), -normal(50).abs()
total = log_decay.cumsum(0)
since = (total[:, None] - total[None, :]).exp().tril()
y = run(ttr.Design(ttr.Decay()), q, k, v, log_decay=log_decay[None, :, None])
assert_close(y, ((q @ k.mT) * since) @ v)

# %% [markdown]
# ## Limits
#
# ```{admonition} Where linear attention meets its neighbours
# :class: important
#
# - **Orthonormal keys.** The delta rule with step size 1, least squares without a ridge and linear attention are
#   the same function of the sequence.
#   With a ridge $\lambda$ the answer of least squares is divided by exactly $1 + \lambda$.
#   Away from orthonormal keys the delta rule leads to {doc}`/notebooks/04_delta_rule`.
# - **A large ridge.** $\lambda\,(K^\top K + \lambda I)^{-1} K^\top V \to K^\top V$ as $\lambda \to \infty$:
#   linear attention is least squares that believes its prior and hardly its data.
# - **No decay.** With a log-decay of 0 the decayed sum is the uniform one.
# ```
#
# Each line, executed:

# %%
q, v = normal(16, 24), normal(16, 10)
k = torch.linalg.qr(normal(24, 16)).Q.mT  # sixteen orthonormal keys
ones = k.new_ones(1, 16, 1)
y = run(linear_attention, q, k, v)
assert_close(run(delta_rule, q, k, v, step_size=ones), y)
for ridge in (1e-4, 1.0, 100.0):
    fit = run(exact, q, k, v, ridge=k.new_full((1, 24), ridge))
    assert_close((1 + ridge) * fit, y)

k = normal(16, 24)  # any keys
y = run(linear_attention, q, k, v)
for ridge in (1e4, 1e6, 1e8):
    fit = run(exact, q, k, v, ridge=k.new_full((1, 24), ridge))
    gap = (ridge * fit - y).norm() / y.norm()
    assert gap < torch.linalg.matrix_norm(k, 2) ** 2 / ridge * 10  # falls as 1/λ

assert_close(run(ttr.Design(ttr.Decay()), q, k, v, log_decay=0 * ones), y)

# %% [markdown]
# ## Exercises
#
# ```{exercise} Whitening
# :label: lin-exercise-whitening
#
# Linear attention takes $K^\top K$ for the identity. Make it true: replace every key and every query by
# $\tilde k = (K^\top K + \lambda I)^{-1/2} k$, called ZCA whitening.
# What does linear attention compute on the whitened keys? Check it on correlated keys.
# Why is this not a way to train a causal layer?
# ```
#
# ````{solution-start} lin-exercise-whitening
# :label: lin-solution-whitening
# :class: dropdown
# ````
#
# With $W = (K^\top K + \lambda I)^{-1/2}$, symmetric, the memory is $\tilde S = W K^\top V$ and the answer
# $\tilde S^\top \tilde q = V^\top K W W q = S_{\mathrm{ls}}^\top q$: exactly least squares.

# %%
k = correlated_keys(torch.tensor(0.9, device=device), 32, 64)
v, q = unit(32, 64), unit(5, 64)
eigenvalues, basis = torch.linalg.eigh(k.mT @ k + 1e-6 * eye(64))
whitening = basis @ (eigenvalues.rsqrt()[:, None] * basis.mT)
white_memory = hebbian(k @ whitening, v)
assert_close(q @ whitening @ white_memory, q @ least_squares(k, v, ridge=1e-6))

broken = (k @ hebbian(k, v) - v).square().sum() / v.square().sum()
repaired = (k @ whitening @ white_memory - v).square().sum() / v.square().sum()
assert repaired < 1e-6 < 1 < broken

# %% [markdown]
# $W$ depends on all keys, so a new key changes how every earlier one should have been stored.
# A fixed $W$, learned or estimated on other data, does fit into the projections of $q$ and $k$, and removes
# what correlation all sequences share.
#
# ````{solution-end}
# ````
#
# ```{exercise} Two documents
# :label: lin-exercise-sum
#
# One memory has read sequence $A$, another sequence $B$. Show that the sum of the two states has read both.
# How would you take one document out again? Which of this is true of the delta rule?
# ```
#
# ````{solution-start} lin-exercise-sum
# :label: lin-solution-sum
# :class: dropdown
# ````
#
# A sum over pairs does not know their order:
# $K_A^\top V_A + K_B^\top V_B$ is the state of both, and subtracting a term forgets it exactly.
# An error-correcting memory stores what the state so far got wrong, so its terms depend on what came
# before, and neither property survives.


# %%
def read(design, *documents):
    k, v = torch.cat(documents, dim=1).chunk(2, dim=-1)
    inputs = {name: k.new_ones(k.shape[:3]) for name in design.inputs}
    _, state = ttr.regress(design, k, k, v, **inputs)
    return state.memory


a, b = (torch.cat([unit(1, 20, 1, 24), unit(1, 20, 1, 24)], dim=-1) for _ in range(2))
both = read(linear_attention, a, b)
assert_close(read(linear_attention, a) + read(linear_attention, b), both)
assert_close(both - read(linear_attention, b), read(linear_attention, a))

both = read(delta_rule, a, b)
for other in (read(delta_rule, b, a), read(delta_rule, a) + read(delta_rule, b)):
    assert (other - both).norm() > 0.1 * both.norm()

# %% [markdown]
# ````{solution-end}
# ````
#
# ```{exercise} A feature map of your own
# :label: lin-exercise-feature-map
#
# Write the feature map $[\operatorname{relu}(x),\, \operatorname{relu}(-x)]$ as a `FeatureMap`:
# its `size`, its formula, and the map itself.
# What is its kernel? Run it through `ttr.regress` by all three optimizers, and normalised.
# When does the normalised form divide by zero?
# ```
#
# ````{solution-start} lin-exercise-feature-map
# :label: lin-solution-feature-map
# :class: dropdown
# ````
#
# A design takes any frozen dataclass that says these three things; nothing has to be registered.
# A fourth, `positive`, vouches for the division: here the sum can be zero, but is never negative, and the last part of
# the exercise is about what that risks.
# The kernel is $\sum_c \max(0,\, q_c k_c)$ over channels:
# only channels in which query and key agree in sign count.

# %%
from dataclasses import dataclass


@dataclass(frozen=True)
class SignedReLU(ttr.FeatureMap):
    positive = True
    formula = r"[\operatorname{relu}(x),\, \operatorname{relu}(-x)]"

    def size(self, key):
        return 2 * key

    def __call__(self, x):
        return torch.cat([x.relu(), (-x).relu()], dim=-1)


q, k, v = (normal(1, 30, 2, 8) for _ in range(3))
regressor = ttr.Linear(SignedReLU())
inputs = {
    ttr.Hebbian(): {},
    ttr.Hebbian(normalize=True): {},
    ttr.GradientDescent(ttr.NLMS()): {"step_size": k.new_ones(1, 30, 2)},
    ttr.Exact(): {"ridge": k.new_ones(2, 16)},
}
for optimizer, needed in inputs.items():
    design = ttr.Design(regressor=regressor, optimizer=optimizer)
    y, _ = ttr.regress(design, q, k, v, **needed)
    assert_close(y, ttr.oracle.regress(design, q, k, v, **needed)[0])

agreement = torch.einsum("bthk,bihk->bhtik", q, k).relu().sum(-1).tril()
y, _ = ttr.regress(ttr.Design(regressor=regressor), q, k, v)
assert_close(y, torch.einsum("bhti,bihv->bthv", agreement, v))

# %% [markdown]
# The normalised form divides by zero when no key so far shares a sign with the query in any channel.
# If the signs of $d$ channels are fair and independent, that has probability $2^{-d}$ at the first key.
# A small constant added to every feature prevents it, and flattens the kernel.
#
# ````{solution-end}
# ````
#
# ```{exercise} To divide or not to divide
# :label: lin-exercise-normalise
#
# Compare `Hebbian()` and `Hebbian(normalize=True)` with Taylor features on two tasks, at keys of length 2:
# (a) all values are the same vector; (b) recall of random values. Which wins where, and why?
# Does the best scale of part 3 of {prf:ref}`lin-theorem-interference` do as well as the division?
# ```
#
# ````{solution-start} lin-exercise-normalise
# :label: lin-solution-normalise
# :class: dropdown
# ````

# %%
k, noise = 2 * unit(8, 32, 1, 16), unit(8, 32, 1, 16)
tasks = {"same": noise[:, :1].expand_as(noise), "random": noise}
taylor = ttr.Linear(ttr.Taylor())
results = {}
for task, v in tasks.items():
    plain = recall(ttr.Design(regressor=taylor), k, v)
    extended = recall(ttr.Design(regressor=taylor, optimizer=ttr.Hebbian(normalize=True)), k, v)
    smoothed = extended[..., :-1] / extended[..., -1:]  # the last column of S is z
    answers = plain, best_scaled(plain, v), smoothed
    results[task] = [error(y, v).mean().item() for y in answers]

plain, scaled, smoothed = results["same"]
assert smoothed < 1e-20 < scaled < 0.05 < 1 < plain
plain, scaled, smoothed = results["random"]
assert scaled < smoothed < plain
record("lin_exercise_random_scaled", scaled)
record("lin_exercise_random_normalised", smoothed)

# %% [markdown]
# (a) A constant is in the class of functions that the normalised form fits, so it is exact;
# the plain form adds the value up once a pair.
# (b) For unrelated values the division gives {glue:text}`lin_exercise_random_normalised:.2f` and the best
# scale {glue:text}`lin_exercise_random_scaled:.2f`.
# Neither brings back what the kernel has mixed.
# The division knows the scale without having seen the answers, and this is most of its use:
# it keeps outputs of the size of values at any length of the sequence.
#
# ````{solution-end}
# ````
#
# ```{exercise} Correlated values
# :label: lin-exercise-values
#
# Part 2 of {prf:ref}`lin-theorem-interference` holds for *any* fixed values of unit length, equal ones too.
# What made the values disappear?
# Derive the expected error for a kernel with $\mathbb E[\kappa(k_i, k_j) \mid k_j] = \mu$, for values with
# $v_i^\top v_l = \tau$ for all $i \ne l$.
# Check it for $\kappa = q^\top k$ and for $\kappa = (q^\top k)^2$.
# ```
#
# ````{solution-start} lin-exercise-values
# :label: lin-solution-values
# :class: dropdown
# ````
#
# In the proof the cross terms $\mathbb E[g_i g_l]\, v_i^\top v_l$ vanish because the $g_i$ have mean zero.
# With mean $\mu$, $\mathbb E[g_i g_l] = \mu^2$, so
#
# $$
# \mathbb E \lVert y_j - v_j \rVert^2 = (n - 1)\, \mathbb E\, \kappa^2 + (n - 1)(n - 2)\, \mu^2\, \tau .
# $$
#
# The inner product has $\mu = 0$. Its square has $\mu = 1/d$, and the second term grows with $n^2$.

# %%
d, n, tau, draws = 16, 40, 0.5, 400
k = unit(draws, n, d)
shared, own = torch.linalg.qr(normal(draws, n + 1, n + 1)).Q.split([1, n], dim=1)
v = tau**0.5 * shared + (1 - tau) ** 0.5 * own
assert_close(v @ v.mT, (tau + (1 - tau) * eye(n)).expand(draws, n, n))

moments = {ttr.Identity(): (1 / d, 0), ttr.Quadratic(): (3 / (d * (d + 2)), 1 / d)}
for feature_map, (second_moment, mu) in moments.items():
    x = feature_map(k)
    measured = (x @ hebbian(x, v) - v).square().sum(-1).mean()
    expected = (n - 1) * second_moment + (n - 1) * (n - 2) * mu**2 * tau
    assert abs(measured - expected) < 0.05 * expected

# %% [markdown]
# ````{solution-end}
# ````
#
# ```{exercise} One pair short
# :label: lin-exercise-taylor
#
# Taylor features of $d$ channels number $1 + d + d(d+1)/2$.
# How many pairs with keys of unit length can least squares on them hold exactly? Why one fewer?
# ```
#
# ````{solution-start} lin-exercise-taylor
# :label: lin-solution-taylor
# :class: dropdown
# ````
#
# On the unit sphere the squares sum to 1, which is the constant feature:
# one feature is a linear combination of others.
# So $d + d(d+1)/2$ pairs fit: normalising keys has taken one dimension from the memory.

# %%
d = 8
phi = ttr.Taylor()
assert torch.linalg.matrix_rank(phi(normal(200, d))) == phi.size(d)
assert torch.linalg.matrix_rank(phi(unit(200, d))) == phi.size(d) - 1

# %% [markdown]
# ````{solution-end}
# ````
#
# ## Further reading
#
# {cite:t}`kohonen1972correlation` has the memory and its interference;
# {cite:t}`hopfield1982neural` feeds its answers back as queries.
# {cite:t}`schmidhuber1992learning` lets a network write such a memory, and {cite:t}`schlag2021linear`
# recognise linear attention in it.
# {cite:t}`vonoswald2022transformers` find the gradient step in trained layers.
# {cite:t}`katharopoulos2020transformers` gave it its name and its two forms.
# For feature maps that imitate softmax read {cite:t}`choromanski2020performers` and {cite:t}`arora2024based`;
# for what limited state does to recall in language models {cite:t}`arora2023zoology`.
# {cite:t}`wang2025testtime` place all of these among the regressions; {doc}`/notebooks/design_space` is the map,
# and {doc}`/book/explorer` lets you play with it. Symbols are collected in {doc}`/book/notation`.
