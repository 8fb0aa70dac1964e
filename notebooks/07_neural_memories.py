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
# # Neural memories
#
# A matrix stores as many arbitrary pairs as a key has channels, and no more.
# What if the memory is itself a small network, trained while it reads?
#
# Then writing is a gradient step on the network's weights and reading is a forward pass.
# The weights are the state.
# This chapter derives the update, makes it parallel, and measures what that costs.
# It then walks through the choices that eight published layers make: the network, the loss, the retention and the
# optimizer.
# Some of these choices do not do what their names suggest, and each such case is executed below.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import matplotlib.pyplot as plt
import torch
from torch.func import grad
from torch.nn.functional import gelu, layer_norm, normalize
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
sizes = {
    "smoke": {
        "stale": {"seeds": 16, "steps": 512},
        "robust": {"seeds": 16, "steps": 400},
        "capacity": {"seeds": 8, "key": 8, "passes": 200},
        "mixture": {"seeds": 24, "steps": 600},
    },
    "full": {
        "stale": {"seeds": 128, "steps": 2048},
        "robust": {"seeds": 256, "steps": 400},
        "capacity": {"seeds": 32, "key": 16, "passes": 400},
        "mixture": {"seeds": 256, "steps": 600},
    },
}[scale]
generator = torch.Generator().manual_seed(7)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def unit(*shape):
    """Directions: vectors of length one."""
    return normalize(randn(*shape), dim=-1)


def network_inputs(d, hidden):
    """What every sequence begins with: random first weights, and a norm that scales nothing. One head."""
    w1, w2 = randn(1, d, hidden) / d**0.5, randn(1, hidden, d) / hidden**0.5
    return {"w1": w1, "w2": w2, "norm_scale": torch.ones_like(w2[:, 0]), "norm_shift": torch.zeros_like(w2[:, 0])}


def relative_error(y, target, start=0):
    """Squared error over squared size, one number a sequence, of the tokens from `start` on."""
    y, target = y[:, start:], target[:, start:]
    return ((y - target).square().sum((1, 2, 3)) / target.square().sum((1, 2, 3))).cpu()


def bands(errors):
    """The median and the tenth and ninetieth percentile over the last axis."""
    return errors.quantile(errors.new_tensor([0.1, 0.5, 0.9]), dim=-1)


# %% [markdown]
# ## A network as the regressor
#
# Nothing in the regression says that $m$ must be linear.
# At each token the memory has a loss on the newest pair,
#
# ```{math}
# :label: neural-eq-loss
# J_t(W) = \ell\bigl(v_t - m(k_t; W)\bigr), \qquad \ell(e) = \tfrac12 \lVert e\rVert^2 \text{ to begin with},
# ```
#
# and takes one gradient step on it.
# {cite:t}`sun2024learning` call this *test-time training*, TTT.
# Their networks are small and carry the key around themselves:
#
# ```{math}
# :label: neural-eq-networks
# \begin{aligned}
# \text{TTT-Linear} \quad & m(k; W) = k + \operatorname{LN}(W^\top k), \\
# \text{TTT-MLP} \quad & m(k; W) = k + \operatorname{LN}\bigl(W_2^\top \operatorname{gelu}(W_1^\top k)\bigr),
# \end{aligned}
# ```
#
# where LN is a layer norm whose scale and shift no token updates.
# Because the key is added outside, the network itself is fitted to $v - k$.
#
# {cite:t}`behrouz2025titans` add the two other tools of a training loop, weight decay and momentum.
# Titans is
#
# ```{math}
# :label: neural-eq-titans
# \begin{aligned}
# \bar W_t &= \alpha_t W_{t-1}, & Z_t &= \eta_t Z_{t-1} - \beta_t \nabla J_t(\bar W_t), \\
# W_t &= \bar W_t + Z_t, & y_t &= m(q_t; W_t) .
# \end{aligned}
# ```
#
# (The paper takes the gradient before the decay, at $W_{t-1}$; this book takes it after, as the delta rule with decay
# does.)
# In the terms of this book $\gamma$ is a decay, the regressor is a network, and the optimizer is stochastic gradient
# descent with momentum that sees each pair once, in order.
#
# ## Ten lines
#
# Autograd writes the rule for us.
# A network is a function of a dictionary of weights, `grad` differentiates the stated objective, and the recursion is
# {eq}`neural-eq-titans` letter by letter.


# %%
def network(weights, x):
    """An MLP with a norm at its end, around which x is carried."""
    hidden = gelu(x @ weights["w1"], approximate="tanh")
    return x + layer_norm(hidden @ weights["w2"], x.shape[-1:], eps=1e-6)


def objective(weights, key, value):
    return (value - network(weights, key)).square().sum() / 2


def titans(q, k, v, weights, step_size, decay, momentum):
    push, answers = dict.fromkeys(weights, 0.0), []
    for t in range(len(k)):
        weights = {name: decay[t] * w for name, w in weights.items()}
        slope = grad(objective)(weights, k[t], v[t])
        push = {name: momentum[t] * push[name] - step_size[t] * slope[name] for name in weights}
        weights = {name: w + push[name] for name, w in weights.items()}
        answers.append(network(weights, q[t]))
    return torch.stack(answers)


d, T = 8, 40
q, k, v = randn(1, T, 1, d), randn(1, T, 1, d), randn(1, T, 1, d)
start = network_inputs(d, 4 * d)
step_size, decay, momentum = (randn(1, T, 1).sigmoid() for _ in range(3))
first = {"w1": start["w1"][0], "w2": start["w2"][0]}
one_head = [x[0, :, 0] for x in (q, k, v)]

y, _ = ttr.regress(
    ttr.atlas["titans"], q, k, v, step_size=step_size, log_decay=decay.log(), log_momentum=momentum.log(), **start
)
ten_lines = titans(*one_head, first, step_size[0, :, 0], decay[0, :, 0], momentum[0, :, 0])
assert_close(y[0, :, 0], ten_lines)

# %% [markdown]
# ## Steps in parallel
#
# The recursion is serial: each gradient needs the weights that the step before left.
# For the delta rule a triangular solve removes the wait, because the error is linear in $S$.
# A network's error is not, so another way out is needed.
#
# TTT takes it from ordinary training: **mini-batches**.
# Cut the sequence into pieces of $b$ tokens, and take all gradients of a piece at the weights with which the piece
# began:
#
# ```{math}
# :label: neural-eq-batch
# W_t = W_{s} - \sum_{i = s+1}^{t} \beta_i \nabla J_i(W_{s}), \qquad s = b \lfloor (t-1)/b \rfloor .
# ```
#
# Now the gradients are independent and come from one batched backward pass.
# Two things must be kept apart.
# The mini-batch $b$ is part of the rule and changes the answers.
# The `chunk_size` of `ttr.regress` only says how the same numbers are computed.
# (Papers call both a chunk.)
#
# Even then nobody forms $T$ networks.
# A pair's gradient in a weight matrix is an outer product of what enters, $h_i$, and what comes back, $-u_i$.
# With $\nabla J_i = -h_i u_i^\top$ a layer of token $t$'s network at an input $x$ is
#
# ```{math}
# :label: neural-eq-dual
# W_t^\top x = W_s^\top x + \sum_{i = s+1}^{t} \beta_i\, (h_i^\top x)\, u_i ,
# ```
#
# which is causal linear attention within the piece: the *dual form* of {cite:t}`sun2024learning`.
# Layer after layer, masked products read every token's own network.
#
# The published TTT layers also divide: the $i$-th token of a piece makes $1/i$ of the sum of the steps so far, that
# is their mean.
# With $b = 16$ that is `ttt_mlp` in the atlas.


# %%
def ttt(q, k, v, weights, step_size, batch):
    answers = []
    for begin in range(0, len(k), batch):
        began, total = weights, dict.fromkeys(weights, 0.0)
        for i, t in enumerate(range(begin, min(begin + batch, len(k))), start=1):
            slope = grad(objective)(began, k[t], v[t])
            total = {name: total[name] - step_size[t] * slope[name] for name in weights}
            weights = {name: began[name] + total[name] / i for name in weights}
            answers.append(network(weights, q[t]))
    return torch.stack(answers)


y, state = ttr.regress(ttr.atlas["ttt_mlp"], q, k, v, step_size=step_size, **start)
assert_close(y[0, :, 0], ttt(*one_head, first, step_size[0, :, 0], 16))
other, _ = ttr.regress(ttr.atlas["ttt_mlp"], q, k, v, step_size=step_size, chunk_size=1, **start)
assert_close(other, y)  # how it is computed changes nothing

# %% [markdown]
# ## What a stale gradient costs
#
# A linear map shows the price without a network in the way.
# Let $m(k) = S^\top k$, without norm and without the key beside it.
#
# ```{prf:theorem} From the delta rule to linear attention
# :label: neural-theorem-ends
# With $b = 1$ the rule {eq}`neural-eq-batch` for a linear map is the delta rule.
# With $b \ge T$ and $S_0 = 0$ it is linear attention with values $\beta_t v_t$.
# In between, one mini-batch takes $S_s$ to
# $\bigl(I - \sum_i \beta_i k_i k_i^\top\bigr) S_s + \sum_i \beta_i k_i v_i^\top$,
# and if the keys within each mini-batch are orthogonal, this is the delta rule again.
# ```
#
# ```{prf:proof}
# The gradient is $\nabla J_i(S) = -k_i (v_i - S^\top k_i)^\top$.
# Inserted in {eq}`neural-eq-batch` it gives the displayed map, with $b = 1$ the delta rule, and with $S_s = 0$
# the sum $\sum_i k_i (\beta_i v_i)^\top$.
# The delta rule multiplies the old memory by $\prod_i (I - \beta_i k_i k_i^\top)$ and pair $j$'s write by the factors
# after $j$.
# If $k_i^\top k_j = 0$ for $i \neq j$, every cross term vanishes: the product is $I - \sum_i \beta_i k_i k_i^\top$ and
# each write passes unchanged.
# ```
#
# That batch gradient descent on a linear map is linear attention is Theorem 1 of {cite:t}`sun2024learning`.
# So the mini-batch is a dial between two layers that we know.


# %%
def mini_batch(size, average=False, **choices):
    """Gradient steps, all of a mini-batch at the weights with which it began."""
    return ttr.Design(optimizer=ttr.GradientDescent(batch=size, average=average), **choices)


linear_attention, delta_net = ttr.atlas["linear_attention"], ttr.atlas["delta_net"]
keys = unit(1, T, 1, d)
delta, _ = ttr.regress(delta_net, q, keys, v, step_size=step_size)
serial, _ = ttr.regress(mini_batch(1), q, keys, v, step_size=step_size)
assert_close(serial, delta)

summed, _ = ttr.regress(linear_attention, q, keys, step_size[..., None] * v)
whole, _ = ttr.regress(mini_batch(T), q, keys, v, step_size=step_size)
assert_close(whole, summed)

frames = torch.linalg.qr(randn(T // d, d, d)).Q.reshape(1, T, 1, d)  # every d keys in a row are orthogonal
delta, _ = ttr.regress(delta_net, q, frames, v, step_size=step_size)
stale, _ = ttr.regress(mini_batch(d), q, frames, v, step_size=step_size)
assert_close(stale, delta)

# %% [markdown]
# Where keys are not orthogonal, every token of the piece corrects the *same* error, and the corrections add up.
#
# ```{prf:proposition} How large a stale step may be
# :label: neural-proposition-stable
# Let all $\beta_i = \beta \ge 0$ and let $v_i = S_\star^\top k_i$, without noise. A mini-batch enlarges $S_s - S_\star$ for
# no $S_s$ if and only if $\beta\, \lambda_{\max}\bigl(\sum_i k_i k_i^\top\bigr) \le 2$.
# For $b$ unit keys the largest eigenvalue lies between $\max(1, b/d)$ and $b$.
# ```
#
# ```{prf:proof}
# With $v_i = S_\star^\top k_i$ the error is multiplied by $I - \beta \sum_i k_i k_i^\top$, a symmetric matrix whose
# eigenvalues lie in $[1 - \beta\lambda_{\max}, 1]$.
# The trace of $\sum_i k_i k_i^\top$ is $b$, shared by at most $\min(b, d)$ eigenvalues that are not zero, so the
# largest is at least $b / \min(b, d)$ and at most $b$.
# ```
#
# One token after the other, unit keys allow every $\beta$ up to $2$.
# A mini-batch that holds one key $b$ times allows $2/b$.
# The mean of the steps, as TTT takes it, is stable at any $b$ for $\beta \le 2$, and pays in another way: at the same
# $\beta$ a whole piece counts as one step.
#
# We measure it: a fixed map, unit keys at random, a little noise, and queries that were never stored.
# Each rule gets the best constant step size of one grid, so that no rule suffers from somebody else's tuning.
# On the left $d = 16$; on the right the same with an MLP memory and $d = 8$, whose target is one that it can represent.

# %%
seeds, T = sizes["stale"].values()
batches = [1, 2, 4, 8, 16, 32, 64, 128]


def search(design, q, k, v, target, grid, start=0, **inputs):
    """Errors of all sequences at all step sizes of a grid, (step size, sequence); divergence counts as a million."""
    size = torch.tensor(grid, dtype=k.dtype, device=device).repeat_interleave(len(k))
    size = size[:, None, None].expand(-1, k.shape[1], 1)
    q, k, v, target = (x.repeat(len(grid), 1, 1, 1) for x in (q, k, v, target))
    with torch.no_grad():
        y, _ = ttr.regress(design, q, k, v, step_size=size, **inputs)
    return relative_error(y, target, start).nan_to_num(1e6).clamp(max=1e6).unflatten(0, (len(grid), -1))


def best(errors):
    """The errors at the step size with the least median."""
    return errors[errors.median(-1).values.argmin()]


def world(memory, seeds, T, noise):
    """Unit queries and keys, noisy values, right answers: of a linear map, or of one that an MLP can represent."""
    d, size = (16, 4) if memory == "linear" else (8, 8)
    target, q, k = randn(seeds, d, size), unit(seeds, T, 1, d), unit(seeds, T, 1, d)
    true, v = (torch.einsum("sthk,skv->sthv", x, target) for x in (q, k))
    if memory == "MLP":
        true, v = q + layer_norm(true, (d,)), k + layer_norm(v, (d,))
    return q, k, v + noise * randn(*v.shape), true


start = network_inputs(8, 32)
stale = {"linear": {}, "MLP": {}}


def measure(memory, grid, fixed, **inputs):
    """Fill in the errors of the sum and of the mean of the steps, at the best step size and at a fixed one."""
    regressor = ttr.MLP() if memory == "MLP" else ttr.Linear()
    q, k, v, true = world(memory, seeds, T, noise=0.05)
    for how in ("sum", "mean"):
        designs = [mini_batch(b, how == "mean", regressor=regressor) for b in batches]
        found = [search(design, q, k, v, true, grid, **inputs) for design in designs]
        stale[memory][f"{how}, best step"] = torch.stack([best(x) for x in found])
        stale[memory][f"{how}, step fixed"] = torch.stack([x[grid.index(fixed)] for x in found])


measure("linear", [2 ** (-i / 2) for i in range(-8, 8)], fixed=0.5)
measure("MLP", [2.0**-i for i in range(-2, 9)], fixed=0.125, **start)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "The price of parallel steps: relative error of the answers at unseen queries against the size of the mini-batch; median and the band from the tenth to the ninetieth percentile over seeds. Left a linear memory, right an MLP. Small mini-batches are nearly free for the linear memory. Larger ones cost accuracy, with the sum of the steps as with their mean, each at its best step size. At a step size that suits single tokens (dotted) the sum diverges for the linear memory, and its mean learns slowly.", "name": "neural-fig-stale"}, "image": {"alt": "Two plots of error against mini-batch size on logarithmic axes. The solid curves of summed and averaged steps at their best step sizes rise together, slowly at first. The dotted curve of summed steps at a fixed size leaves the left plot at large mini-batches; that of averaged steps rises early in both."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharex=True)
styles = {"sum, best step": "C0o-", "mean, best step": "C1s-", "sum, step fixed": "C0o:", "mean, step fixed": "C1s:"}
for axes, (memory, lines) in zip(panels, stale.items(), strict=True):
    for name, style in styles.items():
        low, median, high = bands(lines[name])
        axes.plot(batches, median, style, label=name, markersize=5)
        axes.fill_between(batches, low, high, color=style[:2], alpha=0.15, linewidth=0)
    axes.set(title=memory, xlabel="mini-batch b", xscale="log", yscale="log", ylim=(0.02, 3))
    axes.set_xticks(batches, batches)
    axes.minorticks_off()
panels[0].set_ylabel("relative error")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %%
for memory in ("linear", "MLP"):
    at = {name: errors.median(-1).values for name, errors in stale[memory].items()}
    for how in ("sum", "mean"):
        assert at[f"{how}, best step"][-1] > 2 * at[f"{how}, best step"][0]  # staleness has a price
    assert at["mean, step fixed"][-1] > 2 * at["mean, best step"][-1]  # the mean wants larger steps
    record(f"neural_stale_{memory.lower()}", at["sum, best step"][[0, 3, 7]], rtol=0.1)
    record(f"neural_stale_{memory.lower()}_mean", at["mean, best step"][[0, 3, 7]], rtol=0.1)
    record(f"neural_stale_{memory.lower()}_8", (at["sum, best step"][3] / at["sum, best step"][0]).item(), rtol=0.1)
at = stale["linear"]["sum, best step"].median(-1).values
assert at[2] < 1.25 * at[0]  # four tokens at a time are nearly free
assert stale["linear"]["sum, step fixed"][-1].median() > 10  # diverged

# %% [markdown]
# With eight tokens at a time the error is {glue:text}`neural_stale_linear_8:.2f` times that of the online rule for
# the linear memory, and {glue:text}`neural_stale_mlp_8:.2f` times for the MLP.
# That is the bargain that makes TTT and Titans trainable.
# Sum and mean differ less than they seem to: each at its own best step size, they pay a similar price, the mean
# somewhat more for the linear memory.
# What differs is the step size that a layer must find, and what happens when it finds a wrong one.
#
# ## What an MLP buys, and when
#
# A linear map recalls $n \le d$ pairs exactly.
# An MLP with expansion 4 has $8d^2$ weights, and a pair fixes $d$ numbers, so something like $8d$ pairs should fit.
# Fit how, though? A memory reads its pairs once.
# We let both kinds read the same $n$ pairs once and then many times over, in mini-batches of 16 and at the best step
# of a grid, and ask for all of them again.
#
# The values need care. By {eq}`neural-eq-networks`, $m(k) - k$ is a layer norm's output: its entries have mean zero
# and its length is $\sqrt d$.
# Other values cannot be stored at all, whatever the weights (an exercise below).
# So the values are keys plus normalised noise.
# Beside the networks stand two exact fits: least squares on $v - k$ with the keys and with their $d(d+1)/2$ products
# as features.

# %%
seeds, d, passes = sizes["capacity"].values()
counts = [d, 2 * d, 4 * d, 6 * d, 8 * d, 12 * d]
wide = network_inputs(d, 4 * d)
narrow = {"w1": randn(1, d, d) / d**0.5, **{name: x for name, x in wide.items() if name.startswith("norm")}}
kinds = {"TTT-Linear": (ttr.NormalizedLinear(), narrow), "MLP": (ttr.MLP(), wide)}


def recall(regressor, inputs, k, v, passes, grid=(0.025, 0.05, 0.1, 0.2)):
    """Relative error at all stored keys after some passes, a number a sequence, at the best step of the grid."""
    design, sequences, pairs = mini_batch(16, regressor=regressor), len(k), k.shape[1]
    k, v = k.repeat(len(grid), 1, 1, 1), v.repeat(len(grid), 1, 1, 1)
    size = k.new_tensor(grid).repeat_interleave(sequences)[:, None, None].expand(-1, passes * pairs, 1)
    again = k.repeat(1, passes, 1, 1)
    with torch.no_grad():
        _, state = ttr.regress(design, again, again, v.repeat(1, passes, 1, 1), step_size=size, **inputs)
        silent = 0 * size[:, :pairs]  # steps of size zero: read only
        y, _ = ttr.regress(design, k, k, v, step_size=silent, state=state, **inputs)
    return best(relative_error(y - k, v - k).unflatten(0, (len(grid), sequences)))


def fitted(features, k, v):
    """Least squares at the stored keys."""
    phi, left = features(k)[:, :, 0], (v - k)[:, :, 0]
    return relative_error((phi @ torch.linalg.pinv(phi) @ left)[:, :, None], left[:, :, None])


recalled = {}
for n in counts:
    k = unit(seeds, n, 1, d)
    v = k + layer_norm(randn(seeds, n, 1, d), (d,))
    for name, (regressor, inputs) in kinds.items():
        for times in (1, passes):
            recalled.setdefault((name, times), []).append(recall(regressor, inputs, k, v, times))
    recalled.setdefault(("least squares, keys", 0), []).append(fitted(ttr.Identity(), k, v))
    recalled.setdefault(("least squares, products", 0), []).append(fitted(ttr.Quadratic(), k, v))
recalled = {name: torch.stack(errors) for name, errors in recalled.items()}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Relative error of recall against the number of stored pairs, as a multiple of the key's size; median and the band from the tenth to the ninetieth percentile over seeds. After one pass an MLP recalls hardly more than a linear map. Trained to the end it holds several times as many pairs as a key has channels, which its larger state pays for. An error above one is worse than answering with the key alone. Grey: exact least squares on the keys and on their products.", "name": "neural-fig-capacity"}, "image": {"alt": "Recall error against pairs over key size. Both one-pass curves lie close together at large errors; after many passes TTT-Linear rises early, the MLP stays near zero up to about four pairs a channel and then rises slowly; two grey curves of least squares leave zero at one and at about four and a half pairs a channel."}}
figure, axes = plt.subplots(figsize=(7.5, 4.2))
styles = {
    "TTT-Linear": ("C1", "s"),
    "MLP": ("C0", "o"),
    "least squares, keys": ("0.45", ""),
    "least squares, products": ("0.45", ""),
}
at = [n / d for n in counts]
for (name, times), errors in recalled.items():
    color, marker = styles[name]
    low, median, high = bands(errors)
    dash = {0: "--" if "keys" in name else "-.", 1: ":", passes: "-"}[times]
    label = name if not times else f"{name}, {'one pass' if times == 1 else 'many passes'}"
    axes.plot(at, median, dash, color=color, marker=marker, label=label, markersize=5)
    axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
axes.set(xlabel="pairs stored over size of a key, n / d", ylabel="relative error of recall", ylim=(-0.03, 1.6))
figure.legend(loc="outside lower center", ncols=3, fontsize=9)
plt.show()

# %%
middle = {name: errors.median(-1).values for name, errors in recalled.items()}
four = counts.index(4 * d)
assert middle["MLP", passes][four] < 0.1 < 0.5 < middle["TTT-Linear", passes][four]
assert middle["MLP", 1][four] > 0.75 * middle["TTT-Linear", 1][four]  # one pass: no such difference
assert max(middle["least squares, keys", 0][0], middle["least squares, products", 0][four]) < 1e-9
record("neural_capacity_mlp", middle["MLP", passes][four], atol=0.03)
record("neural_capacity_linear", middle["TTT-Linear", passes][four], rtol=0.05)
record("neural_capacity_mlp_once", middle["MLP", 1][four], rtol=0.1)
record("neural_capacity_linear_once", middle["TTT-Linear", 1][four], rtol=0.1)

# %% [markdown]
# At $n = 4d$ the trained MLP leaves {glue:text}`neural_capacity_mlp:.3f` of the squared size, TTT-Linear
# {glue:text}`neural_capacity_linear:.2f`.
# After one pass they leave {glue:text}`neural_capacity_mlp_once:.2f` and {glue:text}`neural_capacity_linear_once:.2f`,
# which is no recall.
#
# Both sentences matter. The capacity is there, and one gradient step a pair does not fill it.
# The first weights used here are random. A layer learns its first weights, keys and step sizes from outside so that
# one pass does more; how much more is for training to show ({doc}`/notebooks/11_training_on_tasks`).
# And size explains much of it. A linear memory of products ({doc}`/notebooks/02_linear_attention`) has
# $d^2 (d + 1) / 2$ numbers in its map, for $d = 8$ about half as many as the MLP.
# It recalls $d(d + 1)/2$ pairs, if it is solved exactly ({doc}`/notebooks/06_exact_least_squares`).
# The MLP gives out later, and more gently.
#
# ## Four choices
#
# Miras {cite:p}`behrouz2025miras` names the parts of such a memory: the network, the loss (*attentional bias*), the
# *retention*, which holds the weights near what they were, and the optimizer.
#
# | layer | network | loss | retention | optimizer |
# |---|---|---|---|---|
# | TTT-Linear, TTT-MLP {cite:p}`sun2024learning` | linear or MLP, with norm | squared | none | gradient steps, mini-batch 16, mean |
# | Titans {cite:p}`behrouz2025titans` | MLP | squared | squared distance: decay | with momentum |
# | Moneta {cite:p}`behrouz2025miras` | MLP | $\lvert e\rvert^p$, $p = 3$ | $q$-norm, $q = 4$ | gradient step |
# | Yaad {cite:p}`behrouz2025miras` | MLP | Huber | squared distance: decay | gradient step |
# | Memora {cite:p}`behrouz2025miras` | MLP | squared | relative entropy | gradient step |
# | ATLAS {cite:p}`behrouz2025atlas` | MLP of products | squared, over a window | decay | Muon |
# | SwiLA {cite:p}`lee2026switching` | mixture of linear maps | log-likelihood | decay | online EM |
#
# Each is a row of the atlas, and every cell can be exchanged alone.

# %%
atlas = ttr.atlas
assert atlas["ttt_mlp"].optimizer == ttr.GradientDescent(batch=16, average=True)
assert atlas["titans"].optimizer == ttr.GradientDescent(momentum=True)
assert (atlas["moneta"].loss, atlas["moneta"].retention) == (ttr.Lp(3.0), ttr.Lq(4.0))
assert (atlas["yaad"].loss, atlas["yaad"].retention) == (ttr.Huber(delta=None), ttr.L2())
assert (atlas["memora"].loss, atlas["memora"].retention) == (ttr.SquaredError(), ttr.KL())
assert atlas["atlas_memory"].optimizer == ttr.Muon(window=8, iterations=5)
assert atlas["swila"].regressor == ttr.Mixture(4)
unnamed = ttr.Design(ttr.Decay(), ttr.MLP(), ttr.GradientDescent(momentum=True), loss=ttr.Huber(), retention=ttr.KL())
assert unnamed.name is None  # a cell that nobody has published, and that runs

# %% [markdown]
# ## The loss: who pulls how hard
#
# One value in twenty is wrong by a factor of ten. What does it do to the memory?
#
# A loss here acts on each channel of the error and is summed.
# Its gradient is $-\psi(e)$ times the slope of the network, with the **influence function**
# $\psi = \ell'$ {cite:p}`huber1964robust`:
#
# ```{math}
# :label: neural-eq-influence
# \begin{aligned}
# \ell(e) &= \tfrac12 e^2 : & \psi(e) &= e, \\
# \ell(e) &= \rho_\delta(e) : & \psi(e) &= \operatorname{clip}_{[-\delta, \delta]}(e), \\
# \ell(e) &= \tfrac1p \lvert e\rvert^p : & \psi(e) &= \lvert e\rvert^{p-1} \operatorname{sgn}(e) .
# \end{aligned}
# ```
#
# A pair that is wrong by $\lvert e\rvert = 10$ pulls with $10$ under the squared error, with $\delta$ under Huber's
# loss, with $1$ under $p = 1$, and with $100$ under $p = 3$.
# So of the two robust-sounding layers of Miras one is robust. Yaad bounds the influence.
# **Moneta, with $p = 3$, is less robust to wrong values than least squares.**
# (Its loss has a virtue in other places: small errors are left alone.)
#
# Learning rates can hide such a thing, so again each loss gets its best step, now for every share of outliers
# separately.
# A linear memory is on the left, an MLP memory on the right.
# The error is that of the answers at new queries, over the second half of the sequence.

# %%
losses = {
    "squared": ttr.SquaredError(),
    "Huber": ttr.Huber(0.3),
    "p = 1": ttr.Lp(1.0),
    "p = 3": ttr.Lp(3.0),
}
seeds, T = sizes["robust"].values()
shares = [0, 0.01, 0.05, 0.1, 0.2]
grid = [2.0**-i for i in range(-1, 12)]
chance = torch.rand(seeds, T, 1, 1, generator=generator, dtype=torch.float64).to(device)
robust = {"linear": {}, "MLP": {}}

for memory, regressor, inputs in (("linear", ttr.Linear(), {}), ("MLP", ttr.MLP(), start)):
    q, k, v, true = world(memory, seeds, T, noise=0.02)
    outliers = [torch.where(chance < share, 10 * v, v) for share in shares]
    for name, loss in losses.items():
        design = ttr.Design(regressor=regressor, optimizer=ttr.GradientDescent(), loss=loss)
        found = [best(search(design, q, k, x, true, grid, T // 2, **inputs)) for x in outliers]
        robust[memory][name] = torch.stack(found)

# The whole of Moneta, its retention too, in both readings (more on these below), at one value in twenty.
moneta = {}
for printed in (False, True):
    parts = {"loss": ttr.Lp(3.0), "retention": ttr.Lq(4.0, printed)}
    design = ttr.Design(regressor=ttr.MLP(), optimizer=ttr.GradientDescent(), **parts)
    moneta[printed] = best(search(design, q, k, outliers[shares.index(0.05)], true, grid, T // 2, **start)).median()

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: how hard an error pulls, the influence functions of four losses (Huber's with a threshold of one, to be seen). Middle and right: relative error of a linear and of an MLP memory against the share of values that are ten times too large, each loss at its best step size; median and the band from the tenth to the ninetieth percentile over seeds. Bounded influence keeps the error low. The third power is worse than the square as soon as there is one outlier in a hundred.", "name": "neural-fig-robust"}, "image": {"alt": "Three plots. The influence of the squared error is a line, of Huber's loss a clipped line, of the first power a sign, of the third power a parabola on both sides. In the other two plots the curves of Huber's loss and of the first power stay low as outliers increase, the squared error jumps, and the third power lies above it."}}
figure, (influence, *panels) = plt.subplots(1, 3, figsize=(10.5, 3.8))
error = torch.linspace(-3, 3, 301, dtype=torch.float64)
markers = dict(zip(losses, ("o-", "s--", "^:", "D-."), strict=True))
for name, loss in losses.items():
    shown = ttr.Huber(1.0) if name == "Huber" else loss
    psi = grad(lambda e, loss=shown: loss(e).sum())(error)
    influence.plot(error, psi, markers[name][1:], label=name)
influence.set(xlabel="error e", ylabel="influence ψ(e)", ylim=(-4, 4), title="four losses")
for axes, (memory, lines) in zip(panels, robust.items(), strict=True):
    for name, errors in lines.items():
        low, median, high = bands(errors)
        (line,) = axes.plot(shares, median, markers[name], markersize=5)
        axes.fill_between(shares, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="share of outliers", ylabel="relative error", yscale="log", title=f"{memory} memory")
figure.legend(*influence.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %%
five = shares.index(0.05)
for memory, least in (("linear", 10), ("MLP", 2)):
    at = {name: errors.median(-1).values for name, errors in robust[memory].items()}
    assert at["squared"][0] < 1.2 * at["Huber"][0]  # no outliers: nothing to gain
    assert (at["p = 3"] > at["squared"])[1:].all()
    assert at["Huber"][five] < at["squared"][five] / least
    assert at["p = 1"][five] < at["squared"][five]
    assert at["p = 3"][five] > 2 * at["squared"][five]  # and so it is not the robust one
    assert at["p = 3"][1] > 5 * at["squared"][1]
    for name, short in zip(losses, ("squared", "huber", "p1", "p3"), strict=True):
        record(f"neural_robust_{memory.lower()}_{short}", at[name][five], rtol=0.15)
assert min(moneta.values()) > 2 * at["squared"][five]
record("neural_robust_moneta", moneta[False], rtol=0.2)
record("neural_robust_moneta_printed", moneta[True], rtol=0.2)

# %% [markdown]
# With one value in twenty wrong, the linear memory's error is {glue:text}`neural_robust_linear_squared:.3f` under the
# squared loss, {glue:text}`neural_robust_linear_huber:.4f` under Huber's, {glue:text}`neural_robust_linear_p1:.4f`
# with $p = 1$ and {glue:text}`neural_robust_linear_p3:.2f` with $p = 3$.
# For the MLP memory these are {glue:text}`neural_robust_mlp_squared:.3f`, {glue:text}`neural_robust_mlp_huber:.3f`,
# {glue:text}`neural_robust_mlp_p1:.3f` and {glue:text}`neural_robust_mlp_p3:.2f`.
# The figure exchanges the loss alone. All of Moneta, its retention included, has {glue:text}`neural_robust_moneta:.2f`,
# and {glue:text}`neural_robust_moneta_printed:.2f` with the retention as it is printed.
# The norm at the network's end hides the length of an outlier from the answer, and only from the answer: the gradient
# still sees it.
#
# (An outlier here is ten times the right value, so it still points the right way. That may be why the third power, which
# must take tiny steps to survive the first outlier, recovers a little where outliers are frequent.)
#
# Huber's loss needs a threshold. Here it was set by hand, above the noise and below the values.
# In Yaad each token brings its own, the input `threshold`, which the layer learns.
# (The paper prints this loss twice, channel by channel, as here, and with one switch for the norm of the whole error.)
#
# ## The retention: mirror descent
#
# The step {eq}`neural-eq-titans` keeps $W_t$ near $W_{t-1}$ in the squared distance. Miras asks for other distances.
# The tool is mirror descent {cite:p}`beck2003mirror`.
# Choose a strictly convex function $R$ of the weights. Let steps and decay act on an accumulator $A$, and let
#
# ```{math}
# :label: neural-eq-mirror
# A_t = \alpha_t A_{t-1} - \beta_t \nabla J_t(\bar W_t), \qquad
# W_t = \operatorname*{arg\,min}_W\; R(W) - \langle A_t, W\rangle = \nabla R^*(A_t) ,
# ```
#
# with $R^*(A) = \max_W \langle A, W\rangle - R(W)$ the Fenchel dual and $\bar W_t = \nabla R^*(\alpha_t A_{t-1})$.
# With $R = \tfrac12\lVert W\rVert^2$ the map is the identity and the rule is the old one.
#
# ### Moneta's norm
#
# Moneta has $R(W) = \tfrac12\lVert W\rVert_q^2$ with $q = 4$.
#
# ```{prf:theorem} The mirror map of a squared norm
# :label: neural-theorem-mirror
# Let $1 < q < \infty$, $q' = q/(q-1)$ and $R(W) = \tfrac12\lVert W\rVert_q^2$. Then
# $R^*(A) = \tfrac12\lVert A\rVert_{q'}^2$ and, where $A \ne 0$,
# $\nabla R^*(A) = \operatorname{sgn}(A) \odot \lvert A\rvert^{q'-1} \big/ \lVert A\rVert_{q'}^{q'-2}$,
# whose inverse is the same formula with $q$ in the place of $q'$.
# ```
#
# ```{prf:proof}
# By Hölder's inequality $\langle A, W\rangle \le \lVert A\rVert_{q'} \lVert W\rVert_q$, with equality for some $W$ of
# every norm $r = \lVert W\rVert_q$.
# So $R^*(A) = \max_{r \ge 0} r\lVert A\rVert_{q'} - \tfrac12 r^2 = \tfrac12\lVert A\rVert_{q'}^2$.
# With $\lVert A\rVert_{q'}^2 = \bigl(\sum \lvert a\rvert^{q'}\bigr)^{2/q'}$ the chain rule gives
# $\partial R^* / \partial a = \tfrac12 \cdot \tfrac2{q'} \lVert A\rVert_{q'}^{2-q'} \cdot q' \lvert a\rvert^{q'-1}
# \operatorname{sgn}(a)$, the formula.
# The minimiser in {eq}`neural-eq-mirror` satisfies $A = \nabla R(W)$, so $\nabla R$ inverts $\nabla R^*$, and
# $\nabla R$ is the same formula with $q$.
# ```
#
# The paper prints another map, $W = A / \lVert A\rVert_q^{q-2}$.
# No exponent makes that the gradient of a squared norm, except $q = 2$.
# Scale $A$ by $c$: the gradient of a squared norm scales with $c$, the printed map with $c^{3-q}$.
# For $q = 4$ that is $1/c$. **When the accumulator fades, the printed weights grow** without bound, and at $A = 0$ they have no value.
# `ttr.Lq` is the mirror map unless it is told `printed=True`.


# %%
def squared_norm_slope(x, p):
    """The gradient of ½‖x‖²ₚ."""
    return x.sign() * x.abs() ** (p - 1) / torch.linalg.vector_norm(x, p) ** (p - 2)


A = randn(8, 8)
A = A + A.sign() / 10  # the package smooths |a| near zero
W = ttr.Lq(4.0)(A)
assert_close(W, squared_norm_slope(A, 4 / 3), rtol=1e-3, atol=1e-4)
assert_close(squared_norm_slope(squared_norm_slope(A, 4 / 3), 4.0), A)  # the inverse
assert_close(grad(lambda x: torch.linalg.vector_norm(x, 4 / 3) ** 2 / 2)(A), squared_norm_slope(A, 4 / 3))

# A memory that reads nothing new for a hundred tokens and forgets: what becomes of its weights?
start, nothing = network_inputs(8, 32), torch.zeros(1, 100, 1, 8, dtype=torch.float64, device=device)
idle = {"step_size": nothing[..., 0], "log_decay": nothing[..., 0] - 0.02, **start}
_, state = ttr.regress(ttr.atlas["moneta"], nothing, nothing, nothing, **idle)
before, after = start["w1"], state.network["w1"]
kept = (after.norm() / before.norm()).item()
maps = {printed: ttr.Lq(4.0, printed) for printed in (False, True)}
growth = {printed: (weights(after).norm() / weights(before).norm()).item() for printed, weights in maps.items()}
assert abs(growth[False] - kept) < 0.01
assert abs(growth[True] - 1 / kept) < 0.01
record("neural_moneta_mirror", growth[False], rtol=1e-2)
record("neural_moneta_printed", growth[True], rtol=1e-2)

try:  # weights that begin at zero, where the printed map has no value
    x = torch.zeros(1, 1, 1, 4)
    ttr.ops.neural_memory(x, x, x, [torch.zeros(1, 4, 4)], x[..., 0], retention="lq_printed")
except ValueError as error:
    print(error)
else:
    raise AssertionError("expected a refusal")

# %% [markdown]
# After a hundred tokens of a gentle decay the weights of the mirror map are {glue:text}`neural_moneta_mirror:.2f`
# times what they were, those of the printed map {glue:text}`neural_moneta_printed:.2f` times.
#
# ### Memora's softmax
#
# Memora measures the distance of the weights by relative entropy. Then the step has a closed form.
#
# ```{prf:proposition} Relative entropy makes steps multiplicative
# :label: neural-proposition-entropy
# Let $w_{t-1}$ be a distribution over $n$ entries, none zero, $u$ the uniform one, $0 \le \alpha \le 1$ and $g$ a gradient.
# Among all distributions, $\beta\langle g, w\rangle + \alpha \operatorname{KL}(w \Vert w_{t-1}) +
# (1 - \alpha) \operatorname{KL}(w \Vert u)$ is least at
# $w_t = \operatorname{softmax}(\alpha \log w_{t-1} - \beta g)$.
# ```
#
# ```{prf:proof}
# The sum is $\sum_j w_j \bigl(\log w_j - a_j\bigr)$ up to a constant, with $a = \alpha\log w_{t-1} - \beta g$.
# With $a_j = \log \operatorname{softmax}(a)_j + \log\sum_i e^{a_i}$ it is
# $\operatorname{KL}(w \Vert \operatorname{softmax}(a))$ up to a constant. This divergence is zero at
# $w = \operatorname{softmax}(a)$ and positive elsewhere.
# ```
#
# This is the exponentiated gradient of {cite:t}`kivinen1997exponentiated`, with a pull towards the uniform
# distribution as the decay.
# It is {eq}`neural-eq-mirror` with $R$ the negative entropy; $A$ is $\log w$ up to a constant.
# Each column of a weight matrix is such a distribution.
#
# The price: a weight can be neither negative nor larger than one.
# A linear memory of this kind answers each channel with a weighted mean of the query's entries.
# So $\min_j q_j \le y \le \max_j q_j$, whatever was stored.

# %%
log_w, g, alpha, beta = randn(8).log_softmax(0), randn(8), 0.9, 0.5
uniform = torch.full_like(log_w, 1 / 8)


def total(w):
    entropy = (w * w.log()).sum()
    return beta * g @ w + alpha * (entropy - w @ log_w) + (1 - alpha) * (entropy - w @ uniform.log())


step = (alpha * log_w - beta * g).softmax(0)
others = (step.log() + randn(1000, 8) / 10).softmax(-1)
assert all(total(step) < total(w) for w in others)


def memora_linear(q, k, v, step_size):
    """A linear memory with relative entropy as its retention, that begins with uniform weights and forgets nothing."""
    flat = [k.new_zeros(1, k.shape[-1], v.shape[-1])]
    y, state = ttr.ops.neural_memory(q, k, v, flat, torch.full_like(k[..., 0], step_size), retention="kl")
    return y, ttr.KL()(state["w1"])[0, 0]


d, T = 4, 400
corners = torch.eye(d, dtype=torch.float64, device=device)[torch.arange(T) % d][None, :, None]
wanted = randn(d, 3)
stored, q = wanted[torch.arange(T) % d][None, :, None], randn(1, T, 1, d)
y, W = memora_linear(q, corners, stored, 1.0)
assert ((y >= q.amin(-1, keepdim=True)) & (y <= q.amax(-1, keepdim=True))).all()
assert W.min() >= 0
assert_close(W.sum(0), torch.ones_like(W[0]))
negative = wanted < 0
assert ((W - wanted)[negative] >= -wanted[negative]).all()
least_error = ((W - wanted)[negative].norm() / wanted[negative].norm()).item()
record("neural_memora_negative", least_error, rtol=0.05)

# %% [markdown]
# With the unit vectors as keys a matrix could store anything.
# Here the error at the negative values is {glue:text}`neural_memora_negative:.2f` times their size: no weight can go
# below zero, so no answer at these keys does.
# The published layer escapes in part. Its MLP ends in a layer norm, and the norm subtracts a mean, so signs come
# back at its output; inside, the weights stay non-negative.
# The classical escape is to hand the memory each key together with its negative (an exercise).
#
# ## The optimizer: Muon
#
# Besides its features, ATLAS changes two things in Titans {cite:p}`behrouz2025atlas`.
# Its gradient is that of a window of the last $c$ pairs, with weights $\gamma_i$, so it can correct what it has just
# seen.
# And its momentum is **orthogonalised** before it becomes a step:
#
# ```{math}
# :label: neural-eq-atlas
# Z_t = \eta_t Z_{t-1} - \nabla\!\sum_{i > t - c} \gamma_i J_i(\bar W_t), \qquad
# W_t = \bar W_t + \beta_t \operatorname{NS}_5(Z_t) .
# ```
#
# That is the optimizer Muon of {cite:t}`jordan2024muon`. If $Z = U \Sigma V^\top$, then $U V^\top$ is the step of unit
# spectral norm that descends most.
# NS approximates it without a decomposition. It divides $Z$ by its norm and then iterates an odd polynomial,
#
# ```{math}
# :label: neural-eq-schulz
# X \leftarrow a X + b\, X X^\top X + c\, (X X^\top)^2 X, \qquad (a, b, c) = (3.4445, -4.7750, 2.0315) ,
# ```
#
# which acts on each singular value alone, as $\sigma \mapsto a\sigma + b\sigma^3 + c\sigma^5$, and leaves $U$ and $V$
# as they are.


# %%
def newton_schulz(x, steps=5):
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def atlas_memory(q, k, v, weights, step_size, decay, momentum, importance, window=8, phi=ttr.Quadratic()):  # noqa: B008
    """ATLAS: the network sees the key's products, the key itself is carried around it."""

    def answer(weights, x):
        hidden = gelu(phi(x) @ weights["w1"], approximate="tanh")
        return x + layer_norm(hidden @ weights["w2"], x.shape[-1:], eps=1e-6)

    def objective(weights, k, v, importance):
        return (importance * (v - answer(weights, k)).square().sum(-1)).sum() / 2

    push, answers = dict.fromkeys(weights, 0.0), []
    for t in range(len(k)):
        recent = slice(max(0, t - window + 1), t + 1)
        weights = {name: decay[t] * w for name, w in weights.items()}
        slope = grad(objective)(weights, k[recent], v[recent], importance[recent])
        push = {name: momentum[t] * push[name] - slope[name] for name in weights}
        weights = {name: w + step_size[t] * newton_schulz(push[name]) for name, w in weights.items()}
        answers.append(answer(weights, q[t]))
    return torch.stack(answers)


d, T = 4, 12
q, k, v = randn(1, T, 1, d), randn(1, T, 1, d), randn(1, T, 1, d)
start = network_inputs(d, 4 * d) | {"w1": randn(1, d * (d + 1) // 2, 4 * d)}
step_size, decay, momentum, importance = (randn(1, T, 1).sigmoid() for _ in range(4))
y, _ = ttr.regress(
    ttr.atlas["atlas_memory"],
    *(q, k, v),
    step_size=step_size,
    log_decay=decay.log(),
    log_momentum=momentum.log(),
    input_gate=importance,
    **start,
)
first = {"w1": start["w1"][0], "w2": start["w2"][0]}
tokens = (x[0, :, 0] for x in (q, k, v))
numbers = (x[0, :, 0] for x in (step_size, decay, momentum, importance))
assert_close(y[0, :, 0], atlas_memory(*tokens, first, *numbers), rtol=1e-6, atol=1e-6)

# %%
sigma = torch.logspace(-3, 0, 300, dtype=torch.float64)
after = {n: sigma.clone() for n in (0, 1, 2, 3, 5)}
for n, x in after.items():
    for _ in range(n):
        x.copy_(3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5)
spectra = []
for _ in range(16):  # gradients as a memory meets them: few pairs, unequal sizes
    x = torch.einsum("p,pi,pj->ij", randn(16).exp(), unit(16, 16), unit(16, 16))
    left, values, right = torch.linalg.svd(x)
    spectra.append((values / x.norm(), (left.mT @ newton_schulz(x) @ right.mT).diagonal()))
assert_close((left.mT @ newton_schulz(x) @ right.mT).diagonal().diag(), left.mT @ newton_schulz(x) @ right.mT)
seen, brought = (torch.stack(x).flatten().cpu() for x in zip(*spectra, strict=True))
within = after[5][sigma >= 0.01]
assert within.min() > 0.65
assert within.max() < 1.25
record("neural_muon_low", within.min())
record("neural_muon_high", within.max())
spread = [(x[seen > 0.01].max() / x[seen > 0.01].min()).item() for x in (seen, brought)]
assert spread[1] < 2 < 10 < spread[0]
record("neural_muon_before", spread[0], rtol=0.05)
record("neural_muon_after", spread[1], rtol=0.05)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "What Newton–Schulz steps do to a singular value, that of the gradient over its norm: curves after none to five steps, and points of random gradients after five. Five steps bring everything above about a hundredth into a band around one, and never settle exactly: the polynomial was chosen for its slope at zero.", "name": "neural-fig-muon"}, "image": {"alt": "Singular value after iteration against singular value before, on a logarithmic axis. Each further step moves the rise to the left; after five steps the curve lies between about two thirds and one and a fifth for inputs above a hundredth, and grey points lie on it."}}
figure, axes = plt.subplots(figsize=(7, 3.8))
for (n, x), style in zip(after.items(), (":", "--", "-.", (0, (5, 1)), "-"), strict=True):
    axes.plot(sigma, x, linestyle=style, label=f"{n} steps")
axes.plot(seen, brought, "o", color="0.3", markersize=3, alpha=0.5, label="random gradients")
axes.set(xlabel="singular value over the norm", ylabel="after the steps", xscale="log", xlim=(1e-3, 1))
figure.legend(loc="outside lower center", ncols=6, fontsize=9)
plt.show()

# %% [markdown]
# Five steps take every singular value above a hundredth of the norm to between {glue:text}`neural_muon_low:.2f` and
# {glue:text}`neural_muon_high:.2f`.
# The ratio of the largest of these to the smallest falls from {glue:text}`neural_muon_before:.0f` to
# {glue:text}`neural_muon_after:.1f`.
# A weak direction of the error is written as hard as a strong one.
#
# There is a hazard in it. The step has forgotten how large the error was.
# A first write of $v$ and of $100 v$ leave the same linear memory (an exercise), and a memory that already knows a
# pair is still kicked by $\beta_t$.
# The size of the step is no longer in the gradient, so the layer must bring it: in $\beta_t$, $\alpha_t$, and the
# layer norm.
#
# ## More than one map
#
# SwiLA {cite:p}`lee2026switching` stays linear and takes several maps.
# Each channel of a value is a mixture of $J$ linear regressions with noise of variance one, and a pair belongs to map
# $j$ with prior probability $\pi_j$, which the layer computes from the token.
# Expectation–maximisation in its online form {cite:p}`cappe2009online` then says who learns:
#
# ```{math}
# :label: neural-eq-em
# \begin{aligned}
# \delta_j &= v_t - \bar w_j^\top k_t, & r_j &\propto \pi_j(k_t)\, e^{-\delta_j^2/2}, \\
# w_j &\leftarrow \bar w_j + \beta_t\, r_j\, \delta_j\, k_t, & y_t &= \textstyle\sum_j \pi_j(q_t)\, w_j^\top q_t .
# \end{aligned}
# ```
#
# The responsibility $r_j$ is the posterior that map $j$ made the value.
# Each map takes a delta-rule step on the share of the error that it explains.
#
# Take a world of two regimes: $v = A^\top k$ or $v = B^\top k$, a coin tossed at each token.
# One linear map can do no better than $(A + B)/2$.
# For two maps, let the writer have a hint: the logits of $\pi$ are $\pm h$ by the regime.
# The reader knows the regime it asks for.

# %%
seeds, T = sizes["mixture"].values()
d, hints = 8, [0, 0.05, 0.2, 0.5, 1, 2, 4]
maps = 2 * randn(2, seeds, d, 4)
q, k = 2 * unit(seeds, T, 1, d), 2 * unit(seeds, T, 1, d)
regime, asked = (torch.randint(0, 2, (seeds, T, 1, 1), generator=generator).to(device) for _ in "kq")


def regimes(x, regime):
    both = torch.einsum("sthk,jskv->jsthv", x, maps)
    return torch.where(regime == 0, both[0], both[1])


def logits(regime, hint):
    sign = 1 - 2 * regime.double()
    return hint * torch.stack([sign, -sign], dim=3).expand(-1, -1, 1, 2, 4)


true, v = regimes(q, asked), regimes(k, regime) + randn(seeds, T, 1, 4) / 10
step_size = torch.full_like(k[..., 0], 0.05)
swila = ttr.Design(regressor=ttr.Mixture(2), optimizer=ttr.OnlineEM())
y, _ = ttr.regress(delta_net, q, k, v, step_size=step_size)
single = relative_error(y, true, T // 2)
mixed, states = [], {}
for hint in hints:
    chosen = {"key_logits": logits(regime, hint), "query_logits": logits(asked, 20.0)}
    y, states[hint] = ttr.regress(swila, q, k, v, step_size=step_size, **chosen)
    mixed.append(relative_error(y, true, T // 2))
mixed = torch.stack(mixed)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "A world of two regimes: relative error at unseen queries of a mixture of two maps against the strength of the hint that the writer gets, a point a seed, and the median. Without a hint the two maps stay equal and fail as one map does. A faint hint breaks the tie and the posterior does the rest, though some seeds settle with the maps exchanged or mixed. A clear hint separates the regimes. Grey: one map, the delta rule.", "name": "neural-fig-mixture"}, "image": {"alt": "Error on a logarithmic axis against seven strengths of the hint, points for seeds. At zero all points lie near the grey band of one map; at faint hints points split into a low and a high group; at the clearest hint the points lie several orders of magnitude lower."}}
figure, axes = plt.subplots(figsize=(7.5, 3.8))
low, median, high = bands(single)
axes.axhspan(low, high, color="0.85", zorder=0)
axes.axhline(median, color="0.4", linestyle="--", linewidth=1, label="one map")
across = torch.linspace(-0.2, 0.2, seeds)
for at, errors in enumerate(mixed):
    axes.plot(
        at + across,
        errors.sort().values,
        "o",
        color="C0",
        markersize=3,
        alpha=0.6,
        label=None if at else "two maps, a seed",
    )
axes.plot(
    range(len(hints)),
    mixed.median(-1).values,
    "_",
    color="C1",
    markersize=22,
    markeredgewidth=3,
    label="two maps, median",
)
axes.set(xlabel="hint h in the logits of the writer", ylabel="relative error", yscale="log")
axes.set_xticks(range(len(hints)), hints)
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %%
assert_close(states[0].memory[:, :, 0], states[0].memory[:, :, 1])  # nothing tells the maps apart
assert mixed[0].median() > 0.5 * single.median() > 0.1
assert mixed[hints.index(0.2)].median() < 0.05 * single.median()  # a faint hint, for most seeds
assert mixed[hints.index(4)].quantile(0.95) < 0.01 * single.median()  # a clear one, for all but a few
record("neural_mixture_one", single.median(), rtol=0.1)
record("neural_mixture_hint", mixed[hints.index(4)].median(), rtol=0.3, atol=1e-4)
record("neural_mixture_no_hint", mixed[0].median(), rtol=0.1)

# %% [markdown]
# One map has the error {glue:text}`neural_mixture_one:.2f`, two maps without a hint
# {glue:text}`neural_mixture_no_hint:.2f`, and with the clearest hint {glue:text}`neural_mixture_hint:.4f`.
# All maps begin at zero, so only the logits can tell them apart; from there on the errors do.
#
# ## Limits
#
# The same memories, at the ends of their dials.

# %%
d, T = 8, 32
q, k, v = randn(1, T, 1, d), unit(1, T, 1, d), randn(1, T, 1, d)
start = network_inputs(d, 4 * d)
step_size, decay = randn(1, T, 1).sigmoid() / 4, randn(1, T, 1).sigmoid()
with_decay = {"step_size": step_size, "log_decay": decay.log(), **start}
plain, _ = ttr.regress(ttr.Design(ttr.Decay(), ttr.MLP(), ttr.GradientDescent()), q, k, v, **with_decay)

# A threshold that nothing reaches, a power of two, a norm of two: Yaad and Moneta are plain gradient descent.
yaad, _ = ttr.regress(ttr.atlas["yaad"], q, k, v, threshold=1e9 * torch.ones_like(step_size), **with_decay)
assert_close(yaad, plain)
for printed in (False, True):
    square = ttr.Design(ttr.Decay(), ttr.MLP(), ttr.GradientDescent(), ttr.Lp(2.0), ttr.Lq(2.0, printed))
    y, _ = ttr.regress(square, q, k, v, **with_decay)
    assert_close(y, plain)

# Momentum that is forgotten at once: Titans is plain gradient descent with decay.
y, _ = ttr.regress(ttr.atlas["titans"], q, k, v, log_momentum=torch.full_like(step_size, -100.0), **with_decay)
assert_close(y, plain)

# One map: SwiLA is the gated delta rule.
even = torch.zeros(1, T, 1, 1, d, dtype=torch.float64, device=device)
one_map = ttr.Design(ttr.Decay(), ttr.Mixture(1), ttr.OnlineEM())
gates = {"step_size": step_size, "log_decay": decay.log()}
y, _ = ttr.regress(one_map, q, k, v, key_logits=even, query_logits=even, **gates)
gated, _ = ttr.regress(ttr.atlas["gated_delta_net"], q, k, v, **gates)
assert_close(y, gated)

for slug in ("titans", "yaad", "moneta"):
    print(*(f"{ttr.atlas[slug].name} is {limit}" for limit in ttr.atlas[slug].limits()), sep="\n")

# %% [markdown]
# ## Exercises
#
# ```{exercise} One key, many times
# :label: neural-exercise-repeat
# A mini-batch of $b = 8$ holds the same unit key eight times, with the same value.
# For which step sizes does the linear memory come nearer to the value, and what is left of the error after one
# mini-batch? Check it, for the sum of the steps and for their mean.
# ```
#
# ```{solution-start} neural-exercise-repeat
# :class: dropdown
# ```
#
# By {prf:ref}`neural-theorem-ends` the error along $k$ is multiplied by $1 - 8\beta$, so it shrinks for
# $0 < \beta < 1/4$ and is gone at $1/8$.
# With the mean it is multiplied by $1 - \beta$, as by a single step.

# %%
d = 4
key, value = unit(1, 1, 1, d).expand(1, 8, 1, d), randn(1, 1, 1, 3).expand(1, 8, 1, 3)
for beta in (0.05, 0.125, 0.2, 0.3):
    for average, share in ((False, 1 - 8 * beta), (True, 1 - beta)):
        y, _ = ttr.regress(mini_batch(8, average), key, key, value, step_size=torch.full_like(key[..., 0], beta))
        assert_close(value[:, -1] - y[:, -1], share * value[:, -1])

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} What a norm cannot store
# :label: neural-exercise-sphere
# A TTT memory has a norm of scale one and shift zero at its end.
# How near can any weights bring $m(k)$ to a given $v$?
# Compare with what training reaches on one pair.
# ```
#
# ```{solution-start} neural-exercise-sphere
# :class: dropdown
# ```
#
# $m(k) - k$ has mean zero and length $\sqrt d$ (nearly: the norm adds a small number to the variance).
# Split $v - k = \bar u \mathbf 1 + u$ with $u$ of mean zero.
# The nearest point of the sphere is $\sqrt d\, u / \lVert u\rVert$, so the squared distance is
# $d \bar u^2 + (\lVert u\rVert - \sqrt d)^2$.
# A learned scale and shift move and stretch the sphere, the same for all tokens.

# %%
d, T = 8, 400
start = network_inputs(d, 4 * d)
k, v = unit(16, 1, 1, d), randn(16, 1, 1, d)
many = [x.expand(16, T, 1, d) for x in (k, k, v)]
y, _ = ttr.regress(mini_batch(1, regressor=ttr.MLP()), *many, step_size=torch.full_like(many[0][..., 0], 0.05), **start)
mean = (v - k).mean(-1)
floor = d * mean**2 + ((v - k - mean[..., None]).norm(dim=-1) - d**0.5) ** 2
reached = (y[:, -1:] - v).square().sum(-1)
assert (reached > floor - 1e-3).all()
assert_close(reached, floor, rtol=0.02, atol=0.02)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Signs for Memora
# :label: neural-exercise-signs
# Give a linear memory with relative entropy as its retention the key $c\,[k, -k]$ instead of $k$.
# Which linear maps can it represent now? Store the negative values from above.
# ```
#
# ```{solution-start} neural-exercise-signs
# :class: dropdown
# ```
#
# A column is $[w^+, w^-] \ge 0$ with sum one, and the answer is $c\,(w^+ - w^-)^\top q$.
# That is every map whose columns have absolute values of sum at most $c$: the EG$^\pm$ of
# {cite:t}`kivinen1997exponentiated`.

# %%
c = 8.0
assert wanted.abs().sum(0).max() < c
signed = torch.cat([c * corners, -c * corners], dim=-1)
_, W = memora_linear(*(x.repeat(1, 10, 1, 1) for x in (signed, signed, stored)), 0.01)
assert_close(c * (W[:4] - W[4:]), wanted, rtol=0.0, atol=0.01)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A step that does not see the error's size
# :label: neural-exercise-blind
# Show that a linear memory with Muon, one pair in the window and nothing stored, learns the same from $(k, v)$ and
# from $(k, 100 v)$.
# What does it do to a pair that it already knows almost exactly?
# ```
#
# ```{solution-start} neural-exercise-blind
# :class: dropdown
# ```
#
# The first gradient is $-k v^\top$. NS divides by its norm, so the factor is gone: the step is
# $\beta s\, k v^\top / (\lVert k\rVert\lVert v\rVert)$ with $s$ the image of the singular value $1$.
# With a pair known up to $\varepsilon$ the step is as long as the first one, so the error after it is about
# $\beta s$, however small $\varepsilon$ was.

# %%
muon = ttr.Design(optimizer=ttr.Muon(window=1))
k, v = unit(1, 2, 1, 6), randn(1, 2, 1, 6)
inputs = {"step_size": torch.full_like(k[..., 0], 0.1), "log_momentum": torch.full_like(k[..., 0], -100.0)}
y, _ = ttr.regress(muon, k[:, :1], k[:, :1], v[:, :1], **{name: x[:, :1] for name, x in inputs.items()})
louder, _ = ttr.regress(muon, k[:, :1], k[:, :1], 100 * v[:, :1], **{name: x[:, :1] for name, x in inputs.items()})
assert_close(louder, y, rtol=1e-5, atol=1e-6)

again = k[:, :1].expand(1, 2, 1, 6)  # the second value is what the memory answers already, but for a millionth
nearly = torch.cat([v[:, :1], y + 1e-6 * normalize(v[:, 1:], dim=-1)], dim=1)
z, _ = ttr.regress(muon, again, again, nearly, **inputs)
assert (z[:, 1] - nearly[:, 1]).norm() > 0.05 > 1e-5 > (nearly[:, 1] - z[:, 0]).norm()

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`sun2024learning` is the paper to begin with: networks as states, mini-batches, the dual form.
# {cite:t}`behrouz2025titans` add momentum and decay, {cite:t}`behrouz2025miras` the axes of loss and retention,
# {cite:t}`behrouz2025atlas` the window and Muon.
# {cite:t}`jordan2024muon` explain the iteration, {cite:t}`kivinen1997exponentiated` what multiplicative steps are good
# for, {cite:t}`beck2003mirror` mirror descent, and {cite:t}`huber1964robust` is where robust losses begin.
# {cite:t}`lee2026switching` take several linear maps in the place of one network.
# {cite:t}`wang2025testtime` is the framework of this book.
