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
# # Online learners: gains and step sizes
#
# Every online learner meets a pair, looks at its own error, and writes that error along some vector.
# Which vector, and how large?
#
# Along the key if you cannot afford more; along the key whitened by all keys so far if you can.
# As large as $1/t$ to keep everything, and of constant size to forget.
# This chapter derives five answers to "which", proves what the best of them buys, and shows what happens to it in
# floating point. Then it chooses the step size: for one key, for many keys, and for a world that moves.
# It ends with momentum.

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
    "smoke": {"streams": 32, "mean_streams": 600, "key": 64, "recall_seeds": 16},
    "full": {"streams": 128, "mean_streams": 4000, "key": 128, "recall_seeds": 64},
}[scale]
gains = ttr.ops.gains
delta_net, nlms = ttr.atlas["delta_net"], ttr.atlas["nlms"]
exact = ttr.Design(optimizer=ttr.Exact())
forgetful = ttr.Design(ttr.Decay(), optimizer=ttr.Exact())  # recursive least squares with a decay
generator = torch.Generator().manual_seed(5)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def eye(size):
    return torch.eye(size, dtype=torch.float64, device=device)


def ahead(x):
    """Every token gets what belongs to the next one; the last token's is not used."""
    return x.roll(-1, dims=1)


# %% [markdown]
# ## One form, five gains
#
# The regression is the usual one: a linear map from keys to values, the squared loss, pairs that come one at a time.
# An online learner keeps one matrix, the last map, and corrects it:
#
# ```{math}
# :label: online-eq-form
# S_t = \bar S_t + g_t\, e_t^\top, \qquad e_t = v_t - \bar S_t^\top k_t ,
# ```
#
# where $\bar S_t$ is the old memory, decayed if there is a decay. All that differs is the **gain** $g_t$.
# {doc}`/notebooks/04_delta_rule` introduced this form and proved in {eq}`delta-eq-left` that a write leaves the share
# $1 - k_t^\top g_t$ of its own error. It kept to $g = \beta k$. Here are the others.
#
# | learner | solves at each token | gain $g_t$ | extra state |
# |---|---|---|---|
# | LMS | one gradient step | $\beta k_t$ | none |
# | NLMS | a share $\beta$ of the newest equation | $\beta k_t / (\varepsilon + \lVert k_t\rVert^2)$ | none |
# | implicit | the newest loss plus the squared distance from the last map | $\beta k_t / (1 + \beta \lVert k_t\rVert^2)$ | none |
# | diagonal | a Newton step with the curvature's diagonal | $\beta k_t \oslash (\lambda + p_t)$ | $p_t$: $K$ numbers |
# | RLS | all losses so far | $G_t^{-1} k_t$ | $G_t$: $K^2$ numbers |
#
# **LMS** is the gradient step of {cite:t}`widrow1960adaptive`. Its trouble is a unit:
# $\beta$ has to be compared with $1/\lVert k\rVert^2$.
#
# **NLMS** {cite:p}`nagumo1967learning` measures the step against the key. With $\beta = 1$ it projects onto the
# newest equation, which is the method of {cite:t}`kaczmarz1937angenaherte`.
#
# **The implicit step** takes the gradient at the map where it lands. In other words it solves
#
# ```{math}
# :label: online-eq-proximal
# \begin{aligned}
# S_t &= \arg\min_S\ \tfrac12 \lVert S - \bar S_t\rVert_F^2 + \tfrac{\beta_t}2 \lVert v_t - S^\top k_t\rVert^2 , \\
# (I + \beta_t k_t k_t^\top)\,(S_t - \bar S_t) &= \beta_t k_t\, e_t^\top .
# \end{aligned}
# ```
#
# The second line is the first with its gradient set to zero.
# A matrix of the form $I + \beta k k^\top$ is inverted by the formula of Sherman and Morrison, of which we need one
# line:
#
# ```{math}
# :label: online-eq-sherman
# (I + \beta k k^\top)\, \frac{k}{1 + \beta\lVert k\rVert^2} = k
# \quad\Longrightarrow\quad g_t = \frac{\beta_t k_t}{1 + \beta_t \lVert k_t\rVert^2} .
# ```
#
# The share of the error that is left, $1/(1 + \beta\lVert k\rVert^2)$, is positive for every $\beta$: no step is too
# large. Longhorn {cite:p}`liu2024longhorn` derives its layer from {eq}`online-eq-proximal`; the published layer then
# keeps the diagonal of $k k^\top$ only, so that the state can be scanned channel by channel.
#
# **The diagonal step** scales each channel by what has come through it, $p_t = \sum_{i \le t} \gamma_i^{(t)} k_i \odot k_i$.
# Preconditioned DeltaNet {cite:p}`tumma2026preconditioned` puts such a diagonal in the place of the curvature of
# least squares. At unit keys $\lambda \ge \beta/2$ keeps it stable.
#
# **Recursive least squares** uses the whole curvature, and then there is nothing left to approximate.
#
# ```{prf:theorem} The gain that makes one step exact
# :label: online-thm-rls
# Let $G_t = \Lambda + \sum_{i \le t} k_i k_i^\top$ with $\Lambda$ positive definite, $S_0 = 0$ and $g_t = G_t^{-1} k_t$.
# Then {eq}`online-eq-form` without decay gives at every $t$ the minimiser of
# $\sum_{i \le t} \lVert v_i - S^\top k_i\rVert^2 + \operatorname{tr}(S^\top \Lambda S)$.
# With $P_{t} = G_t^{-1}$, the gain and the inverse cost $O(K^2)$ a token:
#
# $$
# g_t = \frac{P_{t-1} k_t}{1 + k_t^\top P_{t-1} k_t}, \qquad P_t = P_{t-1} - g_t\, k_t^\top P_{t-1} .
# $$
# ```
#
# ```{prf:proof}
# The minimiser solves $G_t S_t = C_t = \sum_{i \le t} k_i v_i^\top$. One pair earlier, $G_{t-1} S_{t-1} = C_{t-1}$. Hence
#
# $$
# G_t S_t = C_{t-1} + k_t v_t^\top = (G_t - k_t k_t^\top)\, S_{t-1} + k_t v_t^\top = G_t S_{t-1} + k_t e_t^\top .
# $$
#
# Divide by $G_t$: $S_t = S_{t-1} + G_t^{-1} k_t\, e_t^\top$.
# For the second part multiply the claimed $P_t$ by $G_t = G_{t-1} + k_t k_t^\top$. With $s = k_t^\top P_{t-1} k_t$
# this is $I + k_t k_t^\top P_{t-1}\,(1 - \frac{1}{1+s} - \frac{s}{1+s}) = I$, the matrix inversion lemma
# {cite:p}`hager1989updating`. Finally $P_t k_t = P_{t-1}k_t\,(1 - \frac{s}{1+s})$, which is the $g_t$ of the recursion.
# ```
#
# So {cite:t}`plackett1950some` had a delta rule that is never behind: after each pair it is where least squares
# would be. {doc}`/notebooks/06_exact_least_squares` computes it without a recursion, in chunks.
#
# ## The gains in ten lines


# %%
def learn(k, v, gain):
    """Every memory on the way: k and gain (batch, time, heads, key) → (batch, time, heads, key, value)."""
    memory, memories = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1]), []
    for t in range(k.shape[1]):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        memory = memory + gain[:, t, ..., None] * error[..., None, :]
        memories.append(memory)
    return torch.stack(memories, dim=1)


def five_gains(k, beta, ridge):
    """Of one head: k (time, key), beta (time, 1), ridge (key,)."""
    length, channels = k.square().sum(-1, keepdim=True), k.square().cumsum(0)
    G = torch.diag(ridge) + (k[:, :, None] * k[:, None, :]).cumsum(0)
    return {
        "LMS": beta * k,
        "NLMS": beta * k / (1e-6 + length),
        "implicit": beta * k / (1 + beta * length),
        "diagonal": beta * k / (ridge + channels),
        "RLS": torch.linalg.solve(G, k),
    }


# %%
q, k, v = randn(1, 60, 1, 8) / 3, randn(1, 60, 1, 8) / 3, randn(1, 60, 1, 4)
beta, ridge = randn(1, 60, 1).sigmoid(), 0.5 + randn(1, 8).square()
by_hand = five_gains(k[0, :, 0], beta[0], ridge[0])
from_package = {
    "LMS": gains.lms(k, beta),
    "NLMS": gains.nlms(k, beta),
    "implicit": gains.implicit(k, beta),
    "diagonal": gains.diagonal_newton(k, beta, ridge)[0],
    "RLS": gains.recursive_least_squares(k, ridge)[0],
}
designs = {
    "LMS": (delta_net, {"step_size": beta}),
    "NLMS": (nlms, {"step_size": beta}),
    "implicit": (ttr.atlas["longhorn"], {"step_size": beta}),
    "diagonal": (
        ttr.atlas["preconditioned_delta_net"],
        {"step_size": beta, "ridge": ridge, "log_decay": torch.zeros_like(beta)},
    ),
    "RLS": (ttr.atlas["recursive_least_squares"], {"ridge": ridge}),
}
for name, gain in by_hand.items():
    assert_close(from_package[name][0, :, 0], gain)
    slow = torch.einsum("bthkv,bthk->bthv", learn(k, v, gain[None, :, None]), q)
    fast, _ = ttr.ops.delta_rule(q, k, v, from_package[name])
    design, inputs = designs[name]
    y, _ = ttr.regress(design, q, k, v, **inputs)
    defined, _ = ttr.oracle.regress(design, q, k, v, **inputs)
    for answers in (fast, y, defined):
        assert_close(answers, slow, rtol=0, atol=1e-10)

# %% [markdown]
# For recursive least squares the oracle knows nothing of gains: it solves a stacked least-squares problem at each
# token. That the last row agrees is {prf:ref}`online-thm-rls`, executed.
#
# ## What the condition number does
#
# Let the task stand still: $v_t = W^\top k_t$ plus independent noise of mean zero. Let keys be independent draws with
# $\mathbb E\, k k^\top = R$, and call the eigenvalues of $R$ the $\lambda_i$ and their largest ratio $\kappa$.
# How fast does a gradient step get to $W$?
#
# ```{prf:theorem} LMS learns each direction at its own pace
# :label: online-thm-lms
# Let $R$ be invertible and $\tilde W_t = S_t - W$ under LMS with constant $\beta$. Then $\mathbb E\, \tilde W_t = (I - \beta R)\,\mathbb E\, \tilde W_{t-1}$,
# so along the $i$-th eigenvector of $R$ the mean error shrinks by $1 - \beta\lambda_i$ a pair.
# From every start it vanishes in the limit exactly if $0 < \beta < 2/\lambda_{\max}$. The worst factor is least at
# $\beta = 2 / (\lambda_{\max} + \lambda_{\min})$, and there it is $(\kappa - 1)/(\kappa + 1)$.
# ```
#
# ```{prf:proof}
# Put $v_t = W^\top k_t + \epsilon_t$ into {eq}`online-eq-form`:
# $\tilde W_t = (I - \beta k_t k_t^\top)\, \tilde W_{t-1} + \beta k_t \epsilon_t^\top$.
# $\tilde W_{t-1}$ depends on earlier tokens only, so expectations multiply, and $\mathbb E\, k_t \epsilon_t^\top = 0$.
# The worst factor is the larger of $\lvert 1 - \beta\lambda_{\max}\rvert$ and $\lvert 1 - \beta\lambda_{\min}\rvert$;
# it is least where both are equal.
# ```
#
# The theorem is about the mean. A single stream also jitters, and for Gaussian keys the jitter limits $\beta$ before
# the mean does.
# At its best step size LMS needs a number of pairs that grows like $\kappa$. Second order does not:
#
# ```{prf:theorem} Recursive least squares does not see the coordinates
# :label: online-thm-invariant
# Replace all keys and queries by $A k$ and $A q$, with $A$ invertible, and the ridge by $A \Lambda A^\top$.
# Recursive least squares gives the same answers.
# ```
#
# ```{prf:proof}
# $G_t$ becomes $A G_t A^\top$ and $C_t$ becomes $A C_t$, so
# $(A q)^\top (A G_t A^\top)^{-1} A C_t = q^\top G_t^{-1} C_t$.
# ```
#
# Choose $A = R^{-1/2}$, and the keys are white. Once the data outweigh the ridge, its own size no longer matters, and
# recursive least squares learns a badly conditioned task as fast as a well conditioned one.
# We check both theorems. For the first we average over many streams, because it is about a mean.

# %%
d, streams, steps, beta, kappa = 8, sizes["mean_streams"], 120, 0.5, 100.0


def spectrum(kappa, d):
    """Eigenvalues in a geometric series with ratio κ from first to last, that sum to one."""
    values = torch.logspace(0, -math.log10(kappa), d, dtype=torch.float64, device=device)
    return values / values.sum()


eigenvalues = spectrum(kappa, d)
keys = eigenvalues.sqrt() * randn(streams, steps, 1, d)
task = torch.ones(d, 1, dtype=torch.float64, device=device)
memories = learn(keys, keys @ task, gains.lms(keys, torch.full_like(keys[..., 0], beta)))
error = (memories - task)[:, :, 0, :, 0]  # along the eigenvectors, which are the channels
predicted = -((1 - beta * eigenvalues) ** torch.arange(1, steps + 1, device=device)[:, None])
deviation = (error.mean(0) - predicted) / (error.std(0) / streams**0.5)
assert deviation.abs().max() < 5  # in standard errors, over all directions and times

A, ridge = randn(d).exp(), torch.full((1, d), 0.1, dtype=torch.float64, device=device)
q, k, v = randn(1, 60, 1, d), randn(1, 60, 1, d), randn(1, 60, 1, 3)
one = torch.ones_like(k[..., 0])
plain, _ = ttr.regress(exact, q, k, v, ridge=ridge)
scaled, _ = ttr.regress(exact, A * q, A * k, v, ridge=A**2 * ridge)
assert_close(scaled, plain)
kaczmarz = [ttr.regress(nlms, a * q, a * k, v, step_size=one)[0] for a in (torch.ones_like(A), A)]
assert (kaczmarz[0] - kaczmarz[1]).norm() > 0.1 * kaczmarz[0].norm()  # first order does see them

# %% [markdown]
# ## Learning curves
#
# Now the race. Keys of $d = 16$ channels are Gaussian with $\operatorname{tr} R = 1$ and $\kappa = 1$ or $100$; values are
# $W^\top k$ with unit mean square, plus noise of standard deviation $\sigma = 0.01$.
# We follow the *excess error*, $\operatorname{tr}(\tilde W_t^\top R\, \tilde W_t)$ relative to $\operatorname{tr}(W^\top R W)$: the
# squared error on a fresh pair, without the noise.
#
# Each learner but the last has a step size. A fair race gives each its best one, so we try a handful, and keep the one
# with the least mean error over pairs 64 to 127. That is a gift to the first-order learners: they choose
# after the race.
#
# At $\kappa = 100$ we run twice, with the eigenvectors of $R$ along the channels and in random directions.
# Only the diagonal learner can tell the difference.

# %%
d, T, V, noise = 16, 1000, 2, 0.01
streams, window, late = sizes["streams"], slice(63, 127), slice(500, None)
candidates = {
    "LMS": [0.1, 0.2, 0.4, 0.7, 1.0, 1.3],
    "NLMS": [0.25, 0.5, 0.75, 1.0, 1.25],
    "implicit": [4.0, 8.0, 16.0, 32.0, 64.0],
    "diagonal": [1.0, 2.0, 4.0, 8.0],
}


def race(kappa, rotated=False):
    """Excess error (stream, time) of each learner at its best step size."""
    eigenvalues = spectrum(kappa, d)
    basis = torch.linalg.qr(randn(streams, d, d)).Q if rotated else eye(d).expand(streams, d, d)
    root = basis * eigenvalues.sqrt()  # root rootᵀ = R, one R a stream
    task = randn(streams, d, V)
    task = task * V**0.5 / (root.mT @ task).flatten(1).norm(dim=1)[:, None, None]
    k = (randn(streams, T, d) @ root.mT)[:, :, None]
    v = k @ task[:, None] + noise * randn(streams, T, 1, V)

    def excess(k, v, gain):
        gap = root.mT[:, None, None] @ (learn(k, v, gain) - task[:, None, None])
        return gap.square().sum((-2, -1)) / V

    curves = {}
    for name, betas in candidates.items():
        heads = len(betas)  # the candidates race side by side, as heads
        beta = k.new_tensor(betas).expand(streams, T, heads)
        keys, values = k.expand(-1, -1, heads, -1), v.expand(-1, -1, heads, -1)
        if name == "diagonal":
            gain, _ = gains.diagonal_newton(keys, beta, (beta[0, 0] / 2)[:, None].expand(-1, d))
        else:
            gain = {"LMS": gains.lms, "NLMS": gains.nlms, "implicit": gains.implicit}[name](keys, beta)
        error = excess(keys, values, gain)
        chosen = error[:, window].mean((0, 1)).argmin()
        # Inside the grid, not at its end; only the implicit step has none, and goes on towards NLMS with β = 1.
        assert 0 < chosen < heads - 1 or name == "implicit"
        curves[name] = error[..., chosen].cpu()
    gain, _ = gains.recursive_least_squares(k, k.new_full((1, d), 1e-4))
    curves["RLS"] = excess(k, v, gain)[..., 0].cpu()
    return curves


round_keys, along_channels, rotated = race(1.0), race(100.0), race(100.0, rotated=True)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Excess error of five gains on a task that stands still, each at its best step size; lines are medians over streams, bands run from the tenth to the ninetieth percentile. Left: round keys. Right: keys with condition number 100. Recursive least squares has the same curve in both panels and falls like one over the number of pairs. The first-order learners are slowed down by the bad conditioning, however their steps are normalised. The diagonal learner gains where the bad directions are channels, and loses that where they are rotated (dash-dotted).", "name": "online-fig-race"}, "image": {"alt": "Two plots of excess error against pairs written, both axes logarithmic. On the left four curves fall together and recursive least squares falls steeply near sixteen pairs. On the right recursive least squares is unchanged; LMS, NLMS, implicit and the rotated diagonal learner stay high for hundreds of pairs; the diagonal learner along the channels lies between."}}
figure, panels = plt.subplots(1, 2, figsize=(10, 4.3), sharey=True)
styles = {"LMS": "-", "NLMS": "--", "implicit": ":", "diagonal": "-.", "RLS": "-"}
shown = torch.unique(torch.logspace(0, 3, 120).round().long())  # evenly on the logarithmic axis
levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
for axes, curves, title in zip(panels, (round_keys, along_channels), ("κ = 1", "κ = 100"), strict=True):
    for number, (name, error) in enumerate(curves.items()):
        low, median, high = error[:, shown - 1].quantile(levels, dim=0)
        color = f"C{number}"
        style = "-" if name == "diagonal" else styles[name]
        axes.plot(shown, median, style, color=color, label=name)
        axes.fill_between(shown, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="pairs written", xscale="log", yscale="log", title=title, ylim=(3e-7, 20))
low, median, high = rotated["diagonal"][:, shown - 1].quantile(levels, dim=0)
panels[1].plot(shown, median, "-.", color="C3", label="diagonal, rotated keys")
panels[1].fill_between(shown, low, high, color="C3", alpha=0.1, linewidth=0)
panels[0].set_ylabel("excess error")
panels[1].legend(fontsize=9, loc="lower left")
plt.show()

# %%
tasks = {"round": round_keys, "channels": along_channels, "rotated": rotated}
early = {task: {name: error[:, window].mean() for name, error in curves.items()} for task, curves in tasks.items()}
for task in tasks:  # second order wins early on every task …
    assert early[task]["RLS"] < min(error for name, error in early[task].items() if name != "RLS") / 50
ratio = early["channels"]["RLS"] / early["round"]["RLS"]
assert 0.7 < ratio < 1.4  # … and does not see the conditioning
for name in ("LMS", "NLMS", "implicit"):
    assert early["channels"][name] > 2.5 * early["round"][name]
assert early["channels"]["diagonal"] < 0.75 * early["channels"]["NLMS"]
assert early["rotated"]["diagonal"] > 0.9 * early["rotated"]["NLMS"]
assert early["round"]["diagonal"] > 1.5 * early["round"]["NLMS"]
assert round_keys["diagonal"][:, late].mean() < round_keys["NLMS"][:, late].mean() / 5  # shrinking steps average
pairs = torch.arange(1, T + 1, dtype=torch.float64)
variance = (round_keys["RLS"] * pairs)[:, late].mean() / (d * noise**2)
assert 0.9 < variance < 1.2  # the textbook's d σ²/t

for task in ("round", "channels"):
    record(f"online_race_{task}_rls_digits", early[task]["RLS"].log10(), atol=0.1)
    record(f"online_race_{task}_nlms", early[task]["NLMS"], rtol=0.1)
record("online_race_channels_diagonal", early["channels"]["diagonal"], rtol=0.1)
record("online_race_rotated_diagonal", early["rotated"]["diagonal"], rtol=0.1)
record("online_race_rls_ratio", ratio, atol=0.1)
record("online_race_variance", variance, atol=0.03)

# %% [markdown]
# Between pairs 64 and 127 NLMS has an excess error of {glue:text}`online_race_round_nlms:.4f` at $\kappa = 1$ and of
# {glue:text}`online_race_channels_nlms:.3f` at $\kappa = 100$.
# The logarithm (base ten) of that of recursive least squares is {glue:text}`online_race_round_rls_digits:.1f` and
# {glue:text}`online_race_channels_rls_digits:.1f`. The ratio of its two errors is
# {glue:text}`online_race_rls_ratio:.2f`, and in the long run its error is
# {glue:text}`online_race_variance:.2f` times $d\sigma^2/t$, which is the variance of least squares with $d$ unknowns.
#
# The diagonal learner is at {glue:text}`online_race_channels_diagonal:.3f` where bad directions are channels and at
# {glue:text}`online_race_rotated_diagonal:.3f` where they are rotated. It owns the cure for a scale, and a scale only.
# On round keys there is nothing to cure, and it is slower than NLMS at first. Later the order turns: its steps shrink
# with the accumulated $p_t$ and average the noise away, while constant steps stay on a floor of noise.
# A layer can help itself: it learns its keys, and can learn to put the bad directions along channels.
#
# ## Regret: no distribution needed
#
# So far keys were draws from a distribution. The theory of online learning asks for less: for *any* sequence, how much
# worse is the learner than the best fixed map, chosen when all pairs are known?
# The difference is the **regret**. Here each error $e_t$ is made before the pair is written.
#
# For convex losses with bounded gradients on a bounded set, gradient steps with $\beta_t \propto 1/\sqrt t$ keep the
# regret below a multiple of $\sqrt T$ {cite:p}`zinkevich2003online`. The
# other strategy is to play the map that would have been best so far, with a penalty on its size:
# *follow the regularised leader* {cite:p}`shalevshwartz2012online`.
# For the squared loss with a ridge that is recursive least squares, and its regret can be written down.
#
# ```{prf:theorem} The regret of following the ridge leader
# :label: online-thm-regret
# For any pairs, with $s_t = k_t^\top g_t$ of recursive least squares without decay,
#
# $$
# \sum_{t \le T} (1 - s_t) \lVert e_t\rVert^2
#   = \min_S \Bigl(\sum_{t \le T} \lVert v_t - S^\top k_t\rVert^2 + \operatorname{tr}(S^\top\Lambda S)\Bigr) .
# $$
#
# So its regret against the minimum on the right is $\sum_t s_t \lVert e_t\rVert^2$, and this is at most
# $\max_t \lVert e_t\rVert^2 \,\log (\det G_T / \det\Lambda)$.
# ```
#
# ```{prf:proof}
# Let $L_t(S)$ be the objective after $t$ pairs and $J_t$ its minimum. $L_{t-1}$ is quadratic with curvature $G_{t-1}$, so
# $L_{t-1}(S_t) = J_{t-1} + \operatorname{tr}\,(S_t - S_{t-1})^\top G_{t-1} (S_t - S_{t-1})$, and
# $S_t - S_{t-1} = g_t e_t^\top$. Add the new term at $S_t$, whose error is $(1 - s_t)\, e_t$:
#
# $$
# J_t = J_{t-1} + \lVert e_t\rVert^2 \bigl(g_t^\top G_{t-1}\, g_t + (1 - s_t)^2\bigr) .
# $$
#
# Since $G_{t-1} = G_t - k_t k_t^\top$ and $G_t g_t = k_t$, the first term is $s_t - s_t^2$. The bracket is $1 - s_t$.
# For the bound, $\det G_{t-1} = (1 - s_t) \det G_t$ by the determinant lemma, and $s \le -\log(1 - s)$.
# ```
#
# For bounded keys $\log\det G_T$ grows like $d \log T$: while errors stay bounded the regret is logarithmic.
# {cite:t}`hazan2007logarithmic` prove such bounds for a wider class of losses, with a Newton step a round.
# The identity holds for nonsense, too. We run it on values that have nothing to do with the keys.

# %%
T, d = 400, 8
k, v = randn(1, T, 1, d) / d**0.5, (7 * randn(1, T, 1, 3)).sin()  # no map will fit these
ridge = torch.full((1, d), 0.5, dtype=torch.float64, device=device)
gain, curvature = gains.recursive_least_squares(k, ridge)
y, _ = ttr.regress(exact, ahead(k), k, v, ridge=ridge)  # at each token, asked for the next key
errors = v - torch.cat([torch.zeros_like(v[:, :1]), y[:, :-1]], dim=1)
share, lost = (k * gain).sum(-1)[0, :, 0], errors.square().sum(-1)[0, :, 0]

rows = torch.cat([k[0, :, 0], ridge[0].sqrt().diag()])  # a ridge is d more pairs, with values of zero
padded = torch.cat([v[0, :, 0], torch.zeros(d, 3, dtype=torch.float64, device=device)])
hindsight = (padded - rows @ torch.linalg.lstsq(rows, padded).solution).square().sum()
regret = lost.sum() - hindsight
bound = lost.max() * (curvature[0, 0].logdet() - ridge[0].log().sum())

assert_close(((1 - share) * lost).sum(), hindsight)
assert_close(regret, (share * lost).sum())
assert regret < bound
record("online_regret_share", regret / hindsight, atol=0.005)
record("online_regret_bound", regret / bound, atol=0.01)

# %% [markdown]
# On this sequence the leader pays {glue:text}`online_regret_share:.3f` of the best fixed map's loss on top of it, and
# its regret is {glue:text}`online_regret_bound:.2f` of the bound.
#
# ## Never carry the inverse
#
# The recursion of {prf:ref}`online-thm-rls` is exact on paper. With a decay, $P$ is divided by $\alpha$ at every token,
# and only directions that keys visit are made smaller again. If the keys span a subspace,
# then along the rest of the space $P_t = \alpha^{-t}/\lambda$. This is **wind-up**.
#
# So far it is the truth, and harmless: no key looks there.
# Rounding ends that. A number of size $\lVert P\rVert$ carries an error of $\lVert P\rVert\,\epsilon$, and the useful part
# of $P$ is of order one. When $\lVert P\rVert$ reaches $1/\epsilon$, it has no correct digit left. Since the growth is known,
# so is the date, about $\log(1/\epsilon) / \log(1/\alpha)$ tokens, *in float64 too*.
# Keeping $G$ and solving with it has no such date: $G$ fades where no key comes, and a ridge that stays fills the hole.


# %%
def carried_inverse(k, v, alpha, lam):
    """Sherman and Morrison with a decay, for a batch of streams: the error of each map, and ‖P‖."""
    P = eye(k.shape[-1]).expand(len(k), -1, -1) / lam
    S, maps, norms = k.new_zeros(len(k), k.shape[-1], v.shape[-1]), [], []
    for t in range(k.shape[1]):
        P, key = P / alpha, k[:, t, :, None]
        gain = P @ key / (1 + key.mT @ P @ key)
        S = S + gain @ (v[:, t, None] - key.mT @ S)
        P = P - gain @ (key.mT @ P)
        maps.append(S)
        norms.append(torch.linalg.matrix_norm(P))
    return torch.stack(maps, dim=1), torch.stack(norms, dim=1)


streams, T, d, alpha, lam = 8, 1000, 16, 0.95, 0.1
subspace = torch.linalg.qr(randn(streams, d, d)).Q[:, : d // 2]  # half of the space, along no axis
k = normalize(randn(streams, T, d // 2), dim=-1) @ subspace
task = randn(streams, d, 4) / 2
v = k @ task + 0.01 * randn(streams, T, 4)
maps, norms = carried_inverse(k, v, alpha, lam)

heads = [x[:, :, None] for x in (ahead(k), k, v)]
log_decay = torch.full_like(heads[1][..., 0], alpha).log()
stays = ttr.Design(ttr.Decay(), optimizer=ttr.Exact(ridge_decays=False))
# A ridge that stays biases every later fit, so it is small.
solved = {"G with a ridge that fades": (forgetful, lam), "G with a ridge that stays": (stays, lam / 1000)}
answers = {"P carried": torch.einsum("btkv,btk->btv", maps, ahead(k))}
for name, (design, number) in solved.items():
    answer, _ = ttr.regress(design, *heads, log_decay=log_decay, ridge=heads[1].new_full((1, d), number))
    answers[name] = answer[:, :, 0]
wrong = {
    name: (answer - ahead(k) @ task)[:, :-1].square().sum(-1).view(streams, T - 1).unfold(1, 9, 9).mean(-1).cpu()
    for name, answer in answers.items()
}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Recursive least squares with a decay, on keys that use half of the space, in float64. Left: the norm of the inverse that Sherman and Morrison's recursion carries, one line a stream, on top of what theory says (dashed); dotted, one over the rounding unit. Right: squared error on the next pair, averaged over nine pairs; lines are medians over streams, bands run from the least to the greatest. The recursion loses its answers when the norm of the inverse has passed one over the rounding unit. Keeping the curvature and solving with it does not, with either ridge; those two curves lie on each other. Dotted: the date by the rule above.", "name": "online-fig-windup"}, "image": {"alt": "Left, a rising straight line on a logarithmic axis that crosses a dotted horizontal line. Right, three flat curves, one of which jumps up by many orders of magnitude some time after the crossing on the left."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
rounding = torch.finfo(torch.float64).eps
time = torch.arange(1, T + 1, dtype=torch.float64)
left.plot(time[::10], norms.cpu().T[::10], color="C0", alpha=0.4, linewidth=1)
left.plot(time, (d / 2) ** 0.5 * alpha**-time / lam, "k--", linewidth=1, label="√(d/2) α⁻ᵗ/λ")
left.axhline(1 / rounding, color="0.4", linestyle=":", label="1/ε")
left.set(xlabel="pairs written", ylabel="‖P‖", yscale="log")
left.legend()
for (name, error), style in zip(wrong.items(), ("-", "-", "--"), strict=True):
    at = 9 * torch.arange(error.shape[1]) + 5
    (line,) = right.plot(at, error.median(0).values, style, label=name)
    right.fill_between(at, error.amin(0), error.amax(0), color=line.get_color(), alpha=0.2, linewidth=0)
right.axvline(-math.log(rounding) / -math.log(alpha), color="0.4", linestyle=":")
right.set(xlabel="pairs written", ylabel="squared error on the next pair", yscale="log")
right.legend(fontsize=9, loc="upper left")
plt.show()

# %%
theory = (d / 2) ** 0.5 * alpha ** -torch.arange(1, T + 1, dtype=torch.float64, device=device) / lam
assert ((norms / theory)[:, 200:600].log().abs() < 0.05).all()  # wind-up is no rounding error …
assert (norms[:, -1] > 1e20).all()
carried, fades, kept = wrong.values()
assert carried[:, 40:50].mean() < 1.5 * kept[:, 40:50].mean()  # … and harmless at first
assert (carried[:, -10:].mean(1) > 30 * kept[:, -10:].mean(1)).all()
assert_close(fades[:, -10:].mean(), kept[:, -10:].mean(), rtol=0.05, atol=0.0)
record("online_windup_digits", norms[:, -1].log10().median(), atol=1.0)
record("online_windup_date", -math.log(rounding) / -math.log(alpha))

# %% [markdown]
# After $1000$ pairs the logarithm (base ten) of $\lVert P\rVert$ is {glue:text}`online_windup_digits:.0f`; the date was
# token {glue:text}`online_windup_date:.0f`.
# Everything in the package keeps $G$.
#
# ## Choosing the step size: one key
#
# Now the second half of the question: how large? Take the simplest stream there is, one unit key again and again.
# Along it {eq}`online-eq-form` is a scalar recursion, $y_t = (1 - \beta_t)\, y_{t-1} + \beta_t v_t$.
#
# - $\beta_t = 1/t$ gives the **running mean** of the values: $t\, y_t = (t - 1)\, y_{t-1} + v_t$.
# - constant $\beta$ gives an **exponentially weighted mean**, $y_t = \sum_{i \le t} \beta (1-\beta)^{t-i} v_i$,
#   over a window of about $1/\beta$ values.
#
# The second is linear attention on values $\beta v_t$ with the decay $\alpha = 1 - \beta$ of {doc}`/notebooks/03_state_space_models`.
# **A constant step size is forgetting without a decay.** The difference is where it forgets: a decay shrinks the whole
# memory, a step forgets along the key that it writes.

# %%
T = 50
key = normalize(randn(1, 1, 1, 8), dim=-1)
k, v = key.expand(1, T, 1, 8), randn(1, T, 1, 3)
one, count = torch.ones_like(k[..., 0]), torch.arange(1, T + 1, dtype=torch.float64, device=device)

averaged, _ = ttr.regress(delta_net, k, k, v, step_size=one / count[:, None])
assert_close(averaged[0, :, 0], v[0, :, 0].cumsum(0) / count[:, None])

beta = 0.2
forgets, _ = ttr.regress(delta_net, k, k, v, step_size=beta * one)
decays, _ = ttr.regress(ttr.Design(ttr.Decay()), k, k, beta * v, log_decay=math.log(1 - beta) * one)
assert_close(forgets, decays)

other = randn(1, 1, 1, 8)
other = other - (other * key).sum() * key  # orthogonal to the key
stored = ttr.State(memory=torch.einsum("bthk,bthv->bhkv", other, v[:, :1]))
_, kept = ttr.regress(delta_net, k, k, v, step_size=beta * one, state=stored)
assert_close(torch.einsum("bhkv,bthk->bthv", kept.memory, other), other.square().sum() * v[:, :1])

# %% [markdown]
# Recursive least squares knows this without being told. With one key, $G_t = \lambda + t$ along it, and its gain is
# $k/(\lambda + t)$: it *is* the running mean.
# What a step size has to be told, the curvature counts.
#
# ## Choosing the step size: many keys
#
# With many keys in $\mathbb R^d$, a write with $\beta$ takes away a share $\beta/d$ of an old pair on average.
# For keys that are uniform on the sphere, the argument of {doc}`/notebooks/04_delta_rule`, with a step size a token,
# says that of pair $i$ the part
#
# ```{math}
# :label: online-eq-retained
# r_i = \beta_i \prod_{j = i+1}^{n} \Bigl(1 - \frac{\beta_j}{d}\Bigr), \qquad r_i = \mathbb E\, v_i^\top S_n^\top k_i
# ```
#
# is retained. Constant steps favour the newest. Is there a schedule that favours nobody?
#
# ```{prf:proposition} A step size that treats all ages alike
# :label: online-prop-equal
# Let $\beta_t = d / (d + t - 1)$. Then all $n$ pairs are retained to the same part, $r_i = d/(d + n - 1)$.
# With $\beta_1 = 1$ no other schedule does that.
# ```
#
# ```{prf:proof}
# $r_i = r_{i+1}$ means $\beta_i (1 - \beta_{i+1}/d) = \beta_{i+1}$. Divide by $\beta_i \beta_{i+1}$:
# $1/\beta_{i+1} = 1/\beta_i + 1/d$. So $1/\beta_t = 1 + (t-1)/d$, and $r_n = \beta_n$.
# ```
#
# At $d = 1$ this is $1/t$, the running mean. In $d$ dimensions the steps stay near one for the first pairs, which
# hardly meet.
# We store $n = 2d$ pairs whose values are words of a codebook of $1024$, ask for all of them at the end, and decode.

# %%
d, seeds, words = sizes["key"], sizes["recall_seeds"], 1024
n = 2 * d
k = normalize(randn(seeds, n, 1, d), dim=-1)
codebook = normalize(randn(seeds, words, d), dim=-1)
stored = torch.stack([torch.randperm(words, generator=generator)[:n] for _ in range(seeds)]).to(device)
v = codebook.gather(1, stored[..., None].expand(-1, -1, d)).unsqueeze(2)
one, age = torch.ones_like(k[..., 0]), torch.arange(n - 1, -1, -1, dtype=torch.float64)


def recall(design, **inputs):
    """What the final memory decodes (0 or 1), retains and gets wrong, for each (seed, pair)."""
    _, state = ttr.regress(design, k, k, v, **inputs)
    answers = torch.einsum("shkv,sthk->stv", state.memory, k)
    decoded = torch.einsum("stv,scv->stc", answers, codebook).argmax(-1)
    retained = (answers * v[:, :, 0]).sum(-1)
    return (decoded == stored).double().cpu(), retained.cpu(), (answers - v[:, :, 0]).square().sum(-1).cpu()


schedule = d / (d + torch.arange(n, dtype=torch.float64, device=device))
by_age = {
    "linear attention": recall(ttr.atlas["linear_attention"]),
    "β = 1": recall(delta_net, step_size=one),
    "β = 0.2": recall(delta_net, step_size=0.2 * one),
    "β = d/(d + t − 1)": recall(delta_net, step_size=schedule[:, None] * one),
}
constant = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2]
by_step = [recall(delta_net, step_size=beta * one) for beta in constant]

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Recall of all of n = 2d pairs. Left: the share decoded to the right word, by age of the pair; means over seeds in bins of d/8 pairs, bands are twice their standard error. Right: over all pairs, against a constant step size, the share decoded and the squared error; bars are twice the standard error over seeds. Horizontal lines: the schedule that treats all ages alike. With step size 1 the delta rule recalls the newest pairs and is worse than linear attention over all of them. The two measures want different constant steps, and the schedule is good at both.", "name": "online-fig-steps"}, "image": {"alt": "Left, accuracy against age: step size one falls from one to near zero, the three others stay high. Right, against step size, accuracy falls from near one to below a half while squared error first falls and then rises, with its minimum near one half; a dashed line for each measure marks the schedule."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
bins = 16
for (name, (hits, _, _)), style in zip(by_age.items(), ("-", "--", ":", "-."), strict=True):
    per_seed = hits.view(seeds, bins, -1).mean(-1)
    mean, spread = per_seed.mean(0), 2 * per_seed.std(0) / seeds**0.5
    (line,) = left.plot(age.view(bins, -1).mean(1) / d, mean, style, label=name)
    left.fill_between(
        age.view(bins, -1).mean(1) / d, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0
    )
left.set(xlabel="age of the pair, in units of d", ylabel="decoded correctly", ylim=(0, 1.05))
left.legend(fontsize=9)
for index, label, color, marker in ((0, "decoded correctly", "C0", "o"), (2, "squared error", "C1", "s")):
    per_seed = torch.stack([result[index].mean(1) for result in by_step])
    right.errorbar(
        constant, per_seed.mean(1), 2 * per_seed.std(1) / seeds**0.5, marker=marker, color=color, label=label, capsize=2
    )
    right.axhline(by_age["β = d/(d + t − 1)"][index].mean(), color=color, linestyle="--", linewidth=1)
right.set(xlabel="constant step size β", ylabel="over all pairs", ylim=(0, None))
right.legend(fontsize=9)
plt.show()

# %%
hits, errors = ({name: result[i].mean(1) for name, result in by_age.items()} for i in (0, 2))
hebbian, full, small, equal = by_age
assert (hits[full] < hits[hebbian] - 0.2).all()  # in every seed
assert hits[small].mean() > hits[full].mean() + 0.3
assert hits[equal].mean() > hits[hebbian].mean() - 0.05
assert errors[equal].mean() < min(result[2].mean() for result in by_step)  # less than at any constant step

retained = by_age[equal][1]
deviation = (retained.mean(0) - d / (d + n - 1)) / (retained.std(0) / seeds**0.5)
assert deviation.square().mean() < 1.7  # the proposition: one, up to chance
decoded_best = max(range(len(constant)), key=lambda i: by_step[i][0].mean())
error_best = min(range(len(constant)), key=lambda i: by_step[i][2].mean())
assert constant[decoded_best] < constant[error_best] < 1

record("online_recall_hebbian", hits[hebbian].mean(), atol=0.02)
record("online_recall_full", hits[full].mean(), atol=0.03)
record("online_recall_small", hits[small].mean(), atol=0.02)
record("online_recall_equal", hits[equal].mean(), atol=0.02)
record("online_recall_error_equal", errors[equal].mean(), atol=0.02)
record("online_recall_error_constant", by_step[error_best][2].mean(), atol=0.02)
record("online_recall_error_hebbian", errors[hebbian].mean(), rtol=0.02)

# %% [markdown]
# With $\beta = 1$ the delta rule decodes {glue:text}`online_recall_full:.2f` of all pairs, linear attention
# {glue:text}`online_recall_hebbian:.2f`, and $\beta = 0.2$ decodes {glue:text}`online_recall_small:.2f`.
# A step of 1 is right for the newest equation, and past $n = d$ it has to break old ones to get there.
#
# The schedule decodes {glue:text}`online_recall_equal:.2f`, with a squared error of
# {glue:text}`online_recall_error_equal:.2f`. The best constant step has
# {glue:text}`online_recall_error_constant:.2f`, linear attention {glue:text}`online_recall_error_hebbian:.2f`.
# Nothing about the architecture changed; the memory only counted its pairs.
#
# So why do layers learn $\beta_t$ from the token? Because they do not want all pairs alike.
# A schedule knows how many pairs have come. Only the token knows whether it matters.
#
# ## When the world moves
#
# A mean over everything is right for a world that stands still. Let it move: $W_t = W_{t-1} + \Delta_t$ with
# independent steps of mean zero. Now a small $\beta$ lags behind and a large one follows the noise.
#
# ```{prf:proposition} The best constant step
# :label: online-prop-drift
# Let keys be independent and uniform on the unit sphere of $\mathbb R^d$, $v_t = W_t^\top k_t + \epsilon_t$ with
# $\mathbb E \lVert\epsilon_t\rVert^2 = \sigma^2$ and $\mathbb E\lVert\Delta_t\rVert_F^2 = \rho^2$, all independent.
# In the long run the delta rule with $0 < \beta < 2$ has the excess error
#
# $$
# \mathbb E\lVert (S_{t-1} - W_t)^\top k_t\rVert^2 = \frac{\beta^2\sigma^2 + \rho^2}{\beta\,(2 - \beta)}, \qquad
# \text{least at}\quad \beta^\star = \frac{\sqrt{\rho^4 + 4\rho^2\sigma^2} - \rho^2}{2\sigma^2} .
# $$
# ```
#
# ```{prf:proof}
# Let $a_t = \mathbb E\lVert S_{t-1} - W_t\rVert_F^2$. For a fresh uniform key the error on it is $a_t / d$.
# The write maps $S_{t-1} - W_t$ to $(I - \beta k_t k_t^\top)(S_{t-1} - W_t) + \beta k_t\epsilon_t^\top$, with mean square
# $(1 - (2\beta - \beta^2)/d)\, a_t + \beta^2\sigma^2$. The drift adds $\rho^2$. At rest,
# $a\,(2\beta - \beta^2)/d = \beta^2\sigma^2 + \rho^2$. The derivative of the quotient vanishes where
# $\sigma^2\beta^2 + \rho^2\beta - \rho^2 = 0$.
# ```
#
# For slow drift $\beta^\star \approx \rho/\sigma$: the ratio of how far the world moves to how badly you see it.
# For fast drift $\beta^\star \to 1$. It is never above 1.
#
# Does second order help here as well? Recursive least squares forgets with its decay, over $1/(1-\alpha)$ pairs, and the
# delta rule over $d/\beta$. We give both the same memory length and compare. The other kind of motion is a **switch**:
# $W$ stays for a segment of $128$ pairs, and is then drawn anew. The oracle is least squares that is told when.

# %%
d, V, streams = 16, 4, sizes["streams"] // 2
segments, segment = 8, 128
T = segments * segment
tasks = (randn(streams, segments, d, V) / d**0.5).repeat_interleave(segment, dim=1)
k = randn(streams, T, 1, d)
v = torch.einsum("stkv,sthk->sthv", tasks, k) + 0.01 * randn(streams, T, 1, V)
one, ridge = torch.ones_like(k[..., 0]), k.new_full((1, d), 1e-2)


def next_error(design, k, v, **inputs):
    """Squared error on each pair before it is written, (stream, time)."""
    y, _ = ttr.regress(design, ahead(k), k, v, **inputs)
    y = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
    return ((v - y).square().sum(-1)[..., 0] / V).cpu()


k_alone, v_alone = (x.reshape(streams * segments, segment, 1, -1) for x in (k, v))
switching = {
    "RLS, no decay": next_error(exact, k, v, ridge=ridge),
    "RLS, α = 0.9": next_error(forgetful, k, v, ridge=ridge, log_decay=math.log(0.9) * one),
    "NLMS, β = 1": next_error(nlms, k, v, step_size=one),
    "RLS, told of switches": next_error(exact, k_alone, v_alone, ridge=ridge).view(streams, T),
}

# %%
T, sigma = 1200, 0.3
lengths = torch.tensor([10.0, 16, 25, 40, 64, 100, 160, 250])  # how many pairs are remembered
unit = normalize(randn(streams, T, 1, d), dim=-1)
one = torch.ones_like(unit[..., 0])
noises, steps = sigma * randn(streams, T, 1, V) / V**0.5, randn(streams, T, d, V) / (d * V) ** 0.5
drifting = {}
for rho in (0.03, 0.1, 0.3):
    clean = torch.einsum("stkv,sthk->sthv", (rho * steps).cumsum(1), unit)

    def excess(design, rho=rho, clean=clean, **inputs):
        y, _ = ttr.regress(design, ahead(unit), unit, clean + noises, **inputs)
        return (y[:, :-1] - clean[:, 1:])[:, T // 4 :].square().sum((-2, -1)).mean(1).cpu()

    first = [excess(delta_net, step_size=d / length * one) for length in lengths.to(device)]
    second = [excess(forgetful, ridge=ridge, log_decay=(1 - 1 / length).log() * one) for length in lengths.to(device)]
    drifting[rho] = torch.stack(first), torch.stack(second)  # (length, stream)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: the task is drawn anew every 128 pairs; squared error on the next pair by its position in the segment, the first segment left out; means over streams and segments, bands are twice the standard error over streams. Without a decay recursive least squares averages over tasks that are gone. With a decay it lets go of the old task about as slowly as a normalised gradient step at first, and then settles far lower; neither is as quick as being told. Right: slow, middle and fast random-walk drift (bottom to top). Excess error against the length of the memory; bars, hardly larger than the line, are twice the standard error over streams; dashed, the proposition. At their best lengths first and second order are nearly equal.", "name": "online-fig-motion"}, "image": {"alt": "Left, squared error against position in the segment on a logarithmic axis; three curves fall, fastest the one that is told, while recursive least squares without decay stays near one. Right, three U-shaped pairs of curves against memory length; the minimum moves to shorter lengths for faster drift, and circles and squares nearly coincide."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
for (name, error), style in zip(switching.items(), ("-", "--", "-.", ":"), strict=True):
    inside = error.view(streams, segments, segment)[:, 1:].mean(1)
    mean, spread = inside.mean(0), 2 * inside.std(0) / streams**0.5
    (line,) = left.plot(range(1, segment + 1), mean, style, label=name)
    left.fill_between(
        range(1, segment + 1), (mean - spread).clamp_min(1e-5), mean + spread, color=line.get_color(), alpha=0.15,
        linewidth=0,
    )  # fmt: skip
left.set(xlabel="pair in the segment", ylabel="squared error on the next pair", yscale="log", ylim=(5e-5, 30))
left.legend(fontsize=9, loc="upper center", ncols=2)
for rho, errors in drifting.items():
    for error, color, marker, name in zip(errors, ("C0", "C1"), "os", ("delta rule", "RLS with decay"), strict=True):
        bars = 2 * error.std(1) / streams**0.5
        label = name if rho == 0.1 else None
        right.errorbar(lengths, error.mean(1), bars, color=color, marker=marker, markersize=4, label=label, capsize=2)
    beta = d / lengths
    theory = (beta**2 * sigma**2 + rho**2) / (beta * (2 - beta))
    right.plot(lengths, theory, "k--", linewidth=1, zorder=3, label="proposition" if rho == 0.1 else None)
right.set(xlabel="pairs remembered, d/β or 1/(1−α)", ylabel="excess error", xscale="log", yscale="log")
right.legend(fontsize=9)
plt.show()

# %%
mean = {name: error.mean() for name, error in switching.items()}
fixed, decayed, first_order, told = mean.values()
assert told < decayed < fixed / 3
assert told < first_order < fixed / 3
assert decayed < 1.1 * first_order
settled = {name: error.view(streams, segments, segment)[..., 64:].mean() for name, error in switching.items()}
assert settled["RLS, α = 0.9"] < settled["NLMS, β = 1"] / 3
record("online_switch_settled", settled["RLS, α = 0.9"] / settled["NLMS, β = 1"], atol=0.01)
for name, value in zip(("fixed", "decay", "nlms", "told"), mean.values(), strict=True):
    record(f"online_switch_{name}", value, rtol=0.05)

advantage = []
for rho, (first, second) in drifting.items():
    beta = (d / lengths).double()
    theory = (beta**2 * sigma**2 + rho**2) / (beta * (2 - beta))
    usable = beta <= 1  # (β = 1.6 is allowed, and noisy)
    assert ((first.mean(1) / theory)[usable] - 1).abs().max() < 0.2
    best = ((rho**4 + 4 * rho**2 * sigma**2) ** 0.5 - rho**2) / (2 * sigma**2)
    assert theory.min() >= (best**2 * sigma**2 + rho**2) / (best * (2 - best))
    advantage.append(first.mean(1).min() / second.mean(1).min())
assert min(advantage) > 0.85  # small, of either sign: no claim
assert max(advantage) < 1.6
for speed, value in zip(("slow", "middle", "fast"), advantage, strict=True):
    record(f"online_drift_{speed}", value, atol=0.1)

# %% [markdown]
# Over all segments the squared error is {glue:text}`online_switch_fixed:.2f` without a decay,
# {glue:text}`online_switch_decay:.2f` with one, {glue:text}`online_switch_nlms:.2f` for NLMS and
# {glue:text}`online_switch_told:.2f` for the oracle.
# An exact learner fails if it remembers what is no longer true.
# The means of the two learners that forget are close because the first pairs after a switch dominate them. In the second
# half of the segments the error of least squares is {glue:text}`online_switch_settled:.2f` of that of NLMS.
#
# Under drift, the best error of the delta rule over the best of recursive least squares is
# {glue:text}`online_drift_slow:.2f`, {glue:text}`online_drift_middle:.2f` and {glue:text}`online_drift_fast:.2f` for the
# three speeds. That is close to one, and we claim nothing from it.
# These keys are round. Second order pays for bad conditioning, and here there is none.
# What pays under drift is the right length, for either learner.
#
# ## Momentum
#
# One more way to use old errors: let corrections go on. Momentum DeltaNet {cite:p}`huang2026mdn` carries
# $M_t = \eta M_{t-1} + g_t e_t^\top$ and sets $S_t = \bar S_t + M_t$, the heavy ball of {cite:t}`polyak1964some`.
# Take expectations as in {prf:ref}`online-thm-lms`, with $g = \beta k$ and no decay. Along an eigenvector with eigenvalue
# $\lambda$, error $w$ and momentum $m$ obey
#
# ```{math}
# :label: online-eq-block
# \begin{pmatrix} w_t \\ m_t \end{pmatrix}
# = \begin{pmatrix} 1 - \beta\lambda & \eta \\ -\beta\lambda & \eta \end{pmatrix}
#   \begin{pmatrix} w_{t-1} \\ m_{t-1} \end{pmatrix},
# \qquad w_t = (1 + \eta - \beta\lambda)\, w_{t-1} - \eta\, w_{t-2} .
# ```
#
# The block has determinant $\eta$ and trace $1 + \eta - \beta\lambda$.
# Its eigenvalues are complex where the trace squared is below $4\eta$, and then *all* have modulus $\sqrt\eta$: over a whole range of
# $\lambda$, every direction learns at the same pace. They stay inside the unit circle while $\beta\lambda < 2 (1 + \eta)$.
# With the best choice the worst factor goes from $(\kappa - 1)/(\kappa + 1)$ to $(\sqrt\kappa - 1)/(\sqrt\kappa + 1)$.
#
# That is a statement about the mean. A stream has one noisy gradient a token, and momentum averages gradients that were
# taken at different places. Does it help there?


# %%
def modulus(step, eta):
    """The larger modulus of the block's eigenvalues, for step = βλ."""
    half = (1 + eta - step) / 2  # half of the trace; the determinant is eta
    root = (half**2 - eta + 0j).sqrt()
    return torch.maximum((half + root).abs(), (half - root).abs())


def heavy_ball(k, v, beta, eta):
    """Every memory on the way, for one step size a head: beta and eta (heads,)."""
    memory = momentum = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    memories = []
    for t in range(k.shape[1]):
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        step = torch.einsum("h,bhk,bhv->bhkv", beta, k[:, t], error)
        momentum = eta[:, None, None] * momentum + step
        memory = memory + momentum
        memories.append(memory)
    return torch.stack(memories, dim=1)


inertias, effective, T, d = [0.0, 0.5, 0.8], [0.2, 0.35, 0.5, 0.7, 1.0], 200, 16
streams = 2 * sizes["streams"]
eta, total = (x.flatten() for x in torch.meshgrid(torch.tensor(inertias), torch.tensor(effective), indexing="ij"))
eta, total = eta.double().to(device), total.double().to(device)
eigenvalues = spectrum(100.0, d)
k = (eigenvalues.sqrt() * randn(streams, T, 1, d)).expand(-1, -1, len(eta), -1)
task = randn(streams, 1, 1, d, V)
task = task * (V / (eigenvalues[:, None] * task.square()).sum((-2, -1), keepdim=True)).sqrt()
v = torch.einsum("bxykv,bthk->bthv", task, k)
memories = heavy_ball(k, v, total * (1 - eta), eta)
moved = (eigenvalues[:, None] * (memories - task).square()).sum((-2, -1)) / V  # excess error
momentum_error = moved[:, window].mean(1).view(streams, len(inertias), len(effective)).cpu()

y, _ = ttr.regress(
    ttr.atlas["momentum_delta_net"],
    k,
    k,
    v,
    step_size=(total * (1 - eta)).expand(streams, T, -1),
    log_momentum=eta.clamp_min(1e-30).log().expand(streams, T, -1),
    log_decay=torch.zeros_like(k[..., 0]),
)
assert_close(y, torch.einsum("bthkv,bthk->bthv", memories, k))

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: factor by which the mean error along an eigenvector shrinks a pair. Momentum makes it flat over a range of eigenvalues (where the eigenvalues of the block are complex), and stable for larger steps. Right: what a stream gets of it. Excess error at pairs 64 to 127 at condition number 100, against the effective step size; means over streams, bars are twice the standard error. At equal effective step size momentum changes little.", "name": "online-fig-momentum"}, "image": {"alt": "Left, three curves of modulus against beta lambda: a V shape without momentum, and curves with a flat part at the square root of eta with momentum. Right, three nearly coinciding falling curves of error against effective step size that part at the largest steps."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
step = torch.linspace(0, 4, 401, dtype=torch.float64)
for number, (inertia, style) in enumerate(zip(inertias, ("-", "--", ":"), strict=True)):
    left.plot(step, modulus(step, inertia), style, label=f"η = {inertia:g}")
    per_stream = momentum_error[:, number]
    bars = 2 * per_stream.std(0) / streams**0.5
    right.errorbar(effective, per_stream.mean(0), bars, linestyle=style, marker="os^"[number], markersize=4, capsize=2)
left.axhline(1, color="0.5", linewidth=1)
left.set(xlabel="βλ", ylabel="modulus of the slower eigenvalue", ylim=(0, 1.6))
left.legend()
right.set(xlabel="effective step size, β/(1−η)", ylabel="excess error", yscale="log")
plt.show()

# %%
for inertia in inertias:
    stable = modulus(step[1:], inertia) < 1 - 1e-9
    assert (stable == (step[1:] < 2 * (1 + inertia) - 1e-6)).all()
    turning = (1 + inertia - step) ** 2 < 4 * inertia - 1e-6
    assert_close(modulus(step, inertia)[turning], torch.full_like(step[turning], inertia**0.5))
best = momentum_error.mean(0).amin(1)  # over step sizes, for each η
assert 0.75 < best[1] / best[0] < 1.3
assert best[2] / best[0] > 0.85
record("online_momentum_half", best[1] / best[0], atol=0.15)
record("online_momentum_more", best[2] / best[0], atol=0.15)

# %% [markdown]
# Each at its best step size in this grid, the error with momentum over that without is
# {glue:text}`online_momentum_half:.2f` for $\eta = 0.5$ and {glue:text}`online_momentum_more:.2f` for $\eta = 0.8$. The acceleration that the mean promises is not there.
# With one sample a token, the limit is what a single pair can say, and inertia adds no information.
# It may still help where gradients are averages over many pairs, as in the batches of
# {doc}`/notebooks/07_neural_memories`, or where $\eta_t$ and $\beta_t$ are learned.
#
# ## Limits
#
# ````{admonition} Where the online learners meet their neighbours
# :class: tip
# 1. $\beta \to 0$, answers over $\beta$: linear attention, from LMS and from the implicit step.
# 2. Implicit with $\beta \to \infty$: NLMS with $\beta = 1$, Kaczmarz' projection.
# 3. Orthonormal keys: RLS with $\lambda \to 0$, NLMS and LMS with $\beta = 1$ agree.
# 4. One channel a key: the diagonal learner with $\beta = 1$ is RLS.
# 5. $\eta \to 0$: momentum is the delta rule.
# ````

# %%
print(*delta_net.limits(), *ttr.atlas["momentum_delta_net"].limits(), sep="\n")
q, k, v = randn(1, 16, 1, 16), randn(1, 16, 1, 16), randn(1, 16, 1, 4)
one, tiny = torch.ones_like(k[..., 0]), k.new_full((1, 16), 1e-8)
longhorn, diagonal = ttr.atlas["longhorn"], ttr.Design(optimizer=ttr.GradientDescent(ttr.DiagonalNewton()))
summed, _ = ttr.regress(ttr.atlas["linear_attention"], q, k, v)
for design in (delta_net, longhorn):
    y, _ = ttr.regress(design, q, k, v, step_size=1e-9 * one)
    assert_close(1e9 * y, summed, rtol=1e-5, atol=1e-5)

y, _ = ttr.regress(longhorn, q, k, v, step_size=1e9 * one)
projected, _ = ttr.regress(nlms, q, k, v, step_size=one)
assert_close(y, projected, rtol=1e-5, atol=1e-5)

orthonormal = torch.linalg.qr(randn(16, 16)).Q[None, :, None]
solved, _ = ttr.regress(exact, q, orthonormal, v, ridge=tiny)
for design in (delta_net, nlms):
    y, _ = ttr.regress(design, q, orthonormal, v, step_size=one)
    assert_close(y, solved, rtol=1e-4, atol=1e-4)

channel = torch.randint(0, 4, (16,), generator=generator)
one_hot = eye(16)[channel][None, :, None]  # channels come again
y, _ = ttr.regress(diagonal, q, one_hot, v, step_size=one, ridge=tiny)
solved, _ = ttr.regress(exact, q, one_hot, v, ridge=tiny)
assert_close(y, solved)

still = {"log_momentum": -1e3 * one, "log_decay": 0 * one, "step_size": one / 16}
y, _ = ttr.regress(ttr.atlas["momentum_delta_net"], q, k, v, **still)
corrected, _ = ttr.regress(delta_net, q, k, v, step_size=one / 16)
assert_close(y, corrected)

# %% [markdown]
# ## Exercises
#
# ```{exercise} Units
# :label: online-exercise-units
# Multiply each channel of keys and queries by a number of its own.
# How must the ridge of the diagonal learner change for its answers to stay? Does the same work for a rotation?
# ```
#
# ```{solution-start} online-exercise-units
# :class: dropdown
# ```
#
# With $k' = a \odot k$ and $\lambda' = a \odot a \odot \lambda$ the gain becomes $g' = g \oslash a$.
# By induction $S' = \operatorname{Diag}(a)^{-1} S$, so errors and answers stay.
# A rotation mixes channels: $\sum (Ak) \odot (Ak)$ is not a function of $\sum k \odot k$, and the answers change.

# %%
q, k, v = randn(1, 40, 1, 8), normalize(randn(1, 40, 1, 8), dim=-1), randn(1, 40, 1, 3)
one, ridge = torch.ones_like(k[..., 0]), k.new_full((1, 8), 1.0)
scales, rotation = randn(8).exp(), torch.linalg.qr(randn(8, 8)).Q
plain, _ = ttr.regress(diagonal, q, k, v, step_size=one, ridge=ridge)
scaled, _ = ttr.regress(diagonal, scales * q, scales * k, v, step_size=one, ridge=scales**2 * ridge)
assert_close(scaled, plain)
turned, _ = ttr.regress(diagonal, q @ rotation, k @ rotation, v, step_size=one, ridge=ridge)
assert (turned - plain).norm() > 0.01 * plain.norm()

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A filter for a walk
# :label: online-exercise-kalman
# Recursive least squares with a decay forgets in proportion: $\bar P = P / \alpha$.
# If every entry of $W$ takes independent steps of variance $q$ and each value has noise of variance $r$, doubt grows by
# addition instead: $\bar P = P + q I$. Then $g = \bar P k / (r + k^\top \bar P k)$ and $P = \bar P - g k^\top \bar P$ is
# the Kalman filter. Write it as a gain for `ttr.ops.delta_rule`, run it on keys with $\kappa = 100$, and
# compare with NLMS and with decaying least squares at their best settings. Does it wind up?
# ```
#
# ```{solution-start} online-exercise-kalman
# :class: dropdown
# ```
#
# The gain depends on keys only, so it can be computed beforehand.
# Doubt along unvisited directions grows linearly in $t$ here, not exponentially, so the date of the last digit is far away.
# For this model the filter is optimal among linear learners, and with bad conditioning the margin over one global
# forgetting factor shows: directions that are seldom excited should be forgotten more slowly.


# %%
def kalman_gain(k, q, r):
    P, collected = eye(k.shape[-1]).expand(len(k), -1, -1), []
    for t in range(k.shape[1]):
        P, key = P + q * eye(k.shape[-1]), k[:, t, 0, :, None]
        gain = P @ key / (r + key.mT @ P @ key)
        P = P - gain @ (key.mT @ P)
        collected.append(gain[..., 0])
    return torch.stack(collected, dim=1)[:, :, None]


streams, T, d, walk, noise = 16, 600, 8, 1e-4, 0.1
k = spectrum(100.0, d).sqrt() * randn(streams, T, 1, d)
W = randn(streams, 1, d, 1) + (walk**0.5 * randn(streams, T, d, 1)).cumsum(1)
clean = torch.einsum("btkv,bthk->bthv", W, k)
v, one = clean + noise * randn(streams, T, 1, 1), torch.ones_like(k[..., 0])


def tail(y):
    return (y[:, :-1] - clean[:, 1:])[:, T // 3 :].square().mean()


kalman = tail(ttr.ops.delta_rule(ahead(k), k, v, kalman_gain(k, walk, noise**2))[0])
first = min(tail(ttr.regress(nlms, ahead(k), k, v, step_size=b * one)[0]) for b in (0.02, 0.05, 0.1, 0.2, 0.4))
ridge = k.new_full((1, d), 1e-2)
second = min(
    tail(ttr.regress(forgetful, ahead(k), k, v, ridge=ridge, log_decay=math.log(a) * one)[0])
    for a in (0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
)
assert kalman < min(first, second)
record("online_kalman_first", kalman / first, atol=0.1)
record("online_kalman_second", kalman / second, atol=0.1)

# %% [markdown]
# Its error is {glue:text}`online_kalman_first:.2f` of that of NLMS and {glue:text}`online_kalman_second:.2f` of that of
# least squares with the best decay.
#
# ```{solution-end}
# ```
#
# ```{exercise} Tune the heavy ball
# :label: online-exercise-ball
# Eigenvalues lie in $[\mu, L]$. Choose $\beta$ and $\eta$ in {eq}`online-eq-block` such that both ends are just at the edge
# of the complex range, and show that the worst factor is $(\sqrt\kappa - 1)/(\sqrt\kappa + 1)$.
# ```
#
# ```{solution-start} online-exercise-ball
# :class: dropdown
# ```
#
# The edges are $1 + \eta - \beta\lambda = \pm 2\sqrt\eta$, that is $\beta\lambda = (1 \mp \sqrt\eta)^2$.
# So $\sqrt{\beta\mu} = 1 - \sqrt\eta$ and $\sqrt{\beta L} = 1 + \sqrt\eta$. Add: $\sqrt\beta = 2/(\sqrt L + \sqrt\mu)$.
# Divide: $\sqrt\eta = (\sqrt\kappa - 1)/(\sqrt\kappa + 1)$, and between the edges the modulus is $\sqrt\eta$.

# %%
mu, L = 0.01, 1.0
root = (math.sqrt(L / mu) - 1) / (math.sqrt(L / mu) + 1)
beta = 4 / (math.sqrt(L) + math.sqrt(mu)) ** 2
factor = modulus(beta * torch.linspace(mu, L, 101, dtype=torch.float64), root**2)
assert_close(factor, torch.full_like(factor, root), rtol=0, atol=1e-6)
plain = (L / mu - 1) / (L / mu + 1)
record("online_ball_speed", math.log(root) / math.log(plain), rtol=1e-3)

# %% [markdown]
# In the mean, one pair with momentum is then worth {glue:text}`online_ball_speed:.1f` pairs without, at $\kappa = 100$.
#
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`haykin2002adaptive` has all of these gains, their convergence in mean square and their numerics.
# {cite:t}`widrow1960adaptive`, {cite:t}`nagumo1967learning` and {cite:t}`plackett1950some` are the sources.
# {cite:t}`shalevshwartz2012online` is the place to learn about regret; {cite:t}`zinkevich2003online` and
# {cite:t}`hazan2007logarithmic` have the two rates.
# {cite:t}`liu2024longhorn` make the implicit step a layer, {cite:t}`tumma2026preconditioned` the diagonal one,
# {cite:t}`huang2026mdn` momentum; {cite:t}`behrouz2025titans` put momentum on deeper memories.
# {cite:t}`wang2025testtime` set all of this side by side.
