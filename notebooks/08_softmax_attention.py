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
# # Softmax attention
#
# Attention keeps every pair it has read and answers with a weighted mean of the values.
# It has no state of fixed size and no weights that change while it reads.
# What does softmax attention fit?
#
# A constant, fitted anew for every query, to the pairs whose keys are near the query.
# Statisticians have had it since 1964 and call it kernel smoothing.
# This chapter derives it, asks which kernel a dot product is, and finds that it gives long keys an extra weight.
# Normalising queries and keys removes that weight.
# Then the temperature turns out to be a bandwidth, and we compute and measure which bandwidth is best.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import logging
import math
import warnings

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
sizes = {
    "smoke": {
        "recall": {"key": 32, "pairs": 256, "draws": 24},
        "smoothing": {"pairs": [64, 128, 256, 512, 1024], "draws": 24, "queries": 64},
        "switch": {"length": 512, "streams": 48, "memory": 48},
        "training": {"d_model": 32, "batch_size": 32, "num_train": 150, "seeds": 3},
    },
    "full": {
        "recall": {"key": 64, "pairs": 1024, "draws": 64},
        "smoothing": {"pairs": [64, 256, 1024, 4096, 16384], "draws": 64, "queries": 256},
        "switch": {"length": 4096, "streams": 64, "memory": 256},
        "training": {"d_model": 64, "batch_size": 64, "num_train": 300, "seeds": 8},
    },
}[scale]
softmax_attention, qk_norm_attention = ttr.atlas["softmax_attention"], ttr.atlas["qk_norm_attention"]
generator = torch.Generator().manual_seed(8)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def unit(*shape):
    """Independent directions, uniform on the unit sphere of the last axis."""
    return normalize(randn(*shape), dim=-1)


# %% [markdown]
# ## A constant for every query
#
# The regression of this book minimises $\sum_i \gamma_i \lVert v_i - m(k_i)\rVert^2$.
# So far the weights $\gamma_i$ knew the time at which a pair was read, and the regressor $m$ was a linear map.
# Now let the weights know the query, and let the regressor be the simplest one there is, a constant:
#
# ```{math}
# :label: soft-eq-local-constant
# y_t = \operatorname*{arg\,min}_{c} \tfrac12 \sum_{i \le t} w_{ti}\, \lVert v_i - c \rVert^2,
# \qquad w_{ti} = \kappa(q_t, k_i) \ge 0 .
# ```
#
# The gradient in $c$ is $\sum_i w_{ti} (c - v_i)$. It vanishes at the weighted mean:
#
# ```{math}
# :label: soft-eq-nadaraya-watson
# y_t = \sum_{i \le t} p_{ti}\, v_i, \qquad p_{ti} = \frac{w_{ti}}{\sum_{j \le t} w_{tj}} .
# ```
#
# This is the estimator of {cite:t}`nadaraya1964estimating` and {cite:t}`watson1964smooth`.
# With $\kappa(q, k) = e^{q^\top k / h^2}$, $h$ the *bandwidth*, the $p_{ti}$ are a softmax, and
# {eq}`soft-eq-nadaraya-watson` is the attention of {cite:t}`vaswani2017attention`.
# {cite:t}`tsai2019transformer` read attention as a kernel smoother, and {cite:t}`wang2025testtime` as a point among
# regressions:
#
# | choice | softmax attention |
# |---|---|
# | weights | a kernel $\kappa(q_t, k_i)$ of query and key |
# | regressor | constants |
# | optimizer | exact: a mean needs no iteration |
#
# A constant looks like a poor model. It is fitted anew for every query, though, and $\kappa$ decides to which pairs.
# The whole of the model is in the kernel.
#
# ## Ten lines
#
# The function below takes any similarity and any further log-weight, such as a decay.
# To make the regression visible, it solves a least-squares problem with one column of ones.


# %%
def smoother(q, k, v, similarity, bandwidth=1.0, log_weight=None):
    """Local constant regression for one head: q and k (time, key), v (time, value)."""
    outputs = []
    for t in range(len(q)):
        log_w = similarity(q[t], k[: t + 1]) / bandwidth**2
        if log_weight is not None:
            log_w = log_w + log_weight[t, : t + 1]
        root = (log_w - log_w.max()).div(2).exp()[:, None]  # √w, to a common factor that cancels
        outputs.append(torch.linalg.lstsq(root, root * v[: t + 1]).solution[0])  # one column: a constant
    return torch.stack(outputs)


def dot(q, k):
    return k @ q


def gaussian(q, k):
    return -(q - k).square().sum(-1) / 2


# %% [markdown]
# The package computes the same for all heads at once, and calls torch's own attention where that exists.
# Its convention has no hidden scale: the bandwidth $h$ stands in the design, and torch's `scale` is $1/h^2$.

# %%
h = 1.3
q, k, v = randn(2, 60, 3, 8), randn(2, 60, 3, 8), randn(2, 60, 3, 5)
one_head = tuple(x[0, :, 0] for x in (q, k, v))


def local_constant(weights):
    return ttr.Design(weights, ttr.LocalPolynomial(0), ttr.Exact())


design = local_constant(ttr.Kernel(bandwidth=h))
assert design.name == softmax_attention.name == "Softmax attention"
y, _ = ttr.regress(design, q, k, v)
assert_close(y[0, :, 0], smoother(*one_head, dot, h))

fast = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=h**-2)
assert_close(y, fast.transpose(1, 2))

# %% [markdown]
# ## Which kernel is a dot product?
#
# A kernel should say how near a key is to the query.
# The Gaussian $e^{-\lVert q - k\rVert^2 / 2h^2}$ says that.
# The dot product does not: a long key has a large dot product with many queries, near or not.
# The difference is one factor.
#
# ```{prf:proposition} The weight inside the dot product
# :label: soft-proposition-identity
# For all $q$, $k$ and $h > 0$
#
# $$
# e^{q^\top k / h^2} = e^{-\lVert q - k\rVert^2 / 2h^2} \cdot e^{\lVert k\rVert^2 / 2h^2} \cdot
# e^{\lVert q\rVert^2 / 2h^2} .
# $$
#
# Hence softmax attention is Gaussian kernel smoothing in which pair $i$ has the extra weight
# $e^{\lVert k_i\rVert^2 / 2h^2}$. If all keys have one length, the two are equal.
# ```
#
# ```{prf:proof}
# $\lVert q - k\rVert^2 = \lVert q\rVert^2 - 2 q^\top k + \lVert k\rVert^2$; solve for $q^\top k$, divide by $h^2$ and
# take exponentials. The factor of the query is the same for all pairs and cancels in
# {eq}`soft-eq-nadaraya-watson`. If the keys have one length, so does the factor of the keys.
# ```
#
# At unit length the two agree to rounding.

# %%
weights = {}
q, k = unit(200, 32), unit(200, 32)
for name, similarity in {"dot": dot, "gaussian": gaussian}.items():
    weights[name] = torch.stack([similarity(query, k) for query in q]).mul(16).softmax(-1)
identity_error = (weights["dot"] - weights["gaussian"]).abs().max()
assert identity_error < 1e-14

q, k, v = unit(2, 60, 3, 8), unit(2, 60, 3, 8), randn(2, 60, 3, 5)
same, _ = ttr.regress(qk_norm_attention, q, k, v)
assert_close(same, ttr.regress(softmax_attention, q, k, v)[0])

q, k = 2 * randn(2, 60, 3, 8), 2 * randn(2, 60, 3, 8)  # of any length: not the same
near, _ = ttr.regress(qk_norm_attention, q, k, v)
assert_close(near[0, :, 0], smoother(q[0, :, 0], k[0, :, 0], v[0, :, 0], gaussian))
assert (near - ttr.regress(softmax_attention, q, k, v)[0]).norm() > 0.1 * near.norm()

# %% [markdown]
# Normalising queries and keys before the product is **QK-norm** {cite:p}`henry2020querykey`.
# In the atlas it is a design with a Gaussian kernel, because that is what it means for the regression: weights that
# depend on nearness and on nothing else.
#
# How bad is the extra weight? Some keys become unreachable.
#
# ```{prf:proposition} Keys that never win
# :label: soft-proposition-hull
# If $k_j$ is a convex combination of other keys, then at no query and at no bandwidth has pair $j$ the largest weight
# alone. With the Gaussian kernel every key that is stored once has the largest weight at $q = k_j$.
# ```
#
# ```{prf:proof}
# Let $k_j = \sum_{i \ne j} a_i k_i$ with $a_i \ge 0$ and $\sum_i a_i = 1$.
# Then $q^\top k_j = \sum_i a_i\, q^\top k_i \le \max_{i \ne j} q^\top k_i$.
# The Gaussian weight is 1 at distance zero and below 1 elsewhere.
# ```
#
# The same fact about the output layer of language models is the stolen probability of
# {cite:t}`demeter2020stolen`.
# On the unit sphere no key is a convex combination of different ones, so QK-norm makes every key reachable.
# In the plane one can see it.

# %%
lengths = torch.tensor([1.0, 0.8, 0.3, 1.3, 0.45, 0.9, 1.2, 0.55, 0.15], dtype=torch.float64)
angles = torch.tensor([0.2, 1.0, 1.3, 2.2, 2.9, 3.6, 4.6, 5.3, 5.6], dtype=torch.float64)
keys = torch.stack([angles.cos(), angles.sin()], dim=-1)
grid = torch.linspace(-1.6, 1.6, 240, dtype=torch.float64)
plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1)
long_keys = lengths[:, None] * keys
winners = {
    "dot product": (long_keys, (plane @ long_keys.T).argmax(-1)),
    "Gaussian": (long_keys, torch.cdist(plane.flatten(0, 1), long_keys).argmin(-1).view(240, 240)),
    "QK-norm": (keys, (normalize(plane, dim=-1) @ keys.T).argmax(-1)),
}
reached = {name: len(winner.unique()) for name, (_, winner) in winners.items()}
record("soft_keys_in_plane", len(keys))
record("soft_keys_reached_dot", reached["dot product"])
assert reached["dot product"] < len(keys)
assert reached["Gaussian"] == reached["QK-norm"] == len(keys)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Which key has the largest weight, for every query of the plane. Keys are dots with a number. Under the dot product the long keys divide all queries among themselves, and a key inside the convex hull (cross, dashed outline) has none. The Gaussian kernel gives each key its neighbourhood. QK-norm compares directions only, so each key has a sector.", "name": "soft-fig-cells"}, "image": {"alt": "Three maps of the plane coloured by the winning key. Dot product: a few sectors that belong to the outer keys, inner keys marked by crosses own nothing. Gaussian: one cell around each key. QK-norm: all keys lie on the unit circle, each in a sector of its own."}}
figure, panels = plt.subplots(1, 3, figsize=(9, 3.3), sharex=True, sharey=True)
for panel, (name, (points, winner)) in zip(panels, winners.items(), strict=True):
    extent = (-1.6, 1.6, -1.6, 1.6)
    panel.imshow(winner, origin="lower", extent=extent, cmap="Pastel1", vmin=0, vmax=8, interpolation="nearest")
    panel.contour(grid, grid, winner, levels=torch.arange(8) + 0.5, colors="white", linewidths=0.6)
    if name == "dot product":
        hull = points[[0, 1, 3, 5, 6, 0]]
        panel.plot(*hull.T, color="0.4", linestyle="--", linewidth=1)
    if name == "QK-norm":
        panel.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.4", linestyle="--", linewidth=1))
    wins = torch.isin(torch.arange(len(points)), winner.unique())
    panel.plot(*points[wins].T, "o", color="black", markersize=5)
    panel.plot(*points[~wins].T, "x", color="#D55E00", markersize=7, markeredgewidth=2)
    for number, (x, y_) in enumerate(points.tolist(), start=1):
        panel.annotate(str(number), (x, y_), xytext=(4, 4), textcoords="offset points", fontsize=9)
    panel.grid(False)
    panel.set(title=name, xlabel="first entry of the query", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
panels[0].set_ylabel("second entry of the query")
plt.show()

# %% [markdown]
# Of {glue:text}`soft_keys_in_plane` keys the dot product can reach {glue:text}`soft_keys_reached_dot`.
#
# In more dimensions hulls are roomier, and the question becomes one of degree.
# We ask a memory for its own keys, whose lengths are log-normal: $\log\lVert k_i\rVert \sim N(0, \sigma^2)$.
# Is the largest weight at the pair that is asked for? The bandwidth does not matter for this.

# %%
d, n, draws = (sizes["recall"][name] for name in ("key", "pairs", "draws"))
spreads = [0.0, 0.25, 0.5, 0.75, 1.0]
directions, heights = unit(draws, n, d), randn(draws, n, 1)


def top1(scores):
    """Share of queries whose own pair has the largest weight, for each draw."""
    return (scores.argmax(-1) == torch.arange(n, device=device)).double().mean(-1).cpu()


found = {"dot product": [], "Gaussian": [], "QK-norm": []}
for spread in spreads:
    k = (spread * heights).exp() * directions
    found["dot product"].append(top1(k @ k.mT))
    found["Gaussian"].append(top1(-torch.cdist(k, k)))
    found["QK-norm"].append(top1(normalize(k, dim=-1) @ normalize(k, dim=-1).mT))
found = {name: torch.stack(shares) for name, shares in found.items()}

assert (found["dot product"][0] == 1).all()  # equal lengths
assert (found["QK-norm"] == 1).all()
assert (found["Gaussian"] == 1).all()
assert found["dot product"][2].max() < 0.9
assert found["dot product"][-1].max() < 0.5
for spread, shares in zip(spreads, found["dot product"], strict=True):
    record(f"soft_recall_dot_{int(100 * spread)}", shares.mean(), atol=0.03)

# %% [markdown]
# At $\sigma = \tfrac12$ the dot product finds {glue:text}`soft_recall_dot_50:.2f` of its own keys, at $\sigma = 1$ it
# finds {glue:text}`soft_recall_dot_100:.2f`.
# Both alternatives find all.
#
# Is the weight always a fault? It is a learned importance, shared by all queries. A layer may want one: a long key
# along a direction that all queries share can collect the attention of those that have nothing to look for.
# But then importance and direction are tied together in one vector, and training can move one only by moving the
# other.
# In the design space the importance is a choice of its own, `ttr.InputGate()`, and an exercise below takes the
# dot product apart into the two.
#
# ## The temperature is a bandwidth
#
# QK-norm has a price. The dot product of two unit vectors lies in $[-1, 1]$, and for random ones it is of size
# $1/\sqrt d$.
# Two weights can differ by a factor $e^{2/h^2}$ at most. At $h = 1$ that is not much, and with many pairs the mean is
# nearly a plain one.
#
# Here is the error of recall, $\lVert y - v\rVert / \lVert v\rVert$ over all pairs, against the **temperature**
# $1/h^2$ that multiplies the dot product.
# (The name has stuck, although physics would call its inverse so.)

# %%
temperatures = torch.logspace(-1, 2, 31, dtype=torch.float64)
pairs = [16, 64, 256]
temperature_error = {}
for n_pairs in pairs:
    k, v = unit(draws, n_pairs, d), unit(draws, n_pairs, d)
    overlaps = k @ k.mT
    errors = [((tau * overlaps).softmax(-1) @ v - v).flatten(1).norm(dim=1) / n_pairs**0.5 for tau in temperatures]
    temperature_error[n_pairs] = torch.stack(errors).cpu()

standard = {tau: (temperatures.log() - math.log(tau)).abs().argmin() for tau in (1.0, d**0.5, 32.0)}
for n_pairs in pairs:
    none, root, high = (temperature_error[n_pairs][index].mean() for index in standard.values())
    record(f"soft_error_no_temperature_{n_pairs}", none, rtol=0.02)
    record(f"soft_error_root_temperature_{n_pairs}", root, rtol=0.05)
    assert none > 0.8  # at temperature one all memories are nearly uniform
    assert high < 0.01

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: share of its own keys that a memory finds, against the spread of the logarithm of their lengths; small dots are draws. The dot product loses keys as soon as their lengths differ; the Gaussian kernel and QK-norm coincide at one. Right: error of recall with unit-length keys against the temperature; bands run over all draws. Without a temperature (left dotted line) the answer is nearly a plain mean, and the more so the more pairs there are. The right dotted line is the square root of the key size, where the layers begin.", "name": "soft-fig-norms"}, "image": {"alt": "Left plot: top-1 recall of the dot product falls steeply with the spread of key lengths while the other two stay at one. Right plot: three curves of relative error, flat near one at low temperature and falling to zero at high temperature; with more pairs the fall comes later."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
styles = {"dot product": "o-", "Gaussian": "s--", "QK-norm": "^:"}
for name, shares in found.items():
    (line,) = left.plot(spreads, shares.mean(1), styles[name], label=name)
    jitter = torch.linspace(-0.015, 0.015, draws, dtype=torch.float64)
    for spread, share in zip(spreads, shares, strict=True):
        left.plot(spread + jitter, share, ".", color=line.get_color(), markersize=2.5, alpha=0.6)
left.set(xlabel="spread of the log-lengths, σ", ylabel="own keys found", ylim=(0, 1.05))
left.legend()
for (n_pairs, errors), style in zip(temperature_error.items(), ("-", "--", "-."), strict=True):
    (line,) = right.plot(temperatures, errors.mean(1), style, label=f"n = {n_pairs}")
    right.fill_between(temperatures, errors.amin(1), errors.amax(1), color=line.get_color(), alpha=0.2, linewidth=0)
for tau in (1, d**0.5):
    right.axvline(tau, color="0.4", linestyle=":", linewidth=1)
right.set(xlabel="temperature, 1/h²", ylabel="relative error of recall", xscale="log", ylim=(0, 1.05))
right.legend()
plt.show()

# %% [markdown]
# Without a temperature the error is {glue:text}`soft_error_no_temperature_16:.2f` at $n = 16$ and
# {glue:text}`soft_error_no_temperature_256:.2f` at $n = 256$; an answer of zero scores 1.
# So QK-norm and a learned temperature belong together.
# {cite:t}`henry2020querykey` proposed the pair, and `ttr.layers.RegressionLayer` has a temperature wherever it
# normalises.
# How high must it be? High enough that one pair outweighs $n$ others; an exercise makes that a bound that grows with
# $\log n$.
#
# How does this agree with the familiar factor $1/\sqrt d$?
# If the entries of queries and keys are independent with variance one, $q^\top k$ has variance $d$, and
# $h^2 = \sqrt d$ makes the logits of size one {cite:p}`vaswani2017attention`.
# A unit vector has entries of variance $1/d$. For it the same logits need $1/h^2 = \sqrt d$: a factor $d$ between the
# two conventions, and an easy mistake.

# %%
q, k = randn(4096, d), randn(4096, d)
logits = {
    "entries of variance one": (q * k).sum(-1) / d**0.5,
    "unit length": (normalize(q, dim=-1) * normalize(k, dim=-1)).sum(-1) * d**0.5,
}
for name, values in logits.items():
    assert abs(values.std() - 1) < 0.1, name

# %% [markdown]
# ### Does training notice?
#
# Lengths matter to training too. Logits grow with the product of two weight matrices. Steps that are too large make
# them large, the softmax saturates, and its gradient vanishes.
# {cite:t}`dehghani2023scaling` met this at the scale of eight billion parameters and cured it with QK-norm.
# A model of one layer is enough to see it.
# The task is recall of key–value pairs. The models differ in the normalisation of queries and keys, and in the
# temperature they start with: $\sqrt d$ at unit length and $1/\sqrt d$ otherwise, as we have just seen.

# %% tags=["remove-stderr"]
from lightning.pytorch import Trainer, seed_everything

from ttr.tasks import Recall
from ttr.training import TokenPrediction

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
training = sizes["training"]
learning_rates = [1e-3, 3e-3, 1e-2, 5e-2, 2e-1]


def trained_accuracy(design, learning_rate, seed):
    """Share of queries answered right, on new sequences after training."""
    seed_everything(seed, workers=True, verbose=False)
    batches = {"batch_size": training["batch_size"], "num_train": training["num_train"], "num_val": 4}
    model = {"d_model": training["d_model"], "num_layers": 1, "num_heads": 1}
    convolution = {"conv_width": 2, "conv_on": "k", "conv_silu": False}  # a key that has seen the token before it
    module = TokenPrediction(
        vocab_size=128, learning_rate=learning_rate, warmup_steps=10, design=design, **model, **convolution
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Recall(length=40, num_pairs=10, seed=seed, **batches))
    return trainer.callback_metrics["val_accuracy"].item()


accuracy = {
    design: torch.tensor(
        [[trained_accuracy(design, rate, seed) for seed in range(training["seeds"])] for rate in learning_rates]
    )
    for design in ("softmax_attention", "qk_norm_attention")
}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Accuracy after a short training on associative recall, against the learning rate: the line is the mean, each point a seed. With QK-norm the range of learning rates that work is wider, at both ends.", "name": "soft-fig-learning-rate"}, "image": {"alt": "Accuracy against learning rate on a logarithmic axis. Softmax attention is near zero at the smallest and the largest rate and near one between, but for one seed; QK-norm attention is near one over the whole range."}}
figure, axes = plt.subplots(figsize=(6.5, 3.3))
for (design, results), style in zip(accuracy.items(), ("o-", "^--"), strict=True):
    (line,) = axes.plot(learning_rates, results.mean(1), style[1:], label=ttr.atlas[design].name)
    for shift, one in zip(torch.linspace(0.94, 1.06, training["seeds"]).tolist(), results.T, strict=True):
        axes.plot([shift * rate for rate in learning_rates], one, style[0], color=line.get_color(), markersize=5)
axes.set(xlabel="learning rate", ylabel="accuracy", xscale="log", ylim=(-0.03, 1.05))
axes.legend(loc="lower center", bbox_to_anchor=(0.4, 0.1))
plt.show()

# %%
mean = {design: results.mean(1) for design, results in accuracy.items()}
works = {design: int((results > 0.9).sum()) for design, results in mean.items()}
assert works["qk_norm_attention"] >= works["softmax_attention"] >= 1
if scale == "smoke":
    assert mean["qk_norm_attention"][0] > mean["softmax_attention"][0] + 0.4
    assert mean["qk_norm_attention"][-1] > mean["softmax_attention"][-1] + 0.4
for design in accuracy:
    record(f"soft_trained_slow_{design}", mean[design][0], atol=0.1)
    record(f"soft_trained_middle_{design}", mean[design][2], atol=0.05)
    record(f"soft_trained_fast_{design}", mean[design][-1], atol=0.35)  # at the edge a seed more or less may fail

# %% [markdown]
# At the middle rate they reach {glue:text}`soft_trained_middle_softmax_attention:.2f` and
# {glue:text}`soft_trained_middle_qk_norm_attention:.2f`.
# At the smallest, softmax attention reaches {glue:text}`soft_trained_slow_softmax_attention:.2f` and QK-norm
# {glue:text}`soft_trained_slow_qk_norm_attention:.2f`; at the largest,
# {glue:text}`soft_trained_fast_softmax_attention:.2f` and {glue:text}`soft_trained_fast_qk_norm_attention:.2f`.
# This is one small task. It says that the range of good learning rates is wider, and nothing about which of the two
# is better where both are tuned.
#
# ## Which bandwidth is best?
#
# So far each key was a pair to be found again. There the narrowest kernel wins, because there is no noise and the
# query is a stored key.
# In regression the values are noisy, $v_i = m(k_i) + \varepsilon_i$ with variance $s^2$, and the query is new.
# A wide kernel averages the noise away and the function with it.
#
# Let keys have a density $f$ on a space of $p$ dimensions ($p_i$ stays a weight), and look at a query far from the
# edge. Write $k = q + hz$ and expand $m$ and $f$ around $q$.
# The Gaussian kernel is even, so odd powers of $h$ drop out. With the Laplacian $\Delta$, the sum of second derivatives:
#
# ```{math}
# :label: soft-eq-bias
# \mathbb E\,[y] - m(q) \approx h^2 \Bigl( \tfrac12 \Delta m(q) + \frac{\nabla f(q)^\top \nabla m(q)}{f(q)} \Bigr) .
# ```
#
# The variance is that of a mean over the pairs within the kernel's reach.
# There are about $n f(q) h^p$ of them, and for the Gaussian kernel
#
# ```{math}
# :label: soft-eq-variance
# \operatorname{Var}[y] \approx s^2 \sum_i p_i^2 \approx \frac{s^2}{(4\pi)^{p/2}\, n f(q)\, h^p} .
# ```
#
# Call the square of the bias $B h^4$ and the variance $A / (n h^p)$. Their sum is smallest at
#
# ```{math}
# :label: soft-eq-rate
# h^\star = \Bigl( \frac{p A}{4 B n} \Bigr)^{1/(p + 4)}, \qquad \text{where the error falls as } n^{-4/(p+4)} .
# ```
#
# More pairs want a narrower kernel, that is a higher temperature. In many dimensions the exponent is small: to halve
# the squared error of a smoother takes $2^{(p+4)/4}$ times as many pairs.
# That is the curse of dimension, and the reason why keys should live on few directions.
#
# Unit vectors of $\mathbb R^d$ have $p = d - 1$.
# On the circle take $m = \sin 2\theta$. Then $\Delta m = -4m$ and $f = 1/2\pi$, so averaged over queries
# $B = 2$ and $A = s^2\sqrt\pi$.
# On the sphere of $\mathbb R^3$ take $m = 2 k_1 k_2$, for which $\Delta m = -6m$ and $\mathbb E\, m^2 = 4/15$, so
# $B = 12/5$ and $A = s^2$.
# Both predictions have no free constant.

# %%
noise = 0.5
functions = {2: lambda x: 2 * x[..., 0] * x[..., 1], 3: lambda x: 2 * x[..., 0] * x[..., 1]}  # sin 2θ on the circle
constants = {2: (noise**2 * math.pi**0.5, 2.0), 3: (noise**2, 12 / 5)}
bandwidths = torch.logspace(-1.3, 0.1, 29, dtype=torch.float64)
smoothing = sizes["smoothing"]


def predicted(size, n):
    A, B = constants[size]
    p = size - 1
    return (p * A / (4 * B * n)) ** (1 / (p + 4))


curves, best = {}, {}
for size, m in functions.items():
    for n_pairs in smoothing["pairs"]:
        k, q = unit(smoothing["draws"], n_pairs, size), unit(smoothing["draws"], smoothing["queries"], size)
        values = m(k) + noise * randn(*k.shape[:2])
        overlaps, errors = q @ k.mT, []
        for width in bandwidths:
            answers = ((overlaps / width**2).softmax(-1) @ values[..., None])[..., 0]
            errors.append((answers - m(q)).square().mean(1))
        curves[size, n_pairs] = torch.stack(errors).cpu()
        best[size, n_pairs] = bandwidths[curves[size, n_pairs].argmin(0)]

for size in functions:
    typical = torch.stack([best[size, n_pairs].log().mean() for n_pairs in smoothing["pairs"]])
    theory = torch.tensor([predicted(size, n_pairs) for n_pairs in smoothing["pairs"]], dtype=torch.float64)
    assert (typical - theory.log()).abs().max() < 0.25
    logs = torch.tensor(smoothing["pairs"], dtype=torch.float64).log()
    slope = ((logs - logs.mean()) * typical).sum() / (logs - logs.mean()).square().sum()
    assert abs(slope + 1 / (size + 3)) < 0.07
    record(f"soft_bandwidth_slope_{size}", slope, atol=0.04)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: squared error against the bandwidth for keys on the circle; bands are the middle four fifths of the draws, dots the minima. Narrow kernels leave the noise, wide ones flatten the function, and more pairs move the minimum to the left. Right: the best bandwidth of each draw (small dots) and its geometric mean against the number of pairs; dashed lines are the theory, which has no free constant.", "name": "soft-fig-bandwidth"}, "image": {"alt": "Left: U-shaped error curves on logarithmic axes for three numbers of pairs; the minimum moves down and to the left as the number grows. Right: best bandwidth falling with the number of pairs along two dashed straight lines, the one for the sphere above and flatter than the one for the circle."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7))
for n_pairs, style in zip(smoothing["pairs"][::2], ("-", "--", "-."), strict=True):
    errors = curves[2, n_pairs]
    (line,) = left.plot(bandwidths, errors.mean(1), style, label=f"n = {n_pairs}")
    low, high = errors.quantile(0.1, 1), errors.quantile(0.9, 1)
    left.fill_between(bandwidths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    lowest = errors.mean(1).argmin()
    left.plot(bandwidths[lowest], errors.mean(1)[lowest], "o", color=line.get_color())
left.set(xlabel="bandwidth, h", ylabel="squared error", xscale="log", yscale="log")
left.legend()
for size, (name, marker) in {2: ("circle", "o"), 3: ("sphere", "^")}.items():
    means = [best[size, n_pairs].log().mean().exp() for n_pairs in smoothing["pairs"]]
    (line,) = right.plot(smoothing["pairs"], means, marker, label=name)
    for n_pairs in smoothing["pairs"]:
        spread = n_pairs * torch.linspace(0.92, 1.08, smoothing["draws"])
        right.plot(spread, best[size, n_pairs], ".", color=line.get_color(), markersize=2.5, alpha=0.5)
    theory = [predicted(size, n_pairs) for n_pairs in smoothing["pairs"]]
    right.plot(smoothing["pairs"], theory, "--", color=line.get_color(), linewidth=1)
right.set(xlabel="pairs, n", ylabel="best bandwidth, h", xscale="log", yscale="log")
right.legend()
plt.show()

# %% [markdown]
# The fitted exponents are {glue:text}`soft_bandwidth_slope_2:.2f` on the circle and
# {glue:text}`soft_bandwidth_slope_3:.2f` on the sphere, where the theory has $-1/5$ and $-1/6$.
#
# A trained layer has one temperature for sequences of all lengths.
# The theory says that a memory that holds more pairs should use a higher one, both for recall and for regression.
#
# ## Two more factors: windows and forgetting
#
# Weights multiply. A kernel in key space says *where* to look. A factor in time says *when*.
# A **sliding window** {cite:p}`beltagy2020longformer` keeps the last $w$ pairs:
#
# ```{math}
# :label: soft-eq-window
# w_{ti} = e^{q_t^\top k_i / h^2} \cdot \mathbb 1[t - i < w] .
# ```
#
# It is a compact kernel in time, and it bounds the state.
# **Forgetting attention** {cite:p}`lin2025forgetting` lets old pairs fade, with the decay of
# {doc}`/notebooks/02_linear_attention`:
#
# ```{math}
# :label: soft-eq-forgetting
# w_{ti} = e^{q_t^\top k_i / h^2} \prod_{j=i+1}^{t} \alpha_j .
# ```
#
# A product of weights is a sum of logarithms, so both are the ten lines with a `log_weight`.

# %%
q, k, v = randn(2, 90, 3, 8), randn(2, 90, 3, 8), randn(2, 90, 3, 5)
log_decay = -randn(2, 90, 3).square() / 10
one_head = tuple(x[0, :, 0] for x in (q, k, v))

age = torch.arange(90, device=device)[:, None] - torch.arange(90, device=device)
windowed = torch.where(age < 16, 0.0, -torch.inf).double()
y, state = ttr.regress(local_constant(ttr.Kernel() * ttr.Window(16)), q, k, v)
assert_close(y[0, :, 0], smoother(*one_head, dot, log_weight=windowed))
assert local_constant(ttr.Kernel() * ttr.Window(16)).name == ttr.atlas["sliding_window_attention"].name
assert state.history["k"].shape[1] == 15  # with the next pair it makes sixteen

elapsed = log_decay[0, :, 0].cumsum(0)
y, state = ttr.regress(ttr.atlas["forgetting_attention"], q, k, v, log_decay=log_decay)
assert_close(y[0, :, 0], smoother(*one_head, dot, log_weight=elapsed[:, None] - elapsed))
assert state.history["k"].shape[1] == 90  # every pair is kept, however faint

# %% [markdown]
# What do they buy? Suppose the function changes: $v = m(k) + \varepsilon$ first, and $v = -m(k) + \varepsilon$ from
# the middle of the stream on.
# Plain attention weighs a pair by its key alone, so old and new pairs cancel.

# %%
length, streams, horizon = (sizes["switch"][name] for name in ("length", "streams", "memory"))
k, q = unit(streams, length, 1, 2), unit(streams, length, 1, 2)
sign = torch.where(torch.arange(length, device=device) < length // 2, 1.0, -1.0).double()[None, :, None]
v = (sign * functions[2](k) + noise * randn(streams, length, 1))[..., None]
right_answer = sign * functions[2](q)
kernel = ttr.Kernel(bandwidth=0.3)
fading = k.new_full((streams, length, 1), -1 / horizon)
answers = {
    "everything counts": ttr.regress(local_constant(kernel), q, k, v)[0],
    "window": ttr.regress(local_constant(kernel * ttr.Window(2 * horizon)), q, k, v)[0],
    "forgetting": ttr.regress(local_constant(kernel * ttr.Decay()), q, k, v, log_decay=fading)[0],
}
squared = {name: (y[..., 0] - right_answer).square()[..., 0].cpu() for name, y in answers.items()}
before = slice(length // 2 - horizon, length // 2)
after = slice(length - horizon, length)
for name, errors in squared.items():
    record(f"soft_switch_before_{name.split()[0]}", errors[:, before].mean(), rtol=0.05)
    record(f"soft_switch_after_{name.split()[0]}", errors[:, after].mean(), rtol=0.05)
assert squared["everything counts"][:, before].mean() < squared["window"][:, before].mean()
assert squared["everything counts"][:, before].mean() < squared["forgetting"][:, before].mean()
for name in ("window", "forgetting"):
    assert squared[name][:, after].mean() < squared["everything counts"][:, after].mean() / 3

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Squared error along a stream whose function changes its sign half-way (dotted line); the line is the mean over streams, the band twice its standard error. Before the change, the memory that keeps everything is best, since it averages most. After it, old and new pairs cancel there, while a window forgets abruptly and a decay gradually.", "name": "soft-fig-switch"}, "image": {"alt": "Error against time for three memories. All fall at first, the one that keeps everything lowest; at the switch all jump; the window and the forgetting memory return to their old level, the one that keeps everything falls slowly and stays high."}}
figure, axes = plt.subplots(figsize=(7.5, 3.5))
bins = length // 16
for (name, errors), style in zip(squared.items(), ("-", "--", "-."), strict=True):
    binned = errors.unflatten(1, (16, bins)).mean(2)
    middle = bins * (torch.arange(16) + 0.5)
    center, error = binned.mean(0), 2 * binned.std(0) / streams**0.5
    (line,) = axes.plot(middle, center, style, label=name)
    axes.fill_between(middle, center - error, center + error, color=line.get_color(), alpha=0.2, linewidth=0)
axes.axvline(length // 2, color="0.4", linestyle=":", linewidth=1)
axes.set(xlabel="pairs read", ylabel="squared error", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# Before the change the squared error is {glue:text}`soft_switch_before_everything:.3f` with everything kept and
# {glue:text}`soft_switch_before_forgetting:.3f` with forgetting; at the end it is
# {glue:text}`soft_switch_after_everything:.3f` and {glue:text}`soft_switch_after_forgetting:.3f`.
# Forgetting costs variance and buys the ability to change one's mind.
#
# ## One step of a Hopfield network
#
# An associative memory in the old sense of the word stores patterns and completes them.
# Let values be the keys themselves. Then {eq}`soft-eq-nadaraya-watson` replaces a noisy query by a mean of the
# patterns near it.
# {cite:t}`ramsauer2020hopfield` showed that this is the update of a Hopfield network with an energy under which
# the number of patterns it can hold grows exponentially with the dimension, and that one update usually suffices.
# The classical network {cite:p}`hopfield1982neural` is built on the linear memory of
# {doc}`/notebooks/02_linear_attention` and suffers from its interference.

# %%
patterns = unit(1, 64, 1, 32)
noisy = normalize(patterns + 0.6 * unit(1, 64, 1, 32), dim=-1)
sharp = local_constant(ttr.Kernel(bandwidth=0.25))


def update(x):
    """One step for every query; all patterns are stored."""
    overlaps = torch.einsum("bthk,bihk->bhti", x, patterns) / 0.25**2
    return torch.einsum("bhti,bihk->bthk", overlaps.softmax(-1), patterns)


y, _ = ttr.regress(sharp, noisy, patterns, patterns)
assert_close(y[:, -1], update(noisy)[:, -1])  # the last token of a sequence sees them all

distances = {0: noisy, 1: update(noisy), 2: update(update(noisy))}
distances = {steps: (x - patterns).norm(dim=-1).mean() for steps, x in distances.items()}
for steps, distance in distances.items():
    record(f"soft_hopfield_{steps}", distance, rtol=0.1, atol=1e-3)
assert distances[1] < distances[0] / 3

# %% [markdown]
# The mean distance to the stored pattern is {glue:text}`soft_hopfield_0:.2f` for the noisy query,
# {glue:text}`soft_hopfield_1:.3f` after one update and {glue:text}`soft_hopfield_2:.4f` after two.
#
# ## What it cannot do
#
# **It cannot forget its past to save memory.** The state is every pair: it grows with the sequence, and so does the
# cost of one more token.

# %%
q, k, v = randn(1, 300, 1, 8), randn(1, 300, 1, 8), randn(1, 300, 1, 4)
_, state = ttr.regress(softmax_attention, q, k, v)
assert state.history["k"].shape[1] == state.history["v"].shape[1] == 300
print("state of", softmax_attention.name, "a head:", softmax_attention.cost().state)

# %% [markdown]
# **It cannot extrapolate.** A mean lies between the smallest and the largest value.
# At the edge of the keys all neighbours are on one side, so even a straight line is answered with a bend.
# In one dimension, with $m(k) = k$ and the query at the end of a dense set of keys, the mean is taken over a half
# Gaussian and falls short by $h\sqrt{2/\pi}$. That is of order $h$, where the interior had $h^2$.

# %%
k = torch.linspace(-1, 1, 4001, dtype=torch.float64, device=device)[None, :, None, None]
state = ttr.State(history={"k": k[:, :-1], "v": k[:, :-1]})
last, middle = k[:, -1:], torch.zeros_like(k[:, -1:])
for width in (0.05, 0.1, 0.2):
    design = local_constant(ttr.Kernel(ttr.Gaussian(), width))
    at_edge, _ = ttr.regress(design, last, last, last, state=state)
    inside, _ = ttr.regress(design, middle, last, last, state=state)
    assert abs((1 - at_edge.item()) / (width * (2 / math.pi) ** 0.5) - 1) < 0.02
    assert abs(inside.item()) < 1e-3
    assert at_edge.item() < k.max().item()

# %% [markdown]
# {doc}`/notebooks/09_higher_order_attention` fits a line in place of the constant, and the error at the edge goes
# away.
#
# ## Limits
#
# Some of this chapter's designs turn into others at the end of a parameter's range.
# The package knows some of these limits itself, and the rest are executed below it:

# %%
for slug in ("softmax_attention", "sliding_window_attention", "forgetting_attention"):
    for limit in ttr.atlas[slug].limits():
        if limit.becomes.name:
            print(f"{ttr.atlas[slug].name} is {limit}")

q, k, v = randn(2, 50, 2, 8), randn(2, 50, 2, 8), randn(2, 50, 2, 4)
y, _ = ttr.regress(softmax_attention, q, k, v)
everything, _ = ttr.regress(local_constant(ttr.Kernel() * ttr.Window(50)), q, k, v)
undecayed, _ = ttr.regress(ttr.atlas["forgetting_attention"], q, k, v, log_decay=torch.zeros_like(q[..., 0]))
assert_close(everything, y)
assert_close(undecayed, y)

# h → 0: the value of the nearest key. h → ∞: the plain mean, and next to it linear attention, centred.
nearest, _ = ttr.regress(local_constant(ttr.Kernel(ttr.Gaussian(), 0.01)), k, k, v)
assert_close(nearest, v)
counts = torch.arange(1, 51, dtype=v.dtype, device=device)[:, None, None]
value_mean, key_mean = v.cumsum(1) / counts, k.cumsum(1) / counts
wide, _ = ttr.regress(local_constant(ttr.Kernel(bandwidth=1e3)), q, k, v)
assert_close(wide, value_mean, atol=1e-4, rtol=0)
hebbian, _ = ttr.regress(ttr.atlas["linear_attention"], q, k, v)
centered = hebbian / counts - torch.einsum("bthk,bthk,bthv->bthv", q, key_mean, value_mean)
assert_close((wide - value_mean) * 1e6, centered, atol=1e-4, rtol=1e-4)

# The exponential as a sum of features: second-order Taylor for small keys, random features for any.
taylor = ttr.Design(regressor=ttr.Linear(ttr.Taylor()), optimizer=ttr.Hebbian(normalize=True))
small, _ = ttr.regress(taylor, q / 20, k / 20, v)
assert_close(small, ttr.regress(softmax_attention, q / 20, k / 20, v)[0], atol=1e-4, rtol=0)

# %% [markdown]
# The line about $h \to \infty$ is worth reading twice. Expand the exponential to first order:
#
# ```{math}
# :label: soft-eq-wide
# y_t = \mathbb E[v] + \frac{1}{h^2} \operatorname{Cov}(v, k)\, q_t + O(h^{-4}),
# ```
#
# with plain means over the past, token $t$ included. The second term is linear attention with keys and values centred.
# That random features reach the exponential kernel itself, and at which price, is in
# {doc}`/notebooks/02_linear_attention`.
#
# ## Exercises
#
# ```{exercise} Attention as a conditional mean
# :label: soft-exercise-density
# Put a Gaussian of width $h$ in key space and any width in value space on every stored pair, and take the sum as a
# density of $(k, v)$.
# Show that $\mathbb E[v \mid k = q]$ under this density is {eq}`soft-eq-nadaraya-watson` with the Gaussian kernel, and
# find the covariance of the prediction. Check it: which queries is the memory unsure of?
# ```
#
# ```{solution-start} soft-exercise-density
# :class: dropdown
# ```
#
# The density is a mixture with one component a pair.
# Given $k = q$, component $i$ has probability $\propto e^{-\lVert q - k_i\rVert^2/2h^2}$, which is $p_i$, and mean
# $v_i$.
# So the conditional mean is $\sum_i p_i v_i$, and by the law of total variance the covariance is
# $\sum_i p_i (v_i - y)(v_i - y)^\top$ plus the square of the width in value space, times the identity.
# A second attention, with the squares as values, gives it: the memory is unsure where near keys have different values.

# %%
k = unit(1, 400, 1, 2)
angle = torch.atan2(k[..., 1], k[..., 0])
v = torch.where(angle > 0, randn(1, 400, 1), torch.zeros_like(angle))[..., None]  # noisy on one half of the circle
both = torch.cat([v, v.square()], dim=-1)
moments, _ = ttr.regress(local_constant(ttr.Kernel(bandwidth=0.15)), k, k, both)
variance = moments[..., 1] - moments[..., 0].square()
late = torch.arange(400, device=device)[None, :, None] > 200
assert variance[late & (angle > 0.5) & (angle < 2.6)].min() > variance[late & (angle < -0.5) & (angle > -2.6)].max()

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Take the dot product apart
# :label: soft-exercise-gate
# Build Gaussian attention from dot-product attention: multiply its weights by an `InputGate` that undoes
# {prf:ref}`soft-proposition-identity`. Is that design in the atlas?
# ```
#
# ```{solution-start} soft-exercise-gate
# :class: dropdown
# ```
#
# The gate is $e^{-\lVert k_i\rVert^2 / 2h^2}$. Nobody has named attention with an input gate of its own.

# %%
q, k, v = randn(2, 50, 2, 8), randn(2, 50, 2, 8), randn(2, 50, 2, 4)
gated = local_constant(ttr.Kernel() * ttr.InputGate())
assert gated.name is None
y, _ = ttr.regress(gated, q, k, v, input_gate=(-k.square().sum(-1) / 2).exp())
assert_close(y, ttr.regress(qk_norm_attention, q, k, v)[0])

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} How hot?
# :label: soft-exercise-temperature
# Keys have unit length, and any two have a dot product of at most $1 - \delta$.
# Show that a stored pair gets at least the weight $1/(1 + (n-1) e^{-\delta/h^2})$ when its own key is the query.
# Which temperature makes this at least $1 - \epsilon$? Check it.
# ```
#
# ```{solution-start} soft-exercise-temperature
# :class: dropdown
# ```
#
# The own weight is $e^{1/h^2}$ and each of the others at most $e^{(1-\delta)/h^2}$. Divide.
# The bound exceeds $1 - \epsilon$ if $(n - 1) e^{-\delta/h^2} \le \epsilon$, so
# $1/h^2 = \log\bigl((n-1)/\epsilon\bigr)/\delta$ is enough: it grows with the logarithm of the number of pairs.

# %%
for n_pairs in (16, 256, 4096):
    k = unit(n_pairs, 32)
    overlaps = k @ k.T
    delta = 1 - overlaps.fill_diagonal_(-1).max()
    overlaps.fill_diagonal_(1)
    tau = math.log((n_pairs - 1) / 0.01) / delta
    assert (tau * overlaps).softmax(-1).diagonal().min() >= 0.99

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Attention climbs hills
# :label: soft-exercise-mean-shift
# Let values be keys, use the Gaussian kernel, and feed each answer back as the next query.
# Show that the answer is $q + h^2\,\nabla \log \rho(q)$ with
# $\rho(q) = \sum_i e^{-\lVert q - k_i\rVert^2/2h^2}$.
# Check that $\rho$ rises at every step. Where does the iteration end?
# ```
#
# ```{solution-start} soft-exercise-mean-shift
# :class: dropdown
# ```
#
# $\nabla\rho(q) = \sum_i w_i (k_i - q)/h^2$, so $\nabla\log\rho = (\sum_i p_i k_i - q)/h^2$. Solve for the mean.
# This is the mean shift of {cite:t}`cheng1995mean`: gradient ascent on a log-density, with a step size that needs no
# tuning. It ends at the hills, so it sorts keys into clusters.

# %%
centers = 3 * torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]], dtype=torch.float64, device=device)
k = (centers[:, None] + 0.5 * randn(3, 60, 2)).flatten(0, 1)
x, height = k, -torch.inf
for _ in range(100):
    log_w = -torch.cdist(x, k).square() / (2 * 0.7**2)
    assert (log_w.logsumexp(-1) >= height - 1e-12).all()
    x, height = log_w.softmax(-1) @ k, log_w.logsumexp(-1)
assert len(torch.unique(x.round(decimals=3), dim=0)) == 3

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Choose the bandwidth from the data
# :label: soft-exercise-leave-one-out
# Let $y_i$ be the answer at key $k_i$ of a smoother that holds all $n$ pairs, and $p_{ii}$ the weight of the pair
# itself. Show that the answer of the smoother without pair $i$ misses $v_i$ by $(v_i - y_i)/(1 - p_{ii})$.
# Choose $h$ by it, and compare with the error at new queries.
# ```
#
# ```{solution-start} soft-exercise-leave-one-out
# :class: dropdown
# ```
#
# Without pair $i$ the answer is $(y_i - p_{ii} v_i)/(1 - p_{ii})$. Subtract it from $v_i$.
# One pass over the pairs gives $n$ errors of prediction, and no pair predicts itself.

# %%
m, n_pairs = functions[2], 400
k, q = unit(n_pairs, 2), unit(2000, 2)
v = m(k) + noise * randn(n_pairs)
held_out, new = [], []
for width in bandwidths:
    p = (k @ k.T / width**2).softmax(-1)
    held_out.append(((v - p @ v) / (1 - p.diagonal())).square().mean())
    new.append(((q @ k.T / width**2).softmax(-1) @ v - m(q)).square().mean())
held_out, new = torch.stack(held_out), torch.stack(new)
others = ~torch.eye(n_pairs, dtype=torch.bool, device=device)
p = (k @ k.T / bandwidths[12] ** 2).masked_fill(~others, -torch.inf).softmax(-1)
assert_close((v - p @ v).square().mean(), held_out[12])  # leaving each pair out in turn gives the same number
assert new[held_out.argmin()] < 1.5 * new.min()

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`nadaraya1964estimating` and {cite:t}`watson1964smooth` are short and readable.
# {cite:t}`fan1996local` is the book on local regression, with the rates of this chapter and their proofs.
# {cite:t}`tsai2019transformer` take attention apart as a kernel, {cite:t}`ramsauer2020hopfield` as a Hopfield
# network, and {cite:t}`wang2025testtime` as a regression.
# {cite:t}`henry2020querykey` introduced QK-norm, {cite:t}`dehghani2023scaling` needed it.
# {cite:t}`lin2025forgetting` train with a forget gate.
# How attention is computed without ever storing the weights is {cite:t}`dao2022flashattention`.
# In the {doc}`/book/explorer` the bandwidth is a slider.
