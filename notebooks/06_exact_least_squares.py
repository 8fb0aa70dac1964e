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
# # Exact least squares
#
# Linear attention takes for granted that keys are orthonormal. The delta rule corrects its newest pair and disturbs
# the old ones.
# What if the memory solved its regression completely, at every token, and what would that cost?
#
# It costs a second matrix beside the memory, the curvature of the keys, and one solve a token.
# The solve can be had in three ways: a recursion, a factorisation a chunk, or a few steps of conjugate gradients.
# We derive all three.
# On the way the memory learns to say how sure it is, and the number of solver steps turns out to be a dial between
# linear attention and least squares.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize, one_hot
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
sizes = {
    "smoke": {
        "belief": {"streams": 400},
        "steps": {"key": 64, "pairs": 48, "seeds": 16},
        "surface": {"key": 32, "seeds": 16},
        "cliff": {"key": 16, "seeds": 8},
        "descent": {"key": 32, "seeds": 64},
    },
    "full": {
        "belief": {"streams": 4000},
        "steps": {"key": 128, "pairs": 96, "seeds": 64},
        "surface": {"key": 64, "seeds": 64},
        "cliff": {"key": 32, "seeds": 32},
        "descent": {"key": 64, "seeds": 256},
    },
}[scale]
exact = ttr.atlas["recursive_least_squares"]
recursive_least_squares = ttr.Design(ttr.Decay(), optimizer=ttr.Exact())  # with a decay
mesa = ttr.Design(ttr.Decay(), optimizer=ttr.Exact(ridge_decays=False))
generator = torch.Generator().manual_seed(6)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def eye(size):
    return torch.eye(size, dtype=torch.float64, device=device)


def dot(a, b):
    return (a * b).sum(-1, keepdim=True)


# %% [markdown]
# ## Ridge regression, and three layers that solve it
#
# A linear memory answers $S^\top q$. Among all matrices we want the one that minimises
#
# ```{math}
# :label: exact-eq-objective
# J_t(S) = \tfrac12 \sum_{i \le t} \gamma_i^{(t)} \lVert v_i - S^\top k_i \rVert^2
#   + \tfrac12 \operatorname{tr}(S^\top \Lambda_t S), \qquad
# \gamma_i^{(t)} = w_i\, \alpha_{i+1} \cdots \alpha_t ,
# ```
#
# with weights $w_i$ as pairs come in, decays $\alpha$, and a ridge $\Lambda_t$ that is diagonal and positive.
# By {prf:ref}`recall-thm-exact` there is one minimum, where the **normal equations** hold:
#
# ```{math}
# :label: exact-eq-normal
# (G_t + \Lambda_t)\, S_t = C_t, \qquad
# G_t = \sum_{i \le t} \gamma_i^{(t)} k_i k_i^\top, \qquad C_t = \sum_{i \le t} \gamma_i^{(t)} k_i v_i^\top .
# ```
#
# $C_t$ is the memory of linear attention. $G_t$ is what linear attention leaves out.
# It is the curvature of the objective, and it says which directions of key space are crowded.
# Both are decayed sums, so both fit in a state of fixed size: $K^2 + KV$ numbers in place of $KV$.
#
# Three layers in the atlas are this memory. Their weights differ, and what becomes of the ridge.
#
# | layer | weights | ridge | in the atlas |
# |---|---|---|---|
# | recursive least squares {cite:p}`plackett1950some,haykin2002adaptive` | all equal, or with a decay | fades: $\Lambda_t = \alpha_1 \cdots \alpha_t \Lambda$ | `recursive_least_squares` |
# | Intention {cite:p}`garnelo2023intention` | all equal | stays | `intention` |
# | MesaNet {cite:p}`vonoswald2025mesanet` | a decay, and a gate for what comes in | stays: $\Lambda_t = \Lambda$ | `mesa_net` |
#
# The first mesa-layer {cite:p}`vonoswald2023uncovering` was the first row, trained inside a Transformer and computed
# one token after the other. MesaNet is the version that runs in parallel.

# %%
from IPython.display import Math

Math(ttr.atlas["mesa_net"].update_rule())

# %% [markdown]
# ## What the ridge is
#
# A ridge keeps the equations solvable while there are fewer pairs than dimensions.
# It also has a meaning, and the meaning pays.
# Suppose that the values come from a true map $W$ with noise, and that before any pair arrives we believe $W$ to be
# small.
#
# ```{prf:theorem} The memory is a belief
# :label: exact-thm-belief
# Let the columns of $W$ be independent and normal with mean zero and covariance $\sigma^2 \Lambda^{-1}$, and let
# $v_i = W^\top k_i + \varepsilon_i$ with independent normal noise of variance $\sigma^2 / \gamma_i$ in each entry.
# Given the pairs, the columns of $W$ are independent and normal, with the columns of $S = (G + \Lambda)^{-1} C$ as
# means and the covariance $\sigma^2 P$, where $P = (G + \Lambda)^{-1}$.
# An entry of $W^\top q$ has mean $(S^\top q)_j$ and variance $\sigma^2\, q^\top P q$.
# ```
#
# ```{prf:proof}
# Up to a constant, minus the logarithm of the density of $W$ given the pairs is
# $\frac{1}{2\sigma^2} \sum_i \gamma_i \lVert v_i - W^\top k_i\rVert^2 + \frac{1}{2 \sigma^2} \operatorname{tr}(W^\top \Lambda W)
# = J(W) / \sigma^2$.
# $J$ is quadratic with its minimum at $S$, so
# $J(W) = J(S) + \frac12 \operatorname{tr}\bigl((W - S)^\top (G + \Lambda)(W - S)\bigr)$.
# That is the exponent of a normal density with mean $S$ and, for each column, covariance
# $\sigma^2 (G + \Lambda)^{-1}$.
# ```
#
# So the ridge is a ratio: with $\Lambda = \lambda I$ and entries of $W$ of variance $\tau^2$, it is
# $\lambda = \sigma^2 / \tau^2$, noise over prior.
# A weight $\gamma_i < 1$ says that a pair is noisier than the newest. To forget is to trust less.
#
# The variance $q^\top P q$ depends on the keys alone. The memory knows how sure it is before it has seen one value.
# Let us check that it is right about this.
# A key is a number $x$ between 0 and 1 as nine overlapping bumps, with no pairs for a stretch of $x$.


# %%
def bumps(x, number=9, width=0.1):
    """A number in [0, 1] as a unit vector."""
    centres = torch.linspace(0, 1, number, dtype=x.dtype, device=x.device)
    return normalize(torch.exp(-(((x.unsqueeze(-1) - centres) / width) ** 2) / 2), dim=-1)


streams, pairs, noise = sizes["belief"]["streams"], 12, 0.2
x = torch.rand(streams, pairs, 1, generator=generator, dtype=torch.float64).to(device)
x = torch.where(x < 0.6, 0.7 * x, 0.8 + 0.5 * (x - 0.6))  # nothing between .42 and .8
truth = randn(streams, 1, 9, 1)  # prior variance 1
k = bumps(x)
v = torch.einsum("sthk,shkv->sthv", k, truth) + noise * randn(streams, pairs, 1, 1)

ridge = torch.full_like(k[0, 0], noise**2)
_, state = ttr.regress(recursive_least_squares, k, k, v, log_decay=0 * x, ridge=ridge)
grid = torch.linspace(0, 1, 101, dtype=torch.float64, device=device)
q = bumps(grid)
mean = q @ state.linear_map()[:, 0]  # (stream, grid, 1)
covariance = torch.linalg.inv(state.curvature[:, 0])  # the ridge is in the curvature, as its prior
sure = noise * (q @ covariance * q).sum(-1).sqrt()  # standard deviation, (stream, grid)
error = (mean - q @ truth[:, 0])[..., 0]

edges = sure.flatten().quantile(torch.linspace(0, 1, 9, dtype=torch.float64, device=device))
inside = one_hot(torch.bucketize(sure, edges[1:-1].contiguous()), 8).double()  # (stream, grid, bin)
count = inside.sum((0, 1))
predicted = torch.einsum("sg,sgb->b", sure.square(), inside) / count
actual = torch.einsum("sg,sgb->b", error.square(), inside) / count
per_stream = torch.einsum("sgb,sgb->sb", error.square()[..., None] - actual, inside)  # one stream's errors are alike
spread = 2 * per_stream.square().sum(0).sqrt() / count
predicted, actual, spread = predicted.cpu(), actual.cpu(), spread.cpu()

# %% tags=["hide-input"] mystnb={"figure": {"caption": "A memory that knows how sure it is. Left: one stream of twelve noisy pairs (dots), the map they come from (dashed), the answer of least squares and twice its predicted standard deviation; where no key has been, the memory says so. Right: the squared error that the memory makes against the variance it predicts, over many streams; bars are twice the standard error. The points lie on the diagonal.", "name": "exact-fig-belief"}, "image": {"alt": "Left, a curve with a band that is narrow where there are dots and wide in the gap between them; the dashed true curve stays within the band. Right, eight points on the diagonal of a doubly logarithmic plot of actual against predicted squared error."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
shown = 3
centre, width = mean[shown, :, 0].cpu(), 2 * sure[shown].cpu()
left.fill_between(grid.cpu(), centre - width, centre + width, color="C0", alpha=0.2, linewidth=0)
left.plot(grid.cpu(), centre, label="answer ± 2 standard deviations")
left.plot(grid.cpu(), (q @ truth[shown, 0])[:, 0].cpu(), "k--", linewidth=1.2, label="the true map")
left.plot(x[shown, :, 0].cpu(), v[shown, :, 0, 0].cpu(), "o", color="C1", label="stored pairs")
left.set(xlabel="x, of which the key is made", ylabel="value")
left.legend(fontsize=9)
right.plot(predicted, predicted, color="0.6", linewidth=1, linestyle="--", label="equal")
right.errorbar(predicted, actual, yerr=spread, fmt="o", label="measured")
right.set(xscale="log", yscale="log", xlabel="variance predicted, σ² qᵀPq", ylabel="squared error made")
right.legend()
plt.show()

# %%
assert ((actual - predicted).abs() < 2 * spread + 0.05 * predicted).all()  # spread is two standard errors
record("exact_belief_ratio", error.square().mean() / sure.square().mean(), rtol=0.05)
record("exact_belief_gap", (sure.amax(1) / sure.amin(1)).median(), rtol=0.02)

# %% [markdown]
# Over all streams and queries the squared error is {glue:text}`exact_belief_ratio:.2f` times the predicted variance.
# Inside one stream the memory is {glue:text}`exact_belief_gap:.1f` times surer at its best than at its worst.
# No layer in the atlas reads this number out. It is there for the asking.
#
# **Bias and variance.** For a fixed $W$ and $\gamma_i = 1$ the same algebra splits the error of $S$ in two:
#
# ```{math}
# :label: exact-eq-bias
# \mathbb E\, S - W = -P \Lambda W, \qquad
# \operatorname{Cov}(S_{\cdot j}) = \sigma^2\, P G P .
# ```
#
# A larger ridge shrinks towards zero and is off by more; a smaller ridge lets in more noise.
# Averaged over $W$, the sum of both is least at $\lambda = \sigma^2/\tau^2$, because the mean of the belief has the
# least expected squared error of all functions of the pairs.
#
# ## Two ridges
#
# In recursive least squares the ridge is the curvature before the first pair, $G_0 = \Lambda$, and decays with
# everything else; where the ridge fades, $G_t$ has it inside from here on. In MesaNet it is added afresh at each
# solve. Without decay this is the same. With decay, the difference shows when nothing arrives for a while.
# If $k_t = 0$, then $G_t = \alpha G_{t-1}$ and $C_t = \alpha C_{t-1}$, and so
#
# ```{math}
# :label: exact-eq-silence
# \begin{aligned}
# \text{fades:} \quad & S_t = (\alpha G_{t-1})^{-1} \alpha\, C_{t-1} = S_{t-1}, \\
# \text{stays:} \quad & S_t = (\alpha G_{t-1} + \Lambda)^{-1} \alpha\, C_{t-1} .
# \end{aligned}
# ```
#
# **Recursive least squares forgets nothing in silence.** Its confidence decays, and its memory does not:
# the next pair will count for more.
# In MesaNet the prior wins in the end, and the memory returns to zero.
#
# The price of a prior that fades is paid in directions where no key ever comes.
# There $P$ grows like $\alpha^{-t}/\lambda$; in adaptive control this is called wind-up.
# A single noisy pair in such a direction is then believed completely.
# We write pairs whose keys use half of the channels, and then stop.

# %%
seeds, written, silent, d, lam, alpha = 16, 64, 64, 16, 0.5, 0.95
k = torch.zeros(seeds, written + silent, 1, d, dtype=torch.float64, device=device)
k[:, :written, :, : d // 2] = normalize(randn(seeds, written, 1, d // 2), dim=-1)
v = normalize(randn(seeds, written + silent, 1, 8), dim=-1)
log_decay, one = torch.full_like(k[..., 0], alpha).log(), torch.ones_like(k[..., 0])
ridge = torch.full_like(k[0, 0], lam)
newest = k[:, written - 1 : written]

memories = {
    "ridge fades (RLS)": (recursive_least_squares, {"ridge": ridge}, 0.0),
    "ridge stays (MesaNet)": (mesa, {"ridge": ridge}, lam),
    "Gated DeltaNet": (ttr.atlas["gated_delta_net"], {"step_size": one}, None),
}
length, variance = {}, {}
for name, (design, inputs, stays) in memories.items():
    q = newest.expand_as(k)  # ask for the newest pair all the time
    y, _ = ttr.regress(design, q, k, v, log_decay=log_decay, **inputs)
    length[name] = (y[:, written - 1 :].norm(dim=-1) / y[:, written - 1 : written].norm(dim=-1))[..., 0].cpu()
    if stays is None:
        continue
    state, curves = None, []
    for t in range(written + silent):  # token by token, to see the curvature
        now = slice(t, t + 1)
        _, state = ttr.regress(
            design, q[:, now], k[:, now], v[:, now], log_decay=log_decay[:, now], state=state, **inputs
        )
        P = torch.linalg.inv(state.curvature[:, 0] + stays * eye(d))
        curves.append(torch.stack([dot(newest[:, 0] @ P, newest[:, 0])[:, 0, 0], P[:, -1, -1]]))
    variance[name] = torch.stack(curves, dim=-1).cpu()  # (seen or unseen, seed, time)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Two meanings of the ridge, with half of the channels used by keys, and then silence. Left: length of the answer to the newest pair, during the silence. Recursive least squares keeps its memory, MesaNet goes back to zero slowly at first, and gated DeltaNet decays with its factor. Right: variance of the belief at the newest key and along a channel that no key has used; silence begins at the dotted line. A prior that fades winds up without bound; one that stays bounds the doubt. Lines are means over streams, bands run from the least to the greatest.", "name": "exact-fig-ridges"}, "image": {"alt": "Left, three curves against tokens of silence: constant, falling slowly and then faster, falling exponentially. Right, variances on a logarithmic axis: for a fading ridge the unseen channel is a rising straight line from the start and the seen one is low and then rises as steeply; for a staying ridge the unseen channel is constant and the seen one rises towards it."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
for (name, answers), style in zip(length.items(), ("-", "--", ":"), strict=True):
    (line,) = left.plot(answers.mean(0), style, label=name)
    left.fill_between(
        range(silent + 1), answers.amin(0), answers.amax(0), color=line.get_color(), alpha=0.2, linewidth=0
    )
left.set(xlabel="tokens of silence", ylabel="length of the answer, relative", ylim=(0, 1.15))
left.legend(fontsize=9)
for (name, curves), color in zip(variance.items(), ("C0", "C1"), strict=True):
    for curve, style, where in zip(curves, ("-", "--"), ("newest key", "unseen channel"), strict=True):
        time = range(1, written + silent + 1)
        right.plot(time, curve.mean(0), style, color=color, label=f"{name.split(' (')[0]}, {where}")
        right.fill_between(time, curve.amin(0), curve.amax(0), color=color, alpha=0.15, linewidth=0)
right.axvline(written, color="0.5", linewidth=1, linestyle=":")
right.set(xlabel="tokens", ylabel="variance of the belief, kᵀPk", yscale="log")
right.legend(fontsize=8)
plt.show()

# %%
fades, stays = variance
after = torch.arange(silent + 1).double()
assert_close(length["ridge fades (RLS)"], torch.ones_like(length["ridge fades (RLS)"]))
assert_close(length["Gated DeltaNet"], (alpha**after).expand(seeds, -1))
assert (length["ridge stays (MesaNet)"].diff(dim=1) < 0).all()
assert (length["ridge stays (MesaNet)"] > alpha**after - 1e-12).all()

time = torch.arange(1, written + silent + 1).double()
assert_close(variance[fades][1], (alpha**-time / lam).expand(seeds, -1))
assert (variance[stays] < 1 / lam + 1e-12).all()
trust = {name: curves[1, 0, -1] / (1 + curves[1, 0, -1]) for name, curves in variance.items()}  # kᵀg of a new pair
record("exact_trust_fades", trust[fades], rtol=1e-4)
record("exact_trust_stays", trust[stays], rtol=1e-4)
record("exact_silence_stays", length["ridge stays (MesaNet)"][:, -1].mean(), rtol=0.01)

# %% [markdown]
# At the end of the silence a new pair along the unseen channel would be taken over with the factor
# {glue:text}`exact_trust_fades:.3f` where the ridge fades, noise and all, and with
# {glue:text}`exact_trust_stays:.3f` where it stays.
# MesaNet still answers with {glue:text}`exact_silence_stays:.2f` of the length it began with: while the data outweigh
# the prior, it fades more slowly than the decay.
#
# The ridge that fades is a prior that the data outgrow. The one that stays is a leak.
#
# ## The first way: a recursion
#
# To solve anew at every token costs $K^3$ operations each. But a token changes $G$ by a matrix of rank one, and then
# the inverse changes by rank one too {cite:p}`plackett1950some`.
# The algebra is worth doing once, since it turns least squares into the delta rule.
#
# ```{prf:theorem} Recursive least squares
# :label: exact-thm-recursive
# Let the ridge fade, $P_0 = \Lambda^{-1}$, $S_0 = 0$, $\bar P = P_{t-1} / \alpha_t$, and $w_t = 1$. Then
#
# $$
# g_t = \frac{\bar P k_t}{1 + k_t^\top \bar P k_t}, \qquad
# S_t = S_{t-1} + g_t\, (v_t - S_{t-1}^\top k_t)^\top, \qquad
# P_t = \bar P - g_t k_t^\top \bar P ,
# $$
#
# $S_t$ minimises {eq}`exact-eq-objective`, $P_t$ is the inverse of its curvature, and $g_t = P_t k_t$.
# ```
#
# ```{prf:proof}
# The curvature with its prior is $P_t^{-1} = \bar P^{-1} + k_t k_t^\top$.
# Multiply it with the claimed $P_t$, and write $s = k_t^\top \bar P k_t$:
#
# $$
# (\bar P^{-1} + k_t k_t^\top)\Bigl(\bar P - \frac{\bar P k_t k_t^\top \bar P}{1 + s}\Bigr)
# = I + k_t k_t^\top \bar P \Bigl(1 - \frac{1}{1 + s} - \frac{s}{1 + s}\Bigr) = I .
# $$
#
# Next, $P_t k_t = \bar P k_t (1 - s/(1+s)) = g_t$.
# Last, $C_t = \alpha_t C_{t-1} + k_t v_t^\top$ and $\alpha_t C_{t-1} = \bar P^{-1} S_{t-1} = (P_t^{-1} - k_t k_t^\top) S_{t-1}$,
# so $P_t C_t = S_{t-1} - g_t k_t^\top S_{t-1} + g_t v_t^\top$.
# ```
#
# Compare {eq}`delta-eq-gain`: it is a correction along a gain, and the gain is the newest key, multiplied by the
# inverse curvature of all keys so far. Note what is missing: $S_{t-1}$ does not decay. The decay is inside the gain.
# In ten lines, for one head:


# %%
def recursive(q, k, v, log_decay, ridge):
    """q and k (time, key), v (time, value), log_decay (time,), ridge (key,) → (time, value)"""
    P, S, outputs = torch.diag(1 / ridge), k.new_zeros(k.shape[1], v.shape[1]), []
    for t in range(len(k)):
        P = P / log_decay[t].exp()
        gain = P @ k[t] / (1 + k[t] @ P @ k[t])
        S = S + torch.outer(gain, v[t] - k[t] @ S)
        P = P - torch.outer(gain, k[t] @ P)
        outputs.append(q[t] @ S)
    return torch.stack(outputs)


# %%
q, k = (normalize(randn(1, 100, 1, 12), dim=-1) for _ in range(2))
v, log_decay = randn(1, 100, 1, 7), -randn(1, 100, 1).square() / 20
ridge = 0.1 + randn(1, 12).square()
one_head = [z[0, :, 0] for z in (q, k, v, log_decay)]

y, _ = ttr.regress(recursive_least_squares, q, k, v, log_decay=log_decay, ridge=ridge)
defined, _ = ttr.oracle.regress(recursive_least_squares, q, k, v, log_decay=log_decay, ridge=ridge)
assert_close(y, defined, rtol=0, atol=1e-10)
assert_close(recursive(*one_head, ridge[0]), defined[0, :, 0], rtol=0, atol=1e-10)

gain, _ = ttr.ops.gains.recursive_least_squares(k, ridge, log_decay)
corrected, _ = ttr.ops.delta_rule(q, k, v, gain)  # no decay: it is in the gain
assert_close(corrected, defined, rtol=0, atol=1e-10)

# %% [markdown]
# This costs $O(K^2 + KV)$ operations a token, the delta rule $O(KV)$. It has two flaws.
# It is serial. And it subtracts from $P$ for ever while dividing it by $\alpha$, which rounding does not survive:
# an exercise shows it.
#
# ## The second way: a chunk at a time
#
# In {doc}`/notebooks/04_delta_rule` a chunk of corrections became one triangular system.
# The same can be done here, although each gain depends on all keys before it.
#
# **Step 1: divide the decay out.** Let $c_t$ be the sum of the log-decays since the start of the chunk.
# The minimiser does not care about a common factor of $G_t$ and $C_t$, so we may use $e^{-c_t} G_t$ and
# $e^{-c_t} C_t$, which only grow. With
#
# ```{math}
# :label: exact-eq-undecayed
# \begin{aligned}
# \tilde k_j &= \sqrt{w_j}\, e^{-c_j / 2}\, k_j, & e^{-c_t} G_t &= G_0 + \sum_{j \le t} \tilde k_j \tilde k_j^\top, \\
# \tilde v_j &= \sqrt{w_j}\, e^{-c_j/2}\, v_j, & e^{-c_t} C_t &= C_0 + \sum_{j \le t} \tilde k_j \tilde v_j^\top ,
# \end{aligned}
# ```
#
# where the index 0 is the chunk's start. From here on there is no decay.
# $P_0 = G_0^{-1}$ is the belief and $S_0 = P_0 C_0$ the memory with which the chunk begins.
#
# **Step 2: look at one token.** Let $\tilde K_t$ and $\tilde V_t$ have the first $t$ rows.
# All $t$ corrections together are one correction of rank $t$, by the matrix inversion lemma
# {cite:p}`hager1989updating`:
#
# ```{math}
# :label: exact-eq-push
# S_t = S_0 + P_0 \tilde K_t^\top \bigl(I + \tilde K_t P_0 \tilde K_t^\top\bigr)^{-1} (\tilde V_t - \tilde K_t S_0) .
# ```
#
# **Step 3: one factor serves all tokens.** The matrix in brackets is the leading $t \times t$ block of the one for
# the whole chunk. The Cholesky factor of a leading block is the leading block of the factor.
#
# ```{prf:theorem} The exact chunk form
# :label: exact-thm-chunk
# Let $\tilde K$, $\tilde V$, $Q$ have the $C$ rows of a chunk. With (in this section $W$ is a matrix of gains)
#
# $$
# I + \tilde K P_0 \tilde K^\top = L L^\top, \qquad
# E = L^{-1} (\tilde V - \tilde K S_0), \qquad
# W = L^{-1} \tilde K P_0
# $$
#
# the memory after $t$ tokens of the chunk is $S_t = S_0 + \sum_{j \le t} W_j^\top E_j$, with $W_j$ and $E_j$ the
# rows, and all answers of the chunk are
#
# $$
# Y = Q S_0 + \operatorname{tril}(Q W^\top)\, E .
# $$
# ```
#
# ```{prf:proof}
# First {eq}`exact-eq-push`. Write $N = \tilde K_t$ and $R = I + N P_0 N^\top$. From
# $(G_0 + N^\top N)\, P_0 N^\top = N^\top (I + N P_0 N^\top) = N^\top R$ follows
# $P_0 N^\top R^{-1} = (G_0 + N^\top N)^{-1} N^\top$, so the right-hand side is
# $S_0 + (G_0 + N^\top N)^{-1} N^\top (\tilde V_t - N S_0)
# = (G_0 + N^\top N)^{-1} (G_0 S_0 + N^\top \tilde V_t)$, and $G_0 S_0 = C_0$. That is $S_t$.
#
# Since $L$ is lower triangular, the leading block of $L L^\top$ is $L_t L_t^\top$ with the leading block $L_t$ of $L$,
# and the leading block of $L^{-1}$ is $L_t^{-1}$. So the first $t$ rows of $E$ and $W$ are
# $E_{\le t} = L_t^{-1} (\tilde V_t - \tilde K_t S_0)$ and $W_{\le t} = L_t^{-1} \tilde K_t P_0$, and
# {eq}`exact-eq-push` reads $S_t = S_0 + W_{\le t}^\top E_{\le t}$.
# Row $t$ of $Y$ is $q_t^\top S_t = q_t^\top S_0 + \sum_{j \le t} (q_t^\top W_j^\top) E_j$: the lower triangle, with its
# diagonal, of $Q W^\top$ times $E$.
# ```
#
# **Step 4: go on.** The next chunk begins with $e^{c_C} (G_0 + \tilde K^\top \tilde K)$ and
# $e^{c_C} (C_0 + \tilde K^\top \tilde V)$. These sums need no solve. So all chunks get their beginnings from one
# scan, and then factorise in parallel.


# %%
def chunkwise(q, k, v, log_decay, ridge, chunk=16):
    """The same for one head, one factorisation a chunk."""
    G, C, outputs = ridge.diag(), k.new_zeros(k.shape[1], v.shape[1]), []
    chunks = (z.split(chunk) for z in (q, k, v, log_decay))
    for Q, K, V, log_alpha in zip(*chunks, strict=True):
        c = log_alpha.cumsum(0)[:, None]
        K, V = (-c / 2).exp() * K, (-c / 2).exp() * V
        P = torch.linalg.inv(G)
        L = torch.linalg.cholesky(eye(len(K)) + K @ P @ K.T)
        E = torch.linalg.solve_triangular(L, V - K @ P @ C, upper=False)
        W = torch.linalg.solve_triangular(L, K @ P, upper=False)
        outputs.append(Q @ P @ C + (Q @ W.T).tril() @ E)
        G, C = c[-1].exp() * (G + K.T @ K), c[-1].exp() * (C + K.T @ V)
    return torch.cat(outputs)


# %%
for chunk in (1, 7, 16, 100):
    y = chunkwise(*one_head, ridge[0], chunk)
    assert_close(y, defined[0, :, 0], rtol=0, atol=1e-10)

# %% [markdown]
# Side by side with the delta rule {eq}`delta-eq-chunk`, without decay:
#
# | | delta rule | least squares |
# |---|---|---|
# | state at the start | $S$ | $S_0$ and $P_0$ |
# | overlap within the chunk | $A = \operatorname{tril}(K G^\top, -1)$ | $I + K P_0 K^\top = L L^\top$ |
# | one solve for the errors | $(I + A)\, U = V - K S$ | $L E = V - K S_0$ |
# | along which they are written | gains $G$, given | $W = L^{-1} K P_0$, found |
# | answers | $Q S + \operatorname{tril}(Q G^\top)\, U$ | $Q S_0 + \operatorname{tril}(Q W^\top)\, E$ |
# | memory at the end | $S + G^\top U$ | $S_0 + W^\top E$ |
#
# The shape is the same, and there is more to it than shape.
# Recursive least squares *is* a delta rule with the gains $g_t = P_t k_t$, so its triangle $I + A$ must be hidden in
# $L$. It is $L$ with its columns divided by the diagonal. With $\Delta$ for the diagonal of $L$:
#
# ```{math}
# :label: exact-eq-ldl
# L = (I + A)\, \Delta, \qquad E = \Delta^{-1} U, \qquad W = \Delta\, G, \qquad
# \Delta_{tt}^2 = 1 + k_t^\top P_{t-1} k_t .
# ```
#
# $\Delta_{tt}^2 \sigma^2$ is the variance that the belief after $t - 1$ pairs predicts for $v_t$, noise included.
# So the factorisation finds every gain of the chunk, and every surprise measured in units of what was expected.

# %%
K, P = k[0, :24, 0], torch.diag(1 / ridge[0])
L = torch.linalg.cholesky(eye(24) + K @ P @ K.T)
gain, _ = ttr.ops.gains.recursive_least_squares(k[:, :24], ridge)
G, scale_of = gain[0, :, 0], L.diagonal()
assert_close(L / scale_of, eye(24) + (K @ G.T).tril(-1))
assert_close(torch.linalg.solve_triangular(L, K @ P, upper=False), scale_of[:, None] * G)
for t in (0, 10, 23):
    before = torch.linalg.inv(torch.diag(ridge[0]) + K[:t].T @ K[:t])
    assert_close(scale_of[t] ** 2, 1 + K[t] @ before @ K[t])

# %% [markdown]
# The ten lines have one weakness: $e^{-c_t/2}$ overflows where a chunk forgets nearly everything.
# The op of the package measures what cancels, cuts such chunks in halves, and solves token by token in the end.
# It factorises the same matrix, but applies its factor to the queries and leaves the values to linear attention, which is
# handier for gradients.

# %%
strong = log_decay.clone()
strong[:, 50] = -1000.0  # forget everything, in the middle of a chunk
y, _ = ttr.regress(recursive_least_squares, q, k, v, log_decay=strong, ridge=ridge)
fresh = {"log_decay": strong[:, 50:], "ridge": torch.full_like(ridge, 1e-12)}
begun, _ = ttr.oracle.regress(recursive_least_squares, q[:, 50:], k[:, 50:], v[:, 50:], **fresh)
assert_close(y[:, 70:], begun[:, 20:], rtol=0, atol=1e-6)  # once keys span the space again

# %% [markdown]
# ## The third way: conjugate gradients
#
# A ridge that stays breaks step 1. Divide the decay out, and the ridge becomes $e^{-c_t} \Lambda$: it changes at
# every token, in all directions. No factorisation serves two tokens.
# MesaNet {cite:p}`vonoswald2025mesanet` solves $(G_t + \Lambda)\, x_t = q_t$ iteratively. Its answer is
# $C_t^\top x_t$.
#
# Conjugate gradients {cite:p}`hestenes1952methods` need no matrix, only products with it. And these we can do:
#
# ```{math}
# :label: exact-eq-matvec
# (G_t + \Lambda)\, x_t = \sum_{i \le t} \gamma_i^{(t)} (x_t^\top k_i)\, k_i + \Lambda x_t
# ```
#
# is linear attention with queries $x_t$, and with the keys in the place of the values.
# One step of the solver costs one linear attention, and all tokens take it at the same time.


# %%
def conjugate_gradients(multiply, right, steps):
    """All iterates x_0, …, x_steps of M x = right, one system a row."""
    x, residual, direction = torch.zeros_like(right), right, right
    energy, iterates, tiny = dot(right, right), [x], torch.finfo(right.dtype).tiny
    for _ in range(steps):
        image = multiply(direction)
        length = energy / dot(direction, image).clamp_min(tiny)
        x, residual = x + length * direction, residual - length * image
        before, energy = energy.clamp_min(tiny), dot(residual, residual)
        direction = residual + energy / before * direction
        iterates.append(x)
    return torch.stack(iterates)


def mesa_in_parallel(q, k, v, log_decay, ridge, steps):
    """For one head, the whole sequence as one chunk."""
    c = log_decay.cumsum(0)[:, None]
    weights = (c - c.T).tril().exp().tril()

    def multiply(x):
        return (x @ k.T * weights) @ k + ridge * x

    x = conjugate_gradients(multiply, q, steps)[-1]
    return (x @ k.T * weights) @ v


# %%
y, _ = ttr.regress(mesa, q, k, v, log_decay=log_decay, ridge=ridge)
defined_mesa, _ = ttr.oracle.regress(mesa, q, k, v, log_decay=log_decay, ridge=ridge)
assert_close(y, defined_mesa, rtol=0, atol=1e-10)
assert_close(mesa_in_parallel(*one_head, ridge[0], 40), defined_mesa[0, :, 0], rtol=0, atol=1e-10)
assert (defined_mesa - defined).norm() > 0.05 * defined.norm()  # the two ridges are different memories

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ttr.ops.least_squares(q, k, v, ridge, log_decay, ridge_decays=False, steps=3)
print(caught[0].message)  # too few steps do not pass in silence

# %% [markdown]
# ### How many steps?
#
# After $k$ steps the iterate $x_k$ lies in the space spanned by $q, Mq, \dots, M^{k-1} q$, for $M = G + \Lambda$.
# Conjugate gradients find the best point there, measured by $\lVert e\rVert_M^2 = e^\top M e$.
#
# ```{prf:theorem} Error of conjugate gradients
# :label: exact-thm-cg
# Let $M$ be positive definite with eigenvalues $\mu_1 \ge \dots \ge \mu_d$, let $M x^* = q$ and $x_0 = 0$. For every
# $j < d$ with $\kappa_j = \mu_{j+1} / \mu_d$, and $k \ge j$,
#
# $$
# \frac{\lVert x_k - x^* \rVert_M}{\lVert x^* \rVert_M}
#   \le 2 \left(\frac{\sqrt{\kappa_j} - 1}{\sqrt{\kappa_j} + 1}\right)^{k - j} .
# $$
# ```
#
# ```{prf:proof}
# A point of that space is $x = r(M)\, q = r(M) M x^*$ with a polynomial $r$ of degree below $k$, so
# $x^* - x = p(M)\, x^*$ with $p(\mu) = 1 - \mu\, r(\mu)$: any polynomial of degree at most $k$ with $p(0) = 1$.
# In the eigenbasis of $M$ this gives
# $\lVert x_k - x^*\rVert_M \le \max_i |p(\mu_i)| \cdot \lVert x^* \rVert_M$ for each such $p$.
#
# Take $p(\mu) = \prod_{i \le j} (1 - \mu/\mu_i) \cdot \hat p(\mu)$. It vanishes at the $j$ largest eigenvalues, and
# at the others each factor of the product is in $[0, 1]$. So the maximum is at most that of $|\hat p|$ on
# $[\mu_d, \mu_{j+1}]$.
# For $\hat p$ take the Chebyshev polynomial $T_m$ of degree $m = k - j$, moved to this interval and scaled to
# $\hat p(0) = 1$. It is at most $1 / T_m\bigl(\frac{\kappa_j + 1}{\kappa_j - 1}\bigr)$ there.
# With $z = \frac{\sqrt{\kappa_j} + 1}{\sqrt{\kappa_j} - 1}$ the argument is $\frac12 (z + z^{-1})$, at which
# $T_m = \frac12 (z^m + z^{-m}) \ge \frac12 z^m$. (For $\kappa_j = 1$ take $\hat p(\mu) = (1 - \mu/\mu_d)^m$.)
# ```
#
# The case $j = 0$ is the textbook's, with $\kappa = \mu_1 / \mu_d$.
# For unit keys all eigenvalues are between $\lambda$ and $\lambda + n$, so $\kappa \le 1 + n / \lambda$: **the ridge
# buys steps**.
# The other cases matter here. Keys with a common direction make one eigenvalue huge, and a huge eigenvalue costs one
# step.
#
# The answer inherits the bound. Where $C = K^\top V$ and $G = K^\top K$, the norm of $M^{-1/2} K^\top$ is at most one,
# so $\lVert C^\top e\rVert \le \lVert V \rVert_2\, \lVert e \rVert_M$.


# %%
def correlated_keys(rho, *shape):
    """Unit keys, about rho of whose squared length is along a common direction: (seeds, pairs, key)."""
    seeds, _, size = shape
    common, own = normalize(randn(seeds, 1, size), dim=-1), normalize(randn(*shape), dim=-1)
    return normalize(rho**0.5 * common + (1 - rho) ** 0.5 * own, dim=-1)


def without_rounding(M, right, steps):
    """The best point of each space, from a basis made orthogonal with care: (seeds, keys, key) a step."""
    basis, iterates, new = [], [torch.zeros_like(right)], right
    for _ in range(steps):
        for old in 2 * basis:
            new = new - dot(old, new) * old
        basis.append(normalize(new, dim=-1))
        new, B = basis[-1] @ M, torch.stack(basis, dim=-2)
        projected = torch.linalg.solve(B @ M[:, None] @ B.mT, B @ right[..., None])
        iterates.append((projected.mT @ B)[..., 0, :])
    return torch.stack(iterates)


def solver_errors(rho, lam, steps, seeds, pairs, key):
    """Relative errors ‖x_k − x*‖_M of recalling all pairs, as computed and without rounding, and two bounds."""
    K = correlated_keys(rho, seeds, pairs, key)
    M = K.mT @ K + lam * eye(key)
    exact = torch.linalg.solve(M, K.mT).mT
    size = dot(exact @ M, exact).sqrt()
    x = {"computed": conjugate_gradients(lambda x: x @ M, K, steps), "ideal": without_rounding(M, K, steps)}
    error = {name: (dot((z - exact) @ M, z - exact).sqrt() / size)[..., 0] for name, z in x.items()}

    spectrum = torch.linalg.eigvalsh(M)
    bound = {}
    for j in (0, 1):
        root = (spectrum[:, -1 - j] / spectrum[:, 0]).sqrt()
        power = torch.arange(steps + 1, device=device).sub(j).clamp_min(0)[:, None]
        bound[j] = 2 * ((root - 1) / (root + 1)) ** power
        assert (error["ideal"].amax(-1) <= bound[j] + 1e-10).all()  # every query of every seed
    assert (error["computed"].amax(-1) <= bound[0] + 1e-10).all()

    values = normalize(randn(seeds, pairs, key), dim=-1)
    answer = ((x["computed"] - exact) @ K.mT @ values).norm(dim=-1)
    largest = torch.linalg.matrix_norm(values, 2)[:, None]
    assert (answer <= largest * error["computed"] * size[..., 0] * (1 + 1e-9) + 1e-12).all()
    return *(z.square().mean(-1).sqrt().cpu() for z in error.values()), torch.stack(list(bound.values())).cpu()


shape = sizes["steps"]["seeds"], sizes["steps"]["pairs"], sizes["steps"]["key"]
by_correlation = {rho: solver_errors(rho, 0.25, 24, *shape) for rho in (0.0, 0.5, 0.95)}
by_ridge = {lam: solver_errors(0.5, lam, 24, *shape) for lam in (1.0, 0.1, 0.01, 0.001)}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Conjugate gradients: error of the solution in the norm of the theorem, root mean square over all stored keys as queries, against the number of steps; lines are medians over seeds, bands run from the least to the greatest. Left: a common direction in the keys makes the condition number worse and the solver faster. For the most correlated keys the textbook's bound (grey, dotted) sees the one large eigenvalue and the bound with $j = 1$ (grey, dashed) steps over it. With rounding (the coloured curve) it comes back and costs a step again; the thin black curve is without. All end at the precision of float64. Right: with a small ridge more steps are needed.", "name": "exact-fig-steps"}, "image": {"alt": "Two plots of relative error on a logarithmic axis against solver steps. Left, three curves fall in nearly straight lines, the steepest for the most correlated keys; which has two flat stretches that a thin black curve beside it has not; of two grey bounds one is almost flat and one falls steeply. Right, four curves for four ridges, the smaller the ridge the flatter the curve."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
styles = ("-", "--", "-.", ":")
for axes, curves, symbol in ((left, by_correlation, "ρ"), (right, by_ridge, "λ")):
    for (number, (errors, *_)), style in zip(curves.items(), styles, strict=False):
        (line,) = axes.plot(errors.median(1).values, style, label=f"{symbol} = {number:g}")
        axes.fill_between(range(25), errors.amin(1), errors.amax(1), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="steps of conjugate gradients", yscale="log")
_, ideal, bounds = by_correlation[0.95]
left.plot(ideal.median(1).values, color="k", linewidth=0.8, label="ρ = 0.95 without rounding")
for bound, style in zip(bounds.median(-1).values, (":", "--"), strict=True):
    left.plot(bound, color="0.5", linestyle=style, linewidth=1.2)
left.set(ylabel="relative error, ‖x − x*‖ in the norm of M", title="λ = 0.25", ylim=(1e-19, 10))
right.set(title="ρ = 0.5", ylim=(1e-9, 4))
left.legend(fontsize=9, loc="lower left")
right.legend(fontsize=9, loc="lower left")
plt.show()

# %%
middle = by_correlation[0.5][0]
for step in (5, 10, 20):
    record(f"exact_steps_{step}_digits", -middle[step].median().log10(), atol=0.1)
    assert middle[step].max() < {5: 0.1, 10: 3e-3, 20: 3e-6}[step]
at_ten = [errors[10].median() for errors, *_ in by_correlation.values()]
assert at_ten[0] > at_ten[1] > at_ten[2]  # the more alike the keys, the faster
at_ten = [errors[10] for errors, *_ in by_ridge.values()]
assert all((more < less).all() for more, less in pairwise(at_ten))  # in every seed

computed, ideal, _ = by_correlation[0.95]
assert (computed[:4] < 1.01 * ideal[:4]).all()  # the same at first
steps_to = {
    name: (errors.median(1).values > 1e-12).sum() for name, errors in (("computed", computed), ("ideal", ideal))
}
assert steps_to["computed"] > steps_to["ideal"]
record("exact_steps_computed", steps_to["computed"], atol=1)
record("exact_steps_ideal", steps_to["ideal"], atol=1)

# %% [markdown]
# At $\rho = \frac12$ and $\lambda = \frac14$ five steps give {glue:text}`exact_steps_5_digits:.1f` decimal digits, ten
# give {glue:text}`exact_steps_10_digits:.1f` and twenty {glue:text}`exact_steps_20_digits:.1f`.
# These steps are taken at every token of every sequence, also when the trained model is used.
# {cite:t}`vonoswald2025mesanet` call that test-time compute, and it can be chosen after training.
#
# The flat stretches in the figure are rounding. The theorem is about exact arithmetic, where a direction that has
# been dealt with never returns. On a computer the largest eigenvalue does, and costs its step again
# {cite:p}`greenbaum1989behavior`: {glue:text}`exact_steps_computed` steps to twelve digits at the highest correlation,
# where {glue:text}`exact_steps_ideal` would do.
#
# ### The gradient of a solve is a solve
#
# How does one train through an iteration? Autograd could unroll it, and store every step.
# There is no need to. Let $x = M^{-1} q$, and let the loss see $x$ through its gradient $\bar x$.
# Differentiate $M x = q$ on both sides: $\mathrm dM\, x + M\, \mathrm dx = \mathrm dq$. So
#
# ```{math}
# :label: exact-eq-implicit
# \bar x^\top \mathrm dx = \bar x^\top M^{-1} (\mathrm dq - \mathrm dM\, x) = z^\top \mathrm dq - z^\top\, \mathrm dM\, x,
# \qquad M^\top z = \bar x .
# ```
#
# The gradient with respect to $q$ is $z$, and that with respect to $M$ is $-z x^\top$.
# To go backward is one more solve with the same matrix, by the same solver {cite:p}`giles2008collected`.
# For all tokens at once, $-\sum_t z_t^\top (G_t + \Lambda)\, x_t$ with $x$ and $z$ held constant is linear attention
# again, and its gradient gives those of keys, decays and ridge.


# %%
class Solve(torch.autograd.Function):
    """x = M⁻¹q for symmetric M, one q a row, by as many steps as M has rows."""

    @staticmethod
    def forward(ctx, M, q):
        x = conjugate_gradients(lambda x: x @ M, q, len(M))[-1]
        ctx.save_for_backward(M, x)
        return x

    @staticmethod
    def backward(ctx, x_gradient):
        M, x = ctx.saved_tensors
        z = conjugate_gradients(lambda x: x @ M, x_gradient, len(M))[-1]
        return -(z.T @ x + x.T @ z) / 2, z  # M is symmetric, and so is its gradient


def answer(solve, k, q, v):
    return solve(k.T @ k + eye(k.shape[1]) / 4, q) @ (k.T @ v)


def unrolled(steps):
    return lambda M, q: conjugate_gradients(lambda x: x @ M, q, steps)[-1]


tiny_case = [z.requires_grad_() for z in (normalize(randn(6, 8), dim=-1), randn(3, 8), randn(6, 2))]
assert torch.autograd.gradcheck(lambda *z: answer(Solve.apply, *z), tiny_case)
weight = randn(3, 2)


def gradient(solve):
    return torch.cat([g.flatten() for g in torch.autograd.grad((weight * answer(solve, *tiny_case)).sum(), tiny_case)])


implicit = gradient(Solve.apply)
gaps = {steps: (gradient(unrolled(steps)) - implicit).norm() / implicit.norm() for steps in (2, 4, 8)}
assert gaps[2] > gaps[4] > gaps[8]
assert gaps[8] < 1e-6


def stored(solve):
    """How many numbers autograd keeps for the backward pass."""
    counts = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: counts.append(z.numel()) or z, lambda z: z):
        answer(solve, *tiny_case)
    return sum(counts)


assert stored(unrolled(8)) > 2 * stored(unrolled(2))  # grows with the steps
assert stored(unrolled(8)) > 3 * stored(Solve.apply)
record("exact_gradient_gap", gaps[2], rtol=0.01)
record("exact_gradient_unrolled", stored(unrolled(8)), rtol=0.3)
record("exact_gradient_implicit", stored(Solve.apply), rtol=0.3)

# %% [markdown]
# In this tiny case autograd keeps {glue:text}`exact_gradient_unrolled` numbers for eight unrolled steps and
# {glue:text}`exact_gradient_implicit` for the implicit solve.
# The two gradients agree when the solver has converged. They do not before: after two steps they differ by
# {glue:text}`exact_gradient_gap:.2f` of their length.
# The implicit one is the gradient of the exact answer; the unrolled one is that of the answer actually given.
# A solver that is stopped very early has to be trained unrolled, or as what it then is.
#
# ## From linear attention to least squares, step by step
#
# What is a solver that is stopped early? Start from nothing and take one step. The first direction is $q$ itself, and
#
# ```{math}
# :label: exact-eq-first-step
# x_1 = \frac{q^\top q}{q^\top (G + \Lambda)\, q}\; q, \qquad y = C^\top x_1 .
# ```
#
# **One step is linear attention**, with the length for each query that is best in the norm of the theorem. None is
# silence, all of them are least squares. The number of steps is a dial.

# %%
one_step = mesa_in_parallel(*one_head, ridge[0], 1)
summed, _ = ttr.regress(ttr.Design(ttr.Decay()), q, k, v, log_decay=log_decay)
length = dot(one_step, summed[0, :, 0]) / dot(summed[0, :, 0], summed[0, :, 0])
assert_close(one_step, length * summed[0, :, 0])
assert (length > 0).all()

# %% [markdown]
# We store $n$ random pairs and ask for all of them, for every $n$ and every number of steps.
# Beside it, what four memories hold of a stream as it grows: one that sums, one that corrects, and two exact ones, of
# the key and of all products of two channels.

# %%
d, seeds, most = sizes["surface"]["key"], sizes["surface"]["seeds"], 3 * sizes["surface"]["key"] // 2
counts = [round(d * 2 ** (power / 4)) for power in range(-12, 9)]
surface = torch.zeros(seeds, most + 1, len(counts), dtype=torch.float64)
for column, n in enumerate(counts):
    K, V = (normalize(randn(seeds, n, d), dim=-1) for _ in range(2))
    M = K.mT @ K + 1e-3 * eye(d)
    answers = conjugate_gradients(lambda x, M=M: x @ M, K, most) @ (K.mT @ V)
    surface[:, :, column] = (answers - V).square().sum(-1).mean(-1).mT.cpu()
enough = (surface > surface[:, -1:] + 0.01).double().sum(1)  # steps to come within .01 of the exact error

# %%
key, draws = sizes["cliff"]["key"], sizes["cliff"]["seeds"]
products = ttr.Quadratic()
features = products.size(key)
reached = sorted({round(key * 2 ** (power / 2)) for power in range(-4, 10)} | {features - 8, features, features + 8})
k, v = (normalize(randn(draws, reached[-1], 1, key), dim=-1) for _ in range(2))
small = {"ridge": k.new_full((1, key), 1e-9)}
contenders = {
    "linear attention": (ttr.atlas["linear_attention"], {}, ttr.Identity()),
    "delta rule": (ttr.atlas["delta_net"], {"step_size": torch.ones_like(k[..., 0])}, ttr.Identity()),
    "least squares": (exact, small, ttr.Identity()),
    "least squares of products": (
        ttr.Design(regressor=ttr.Linear(products), optimizer=ttr.Exact()),
        {"ridge": k.new_full((1, features), 1e-9)},
        products,
    ),
}
held = {}
for name, (design, inputs, feature_map) in contenders.items():
    state, last, errors = None, 0, []
    for n in reached:  # one pass over the stream: the state is handed on
        new = slice(last, n)
        now = {label: x[:, new] if label == "step_size" else x for label, x in inputs.items()}
        _, state = ttr.regress(design, k[:, new], k[:, new], v[:, new], state=state, **now)
        answers = torch.einsum("sthk,shkv->sthv", feature_map(k[:, :n]), state.linear_map())
        errors.append((answers - v[:, :n]).square().sum(-1).mean((1, 2)))
        last = n
    held[name] = torch.stack(errors, dim=1).cpu()

# %% tags=["hide-input"] mystnb={"figure": {"caption": "What exactness buys. Left: squared error of recalling all of $n$ pairs after a number of conjugate-gradient steps, with ridge $10^{-3}$; the bottom row is silence, the next one linear attention at its best length, the top least squares. The white line, with a band for the middle four fifths of the seeds, is where the error is as good as the exact one: the solver works hardest at the cliff. Right: the cliff, for keys of $d$ channels and for their $d(d+1)/2$ products; lines are means over seeds, bands the least and the greatest, dashed black curves are $1 - p/n$ with $p$ the number of features. Linear attention and the delta rule err from the start; least squares is exact up to one pair a feature.", "name": "exact-fig-cliff"}, "image": {"alt": "Left, a heat map of recall error over the number of pairs and solver steps: dark, small errors fill the upper left, light ones the right beyond n equals d; a white curve rises from the left to a peak at n equals d and falls again. Right, four curves against the number of pairs: two rise from the start, two stay at zero up to d and up to d times d plus one over two, and then rise along dashed curves."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2))
share, colours = torch.tensor(counts) / d, {"cmap": "cividis", "vmin": 0, "vmax": 1}
image = left.pcolormesh(share, range(most + 1), surface.mean(0), shading="nearest", rasterized=True, **colours)
figure.colorbar(image, ax=left, label="squared error of recall")
low, high = enough.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0)
left.fill_between(share, low, high, color="white", alpha=0.3, linewidth=0)
left.plot(share, enough.mean(0), color="white")
left.set(xscale="log", xlabel="pairs stored, n / d", ylabel="steps of conjugate gradients")
left.set_xticks((1 / 8, 1 / 4, 1 / 2, 1, 2, 4), ("1/8", "1/4", "1/2", "1", "2", "4"))
for (name, errors), style in zip(held.items(), (":", "-.", "-", "--"), strict=True):
    (line,) = right.plot(reached, errors.mean(0), style, marker="o", markersize=3, label=name)
    right.fill_between(reached, errors.amin(0), errors.amax(0), color=line.get_color(), alpha=0.2, linewidth=0)
for p in (key, features):
    dense = torch.linspace(p, reached[-1], 200)
    right.plot(dense, 1 - p / dense, "k--", linewidth=0.7)
right.set(xscale="log", xlabel="pairs stored, n", ylabel="squared error of recall", ylim=(-0.05, 1.7))
right.set_xticks([4, key, 4 * key, features], ["4", f"{key}", f"{4 * key}", f"{features}"])
for axes in (left, right):
    axes.minorticks_off()
figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
plt.show()

# %%
full = counts.index(d)
assert enough.mean(0).argmax() == full  # hardest exactly at n = d
assert (surface[:, 1:].diff(dim=1).mean(0) < 1e-4).all()  # another step does not hurt
few, many = counts.index(d // 4), counts.index(4 * d)
for name, column in (("few", few), ("full", full), ("many", many)):
    record(f"exact_surface_{name}", enough[:, column].mean(), rtol=0.05, atol=0.5)
record("exact_surface_one_step", surface[:, 1, full].mean(), rtol=0.01)
record("exact_surface_exact", surface[:, -1, full].mean(), atol=0.01)

for name, p in (("least squares", key), ("least squares of products", features)):
    for column, n in enumerate(reached):
        if n < p:
            assert held[name][:, column].max() < 1e-9
        elif n > p:
            assert (held[name][:, column].mean() - (1 - p / n)).abs() < 0.03
twice = reached.index(2 * key)
for name, errors in held.items():
    record(f"exact_twice_{name.replace(' ', '_')}", errors[:, twice].mean(), rtol=0.01, atol=1e-6)
assert (held["least squares"][:, twice] < held["delta rule"][:, twice]).all()

# %% [markdown]
# With $n = d/4$, $d$ and $4d$ pairs it takes {glue:text}`exact_surface_few:.1f`, {glue:text}`exact_surface_full:.1f` and
# {glue:text}`exact_surface_many:.1f` steps, on average, to be as good as exact.
# Far from the cliff on either side a few steps do, because the eigenvalues that a stored key meets are of similar size:
# on the left those of its $n$ directions, on the right all $d$.
# At $n = d$ one step errs by {glue:text}`exact_surface_one_step:.2f`, all steps by {glue:text}`exact_surface_exact:.2f`.
#
# With twice as many pairs as channels the squared errors are {glue:text}`exact_twice_linear_attention:.2f` for linear
# attention, {glue:text}`exact_twice_delta_rule:.2f` for the delta rule and
# {glue:text}`exact_twice_least_squares:.2f` for least squares.
# {prf:ref}`lin-prop-capacity` gave the law: the answers are a projection of $n$ values on a space of $p$ dimensions,
# which keeps the share $p/n$.
# The products of two channels have $p = d(d+1)/2$ features, and their cliff is at $n = p$.
# The state has the square of that many numbers.
#
# ## To fit is not to learn
#
# Until now the queries were stored keys. Ask for a new one, when the values follow a map with noise.
# An exact memory repeats every value it has stored, with the noise in it. Is that wise?
#
# ```{prf:theorem} Stored and learned
# :label: exact-thm-risk
# Let the $n$ keys be independent standard normal vectors in $\mathbb R^d$ and $v_i = W^\top k_i + \varepsilon_i$ with
# independent noise of variance $\sigma^2$ in each entry. For the least-squares fit without ridge, of least norm where
# there are many, and per entry of the value:
#
# 1. At the stored keys, $n \ge d$: the mean square of $v_i - S^\top k_i$ is $\sigma^2 (1 - d/n)$.
# 2. At a new key of the same kind the expected squared error, beside the noise, is $\lVert S - W \rVert_F^2 / V$.
#    With $\omega^2$ the mean squared length of a column of $W$,
#
# $$
# \mathbb E\, \frac{\lVert S - W \rVert_F^2}{V} =
# \begin{cases}
# \omega^2 \bigl(1 - \frac nd\bigr) + \sigma^2\, \dfrac{n}{d - n - 1}, & n \le d - 2, \\[2ex]
# \sigma^2\, \dfrac{d}{n - d - 1}, & n \ge d + 2 .
# \end{cases}
# $$
# ```
#
# ```{prf:proof}
# One entry of the value suffices; let $w$ be the column of $W$, $s$ that of $S$, and $K$ the $n \times d$ matrix of
# keys.
# *Stored.* The residual is $(I - H)\varepsilon$ with $H$ the projection on the columns of $K$, and
# $\operatorname{tr}(I - H) = n - d$.
#
# *New, $n \ge d + 2$.* Here $s - w = (K^\top K)^{-1} K^\top \varepsilon$, so the expectation is
# $\sigma^2\, \mathbb E \operatorname{tr} (K^\top K)^{-1}$.
# By the formula for the inverse in blocks, entry $(j, j)$ of $(K^\top K)^{-1}$ is one over the squared length of what
# is left of column $j$ of $K$ after projection off the other $d - 1$ columns.
# That is a standard normal vector in $n - d + 1$ dimensions. The squared length is $\chi^2$ with $n - d + 1$ degrees of
# freedom, and the mean of its inverse is $1 / (n - d - 1)$. There are $d$ such entries.
#
# *New, $n \le d - 2$.* The fit of least norm is $s = K^\top (K K^\top)^{-1} (K w + \varepsilon)$. Its first part
# projects $w$ on the span of $n$ random directions, which leaves $\omega^2 (1 - n/d)$.
# The second has mean square $\sigma^2\, \mathbb E \operatorname{tr} (K K^\top)^{-1} = \sigma^2\, n / (d - n - 1)$, by
# the same argument with rows for columns. The mixed term has mean zero.
# ```
#
# At $n = d$, and one pair to either side, the expectation is infinite. The last free direction is used up to fit
# noise, with whatever slope that takes.
# From there, more data helps and fewer would too: this is known as double descent {cite:p}`hastie2019surprises`.
# By {prf:ref}`exact-thm-belief` the remedy is known beforehand: $\lambda = \sigma^2/\tau^2$.

# %%
d, seeds, width, noise = sizes["descent"]["key"], sizes["descent"]["seeds"], 8, 0.5
checkpoints = sorted({round(d * share) for share in (0.125, 0.25, 0.5, 0.75, 0.875, 1, 1.125, 1.25, 1.5, 2, 3, 4)})
truth = randn(seeds, 1, d, width) / d**0.5  # τ² = 1/d: an empty memory errs by 1
k = randn(seeds, checkpoints[-1], 1, d)
v = torch.einsum("sthk,shkv->sthv", k, truth) + noise * randn(seeds, checkpoints[-1], 1, width)
ridges = {"no ridge": 1e-8, "ridge σ²/τ²": noise**2 * d}
learned, fitted = {}, {}
for name, lam in ridges.items():
    state, last, risks, residuals = None, 0, [], []
    for n in checkpoints:
        ridge, new = k.new_full((1, d), lam), slice(last, n)
        _, state = ttr.regress(exact, k[:, new], k[:, new], v[:, new], state=state, ridge=ridge)
        S = state.linear_map()
        risks.append((S - truth).square().sum((1, 2, 3)) / width)
        residual = v[:, :n] - torch.einsum("sthk,shkv->sthv", k[:, :n], S)
        residuals.append(residual.square().mean((1, 2, 3)))
        last = n
    learned[name], fitted[name] = torch.stack(risks, dim=1).cpu(), torch.stack(residuals, dim=1).cpu()


def expected_risk(n):
    if n < d:
        return 1 - n / d + noise**2 * n / (d - n - 1)
    return noise**2 * d / (n - d - 1)


# %% tags=["hide-input"] mystnb={"figure": {"caption": "Two descents: squared error at new keys against the number of stored pairs, for noisy values of a true map; an empty memory errs by one. Lines are medians over seeds, bands the middle four fifths, dotted black curves the expectation of the theorem. Without a ridge, least squares is worst exactly where it can just store everything. With the ridge that the noise calls for, every pair helps.", "name": "exact-fig-descent"}, "image": {"alt": "Error on a logarithmic axis against n over d. The curve without ridge falls slightly, rises to a sharp peak at one and falls again; dotted curves go through it on both sides of the peak. The curve with ridge falls steadily and meets the other one at the right."}}
figure, axes = plt.subplots(figsize=(7, 3.8))
share = torch.tensor(checkpoints) / d
for (name, risks), style in zip(learned.items(), ("-", "--"), strict=True):
    (line,) = axes.plot(share, risks.median(0).values, style, marker="o", markersize=4, label=name)
    low, high = risks.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=0)
    axes.fill_between(share, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
for numbers in (range(checkpoints[0], d - 1), range(d + 2, checkpoints[-1] + 1)):
    axes.plot([n / d for n in numbers], [expected_risk(n) for n in numbers], "k:", linewidth=1)
axes.set(xscale="log", yscale="log", xlabel="pairs stored, n / d", ylabel="squared error at new keys")
axes.set_xticks((1 / 8, 1 / 4, 1 / 2, 1, 2, 4), ("1/8", "1/4", "1/2", "1", "2", "4"))
axes.minorticks_off()
axes.legend()
plt.show()

# %%
for column, n in enumerate(checkpoints):
    if not 0.8 * d < n < 1.2 * d:  # near n = d the mean over seeds is that of a few draws
        assert (learned["no ridge"][:, column].mean() / expected_risk(n) - 1).abs() < 0.1
    if n >= d:
        assert (fitted["no ridge"][:, column].mean() - noise**2 * (1 - d / n)).abs() < 0.02 * noise**2 + 1e-9
full = checkpoints.index(d)
assert learned["no ridge"].median(0).values.argmax() == full
assert learned["no ridge"].median(0).values[full] > 5  # far worse than an empty memory
assert (learned["ridge σ²/τ²"].mean(0).diff() < 0).all()  # every pair helps
assert (learned["ridge σ²/τ²"].mean(0) < learned["no ridge"].mean(0) + 0.01).all()
record("exact_descent_peak", learned["no ridge"].median(0).values[full], rtol=0.1)
record("exact_descent_ridge", learned["ridge σ²/τ²"].median(0).values[full], rtol=0.02)

# %% [markdown]
# At $n = d$ the memory without a ridge errs by {glue:text}`exact_descent_peak:.0f` in the median, where answering
# nothing errs by one. With the ridge it is {glue:text}`exact_descent_ridge:.2f`, on the same pairs.
# The stored pairs show nothing of this. There the fit without ridge is perfect.
#
# Does stopping the solver early do the work of the ridge?
# It depends on what is solved for: one system a query, $G x = q$, as the layers do it, or the memory itself,
# $G S = C$. At the end both give the same answers. On the way there, with $n = d$ and no ridge:

# %%
K, V, q = k[:, :d, 0], v[:, :d, 0], randn(seeds, 200, d)
C, W = K.mT @ V, truth[:, 0]
solved = {name: conjugate_gradients(lambda x: (x @ K.mT) @ K, right, d) for name, right in (("q", q), ("S", C.mT))}
answers = {"queries": solved["q"] @ C, "memory": q @ solved["S"].mT}
stopped = {name: (y - q @ W).square().mean((-2, -1)).median(1).values.cpu() for name, y in answers.items()}
assert (stopped["queries"][1:] > stopped["queries"][0]).all()  # no number of steps beats none
assert (stopped["queries"].diff()[:8] > 0).all()  # and at first each makes it worse
assert stopped["memory"].min() < 1.3 * learned["ridge σ²/τ²"].median(0).values[full]
record("exact_stopped_query_1", stopped["queries"][1], rtol=0.05)
record("exact_stopped_query_4", stopped["queries"][4], rtol=0.05)
record("exact_stopped_memory", stopped["memory"].min(), rtol=0.05)
record("exact_stopped_best", stopped["memory"].argmin(), atol=1)

# %% [markdown]
# For the memory, the large eigenvalues are served first, and the noise is amplified at the small ones:
# after {glue:text}`exact_stopped_best` steps the error is {glue:text}`exact_stopped_memory:.2f`, nearly that of the
# ridge.
# For the queries it is {glue:text}`exact_stopped_query_1:.2f` after one step, {glue:text}`exact_stopped_query_4:.2f`
# after four, and no number of steps is better than none.
# A new query has as much of itself along small eigenvalues as along large ones, while $C$ has little along the small.
# **Few steps are no ridge** in a layer that solves for its queries.
#
# So a memory that must *recall* wants a small ridge, and one that must *predict* wants noise over prior.
# A layer can learn which.
#
# ## What it costs
#
# The package counts operations and the size of the state for each design.

# %%
token_sizes = {"T": 4096, "d": 64, "C": 64, "n": 10}
costs = {
    name: ttr.atlas[name].cost().at(**token_sizes)
    for name in ("linear_attention", "delta_net", "recursive_least_squares", "mesa_net")
}
for name, (flops, state_size, _) in costs.items():
    print(
        f"{name:24} {flops / token_sizes['T'] / 1000:6.1f} thousand operations a token, {state_size:.0f} numbers of state"
    )
record("exact_cost_chunk", costs["recursive_least_squares"][0] / costs["delta_net"][0], rtol=0.2)
record("exact_cost_mesa", costs["mesa_net"][0] / costs["delta_net"][0], rtol=0.2)
assert costs["recursive_least_squares"][1] == costs["mesa_net"][1] == 2 * costs["delta_net"][1]
assert costs["delta_net"][0] < costs["recursive_least_squares"][0] < costs["mesa_net"][0]

# %% [markdown]
# For a head with $d = 64$, chunks of 64 and ten solver steps, the exact chunk form takes
# {glue:text}`exact_cost_chunk:.1f` times the operations of the delta rule, conjugate gradients
# {glue:text}`exact_cost_mesa:.1f` times. The state is twice as large, for it has $G$.
# Operations are not time: {doc}`/notebooks/speed` has what was measured.
#
# What is it good for? {cite:t}`vonoswald2022transformers` built one gradient step on an in-context regression out of
# linear attention, and {cite:t}`vonoswald2023uncovering` replaced the step by the solution.
# A layer that solves least squares need not learn to do so: {doc}`/notebooks/11_training_on_tasks` trains both on
# regression in context.
#
# ## Limits
#
# ````{admonition} Where exact least squares meets its neighbours
# :class: tip
# 1. $\lambda \to \infty$, answers times $\lambda$: linear attention. With a decay, the ridge has to stay.
# 2. Orthonormal keys and $\lambda \to 0$: the delta rule with $\beta = 1$.
# 3. The gain of recursive least squares in the delta rule: least squares, for any keys.
# 4. No decay: a ridge that stays and one that fades are the same.
# 5. One step of conjugate gradients: linear attention at its best length (shown above).
#
# The cell below executes the first four.
# ````

# %%
print(*mesa.limits(), sep="\n")
q, v = randn(1, 16, 1, 16), randn(1, 16, 1, 8)
k = normalize(randn(1, 16, 1, 16), dim=-1)
log_decay, one = -torch.rand(1, 16, 1, generator=generator, dtype=torch.float64).to(device), torch.ones_like(v[..., 0])
huge, tiny, some = (v.new_full((1, 16), number) for number in (1e9, 1e-8, 0.1))

y, _ = ttr.regress(mesa, q, k, v, log_decay=log_decay, ridge=huge)
summed, _ = ttr.regress(ttr.Design(ttr.Decay()), q, k, v, log_decay=log_decay)
assert_close(1e9 * y, summed)

orthonormal = torch.linalg.qr(randn(16, 16)).Q[None, :, None]
solved, _ = ttr.regress(exact, q, orthonormal, v, ridge=tiny)
corrected, _ = ttr.regress(ttr.atlas["delta_net"], q, orthonormal, v, step_size=one)
assert_close(solved, corrected, rtol=0, atol=1e-6)

gain, _ = ttr.ops.gains.recursive_least_squares(k, some)
corrected, _ = ttr.ops.delta_rule(q, k, v, gain)
solved, _ = ttr.regress(exact, q, k, v, ridge=some)
assert_close(corrected, solved)

stays, _ = ttr.regress(ttr.atlas["intention"], q, k, v, ridge=some)
assert_close(stays, solved)

# %% [markdown]
# ## Exercises
#
# ```{exercise} A ridge is data
# :label: exact-exercise-pseudo
# Find $d$ pairs which, stored before all others, do what a ridge $\Lambda$ does.
# Which of the two ridges do they give when there is a decay?
# ```
#
# ```{solution-start} exact-exercise-pseudo
# :class: dropdown
# ```
#
# The pairs $(\sqrt{\lambda_j}\, u_j,\, 0)$ with $u_j$ the unit vectors add $\sum_j \lambda_j u_j u_j^\top = \Lambda$ to
# $G$ and nothing to $C$. Stored once, they decay like any pair: the ridge of recursive least squares.
# For the other one they would have to be stored anew at every token, with the weight $1 - \alpha_t$.

# %%
ridge = 0.1 + randn(1, 16).square()
pretended = torch.cat([torch.diag(ridge[0].sqrt())[None, :, None], k], dim=1)
nothing = torch.cat([torch.zeros_like(v), v], dim=1)
faded = torch.cat([torch.zeros_like(log_decay), log_decay], dim=1)
y, _ = ttr.regress(recursive_least_squares, torch.cat([q, q], 1), pretended, nothing, log_decay=faded, ridge=tiny)
with_ridge, _ = ttr.regress(recursive_least_squares, q, k, v, log_decay=log_decay, ridge=ridge)
assert_close(y[:, 16:], with_ridge, rtol=0, atol=1e-5)  # but for the tiny ridge

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Which ridge? Ask the pairs
# :label: exact-exercise-loo
# Leave pair $i$ out, fit the others, and predict $v_i$. Show that no second fit is needed:
# with $e_i = v_i - S^\top k_i$ and $P = (G + \Lambda)^{-1}$ of *all* pairs, the error of the prediction is
# $e_i / (1 - k_i^\top P k_i)$.
# Use it to choose $\lambda$ for noisy pairs whose $\sigma^2/\tau^2$ you know.
# ```
#
# ```{solution-start} exact-exercise-loo
# :class: dropdown
# ```
#
# Without weights the order of the pairs does not matter, so let $i$ be the last one. Then
# {prf:ref}`exact-thm-recursive` goes from the fit without it to the fit with it, with the gain $g = P k_i$, and
# {eq}`delta-eq-left` says that the write leaves the share $1 - k_i^\top g$ of the error. Divide.

# %%
d, n, noise = 16, 48, 0.5
truth = randn(64, d, 4) / d**0.5
K = randn(64, n, d)
V = K @ truth + noise * randn(64, n, 4)


def left_out(lam):
    P = torch.linalg.inv(K.mT @ K + lam * eye(d))
    return (V - K @ P @ (K.mT @ V)) / (1 - dot(K @ P, K))


others = torch.arange(n, device=device) != 5
by_hand = torch.linalg.solve(K[:, others].mT @ K[:, others] + 3 * eye(d), K[:, others].mT @ V[:, others])
assert_close(left_out(3.0)[:, 5], V[:, 5] - (K[:, 5:6] @ by_hand)[:, 0])

candidates = [noise**2 * d * 2.0**power for power in range(-6, 7)]
scores = torch.stack([left_out(lam).square().mean() for lam in candidates])
chosen = candidates[int(scores.argmin())]
assert noise**2 * d / 2 <= chosen <= noise**2 * d * 2  # within a factor of two of σ²/τ²

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} When are two steps enough?
# :label: exact-exercise-spectrum
# How many steps do conjugate gradients need at most if $M$ has only $m$ different eigenvalues?
# What follows for orthonormal keys, and for $n < d$ keys of which all pairs have the same inner product?
# ```
#
# ```{solution-start} exact-exercise-spectrum
# :class: dropdown
# ```
#
# The polynomial $\prod (1 - \mu/\mu_i)$ over the different eigenvalues has degree $m$ and vanishes at all of them, so
# $m$ steps are exact.
# For orthonormal keys $G$ is a projection and $M$ has the eigenvalues $\lambda$ and $1 + \lambda$: two steps, and one
# if the query is itself a combination of keys.
# Equal inner products $\rho$ give $G$ the eigenvalues $1 - \rho$, $1 - \rho + n\rho$ and 0: three steps, however
# correlated the keys.

# %%
frame = torch.linalg.qr(randn(16, 16)).Q[:8]
gram = 0.9 * torch.ones_like(eye(8)) + 0.1 * eye(8)
alike = torch.linalg.cholesky(gram) @ frame  # unit keys, all inner products .9
for K, steps in ((frame, 2), (alike, 3)):
    M, right = K.T @ K + 0.01 * eye(16), randn(5, 16)
    x = conjugate_gradients(lambda x, M=M: x @ M, right, steps)
    residuals = (x @ M - right).norm(dim=(1, 2)) / right.norm()
    assert residuals[steps] < 1e-10
    assert residuals[steps - 1] > 1e-3  # one step fewer is not enough
recalled = conjugate_gradients(lambda x: x @ (frame.T @ frame + 0.01 * eye(16)), frame, 1)[-1]
assert_close(recalled, frame / 1.01)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Never carry the inverse
# :label: exact-exercise-inverse
# Run the ten-line recursion in float32 with a decay on keys that use half of the channels, for a few thousand tokens.
# Then run the op of the package, which carries $G$ and factorises. What happens, and why?
# ```
#
# ```{solution-start} exact-exercise-inverse
# :class: dropdown
# ```
#
# Along the unused channels $P$ is multiplied by $1/\alpha$ at each token and never made smaller: it overflows.
# Before that its large part drowns its small one, $\bar P k$ loses its digits, and the answers are lost with them.
# $G$ only ever decays there, towards zero, which is no harm until it is factorised; the op then adds what rounding
# cannot resolve.

# %%
T, d = 3000, 16
k = torch.zeros(1, T, 1, d, dtype=torch.float64, device=device)
k[..., : d // 2] = normalize(randn(1, T, 1, d // 2), dim=-1)
k = k @ torch.linalg.qr(randn(d, d)).Q  # half of the space, along no axis
v = torch.einsum("bthk,kv->bthv", k, randn(d, 4))
log_decay, ridge = torch.full_like(k[..., 0], 0.95).log(), k.new_full((1, d), 0.1)
single = [z.float() for z in (k, v, log_decay, ridge)]
k32, v32, decay32, ridge32 = single
carried = recursive(k32[0, :, 0], k32[0, :, 0], v32[0, :, 0], decay32[0, :, 0], ridge32[0])
solved, _ = ttr.regress(recursive_least_squares, k32, k32, v32, log_decay=decay32, ridge=ridge32)
late = slice(-100, None)
lost = (carried[late] - v32[0, late, 0]).norm() / v32[0, late, 0].norm()
kept = (solved[:, late] - v32[:, late]).norm() / v32[:, late].norm()
assert not lost < 0.1  # too large, or not a number
assert kept < 1e-2

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`plackett1950some` has the recursion on two pages, {cite:t}`haykin2002adaptive` its uses and its numerics,
# {cite:t}`hager1989updating` the history of the lemma behind it.
# {cite:t}`hoerl1970ridge` introduced the ridge; {cite:t}`rasmussen2006gaussian` begin with the belief of this chapter
# and go on to kernels.
# {cite:t}`hestenes1952methods` is still a good place to learn conjugate gradients.
# {cite:t}`hastie2019surprises` analyse least squares around the point where it just fits.
# Of the layers, read {cite:t}`garnelo2023intention` for the idea, {cite:t}`vonoswald2023uncovering` for why a
# Transformer might want it, and {cite:t}`vonoswald2025mesanet` for how it is made to run.
# {cite:t}`wang2025testtime` is the framework of this book.
