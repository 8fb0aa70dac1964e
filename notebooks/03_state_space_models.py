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
# # State-space models: weights that forget
#
# A memory of fixed size keeps adding pairs. The world that made the pairs changes.
# How does such a memory follow a world that does not stand still?
#
# By giving old pairs less weight in the regression.
# We derive the decays of RetNet, Mamba-2, gated linear attention and mLSTM as such weights, ask how many pairs a
# decaying memory holds and how many it should hold, and arrive at the same recurrences from the other end, as
# linear systems in continuous time.
# At the end eight recurrences become clouds of eigenvalues in the unit disc, and one look tells what some of them
# cannot do.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
sizes = {
    "smoke": {"seeds": 16, "dim": 16, "segment": 128, "segments": 8, "segment_lengths": (64, 256, 1024)},
    "full": {"seeds": 64, "dim": 32, "segment": 256, "segments": 16, "segment_lengths": (128, 512, 2048)},
}[scale]
generator = torch.Generator().manual_seed(3)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


# %% [markdown]
# ## Weights that fade
#
# A memory of {doc}`/notebooks/01_associative_recall` minimises a weighted sum of squares.
# Let the weight of pair $i$ at time $t$ be a product of factors, one for every token since:
#
# ```{math}
# :label: ssm-eq-weights
# S_t = \operatorname*{arg\,min}_S \tfrac12 \sum_{i \le t} \gamma_i^{(t)} \lVert v_i - S^\top k_i \rVert^2,
# \qquad \gamma_i^{(t)} = \prod_{j=i+1}^{t} \alpha_j, \qquad 0 < \alpha_j \le 1 .
# ```
#
# The newest pair has weight one. Each later token multiplies the weight of everything before it by its own $\alpha$.
# So nobody has to look at the past again to weigh it: $\gamma_i^{(t)} = \alpha_t\, \gamma_i^{(t-1)}$.
#
# Stack the keys and values as rows of $K$ and $V$ and the weights on the diagonal of $\Gamma_t$.
# Once the keys span their space, the minimiser is
#
# ```{math}
# :label: ssm-eq-solution
# S_t = (K^\top \Gamma_t K)^{-1} K^\top \Gamma_t V .
# ```
#
# Now do what linear attention does in {doc}`/notebooks/02_linear_attention`: take the first factor for the identity.
# What is left follows from its predecessor.
#
# ```{math}
# :label: ssm-eq-recurrence
# S_t = K^\top \Gamma_t V = \sum_{i \le t} \gamma_i^{(t)} k_i v_i^\top = \alpha_t\, S_{t-1} + k_t v_t^\top .
# ```
#
# This is how {cite:t}`wang2025testtime` read the gates of the whole family.
# The gate is a weight of the regression. The missing correction for correlated keys is a choice of the optimizer.
# The two are independent, and {doc}`/notebooks/06_exact_least_squares` keeps the gate and restores the correction.
#
# **One factor a channel.** Gated linear attention {cite:p}`yang2023gated` has a vector $\alpha_t$, one factor for each
# channel of the key:
#
# ```{math}
# :label: ssm-eq-diagonal
# S_t = \operatorname{Diag}(\alpha_t)\, S_{t-1} + k_t v_t^\top .
# ```
#
# No weight on whole pairs gives this.
# It is the same single gradient step from zero, taken on keys that fade:
# with $k_i^{(t)} = \gamma_i^{(t)} \odot k_i$, the negative gradient of
# $\tfrac12\sum_i \lVert v_i - S^\top k_i^{(t)}\rVert^2$ at $S = 0$ is $\sum_i (\gamma_i^{(t)} \odot k_i)\, v_i^\top$.
#
# In ten lines, for both:


# %%
def decayed_sum(q, k, v, log_decay):
    """One token after the other; log_decay is (batch, time, heads) or (batch, time, heads, key)."""
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    memory, outputs = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]), []
    for t in range(k.shape[1]):
        memory = log_decay[:, t].exp()[..., None] * memory
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
    return torch.stack(outputs, dim=1), memory


q, k, v = randn(2, 70, 3, 8), randn(2, 70, 3, 8), randn(2, 70, 3, 5)
per_head, per_channel = -randn(2, 70, 3).square() / 5, -randn(2, 70, 3, 8).square() / 5
for design, log_decay in ((ttr.Design(ttr.Decay()), per_head), (ttr.atlas["gla"], per_channel)):
    slow, memory = decayed_sum(q, k, v, log_decay)
    y, state = ttr.regress(design, q, k, v, log_decay=log_decay)
    assert_close(y, slow)
    assert_close(state.memory, memory)
    assert_close(ttr.ops.linear_attention(q, k, v, log_decay)[0], slow)

# %% [markdown]
# The last `memory` is that of gated linear attention. It is also the gradient step on faded keys:

# %%
since = per_channel.flip(1).cumsum(1).flip(1) - per_channel  # log of what all later tokens leave
faded = since.exp() * k


def sum_of_squares(S):
    return (v - torch.einsum("bhkv,bthk->bthv", S, faded)).square().sum() / 2


assert_close(-torch.func.grad(sum_of_squares)(torch.zeros_like(memory)), memory)

# %% [markdown]
# ## How many pairs does it hold?
#
# Take a constant factor $\alpha < 1$. A pair of age $s$ has weight $\alpha^s$, and all weights together are
#
# ```{math}
# :label: ssm-eq-length
# \sum_{s=0}^{\infty} \alpha^s = \frac{1}{1 - \alpha} .
# ```
#
# So the memory counts like $1/(1-\alpha)$ pairs of full weight. We call that number its **length**.
# Is it worth forgetting at all? Two errors pull in opposite directions, and the smallest example shows both.
#
# ```{prf:proposition} What forgetting costs and what it buys
# :label: ssm-prop-bias-variance
# Let all keys be $1$, so that the memory is a weighted mean, and let $v_t = \theta_t + \varepsilon_t$ with independent
# noise of variance $\sigma^2$.
# Let $\theta$ have been the same for all time and then jump by $\delta$. After $s$ pairs of the new world
#
# $$
# \mathbb E\, (m_t - \theta_t)^2 = \underbrace{\delta^2 \alpha^{2s}}_{\text{what is still remembered}}
#   + \underbrace{\sigma^2\, \frac{1 - \alpha}{1 + \alpha}}_{\text{what is not averaged away}} .
# $$
# ```
#
# ```{prf:proof}
# The weighted least-squares mean is $m_t = \sum_i \gamma_i^{(t)} v_i / \sum_i \gamma_i^{(t)}$, with total weight
# $1/(1-\alpha)$ by {eq}`ssm-eq-length`.
# Pairs of the old world have ages $s, s+1, \dots$ and total weight $\alpha^s/(1-\alpha)$, so that the mean is off by
# the share $\alpha^s$ of the jump.
# The noise has variance $\sigma^2 \sum_{u \ge 0} \alpha^{2u} (1-\alpha)^2 = \sigma^2 (1-\alpha)^2/(1-\alpha^2)$.
# ```
#
# A least-squares memory with keys of $d$ channels fits $d$ numbers for each value.
# Where the memory is long against $d$ and the keys are uniform on the sphere, its weighted second moment
# $K^\top\Gamma_t K$ is near its mean, the same computation goes through, and the noise counts $d$ times.
# Let the world switch every $L$ pairs. With $n = 1/(1-\alpha)$, averaged over a segment and for $d \ll n \ll L$,
#
# ```{math}
# :label: ssm-eq-tradeoff
# \text{error} \approx \frac{\delta^2}{L} \sum_{s=0}^{L-1} \alpha^{2s} + d\,\sigma^2\, \frac{1-\alpha}{1+\alpha}
#   \approx \frac{\delta^2 n}{2L} + \frac{d\,\sigma^2}{2n},
# \qquad n^\star = \frac{\sigma}{\delta} \sqrt{d\,L} .
# ```
#
# The best memory is as long as the square root of the time between switches.
# A noisier world wants a longer memory, a world that jumps further a shorter one.
#
# To separate forgetting from the other shortcoming of linear attention, the experiment uses the exact solution
# {eq}`ssm-eq-solution` with a small ridge.
# Keys are uniform on the unit sphere in $d$ channels. Each segment has a linear function $w$ of its own,
# with $w \sim N(0, I)$, so that values have variance one and $\delta^2 = 2$.
# Each value is predicted before it is shown.

# %%
design = ttr.Design(ttr.Decay(), optimizer=ttr.Exact())


def switching(seeds, segments, length, noise):
    """Keys, values as shown and values without noise, (seeds, time, 1, ·)."""
    k = normalize(randn(seeds, segments * length, 1, sizes["dim"]), dim=-1)
    w = randn(seeds, segments, 1, sizes["dim"]).repeat_interleave(length, dim=1)
    clean = (k * w).sum(-1, keepdim=True)
    return k, clean + noise * randn(*clean.shape), clean


def late(x):
    """The same one token later: what the memory has seen when it is asked."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def prediction_error(k, v, clean, log_decay):
    """Squared error at every token of the memory before it, (seeds, time)."""
    ridge = k.new_full((1, k.shape[-1]), 1e-3)
    y, _ = ttr.regress(design, k, late(k), late(v), log_decay=log_decay, ridge=ridge)
    return (y - clean).square()[..., 0, 0].cpu()


def constant(v, alpha):
    return torch.full_like(v[..., 0], math.log(alpha))


seeds, segments, length, d = (sizes[name] for name in ("seeds", "segments", "segment", "dim"))
k, v, clean = switching(seeds, segments, length, noise=0.01)
after_switch = {}
for alpha in (1.0, 0.99, 0.9, 0.7):
    error = prediction_error(k, v, clean, constant(v, alpha))
    after_switch[f"α = {alpha:g}"] = error.view(seeds, segments, length)[:, 1:].mean(1)

own = [x.reshape(seeds * segments, length, *x.shape[2:]) for x in (k, v, clean)]  # a new memory for each segment
error = prediction_error(*own, torch.zeros_like(own[1][..., 0]))
after_switch["emptied at the switch"] = error.view(seeds, segments, length)[:, 1:].mean(1)

# %% [markdown]
# The second question is the trade-off itself: error against length, for segments of three lengths, now with noise as
# large as the values.

# %%
memory_lengths = [2.0**m for m in range(3, 9)]
tradeoff, predicted = {}, {}
noise, pairs = 1.0, 4 * max(sizes["segment_lengths"])
for L in sizes["segment_lengths"]:
    stream = switching(seeds // 2, pairs // L, L, noise)
    alphas = [1 - 1 / n for n in memory_lengths]
    errors = [prediction_error(*stream, constant(stream[1], alpha))[:, L:].mean(1) for alpha in alphas]
    tradeoff[L] = torch.stack(errors)
    predicted[L] = [2 / L * (1 - a ** (2 * L)) / (1 - a**2) + d * noise**2 * (1 - a) / (1 + a) for a in alphas]

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Least squares that forgets, in a world that switches. Left: squared error by the number of pairs since the switch, with little noise; lines are means over seeds and switches, bands the middle four fifths of the seeds. A memory that keeps everything stays wrong for as long as the segment lasts; the shortest one recovers first, after the largest errors, and ends on the highest noise. Right: error against the length of the memory, with much noise, for three segment lengths, points one a seed; dashed the prediction, diamonds its minimum. The prediction wants a memory longer than the $d$ unknowns and shorter than the segment, and fails outside. The best length grows with the segment.", "name": "ssm-fig-switch"}, "image": {"alt": "Two plots. Left, error after a switch on a logarithmic axis for four decays and an emptied memory: without decay it hardly falls; with a decay of one hundredth it falls slowly; with one tenth quickly to a low level; with three tenths it first rises, then falls fastest of the four and stops at a higher level; the emptied memory falls off after sixteen pairs. Right: three U-shaped curves of error against memory length, the minimum moving right and down for longer segments, near the dashed prediction."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
styles = ["-", "--", "-.", ":", "-"]
for (name, error), style in zip(after_switch.items(), styles, strict=True):
    smooth = error.unfold(1, 4, 4).mean(-1)  # four pairs a point
    low, high = smooth.quantile(smooth.new_tensor([0.1, 0.9]), dim=0)
    at = 4 * torch.arange(smooth.shape[1]) + 1.5
    color = "black" if "emptied" in name else None
    (line,) = left.plot(at, smooth.mean(0), linestyle=style, color=color, label=name)
    left.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
left.set(xlabel="pairs since the switch", ylabel="squared error", yscale="log")
left.legend(fontsize=9)
for (L, error), marker in zip(tradeoff.items(), "osv", strict=True):
    (line,) = right.plot(memory_lengths, error.mean(1), marker=marker, label=f"L = {L}")
    for n, points in zip(memory_lengths, error, strict=True):
        right.plot([n] * len(points), points, ".", color=line.get_color(), markersize=2, alpha=0.5)
    right.plot(memory_lengths, predicted[L], "--", color=line.get_color(), linewidth=1.2)
    best = noise * math.sqrt(d * L / 2)
    a = 1 - 1 / best
    lowest = 2 / L * (1 - a ** (2 * L)) / (1 - a**2) + d * noise**2 * (1 - a) / (1 + a)
    right.plot(best, lowest, "D", color=line.get_color(), markeredgecolor="black", markersize=7)
right.set_xscale("log", base=2)
right.set(xlabel="length of the memory, 1/(1 − α)", ylabel="squared error", ylim=(0, 2))
right.legend(fontsize=9)
plt.show()

# %%
mean = {name: error.mean(1) for name, error in after_switch.items()}
assert (mean["α = 1"] > 2 * mean["α = 0.9"]).all()  # in every seed
assert (mean["α = 0.99"] > 1.5 * mean["α = 0.9"]).all()
assert mean["α = 0.7"].mean() > 1.2 * mean["α = 0.9"].mean()
assert mean["emptied at the switch"].mean() < 0.5 * mean["α = 0.9"].mean()
record("ssm_switch_none", mean["α = 1"].mean(), rtol=0.02)
record("ssm_switch_090", mean["α = 0.9"].mean(), rtol=0.02)
record("ssm_switch_070", mean["α = 0.7"].mean(), rtol=0.02)
record("ssm_switch_emptied", mean["emptied at the switch"].mean(), rtol=0.02)
late_error = {name: error[:, -length // 4 :].mean() for name, error in after_switch.items()}
assert late_error["α = 0.7"] > 3 * late_error["α = 0.9"]
assert late_error["α = 0.7"] > 0.01**2  # the variance of the noise in the values

best = {L: memory_lengths[error.mean(1).argmin()] for L, error in tradeoff.items()}
shortest, middle, longest = sizes["segment_lengths"]
assert best[shortest] < best[longest]
for L in (middle, longest):
    assert 0.5 <= best[L] / (noise * math.sqrt(d * L / 2)) <= 2.0  # the grid has steps of two
    long = [n for n, length_of in enumerate(memory_lengths) if 2 * d <= length_of <= L / 4]
    ratio = tradeoff[L].mean(1)[long] / torch.tensor(predicted[L])[long]
    assert ((ratio > 0.9) & (ratio < 1.5)).all()

# %% [markdown]
# Mean squared error after the first switch, in units of the values' variance:
# {glue:text}`ssm_switch_none:.2f` for a memory that keeps everything, which is no better than the answer zero,
# {glue:text}`ssm_switch_090:.2f` at $\alpha = 0.9$, {glue:text}`ssm_switch_070:.2f` at $\alpha = 0.7$.
# A memory that is emptied at each switch has {glue:text}`ssm_switch_emptied:.2f`.
# It needs to see $d$ pairs before it knows everything, and for functions drawn like these nothing that starts at the
# switch can do much better.
#
# Two things in the left panel deserve a second look.
# At $\alpha = 0.9$ the length is ten pairs, fewer than the $d$ unknowns, and yet it is the best of the four.
# With next to no noise a weight need not be large to count; it must only be larger than that of the pairs it
# contradicts.
# And $\alpha = 0.7$ recovers first, but pays for it twice.
# While it has seen fewer than $d$ new pairs, it fits the newest at any price and bends what it knew to do so, which is
# worse than having kept the old function.
# Afterwards it averages over almost nothing, and its answers are noisier than the values it was shown.
#
# ## When to forget: decays that look at the token
#
# A constant decay pays for both errors at all times. The black curve pays for neither, because something told it when
# the world changed. If the tokens say so, a decay that is a function of the token can do the same.
# That step, from $\alpha$ to $\alpha_t$, is what {cite:t}`gu2023mamba` call *selection*.
#
# | layer | weight $\gamma_i^{(t)}$ | new pair | in the atlas |
# |---|---|---|---|
# | linear attention {cite:p}`katharopoulos2020transformers` | $1$ | $k_t v_t^\top$ | `linear_attention` |
# | RetNet {cite:p}`sun2023retnet` | $\alpha^{t-i}$, a constant for each head | $k_t v_t^\top$ | `retnet` |
# | Mamba-2 {cite:p}`dao2024mamba2` | $\Delta_i\, e^{-a(\Delta_{i+1} + \dots + \Delta_t)}$ | $\Delta_t\, k_t v_t^\top$ | `mamba2` |
# | gated linear attention {cite:p}`yang2023gated` | $\prod_j \alpha_j$, a vector over channels | $k_t v_t^\top$ | `gla` |
# | mLSTM {cite:p}`beck2024xlstm` | $e^{\tilde w_i} \prod_j \alpha_j$, then normalised | $e^{\tilde w_t} k_t v_t^\top$ | `mlstm` |
#
# (RetNet also rotates queries and keys by their position. The rotation is the imaginary part of an eigenvalue, and
# comes with S4D below.)
#
# **A trap.** Suppose the token at a switch sends a log-decay of $-20$. Is the memory then empty?
# Linear attention's is: what is left has a weight of $e^{-20}$ in every answer.
# Least squares is different. Its answer does not change when all weights are multiplied by the same number.

# %%
at_switch = torch.zeros_like(v[..., 0])
at_switch[:, length + 1 :: length] = -20.0  # with the first pair of a segment, once it has been predicted


def known(error):
    """The mean error from the second pair of a segment on: the first comes before anybody is told."""
    return error.view(-1, segments, length)[:, 1:, 1:].mean()


told = known(prediction_error(k, v, clean, at_switch))
emptied = known(prediction_error(*own, torch.zeros_like(own[1][..., 0])))
assert told > 1.5 * emptied

stays = ttr.Design(ttr.Decay(), optimizer=ttr.Exact(ridge_decays=False))
ridge = k.new_full((1, d), 1e-3)
y, _ = ttr.oracle.regress(stays, k[:2], late(k[:2]), late(v[:2]), log_decay=at_switch[:2], ridge=ridge)
told_and_stays = known((y - clean[:2]).square().cpu())
own = [x[: 2 * segments] for x in own]  # the same two seeds
assert_close(told_and_stays, known(prediction_error(*own, torch.zeros_like(own[1][..., 0]))), rtol=1e-4, atol=0.0)
record("ssm_emptied", emptied, rtol=0.02)
record("ssm_told", told, rtol=0.02)

# %% [markdown]
# From the second pair of a segment on, the error is {glue:text}`ssm_told:.2f`, and
# {glue:text}`ssm_emptied:.2f` if the memory is emptied.
# In directions that the new keys have not shown, nothing contradicts the old pairs, and their tiny weights are all
# there is: **least squares forgets what new pairs contradict, and nothing else**.
# Its ridge would pull such directions to zero, but here the ridge is data like any other and has faded too.
# A ridge that stays, as MesaNet has it {cite:p}`vonoswald2025mesanet`, empties the memory, as the last assertion
# shows.
#
# ### Mamba-2: one number that forgets and writes
#
# Mamba-2 has a **time step** $\Delta_t \ge 0$, a function of the token, and a rate $a \ge 0$ for each head:
#
# ```{math}
# :label: ssm-eq-mamba
# S_t = e^{-a\Delta_t}\, S_{t-1} + \Delta_t\, k_t v_t^\top .
# ```
#
# One number does two things. A large $\Delta_t$ clears the memory and writes the pair; $\Delta_t = 0$ lets the token
# pass as if it had not been there. In the papers' letters $k$ is $B$, $q$ is $C$, $v$ is $x$ and $-a$ is $A$.

# %%
q, k, v = randn(2, 70, 3, 8), randn(2, 70, 3, 8), randn(2, 70, 3, 5)
time_step, rate = randn(2, 70, 3).square() / 5, randn(3).square()
y, _ = ttr.regress(ttr.atlas["mamba2"], q, k, v, time_step=time_step, rate=rate)
slow, _ = decayed_sum(q, time_step[..., None] * k, v, -rate * time_step)
assert_close(y, slow)

skip = torch.ones(70, dtype=torch.bool)
skip[10:40] = False
time_step[:, ~skip] = 0.0  # thirty tokens of no importance
y, _ = ttr.regress(ttr.atlas["mamba2"], q, k, v, time_step=time_step, rate=rate)
short = [x[:, skip] for x in (q, k, v)]
without, _ = ttr.regress(ttr.atlas["mamba2"], *short, time_step=time_step[:, skip], rate=rate)
assert_close(y[:, skip], without)

# %% [markdown]
# ### mLSTM: importance of any size
#
# A decay can only make an old pair small against the new one.
# mLSTM gives each pair an importance $e^{\tilde w_t}$, any positive number, so a new pair can outweigh everything
# before it although nothing decays.
# Sums of such numbers have no scale, so they are divided by the same sum over keys:
#
# ```{math}
# :label: ssm-eq-mlstm
# S_t = \alpha_t S_{t-1} + e^{\tilde w_t} k_t v_t^\top, \qquad
# z_t = \alpha_t z_{t-1} + e^{\tilde w_t} k_t, \qquad
# y_t = \frac{S_t^\top q_t}{\max\bigl(\lvert z_t^\top q_t\rvert,\, 1\bigr)} .
# ```
#
# Nothing here fits into float32 when $\tilde w$ reaches a hundred.
# The remedy is that of every softmax: divide by the largest weight, and keep its logarithm $m_t$ beside the memory,
#
# ```{math}
# :label: ssm-eq-stabiliser
# m_t = \max(\log\alpha_t + m_{t-1},\ \tilde w_t), \qquad
# \hat S_t = e^{\log\alpha_t + m_{t-1} - m_t}\, \hat S_{t-1} + e^{\tilde w_t - m_t}\, k_t v_t^\top .
# ```
#
# Both exponents are at most zero. Since $S_t = e^{m_t} \hat S_t$, and $z_t$ likewise, the one in {eq}`ssm-eq-mlstm`
# becomes $e^{-m_t}$.


# %%
def mlstm(q, k, v, log_decay, log_gate):
    """The stabilised recursion, for one head: q, k (time, key), v (time, value)."""
    memory, largest, outputs = k.new_zeros(k.shape[-1], v.shape[-1] + 1), k.new_tensor(-torch.inf), []
    v = torch.cat([v, torch.ones_like(v[:, :1])], dim=-1)  # the last column is z
    for t in range(len(k)):
        before = log_decay[t] + largest
        largest = torch.maximum(before, log_gate[t])
        memory = (before - largest).exp() * memory + (log_gate[t] - largest).exp() * torch.outer(k[t], v[t])
        answer = q[t] @ memory
        outputs.append(answer[:-1] / answer[-1].abs().clamp_min((-largest).exp()))
    return torch.stack(outputs)


log_decay, log_gate = per_head, 300 * randn(2, 70, 3)
inputs = {"log_decay": log_decay, "log_input_gate": log_gate}
y, _ = ttr.regress(ttr.atlas["mlstm"], q, k, v, **inputs)
assert_close(y[0, :, 0], mlstm(*(x[0, :, 0] for x in (q, k, v, log_decay, log_gate))))

single = {name: x.float() for name, x in inputs.items()}
y32, _ = ttr.regress(ttr.atlas["mlstm"], q.float(), k.float(), v.float(), **single)
assert y32.isfinite().all()
assert log_gate.float().exp().isinf().any()

# %% [markdown]
# ## The other end: systems in continuous time
#
# State-space models did not start from a regression. They started from physics.
# A state $x(t)$ obeys a linear differential equation, driven by an input $u(t)$, and is observed through $C$:
#
# ```{math}
# :label: ssm-eq-continuous
# x'(t) = A\, x(t) + B\, u(t), \qquad y(t) = C\, x(t) .
# ```
#
# A sequence gives $u$ at discrete times only. The **zero-order hold** assumes that $u$ keeps the value $u_t$ for the
# whole step of length $\Delta$ that ends at token $t$. Then {eq}`ssm-eq-continuous` has an exact solution.
# Multiply by $e^{-A\tau}$, integrate over the step, and multiply back:
#
# ```{math}
# :label: ssm-eq-hold
# x_t = \underbrace{e^{A\Delta}}_{\bar A}\, x_{t-1}
#   + \underbrace{\int_0^\Delta e^{A\tau}\, d\tau\; B}_{\bar B = A^{-1}(e^{A\Delta} - I)\, B}\; u_t .
# ```
#
# (The form with $A^{-1}$ needs an invertible $A$.) For small steps $\bar B \approx \Delta B$: that is the
# $\Delta_t\, k_t$ of Mamba-2 {eq}`ssm-eq-mamba`, and its $e^{-a\Delta_t}$ is $\bar A$ for a scalar $A = -a$.
# The formula can be checked with no algebra of ours. Append the constant input to the state, and one matrix
# exponential solves everything:

# %%
A, B, step = randn(4, 4) - 2 * torch.eye(4, device=device), randn(4, 1), 0.3
held = torch.cat([torch.cat([A, B], dim=1), torch.zeros(1, 5, dtype=A.dtype, device=device)])
solved = torch.linalg.matrix_exp(step * held)
A_bar = torch.linalg.matrix_exp(step * A)
B_bar = torch.linalg.solve(A, (A_bar - torch.eye(4, device=device)) @ B)
assert_close(solved[:4, :4], A_bar)
assert_close(solved[:4, 4:], B_bar)

ratio = -torch.expm1(-rate[:, None] * torch.tensor([0.1, 0.01, 0.001], device=device)) / rate[:, None]
assert_close(ratio[:, -1], torch.full_like(rate, 1e-3), rtol=5e-3, atol=0.0)  # (1 − e^(−aΔ))/a ≈ Δ

# %% [markdown]
# ### S4D: keys that do not look
#
# S4 {cite:p}`gu2021s4` and its diagonal form S4D {cite:p}`gu2022s4d` keep $A$, $B$, $C$ and $\Delta$ the same for all
# tokens: a *linear time-invariant* system.
# Unroll {eq}`ssm-eq-hold` from an empty state, for one channel $u$:
#
# ```{math}
# :label: ssm-eq-convolution
# y_t = \sum_{i \le t} C \bar A^{\,t-i} \bar B\, u_i = (\kappa * u)_t, \qquad \kappa_s = C \bar A^{\,s} \bar B .
# ```
#
# Read it as a memory. The key is $\bar B$, the query is $C$, the value is $u_i$, and the decay is $\bar A$:
# every pair has the same key and every question is the same. Such a memory can be asked one thing only, how long ago.
# That is why its answer is a convolution, and why it recalls nothing by content
# ({doc}`/notebooks/10_keys_and_values` needs exactly this to make keys).
#
# A diagonal $A$ with entries that are real and negative gives sums of falling exponentials.
# S4D takes complex ones. The initial values of S4D-Lin are $A_n = -\tfrac12 + \mathrm i \pi n$: all channels forget
# at the same rate, and the $n$-th turns $n$ times as fast as the first. So $\kappa$ starts as a Fourier series
# under one envelope. In `ttr` a complex entry is a pair of real channels.

# %%
channels, steps, step = 8, 200, 0.05
A = torch.complex(torch.full((channels,), -0.5), math.pi * torch.arange(channels)).to(torch.complex128).to(device)
A_bar = (step * A).exp()
B_bar = (A_bar - 1) / A  # B = 1
C = torch.complex(randn(channels), randn(channels))
u = randn(steps)

state, recurrent = torch.zeros_like(A), []
for t in range(steps):
    state = A_bar * state + B_bar * u[t]
    recurrent.append((C * state).sum().real)
recurrent = torch.stack(recurrent)

powers = A_bar ** torch.arange(steps, device=device)[:, None]
kernel = (powers * B_bar * C).sum(-1).real
spectrum = torch.fft.rfft(kernel, n=2 * steps) * torch.fft.rfft(u, n=2 * steps)
assert_close(torch.fft.irfft(spectrum)[:steps], recurrent)  # padded to twice the length: nothing wraps around


def real_pairs(z):
    """Real and imaginary parts as neighbours, for every token: (1, steps, 1, 2 · channels)."""
    return torch.stack([z.real, z.imag], dim=-1).flatten().expand(1, steps, 1, -1)


y, _ = ttr.regress(
    ttr.atlas["s4d"],
    real_pairs(C.conj()),  # the answer is the real part of conj(q)·x
    real_pairs(B_bar),
    u.view(1, steps, 1, 1),
    log_decay=step * A.real[None],
    frequency=step * A.imag[None],
)
assert_close(y.flatten(), recurrent)

# %% [markdown]
# The fast Fourier transform computes all $T$ outputs in $O(T \log T)$, and it needs the kernel $\kappa$ to be the same
# everywhere.
# Once $\alpha_t$ looks at the token there is no such kernel. What is left of the convolution?
#
# ## Three forms of one sum
#
# Write {eq}`ssm-eq-recurrence` for all tokens at once.
# With the rows $q_t$, $k_i$, $v_i$ in $Q$, $K$, $V$, the weights form a lower triangular **mask** and
#
# ```{math}
# :label: ssm-eq-mask
# Y = (L \odot Q K^\top)\, V, \qquad L_{ti} = \alpha_{i+1} \cdots \alpha_t \ \ (i \le t), \qquad L_{ti} = 0 \ \ (i > t) .
# ```
#
# That is attention with the mask $L$ in the place of softmax.
# {cite:t}`dao2024mamba2` call the equality of the recurrence and {eq}`ssm-eq-mask` *structured state-space duality*.
# The structure is in $L$.
#
# ```{prf:proposition} The mask has rank one below the diagonal
# :label: ssm-prop-semiseparable
# Let all $\alpha_t > 0$. Each block of $L$ whose columns end before its rows begin has rank one, and the same block
# of $L \odot QK^\top$ has a rank of at most the size of a key.
# ```
#
# ```{prf:proof}
# Let the rows of the block begin at $r$. For $i < r \le t$ the product splits at $r$:
# $L_{ti} = (\alpha_{r+1} \cdots \alpha_t)(\alpha_{i+1} \cdots \alpha_r)$, a column times a row.
# Multiplying the entries of $Q K^\top$ by a number for each row and a number for each column does not raise its rank.
# ```
#
# Such a block is what a later stretch of tokens has to know about an earlier one.
# Its rank bounds the state: the block passes through a memory with one row for each key channel.
# The chunk form uses this directly. Blocks on the diagonal are computed as attention, blocks below it through the
# state. So the same sum has three orders of summation.

# %%
q, k, v = randn(96, 8), randn(96, 8), randn(96, 5)
log_decay = -randn(96).square() / 10


def mask(log_decay):
    """L, with no exponent above zero."""
    total = log_decay.cumsum(0)
    return (total[:, None] - total).tril().exp().tril()


def chunkwise(q, k, v, log_decay, chunk=32):
    memory, outputs = k.new_zeros(k.shape[-1], v.shape[-1]), []
    for Q, K, V, log_alpha in zip(*(x.split(chunk) for x in (q, k, v, log_decay)), strict=True):
        c = log_alpha.cumsum(0)[:, None]
        outputs.append(c.exp() * Q @ memory + (mask(log_alpha) * (Q @ K.mT)) @ V)
        memory = c[-1].exp() * memory + ((c[-1] - c).exp() * K).mT @ V
    return torch.cat(outputs)


def batched(*tensors):
    """A batch of one sequence with one head."""
    return [x[None, :, None] for x in tensors]


L = mask(log_decay)
recurrence, _ = decayed_sum(*batched(q, k, v, log_decay))
assert_close((L * (q @ k.mT)) @ v, recurrence[0, :, 0])
assert_close(chunkwise(q, k, v, log_decay), recurrence[0, :, 0])
assert_close(ttr.ops.linear_attention(*batched(q, k, v, log_decay))[0], recurrence)

below = (slice(48, None), slice(0, 48))
assert torch.linalg.matrix_rank(L[below]) == 1
assert torch.linalg.matrix_rank((L * (q @ k.mT))[below]) == 8

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Four masks: what the pair in a column weighs in the answer of a row. Linear attention keeps everything, RetNet a fading band of fixed width. Mamba-2 fades too; with one large time step it cuts the past off at one token, and with a time step of zero it leaves a column empty. The weights of S4D turn as they fade, and change their sign.", "name": "ssm-fig-masks"}, "image": {"alt": "Four square heat maps, lower triangular. The first is uniformly dark; the second fades away from the diagonal; the third is made of two triangles with an empty block between them and empty columns; the fourth has stripes of alternating sign parallel to the diagonal."}}
tokens = 48
time_steps = torch.full((tokens,), 0.4)
time_steps[28] = 4.0  # this token clears the memory
time_steps[10:14] = 0.0  # these leave no trace
ages = torch.arange(tokens)[:, None] - torch.arange(tokens)
masks = {
    "linear attention": torch.ones(tokens, tokens).tril(),
    "RetNet": mask(torch.full((tokens,), math.log(0.9))),
    "Mamba-2, scaled to one": mask(-0.5 * time_steps) * (time_steps / 0.4).clamp_max(1),
    "S4D, one channel": (torch.exp(-0.04 * ages) * torch.cos(0.5 * ages)).tril(),
}
figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True)
for axes, (name, weights) in zip(panels, masks.items(), strict=True):
    image = axes.imshow(weights, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(title=name, xlabel="pair i")
    axes.grid(False)
panels[0].set_ylabel("answer t")
figure.colorbar(image, ax=panels, label="weight", shrink=0.8)
plt.show()

# %% [markdown]
# ### Strong decays in a chunk
#
# A tempting way to compute {eq}`ssm-eq-mask` is to fold the mask into queries and keys,
# $q_t e^{c_t}$ and $k_i e^{-c_i}$ with $c$ the cumulative log-decay: one matrix product and no mask.
# With a log-decay of $-20$ a token, $e^{-c_i}$ leaves the range of float32 at the fifth token.
# The ten lines above take the difference $c_t - c_i \le 0$ first. With one factor a channel the difference depends on
# the channel as well and no single matrix holds it; the op then works through smaller blocks, each with its own
# reference point.

# %%
strong = torch.full((96,), -20.0)
strong[::7] = -1e-3  # and in between, tokens that keep everything
total = strong.cumsum(0)[:, None]
folded = (((total.exp() * q.float()) @ ((-total).exp() * k.float()).mT).tril()) @ v.float()
assert folded.isnan().any()

for log_decay in (strong[None, :, None], strong[None, :, None, None].expand(1, -1, 1, 8)):
    fast, _ = ttr.ops.linear_attention(*batched(q.float(), k.float(), v.float()), log_decay.to(device))
    exact, _ = decayed_sum(*batched(q, k, v), log_decay.double().to(device))
    assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)

# %% [markdown]
# ## What the eigenvalues say
#
# A memory whose state is one matrix, and whose next state is linear in it, has the form
#
# ```{math}
# :label: ssm-eq-transition
# S_t = A_t S_{t-1} + (\text{the new pair}),
# ```
#
# and what happens to an old pair is in the product of the **transition matrices** $A_t$.
# {cite:t}`sieber2024understanding` compare attention, state-space models and recurrent networks in this form, as
# linear systems that vary in time.
#
# | memory | transition $A_t$ | eigenvalues |
# |---|---|---|
# | linear attention | $I$ | $1$ |
# | RetNet | $\alpha I$ | one constant a head |
# | Mamba-2 | $e^{-a\Delta_t} I$ | one a token, in $[0, 1]$ |
# | gated linear attention | $\operatorname{Diag}(\alpha_t)$ | one a channel and token, in $[0, 1]$ |
# | S4D | $\operatorname{Diag}(e^{\Delta A_n})$ | constants in the complex disc |
# | DeltaNet | $I - \beta_t k_t k_t^\top$ | $1$, and $1 - \beta_t$ along the unit key |
# | DeltaProduct, two steps | a product of two such | complex pairs, if $\beta_t$ may exceed one |
#
# An eigenvalue of modulus one keeps, a smaller one forgets, a larger one explodes.
# A positive one fades, a negative one flips the sign at each step, a complex one turns.
# There is a way to read off $A_t$ that knows nothing of the formulas: let the memory be the identity, write a value
# of zero, and look.


# %%
def transition(design, k, **inputs):
    """A_t of every token, (tokens, heads, key, key); each token is a sequence of its own."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device).expand(len(k), k.shape[-2], -1, -1)
    query = k if k.ndim == 4 else k[:, :, 0]
    _, state = ttr.regress(design, query, k, torch.zeros_like(k), state=ttr.State(memory=eye), **inputs)
    return state.linear_map()


layers = {
    "linear attention": ("linear_attention", {}),
    "RetNet": ("retnet", {}),
    "Mamba-2": ("mamba2", {}),
    "gated linear attention": ("gla", {}),
    "S4D": ("s4d", {}),
    "DeltaNet, β < 1": ("delta_net", {}),
    "DeltaNet, β < 2": ("delta_net", {"max_step_size": 2.0}),
    "DeltaProduct, β < 2": ("delta_product", {"max_step_size": 2.0}),
}
eigenvalues, key_dim, heads, tokens = {}, 16, 4, 32
for name, (slug, options) in layers.items():
    torch.manual_seed(7)
    layer = ttr.layers.RegressionLayer(slug, 64, heads, key_dim=key_dim, **options).double().to(device)
    x = 2 * randn(tokens, 1, 64)
    pairs = (tokens, 1, 2, heads, key_dim) if slug == "delta_product" else (tokens, 1, heads, key_dim)
    with torch.no_grad():
        inputs = {input_name: module(x) for input_name, module in layer.inputs.items()}
        matrices = transition(layer.design, normalize(randn(*pairs), dim=-1), **inputs)
    eigenvalues[name] = torch.linalg.eigvals(matrices).flatten().cpu()

# %% [markdown]
# Each panel shows one layer of four heads as it is before any training, with the initial values that its authors or
# the field give it, on random tokens.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Eigenvalues of the transition matrices of eight memories at their usual initial values, over heads, channels and random tokens, in the unit disc. Blue squares are the same at every token, orange dots are chosen by the token. Decays live on the positive real axis. S4D turns, always at the same pace. Only steps beyond one reach the negative axis by choice, and two of them a token leave the axis.", "name": "ssm-fig-eigenvalues"}, "image": {"alt": "Eight unit discs with dots. Linear attention: a dot at one. RetNet: a few dots just left of one. Mamba-2 and gated linear attention: dots along the positive real axis. S4D: dots on spirals all around the disc. DeltaNet with small steps: the positive axis; with large steps: the whole real axis; DeltaProduct: dots off the axis too, mirrored above and below."}}
figure, panels = plt.subplots(2, 4, figsize=(10, 5.4), sharex=True, sharey=True)
circle = torch.linspace(0, 2 * math.pi, 200)
for axes, (name, values) in zip(panels.flat, eigenvalues.items(), strict=True):
    distinct = torch.view_as_real(values).mul(50).round().div(50).unique(dim=0)  # what prints at the same spot, once
    axes.plot(circle.cos(), circle.sin(), color="0.6", linewidth=1)
    axes.axhline(0, color="0.85", linewidth=1, zorder=0)
    marker, color = ("s", "C0") if name in ("linear attention", "RetNet", "S4D") else ("o", "C1")
    axes.plot(distinct[:, 0], distinct[:, 1], marker, color=color, markersize=4, alpha=0.7)
    axes.set(title=name, aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    axes.title.set_fontsize(10)
    axes.grid(False)
for axes in panels[1]:
    axes.set_xlabel("real part")
for axes in panels[:, 0]:
    axes.set_ylabel("imaginary part")
plt.show()

# %%
for name, values in eigenvalues.items():
    assert values.abs().max() < 1 + 1e-9  # nothing explodes
    turning = values.imag.abs().max() > 0.1
    negative = values.real.min() < -0.1
    assert turning == (name in ("S4D", "DeltaProduct, β < 2"))
    assert negative == (name in ("S4D", "DeltaNet, β < 2", "DeltaProduct, β < 2"))

# %% [markdown]
# Now the look that was promised.
#
# **What stays on the positive axis cannot count modulo two.**
# The effect of a token on all later states is multiplied by numbers in $[0, 1]$, so it can shrink and never change
# its sign.
# For the parity of a bit string, the effect of every early bit must flip with each later one.
# {cite:t}`grazzi2024unlocking` prove that in finite precision no stack of such layers, however deep, recognises the
# parity of strings of any length. {doc}`/notebooks/04_delta_rule` builds the negative eigenvalue that does.
#
# **S4D has negative eigenvalues, and they do not help.** Its signs do not depend on the token.
# A channel with $\omega = \pi$ flips at every step, whatever was read: it counts tokens and not ones.

# %%
bits = torch.randint(0, 2, (4, 24), generator=generator).double().to(device)
parity = (-1.0) ** bits.cumsum(1)
key = torch.tensor([1.0, 0.0], dtype=bits.dtype, device=device).expand(4, 24, 1, 2)
start = ttr.State(memory=key[:, 0, :, :, None])
quiet = torch.zeros(4, 24, 1, 1, dtype=bits.dtype, device=device)  # nothing is written; the memory only turns
flip = {"log_decay": quiet.new_zeros(1, 1), "frequency": quiet.new_full((1, 1), math.pi)}
signs, _ = ttr.regress(ttr.atlas["s4d"], key, key, quiet, state=start, **flip)
assert_close(signs[..., 0, 0], (-1.0) ** torch.arange(1, 25, device=device).double().expand(4, -1))
assert not torch.equal(signs[..., 0, 0].sign(), parity)

kept, _ = ttr.regress(ttr.Design(ttr.Decay()), key, key, quiet, state=start, log_decay=-3 * bits[..., None])
assert (kept > 0).all()  # decays that read the bits: the size changes, the sign does not

one_channel = key[..., :1]
start = ttr.State(memory=one_channel[:, 0, :, :, None])
counted, _ = ttr.regress(
    ttr.atlas["delta_net"], one_channel, one_channel, quiet, state=start, step_size=2 * bits[..., None]
)
assert_close(counted[..., 0, 0], parity)

# %% [markdown]
# So there are two separate questions to put to a recurrence: where its eigenvalues may lie, and whether the token
# chooses them.
#
# ## Limits
#
# ```{admonition} Where the decaying memories meet
# :class: important
#
# - All channels decay alike: gated linear attention is the decay of one factor a head.
# - All tokens decay alike: that is RetNet. Nothing decays: linear attention.
# - No channel turns: S4D is RetNet with a constant a channel.
# - Time steps of one and a rate of zero: Mamba-2 is linear attention.
# - Factors $\alpha_t \to 0$: only the newest pair is left, $y_t = (k_t^\top q_t)\, v_t$.
# - A large ridge that stays: the exact solution times the ridge is the decayed sum.
# ```
#
# `design.limits()` knows most of these by itself. Below, each line of the box is executed.

# %%
q, k, v = randn(2, 20, 2, 6), randn(2, 20, 2, 6), randn(2, 20, 2, 6)
for slug in ("gla", "retnet", "mamba2", "s4d"):
    print(f"{slug}:", *ttr.atlas[slug].limits(), sep="\n    ")

total_loss = torch.full((2, 20, 2), -1e4, dtype=q.dtype, device=device)
y, _ = ttr.regress(ttr.Design(ttr.Decay()), q, k, v, log_decay=total_loss)
assert_close(y, (k * q).sum(-1, keepdim=True) * v)

log_decay = -randn(2, 20, 2).square()
decayed, _ = ttr.regress(ttr.Design(ttr.Decay()), q, k, v, log_decay=log_decay)
wide, _ = ttr.regress(ttr.atlas["gla"], q, k, v, log_decay=log_decay[..., None].expand(-1, -1, -1, 6))
assert_close(wide, decayed)
solved, _ = ttr.regress(stays, q, k, v, log_decay=log_decay, ridge=q.new_full((2, 6), 1e9))
assert_close(1e9 * solved, decayed, rtol=1e-6, atol=1e-6)
still = {"log_decay": -0.1 * torch.ones(2, 3).to(q), "frequency": torch.zeros(2, 3).to(q)}
turning, _ = ttr.regress(ttr.atlas["s4d"], q, k, v, **still)
fixed, _ = ttr.regress(ttr.atlas["retnet"], q, k, v, log_decay=-0.1 * torch.ones(2).to(q))
assert_close(turning, fixed)
stopped = {"time_step": torch.ones_like(log_decay), "rate": q.new_zeros(2)}
unmoved, _ = ttr.regress(ttr.atlas["mamba2"], q, k, v, **stopped)
assert_close(unmoved, ttr.regress(ttr.atlas["linear_attention"], q, k, v)[0])

# %% [markdown]
# ## Exercises
#
# ```{exercise} A mean that keeps its size
# :label: ssm-exercise-hold
# Mamba-2 writes $\Delta_t k_t v_t^\top$. The zero-order hold {eq}`ssm-eq-hold` of the same scalar system would write
# $\frac{1 - e^{-a\Delta_t}}{a} k_t v_t^\top$.
# Show that with the hold the weights of all pairs, times $a$, sum to $1 - \prod_{j \le t} \alpha_j \le 1$, for any
# time steps. What can the weights of Mamba-2 sum to?
# ```
#
# ```{solution-start} ssm-exercise-hold
# :class: dropdown
# ```
#
# The weights times $a$ are $(1 - \alpha_i) \prod_{j > i} \alpha_j = \prod_{j>i} \alpha_j - \prod_{j \ge i} \alpha_j$,
# a sum that telescopes. So the memory is an average of what it read, with the rest of the weight on the empty
# beginning.
# The weights of Mamba-2 exceed it, since $x \ge 1 - e^{-x}$, and by any factor: with steps of $\Delta$ their sum times
# $a$ tends to $a\Delta/(1 - e^{-a\Delta})$, which grows like $a\Delta$.

# %%
time_step, rate = 3 * randn(40).square(), 0.7
alpha = (-rate * time_step).exp()
one = torch.ones(40, 1, dtype=alpha.dtype, device=device)
weights = (1 - alpha)[:, None] * one
total, _ = decayed_sum(*batched(one, weights, one, alpha.log()))
assert_close(total.flatten(), 1 - alpha.cumprod(0))
mamba, _ = decayed_sum(*batched(one, rate * time_step[:, None] * one, one, alpha.log()))
assert (mamba >= total).all()
assert mamba.max() > 1

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Two lengths
# :label: ssm-exercise-length
# By {eq}`ssm-eq-length` the weights sum to $1/(1-\alpha)$.
# By the proposition the noise of the weighted mean is that of $n_{\mathrm{eff}} = (1+\alpha)/(1-\alpha)$ pairs of
# equal weight. Why are there about twice as many? Derive
# $n_{\mathrm{eff}} = (\sum \gamma)^2 / \sum \gamma^2$ for any weights, and check it by simulation.
# ```
#
# ```{solution-start} ssm-exercise-length
# :class: dropdown
# ```
#
# The variance of $\sum \gamma_i v_i / \sum \gamma_i$ is $\sigma^2 \sum\gamma_i^2 / (\sum\gamma_i)^2$, which for $n$
# equal weights is $\sigma^2/n$. For $\gamma_s = \alpha^s$ it is the formula.
# The total weight counts a pair at half weight as half a pair; in the average, two pairs at half weight still
# average out their noise.

# %%
alpha = 0.9
weights = alpha ** torch.arange(300, dtype=torch.float64, device=device)
effective = weights.sum() ** 2 / weights.square().sum()
assert_close(effective.item(), (1 + alpha) / (1 - alpha), rtol=1e-6, atol=0.0)
means = randn(4000, 300) @ weights / weights.sum()
assert_close(1 / means.var().item(), (1 + alpha) / (1 - alpha), rtol=0.1, atol=0.0)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A random walk
# :label: ssm-exercise-walk
# Replace the jump of the proposition by a walk, $\theta_t = \theta_{t-1} + \eta_t$ with steps of variance $\rho^2$.
# Derive the error of the decaying mean that has just seen $v_t$, and the length that minimises it for
# $\rho \ll \sigma$.
# ```
#
# ```{solution-start} ssm-exercise-walk
# :class: dropdown
# ```
#
# The step $\eta_{t-s}$, taken $s$ tokens ago, is missing from all pairs that are older than it, and those have the
# share $\alpha^{s+1}$ of the weight. So the bias has variance
# $\rho^2 \sum_{s \ge 0} \alpha^{2(s+1)} = \rho^2 \alpha^2/(1-\alpha^2)$.
# With the noise, for $n = 1/(1-\alpha) \gg 1$: $\rho^2 n/2 + \sigma^2/(2n)$, least at $n = \sigma/\rho$.
# A Kalman filter for this model has a constant gain in the long run, which is a decay, and the same length.

# %%
sigma, rho, alpha = 1.0, 0.1, 0.9
theta = (rho * randn(200, 400)).cumsum(1)
seen = theta + sigma * randn(200, 400)
tokens = torch.ones_like(seen)[..., None, None]
ratio = torch.full_like(seen, math.log(alpha))[..., None]
top, _ = decayed_sum(tokens, tokens, seen[..., None, None], ratio)
bottom, _ = decayed_sum(tokens, tokens, tokens, ratio)
error = (top / bottom)[..., 0, 0] - theta
expected = rho**2 * alpha**2 / (1 - alpha**2) + sigma**2 * (1 - alpha) / (1 + alpha)
assert_close(error[:, 100:].square().mean().item(), expected, rtol=0.1, atol=0.0)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A shift register
# :label: ssm-exercise-shift
# A transition need not be diagonal. Which $A$, $B$ and $C$ make {eq}`ssm-eq-convolution` the delay $y_t = u_{t-3}$?
# Where are the eigenvalues of $A$, and what does that say about how long the system remembers?
# Why can no diagonal system do it, real or complex, with any number of channels?
# ```
#
# ```{solution-start} ssm-exercise-shift
# :class: dropdown
# ```
#
# Four places, each handing its content to the next: $A_{j+1,j} = 1$, $B = e_1$, $C = e_4^\top$.
# All eigenvalues are $0$: $A^4 = 0$ and everything is forgotten after four tokens, though nothing fades before.
# Eigenvalues bound what happens in the long run; a matrix that is not normal can behave differently until then.
# The kernel of a diagonal system is a sum of exponentials $\sum_n c_n a_n^s$. A channel with $a_n = 0$ adds to $s = 0$
# only. Those with $a_n \ne 0$ are independent as sequences from any $s$ on. If their sum is zero for all $s \ge 4$,
# each $c_n$ is zero (for different $a_n$), and nothing is left at $s = 3$.
# The shift is what H3 puts before its memory {cite:p}`fu2022hungry`, and the short convolutions of today's layers
# replace it.

# %%
shift = torch.diag(torch.ones(3, dtype=torch.float64), -1)
impulse = [torch.linalg.matrix_power(shift, s)[3, 0].item() for s in range(8)]
assert impulse == [0, 0, 0, 1, 0, 0, 0, 0]
assert torch.linalg.eigvals(shift).abs().max() < 1e-3

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`gu2022s4d` is the place to begin with time-invariant systems: it is short, and all of S4D is in it.
# {cite:t}`gu2021s4` is where it comes from.
# {cite:t}`gu2023mamba` let the token choose the time step; {cite:t}`dao2024mamba2` is the duality, with the algorithms.
# {cite:t}`sun2023retnet`, {cite:t}`yang2023gated` and {cite:t}`beck2024xlstm` arrive at decays from attention and from
# the LSTM.
# {cite:t}`sieber2024understanding` put all of them in one form, {cite:t}`grazzi2024unlocking` ask what eigenvalues can
# track.
# {cite:t}`wang2025testtime` is where the decays are weights of a regression.
# For what a forgetting factor does to least squares, adaptive filtering has the long answer
# {cite:p}`haykin2002adaptive`.
