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
# # Fast weights: the delta rule
#
# A least-squares memory weighs every new pair against all old ones, and solves its regression again to do so.
# Linear attention never solves anything, and never notices that it was wrong.
# How does a memory correct itself without solving its regression again?
#
# The answer of this chapter is one gradient step for each pair.
# We derive it, ask what one step does to everything that was stored before, turn a recursion that looks hopelessly
# serial into matrix products, and measure what the memory forgets.
# At the end two small language models are trained, one that adds and one that corrects.

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
recall_sizes = {"smoke": {"key": 64, "seeds": 32}, "full": {"key": 128, "seeds": 64}}[scale]
text_sizes = {
    "smoke": {
        "model": {"d_model": 96, "num_layers": 2, "num_heads": 4},
        "data": {"length": 256, "batch_size": 4, "num_train": 50, "num_val": 8},
        "rounds": 9,
        "margin": 0.2,  # in bits a byte: how clear the lead must be
    },
    "full": {
        "model": {"d_model": 512, "num_layers": 6, "num_heads": 4},
        "data": {"length": 1024, "batch_size": 32, "num_train": 250, "num_val": 16},
        "rounds": 20,
        "margin": 0.0,
    },
}[scale]
linear_attention = ttr.atlas["linear_attention"]
delta_net, gated_delta_net = ttr.atlas["delta_net"], ttr.atlas["gated_delta_net"]
generator = torch.Generator().manual_seed(4)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def read(memory, query):
    """y = Sᵀq, for every batch element and head."""
    return torch.einsum("bhkv,bhk->bhv", memory, query)


# %% [markdown]
# ## A sum cannot be corrected
#
# Suppose a name is bound to a value, and later to another one: `x = 1`, then `x = 2`.
# The same key $k$ arrives twice, first with $v$ and then with $v'$.
# What should the memory answer when it is asked for $k$?
#
# The linear attention of {doc}`/notebooks/02_linear_attention` adds $k v^\top$ and then $k v'^\top$, so it answers
# $v + v'$.
# It is a sum, and a sum has no way to take anything back.
# Let us run both memories, the sum and the one that this chapter is about.

# %%
k = normalize(randn(1, 1, 1, 8), dim=-1).expand(1, 2, 1, 8)  # the same key twice
v, one = randn(1, 2, 1, 3), torch.ones_like(k[..., 0])
summed, _ = ttr.regress(linear_attention, k, k, v)
corrected, _ = ttr.regress(delta_net, k, k, v, step_size=one)

assert_close(summed[:, 1], v[:, 0] + v[:, 1])
assert_close(corrected[:, 1], v[:, 1])

# %% [markdown]
# The second memory answers $v'$.
# It looked up what it knew about $k$ before it wrote, and wrote only what was missing.
# You can watch a memory do this one pair at a time in the
# <a href="../book/explorer.html#memory=delta&amp;beta=1">explorer</a>.
#
# ## One gradient step
#
# Start from the regression. A memory that is a matrix $S$ answers $S^\top k$, and its error on the newest pair is
#
# ```{math}
# :label: delta-eq-loss
# J_t(S) = \tfrac12 \lVert v_t - S^\top k_t \rVert^2 .
# ```
#
# Least squares minimises the sum of these losses over all pairs at every step.
# That takes the inverse of a matrix of key products ({doc}`/notebooks/06_exact_least_squares`).
# Far cheaper is one gradient step on the newest term only.
# The error enters linearly, so the gradient is an outer product:
#
# ```{math}
# :label: delta-eq-gradient
# \nabla_S\, J_t(S) = -\,k_t \bigl(v_t - S^\top k_t\bigr)^\top .
# ```
#
# One step of size $\beta_t$ from $S_{t-1}$ is the **delta rule**:
#
# ```{math}
# :label: delta-eq-rule
# S_t = S_{t-1} + \beta_t\, k_t\, e_t^\top, \qquad e_t = v_t - S_{t-1}^\top k_t, \qquad y_t = S_t^\top q_t .
# ```
#
# So the optimizer is stochastic gradient descent with one sample a step and the sequence as its order.
# Nothing is averaged, nothing is revisited, and the state is still one matrix.
#
# The rule is much older than attention:
# {cite:t}`widrow1960adaptive` trained the weights of one linear unit with it, as *least mean squares*.
# What is new is whose weights they are.
# In the fast weight programmers of {cite:t}`schmidhuber1992learning` one network, whose weights change slowly over
# training, writes the weights of another while it reads a sequence.
# {cite:t}`schlag2021linear` saw that linear attention is such a programmer, one that can only add, and gave it the
# delta rule: a slow network chooses $k_t$, $v_t$, $q_t$ and $\beta_t$ for each token, and {eq}`delta-eq-rule`
# programs the fast one.
#
# ## The gain: one formula for many online learners
#
# A gradient step needs a metric. Nothing says that the error must be written along $k_t$.
# Let it be written along any vector $g_t$, the **gain** of adaptive filtering {cite:p}`haykin2002adaptive`, and let
# the old memory fade to $\bar S_t$ first if it should:
#
# ```{math}
# :label: delta-eq-gain
# S_t = \bar S_t + g_t\, e_t^\top, \qquad e_t = v_t - \bar S_t^\top k_t .
# ```
#
# Many online learners of a linear map under the squared loss have the form {eq}`delta-eq-gain`, each with its own
# $g_t$. That is why the package has one op for all of them, `ttr.ops.delta_rule(q, k, v, gain, log_decay)`.
# Steps scaled entry by entry, several steps a token and momentum need more.
#
# | learner | gain $g_t$ | what is left of the error, $1 - k_t^\top g_t$ | in the atlas |
# |---|---|---|---|
# | LMS, DeltaNet {cite:p}`widrow1960adaptive,schlag2021linear` | $\beta_t k_t$ | $1 - \beta_t \lVert k_t\rVert^2$ | `delta_net` |
# | normalised LMS {cite:p}`nagumo1967learning` | $\beta_t k_t / (\varepsilon + \lVert k_t\rVert^2)$ | $\approx 1 - \beta_t$ | `nlms` |
# | implicit step, Longhorn {cite:p}`liu2024longhorn` | $\beta_t k_t / (1 + \beta_t\lVert k_t\rVert^2)$ | $1 / (1 + \beta_t \lVert k_t\rVert^2)$ | `longhorn` |
# | diagonal {cite:p}`tumma2026preconditioned` | $\beta_t k_t \oslash (\lambda + \sum_{i \le t} k_i \odot k_i)$ | in $[1 - \beta_t d,\ 1]$ | `preconditioned_delta_net` |
# | recursive least squares {cite:p}`plackett1950some` | $\bigl(\Lambda + \sum_{i \le t} k_i k_i^\top\bigr)^{-1} k_t$ | in $[0, 1]$ | `recursive_least_squares` |
#
# The third column is worth a line of algebra. Put the new memory {eq}`delta-eq-gain` into the error of the same pair:
#
# ```{math}
# :label: delta-eq-left
# v_t - S_t^\top k_t = e_t - e_t\, g_t^\top k_t = (1 - k_t^\top g_t)\, e_t .
# ```
#
# A write multiplies the error of its own pair by the number $1 - k_t^\top g_t$.
# At 0 the pair is stored, at 1 it is ignored, and outside $[-1, 1]$ the correction has made things worse.
#
# A small experiment shows what that means for keys of unequal length. The task is stationary and has no noise:
# $v_t = W^\top k_t$ with a fixed $W$, and the length of the keys is log-normal.
# To follow the memory through time we need the recursion itself.
#
# ## The recursion in ten lines


# %%
def delta_rule(q, k, v, gain, log_decay=None):
    """One token after the other: the answers, and every memory on the way."""
    memory = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    outputs, memories = [], []
    for t in range(k.shape[1]):
        if log_decay is not None:
            memory = log_decay[:, t, :, None, None].exp() * memory
        error = v[:, t] - read(memory, k[:, t])
        memory = memory + torch.einsum("bhk,bhv->bhkv", gain[:, t], error)
        outputs.append(read(memory, q[:, t]))
        memories.append(memory)
    return torch.stack(outputs, dim=1), torch.stack(memories, dim=1)


# %% [markdown]
# The gains come from `ttr.ops.gains`; each takes the keys and returns one vector a token.

# %%
streams, steps, d = 20, 192, 16
target = randn(streams, 1, d, 4)
lengths = (randn(streams, steps, 1, 1) / 2).exp()
keys = lengths * normalize(randn(streams, steps, 1, d), dim=-1)
values = torch.einsum("sthk,shkv->sthv", keys, target)
ones, ridge = torch.ones_like(keys[..., 0]), keys.new_full((1, d), 1e-4)
gains = {
    "LMS": ttr.ops.gains.lms(keys, ones),
    "normalised LMS": ttr.ops.gains.nlms(keys, ones),
    "implicit": ttr.ops.gains.implicit(keys, ones),
    "diagonal": ttr.ops.gains.diagonal_newton(keys, ones, keys.new_ones(1, d))[0],
    "recursive least squares": ttr.ops.gains.recursive_least_squares(keys, ridge)[0],
}
distances = {}
for name, gain in gains.items():
    _, memories = delta_rule(keys, keys, values, gain)
    gap = (memories - target[:, None]).flatten(2).norm(dim=-1)
    gap = (gap / target.flatten(1).norm(dim=-1, keepdim=True)).cpu()
    distances[name] = gap.quantile(gap.new_tensor([0.1, 0.5, 0.9]), dim=0)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: the share of a pair's error that its own write leaves, against the length of the key, at step size 1. Least mean squares leaves the stable band (grey) for long keys; the normalised step does not see the length; the implicit step cannot overshoot. Right: distance to the true map for keys of log-normal length, median and the band from the tenth to the ninetieth percentile of the streams. The same step size that is right for a short key makes least mean squares diverge.", "name": "delta-fig-gains"}, "image": {"alt": "Two plots. Left: one minus k transposed g against key length for three gains; the curve of least mean squares falls below minus one. Right: relative error of the memory against the number of pairs for five gains on a logarithmic scale; least mean squares grows, recursive least squares falls fastest."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
length = torch.linspace(0, 2, 201)
left.axhspan(-1, 1, color="0.93", zorder=0)
for share in (
    1 - length**2,
    torch.zeros_like(length),
    1 / (1 + length**2),
):  # in the order of the legend
    left.plot(length, share)
left.set(
    xlabel="length of the key, ‖k‖",
    ylabel="share of the error left, 1 − kᵀg",
    ylim=(-2, 1.2),
)
for name, (low, median, high) in distances.items():
    (line,) = right.plot(range(1, steps + 1), median, label=name)
    right.fill_between(
        range(1, steps + 1),
        low,
        high,
        color=line.get_color(),
        alpha=0.15,
        linewidth=0,
    )
right.set(xlabel="pairs written", ylabel="‖S − W‖ / ‖W‖", yscale="log", ylim=(1e-6, 1e3))
figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5)
plt.show()

# %%
final = {name: bands[1, -1] for name, bands in distances.items()}
assert final["LMS"] > 1 > final["diagonal"]
assert final["diagonal"] > final["implicit"] > final["normalised LMS"]
assert final["recursive least squares"] < final["normalised LMS"] / 10
record("delta_gains_lms_digits", final["LMS"].log10(), atol=0.05)
record("delta_gains_nlms", final["normalised LMS"], rtol=1e-2)
record("delta_gains_rls", final["recursive least squares"], rtol=1e-2)

# %% [markdown]
# Layers avoid the trouble of the left panel by making keys unit length, as `ttr.layers.RegressionLayer` does.
# What else the gains buy, and what they cost, is in {doc}`/notebooks/05_online_learners`. Here we stay with
# $g = \beta k$.
#
# ## What one write does to everything else
#
# Collect in {eq}`delta-eq-rule` what multiplies the old memory:
#
# ```{math}
# :label: delta-eq-transition
# S_t = (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top .
# ```
#
# The old memory passes through $I - \beta k k^\top$, the new value is added.
# All that a write does to old pairs is in that matrix.
#
# ```{prf:theorem} What a write keeps
# :label: delta-theorem-spectrum
# Let $k \neq 0$.
# The matrix $I - \beta k k^\top$ has the eigenvalue $1$ on the $d - 1$ directions orthogonal to $k$, and
# $1 - \beta\lVert k\rVert^2$ along $k$.
# It never enlarges a vector if and only if $0 \le \beta \lVert k\rVert^2 \le 2$.
# ```
#
# ```{prf:proof}
# If $x \perp k$ then $(I - \beta k k^\top) x = x$. And $(I - \beta k k^\top) k = (1 - \beta \lVert k\rVert^2)\, k$.
# The matrix is symmetric, so its norm is the largest modulus among its eigenvalues,
# $\max(1, \lvert 1 - \beta\lVert k\rVert^2\rvert)$, which is $1$ exactly if $-1 \le 1 - \beta\lVert k\rVert^2 \le 1$.
# ```
#
# With unit keys the stable range is $\beta \in [0, 2]$, whatever the order of the keys: a product of matrices that
# enlarge nothing enlarges nothing.
# This argument needs $g$ parallel to $k$.
# For another gain the eigenvalue $1 - k^\top g$ is still right, but $I - g k^\top$ is not symmetric, and it does
# enlarge some vectors even where its eigenvalues are at most one.
#
# Three step sizes deserve a name. A small one nudges.
# **$\beta = 1$ projects**: what the memory answered at $k$ is removed entirely, and replaced.
#
# ```{prf:proposition} Kaczmarz: the newest pair exactly, by the smallest change
# :label: delta-proposition-kaczmarz
# Let $\lVert k_t\rVert = 1$ and $\beta_t = 1$.
# Then $S_t^\top k_t = v_t$, and among all matrices with this property $S_t$ is the one nearest to $S_{t-1}$ in the
# Frobenius norm.
# ```
#
# ```{prf:proof}
# {eq}`delta-eq-left` with $g = k$ gives $v_t - S_t^\top k_t = 0$.
# Any other matrix that stores the pair is $S_t + \Delta$ with $\Delta^\top k_t = 0$.
# The step taken is $S_t - S_{t-1} = k_t e_t^\top$, and
# $\langle \Delta, k_t e_t^\top\rangle = e_t^\top \Delta^\top k_t = 0$.
# So $\lVert S_t + \Delta - S_{t-1}\rVert_F^2 = \lVert S_t - S_{t-1}\rVert_F^2 + \lVert\Delta\rVert_F^2$.
# ```
#
# {cite:t}`kaczmarz1937angenaherte` solved linear systems this way, one equation after the other.
# The proposition is the good news.
# The bad news is that "nearest" is not "equal": a pair stored earlier survives unharmed only if its key is orthogonal
# to $k_t$, or if there was nothing to correct, $e_t = 0$.
# We measure the damage below.
#
# **$\beta = 2$ reflects**: $I - 2kk^\top$ turns the sign of what is stored along $k$. It is a Householder reflection.
# A memory that can turn signs can do something that no decay with factors in $[0, 1]$ can: count modulo two.
# Write nothing ($v = 0$), and let a token choose between $\beta = 2$ for a one and $\beta = 0$ for a zero.
# The sign of the memory is then the parity of the bits read so far:

# %%
bits = torch.randint(0, 2, (1, 40, 1), generator=generator).double().to(device)
key = torch.ones_like(bits)[..., None]
silence = torch.zeros_like(key)
start = ttr.State(memory=key[:, :1])
signs, _ = ttr.regress(delta_net, key, key, silence, step_size=2 * bits, state=start)
assert_close(signs.flatten(), (-1.0) ** bits.flatten().cumsum(0))

damped, _ = ttr.regress(delta_net, key, key, silence, step_size=bits / 2, state=start)
assert (damped > 0).all()  # with β < 1 no eigenvalue is negative, and no sign is ever turned

# %% [markdown]
# This shows that the numbers exist, and says nothing about whether training finds them.
# {cite:t}`grazzi2024unlocking` show that it can, and that in finite precision no eigenvalues in $[0, 1]$ solve
# parity.
# In the layers it is the argument `max_step_size=2`. {doc}`/notebooks/study` trains one layer on streams of $32$ bits
# and tests it on $64$: its accuracy is {glue:text}`../notebooks/study.ipynb::study_parity_shrinks:.2f` with
# $\beta \le 1$ and {glue:text}`../notebooks/study.ipynb::study_parity_turns:.2f` with $\beta \le 2$.
#
# ## Forgetting, before correcting
#
# The delta rule replaces what it is told to replace. It has no way to drop what nobody mentions again.
# Gated DeltaNet {cite:p}`yang2024gateddelta` adds the decay of {doc}`/notebooks/03_state_space_models`:
# $\bar S_t = \alpha_t S_{t-1}$ in {eq}`delta-eq-gain`, or
#
# ```{math}
# :label: delta-eq-gated
# S_t = \alpha_t (I - \beta_t k_t k_t^\top)\, S_{t-1} + \beta_t k_t v_t^\top .
# ```
#
# The order matters.
# The memory decays first, and the error is that of the decayed memory, so the correction knows about the decay.
# With $\beta = 1$ the newest pair is still recalled exactly.
# Decay after the correction, and it comes back too small by $\alpha_t$.
# The package writes the rule from the choices that make up the design, in this order:

# %%
from IPython.display import Math

Math(gated_delta_net.update_rule())

# %%
q, k = (normalize(randn(2, 50, 3, 16), dim=-1) for _ in range(2))
v, log_decay = randn(2, 50, 3, 8), -randn(2, 50, 3).square() / 10
inputs = {"log_decay": log_decay, "step_size": torch.ones_like(log_decay)}
recalled, _ = ttr.regress(gated_delta_net, k, k, v, **inputs)
assert_close(recalled, v)

one_late = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay[:, :-1]], dim=1)
_, memories = delta_rule(k, k, v, k, one_late)
decay = log_decay[..., None].exp()
decayed_after = decay[..., None] * memories
assert_close(torch.einsum("bthkv,bthk->bthv", decayed_after, k), decay * v)

# %% [markdown]
# One factor a channel instead of one a head gives Kimi Delta Attention {cite:p}`kimi2025linear`, `ttr.atlas["kda"]`.
#
# ## The same numbers, chunk by chunk
#
# The ten lines are too slow to train with. They take one step after the other, each too small for a GPU.
# In linear attention a chunk of tokens was one matrix product, because a write did not depend on the writes before
# it.
# Here it does: the error $e_t$ contains everything written earlier.
# But it does so *linearly*, and triangular linear systems can be solved at once.
#
# Number the tokens of a chunk $1, \dots, C$, let $S$ be the memory at its start, and
# $c_t = \sum_{j \le t} \log\alpha_j$.
# Whatever the errors are, {eq}`delta-eq-gain` only ever adds terms $g_j e_j^\top$ and lets them decay. So
#
# ```{math}
# :label: delta-eq-unrolled
# \bar S_t = e^{c_t} S + \sum_{j < t} e^{c_t - c_j}\, g_j e_j^\top .
# ```
#
# Put this into the definition of the error, $e_t = v_t - \bar S_t^\top k_t$:
#
# ```{math}
# :label: delta-eq-errors
# e_t + \sum_{j < t} \underbrace{e^{c_t - c_j}\, k_t^\top g_j}_{A_{tj}}\, e_j = v_t - e^{c_t} S^\top k_t .
# ```
#
# These are $C$ equations for $C$ unknown rows $e_t^\top$.
# Stack them into $U$, the keys, gains, queries and values into $K$, $G$, $Q$ and $V$, and let $\bar K$ have the rows
# $e^{c_t} k_t^\top$:
#
# ```{math}
# :label: delta-eq-system
# (I + A)\, U = V - \bar K S, \qquad A \text{ strictly lower triangular.}
# ```
#
# One solve gives all errors of the chunk.
# With $D_{tj} = e^{c_t - c_j}$ for $j \le t$, else $0$, and $\bar Q$ made as $\bar K$, the answers and the next
# memory are products:
#
# ```{math}
# :label: delta-eq-chunk
# Y = \bar Q S + (Q G^\top \odot D)\, U, \qquad S' = e^{c_C} S + \sum_{j \le C} e^{c_C - c_j}\, g_j e_j^\top .
# ```
#
# For one head this is again ten lines.
# Every exponent is at most zero, so nothing overflows, however strong the decay.


# %%
def solve(A, right):
    """(I + A)⁻¹ right for a strictly lower triangular A."""
    return torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)


def chunkwise(q, k, v, gain, log_decay, chunk=64):
    """The same recursion for one head: q, k and gain (time, key), v (time, value)."""
    memory, outputs = k.new_zeros(k.shape[-1], v.shape[-1]), []
    chunks = (x.split(chunk) for x in (q, k, v, gain, log_decay))
    for Q, K, V, G, log_alpha in zip(*chunks, strict=True):
        c = log_alpha.cumsum(0)[:, None]
        D = (c - c.T).tril().exp().tril()
        A = (K @ G.T * D).tril(-1)
        U = solve(A, V - c.exp() * K @ memory)
        outputs.append(c.exp() * Q @ memory + (Q @ G.T * D) @ U)
        memory = c[-1].exp() * memory + ((c[-1] - c).exp() * G).T @ U
    return torch.cat(outputs), memory


# %% [markdown]
# Ten lines of recursion, ten lines of chunks, the op, and the one entry point: four ways to the same numbers.
# The length is not a multiple of the chunk, the gain is not along the key, and the step sizes reach two.

# %%
q, k = (normalize(randn(2, 150, 3, 16), dim=-1) for _ in range(2))
v, log_decay, beta = (
    randn(2, 150, 3, 8),
    -randn(2, 150, 3).square() / 5,
    2 * randn(2, 150, 3).sigmoid(),
)
gain = ttr.ops.gains.lms(k, beta) + randn(2, 150, 3, 16) / 50

slow, memories = delta_rule(q, k, v, gain, log_decay)
fast, memory = chunkwise(*(x[0, :, 0] for x in (q, k, v, gain, log_decay)))
assert_close(fast, slow[0, :, 0])
assert_close(memory, memories[0, -1, 0])

y, memory = ttr.ops.delta_rule(q, k, v, gain, log_decay)
assert_close(y, slow)
assert_close(memory, memories[:, -1])

slow, _ = delta_rule(q, k, v, ttr.ops.gains.lms(k, beta), log_decay)
inputs = {"log_decay": log_decay, "step_size": beta}
y, _ = ttr.regress(gated_delta_net, q, k, v, **inputs)
assert_close(y, slow)

# %% [markdown]
# **The name.** With $V = 0$ and no decay the chunk only multiplies the memory, and {eq}`delta-eq-chunk` reads
#
# ```{math}
# :label: delta-eq-wy
# (I - g_C k_C^\top) \cdots (I - g_1 k_1^\top) = I - G^\top (I + A)^{-1} K .
# ```
#
# A product of $C$ rank-one changes of the identity is one change of rank at most $C$.
# For reflections that is the WY form of {cite:t}`bischof1987wy`; that the middle matrix is the inverse of a triangle
# is the UT form of {cite:t}`joffrain2006accumulating`.
# {cite:t}`yang2024parallelizing` brought both to DeltaNet, and {cite:t}`yang2024gateddelta` added the decay.

# %%
K, G = k[0, :64, 0], gain[0, :64, 0]
eye = torch.eye(16, dtype=K.dtype, device=device)
product = eye
for key, g in zip(K, G, strict=True):
    product = (eye - torch.outer(g, key)) @ product
assert_close(product, eye - G.T @ solve((K @ G.T).tril(-1), K))

# %% [markdown]
# **The cost.** A token costs about $6 d_k d_v$ operations in the recursion: read the old value, write the error, read
# the answer.
# The chunk form adds $C\,(4 d_k + 3 d_v)$: two matrices of overlaps, a solve, a product.
# At $C = d_k = d_v$ that is $13/6$ of the work.
# It buys $C$ times fewer steps that touch the state; each is a few matrix products and one triangular solve.
#
# **Why a solve, and not the series?** $A$ is nilpotent, so $(I + A)^{-1} = I - A + A^2 - \dots \pm A^{C-1}$ exactly,
# and in the form $(I - A)(I + A^2)(I + A^4)\cdots$ this takes about $2\log_2 C$ matrix products and no solve, which looks
# ideal for a GPU.
# But the terms are huge where keys are alike.
# For equal keys at $\beta = 1$ all entries of $A$ are one, and those of $A^m$ are binomial coefficients; they must
# cancel to give an inverse with entries of size one.
# In float32 they do not:


# %%
def series(A, right):
    """(I + A)⁻¹ right by the product (I − A)(I + A²)(I + A⁴)…"""
    inverse, power = torch.eye(len(A), dtype=A.dtype, device=A.device) - A, A @ A
    while power.any():
        inverse, power = inverse + power @ inverse, power @ power
    return inverse @ right


def rounding_error(method, A, right):
    """Relative error in float32."""
    exact = solve(A, right)
    return ((method(A.float(), right.float()) - exact).norm() / exact.norm()).cpu()


correlations, draws, chunk = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9], 8, 64
rounding = {"series": [], "solve": []}
for rho in correlations:
    common, own = (normalize(randn(draws, n, 64), dim=-1) for n in (1, chunk))
    keys = normalize(rho**0.5 * common + (1 - rho) ** 0.5 * own, dim=-1)
    systems = [((K @ K.T).tril(-1), randn(chunk, 64)) for K in keys]
    for method in (series, solve):
        errors = [rounding_error(method, *system) for system in systems]
        rounding[method.__name__].append(torch.stack(errors))
rounding = {name: torch.stack(errors) for name, errors in rounding.items()}


# %% tags=["hide-input"] mystnb={"figure": {"caption": "Relative error in float32 of the errors within one chunk of 64 unit keys, against the correlation of the keys; the line is the median, the band runs from the smallest to the largest of eight draws. The series loses every digit well before the keys are alike; the triangular solve never does.", "name": "delta-fig-series"}, "image": {"alt": "Rounding error on a logarithmic scale against key correlation. The curve of the series rises over many orders of magnitude above one, the curve of the solve stays many orders of magnitude below."}}
figure, axes = plt.subplots(figsize=(7, 3.4))
for name, errors in rounding.items():
    (line,) = axes.plot(correlations, errors.median(1).values, marker="o", label=name)
    low, high = errors.amin(1), errors.amax(1)
    axes.fill_between(correlations, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
axes.axhline(1, color="0.5", linewidth=1, linestyle=":")
axes.set(
    xlabel="correlation of the keys",
    ylabel="relative error in float32",
    yscale="log",
)
axes.legend()
plt.show()

# %%
half = correlations.index(0.5)
assert rounding["solve"].max() < 1e-5
assert rounding["series"][half].min() > 1  # not one digit is left
record("delta_series_digits", rounding["series"][half].median().log10(), atol=0.5)
record("delta_solve_digits", rounding["solve"].max().log10(), atol=0.5)

# %% [markdown]
# The logarithm (base ten) of the series' relative error at correlation one half is
# {glue:text}`delta_series_digits:.1f`; that of the solve is {glue:text}`delta_solve_digits:.1f` at its worst.
# Nothing keeps the keys of a layer uncorrelated: they are projections of tokens that may be alike.
#
# ## More than one step, and steps that go on
#
# Why only one step a token?
# DeltaProduct {cite:p}`siems2025deltaproduct` takes $n$, each with a key, a value and a step size of its own.
# Nothing new is needed: a token becomes $n$ pairs, the memory decays at the first and is read after the last.
# The transition is then a product of $n$ rank-one changes, so it may be a rotation and not only a reflection.
#
# The group S3 of the orders of three things needs that: a cycle is two swaps, that is two reflections.
# Trained on it, one step a token reaches {glue:text}`../notebooks/study.ipynb::study_s3_one_step:.2f`, two steps
# {glue:text}`../notebooks/study.ipynb::study_s3_two_steps:.2f`, on sequences twice as long as in training
# ({doc}`/notebooks/study`).

# %%
delta_product, n = ttr.atlas["delta_product"], 2
queries = normalize(randn(2, 40, 3, 16), dim=-1)
pairs = normalize(randn(2, 40, n, 3, 16), dim=-1), randn(2, 40, n, 3, 8)
step_size = 2 * randn(2, 40, n, 3).sigmoid()
y, _ = ttr.regress(delta_product, queries, *pairs, step_size=step_size)
defined, _ = ttr.oracle.regress(delta_product, queries, *pairs, step_size=step_size)
assert_close(y, defined)

k_each, v_each, beta_each = (x.flatten(1, 2) for x in (*pairs, step_size))
gain = ttr.ops.gains.lms(k_each, beta_each)
one_by_one, _ = delta_rule(queries.repeat_interleave(n, 1), k_each, v_each, gain)
assert_close(y, one_by_one[:, n - 1 :: n])

# %% [markdown]
# An optimizer may also have inertia. With momentum $\eta_t$ a second matrix carries the last steps on,
#
# ```{math}
# :label: delta-eq-momentum
# M_t = \eta_t M_{t-1} + g_t e_t^\top, \qquad S_t = \bar S_t + M_t ,
# ```
#
# which without decay is the linear case of Titans {cite:p}`behrouz2025titans`.
# Momentum DeltaNet {cite:p}`huang2026mdn` computes it in chunks.
# A write now reaches the memory by two ways, through $S$ and through $M$, so the state doubles; the errors still
# solve a triangular system.

# %%
momentum_delta_net = ttr.atlas["momentum_delta_net"]
inputs |= {"step_size": beta / 2, "log_momentum": -randn(2, 150, 3).square()}
y, _ = ttr.regress(momentum_delta_net, q, k, v, **inputs)
defined, _ = ttr.oracle.regress(momentum_delta_net, q, k, v, **inputs)
assert_close(y, defined)

# %% [markdown]
# ## How fast does an old pair fade?
#
# The newest pair is recalled exactly, and each write damages the others a little. What is the balance?
# For random keys three short recursions give it exactly.
#
# ```{prf:proposition} Error by age
# :label: delta-proposition-age
# Let the keys be independent and uniform on the unit sphere of $\mathbb R^d$, the values independent of them and of
# each other with mean zero and $\mathbb E\lVert v\rVert^2 = 1$, and $S_0 = 0$.
# Under the delta rule with a constant $\beta$, pair $i$ is recalled at time $t \ge i$ with
# $\mathbb E\lVert v_i - S_t^\top k_i\rVert^2 = 1 - 2 r_t + b_t$, where
#
# $$
# \begin{aligned}
# r_i &= \beta, \qquad r_t = \Bigl(1 - \frac\beta d\Bigr)\, r_{t-1}, \\
# b_i &= (1 - \beta)^2\, \frac{s_{i-1}}{d} + \beta^2, \\
# b_t &= \Bigl(1 - \frac{2\beta}{d} + \frac{2\beta^2}{d(d+2)}\Bigr) b_{t-1}
#   + \frac{\beta^2 s_{t-1}}{d(d+2)} + \frac{\beta^2}{d}, \\
# s_0 &= 0, \qquad s_t = \Bigl(1 - \frac{2\beta - \beta^2}{d}\Bigr) s_{t-1} + \beta^2 .
# \end{aligned}
# $$
# ```
#
# ```{prf:proof}
# $r$, $b$ and $s$ are the expectations of $v_i^\top S_t^\top k_i$ (what is retained), $\lVert S_t^\top k_i\rVert^2$
# (the size of the answer) and $\lVert S_t\rVert_F^2$.
# At $t = i$ the answer is $(1 - \beta) S_{i-1}^\top k_i + \beta v_i$; its first part is independent of $v_i$ and has
# the mean square $(1-\beta)^2 s_{i-1}/d$.
# At a later write, with $k = k_t$, the answer becomes
# $S^\top k_i - \beta (k^\top k_i)\, S^\top k + \beta (k^\top k_i)\, v_t$.
# The last part is uncorrelated with the rest, since $v_t$ has mean zero.
# For uniform $k$, $\mathbb E\, k k^\top = I/d$, which gives $r$ and the terms in $\beta/d$ and $\beta^2/d$.
# For uniform $k$ and a symmetric matrix $B$ also
#
# $$
# \mathbb E\,(k^\top x)^2\, k^\top B k = \frac{\lVert x\rVert^2 \operatorname{tr} B + 2\, x^\top B x}{d(d+2)} ,
# $$
#
# which with $B = S S^\top$ and $x = k_i$ gives the rest of $b$.
# The line of $s$ is the same computation with the whole memory:
# $\mathbb E \lVert (I - \beta k k^\top) S\rVert_F^2 = (1 - (2\beta - \beta^2)/d)\lVert S\rVert_F^2$.
# ```
#
# The retained part decays like $(1 - \beta/d)^{\text{age}}$:
# **the memory forgets over the last $d/\beta$ pairs**, although no decay was asked for.
# Linear attention forgets nothing, $r = 1$ at every age, but its interference grows with $n$: its error is $(n-1)/d$,
# at every age the same.
#
# Let us store $n = 2d$ random pairs, and ask for all of them at the end. Two measures, because they disagree.
# The squared error is what the regression is about.
# A layer that feeds a classifier needs less: the right value must be nearer to the answer than the others, so we also
# decode each answer to the best match in a codebook of 1024 values.

# %%
d, seeds = recall_sizes["key"], recall_sizes["seeds"]
n = 2 * d
k = normalize(randn(seeds, n, 1, d), dim=-1)
codebook = normalize(randn(seeds, 1024, d), dim=-1)
draws = [torch.randperm(1024, generator=generator)[:n] for _ in range(seeds)]
stored = torch.stack(draws).to(device)
v = codebook.gather(1, stored[..., None].expand(-1, -1, d)).unsqueeze(2)

one, ridge = torch.ones_like(k[..., 0]), k.new_full((1, d), 1e-6)
fits = {
    "linear attention": (linear_attention, {}),
    "delta rule, β = 1": (delta_net, {"step_size": one}),
    "delta rule, β = 0.2": (delta_net, {"step_size": 0.2 * one}),
    "least squares": (ttr.Design(optimizer=ttr.Exact()), {"ridge": ridge}),
}
squared_error, accuracy = {}, {}
for name, (design, inputs) in fits.items():
    _, state = ttr.regress(design, k, k, v, **inputs)
    answers = torch.einsum("shkv,sthk->sthv", state.linear_map(), k)
    squared_error[name] = (answers - v).square().sum(-1)[..., 0].cpu()
    decoded = torch.einsum("sthv,scv->stc", answers, codebook).argmax(-1)
    accuracy[name] = (decoded == stored).double().cpu()

# %% [markdown]
# Before we look: the measured errors should scatter around the proposition as much as the seeds do, and no more.


# %%
def expected_error(beta, n, d):
    """The proposition, for pairs 1 … n at time n."""
    s = [0.0]
    for _ in range(n):
        s.append((1 - (2 * beta - beta**2) / d) * s[-1] + beta**2)
    errors = []
    for i in range(1, n + 1):
        r, b = beta, (1 - beta) ** 2 * s[i - 1] / d + beta**2
        for t in range(i + 1, n + 1):
            r *= 1 - beta / d
            b *= 1 - 2 * beta / d + 2 * beta**2 / (d * (d + 2))
            b += beta**2 * s[t - 1] / (d * (d + 2)) + beta**2 / d
        errors.append(1 - 2 * r + b)
    return torch.tensor(errors, dtype=torch.float64)


expected = {
    "linear attention": torch.full((n,), (n - 1) / d, dtype=torch.float64),
    "delta rule, β = 1": expected_error(1.0, n, d),
    "delta rule, β = 0.2": expected_error(0.2, n, d),
}
for name, curve in expected.items():
    error = squared_error[name]
    deviation = (error.mean(0) - curve) / (error.std(0) / seeds**0.5 + 1e-9)
    assert deviation.square().mean() < 1.5  # one, up to chance


# %% tags=["hide-input"] mystnb={"figure": {"caption": "Recall of all of n = 2d stored pairs, by age: the number of pairs written since, in units of d. Left: squared error, where 1 is the error of answering nothing; lines are means over seeds in bins of d/8 pairs, bands twice their standard error, dots the proposition. Right: the share decoded to the right value out of 1024. The delta rule with step size 1 is exact for the newest pair and loses the oldest; linear attention treats all ages alike; a small step size forgets more slowly, and of these three has the least squared error over all pairs.", "name": "delta-fig-age"}, "image": {"alt": "Two plots against the age of a stored pair. Left, squared error: the delta rule with step size one rises from zero to above one; with a small step size it rises slowly below one; linear attention is flat near two; least squares is flat near one half. Right, decoding accuracy: step size one falls from one to nearly zero, the other three stay high."}}
bins = 16
age = (torch.arange(n).flip(0).double() / d).view(bins, -1).mean(1)
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
for name in fits:
    for axes, measured in ((left, squared_error[name]), (right, accuracy[name])):
        per_seed = measured.view(seeds, bins, -1).mean(-1)
        mean, spread = per_seed.mean(0), 2 * per_seed.std(0) / seeds**0.5
        (line,) = axes.plot(age, mean, label=name)
        axes.fill_between(
            age,
            mean - spread,
            mean + spread,
            color=line.get_color(),
            alpha=0.25,
            linewidth=0,
        )
    if name in expected:
        left.plot(
            age,
            expected[name].view(bins, -1).mean(1),
            "o",
            color=line.get_color(),
            markersize=4,
        )
left.axhline(1, color="0.5", linewidth=1, linestyle=":")
left.set(
    xlabel="age of the pair, in units of d",
    ylabel="squared error, ‖v − Sᵀk‖²",
    ylim=(0, None),
)
right.set(
    xlabel="age of the pair, in units of d",
    ylabel="decoded correctly",
    ylim=(0, 1.05),
)
right.legend(loc="lower left")
plt.show()

# %%
hebbian, full, small, exact = fits
record("delta_age_accuracy_hebbian", accuracy[hebbian].mean(), atol=0.01)
record("delta_age_accuracy_beta1", accuracy[full].mean(), atol=0.01)
record("delta_age_accuracy_small", accuracy[small].mean(), atol=0.01)
record("delta_age_error_hebbian", squared_error[hebbian].mean())
record("delta_age_error_beta1", squared_error[full].mean())
record("delta_age_error_small", squared_error[small].mean())
record("delta_age_error_exact", squared_error[exact].mean())
oldest, newest = slice(0, n // 8), slice(-n // 8, None)
record("delta_age_oldest_beta1", accuracy[full][:, oldest].mean(), atol=0.01)
record("delta_age_newest_beta1", accuracy[full][:, newest].mean(), atol=0.01)

by_seed = {name: hits.mean(1) for name, hits in accuracy.items()}
assert (by_seed[full] < by_seed[hebbian] - 0.2).all()  # in every seed
assert by_seed[small].mean() > by_seed[full].mean() + 0.3
assert squared_error[full][:, -1].max() < 1e-20  # the newest pair is exact
assert squared_error[full][:, oldest].mean() > 1  # the oldest are worse than silence
assert squared_error[full].mean() < squared_error[hebbian].mean()

# %% [markdown]
# With $\beta = 1$ the memory decodes {glue:text}`delta_age_accuracy_beta1:.2f` of all pairs, linear attention
# {glue:text}`delta_age_accuracy_hebbian:.2f`.
# Look at the ages: of the newest eighth it decodes {glue:text}`delta_age_newest_beta1:.2f`, of the oldest
# {glue:text}`delta_age_oldest_beta1:.2f`.
# Past capacity, the rule that corrects itself is worse than a sum at remembering everything, because it does not try
# to: it solves the newest equation.
# The old pairs are not merely gone. Their squared error is above 1, so silence would be a better answer.
#
# The other measure tells the other half.
# The mean squared error is {glue:text}`delta_age_error_beta1:.2f` against {glue:text}`delta_age_error_hebbian:.2f`
# for linear attention, whose answers point the right way and are much too long.
# A small step size, $\beta = 0.2$, gets most of both:
# {glue:text}`delta_age_accuracy_small:.2f` decoded at an error of {glue:text}`delta_age_error_small:.2f`.
# Least squares, which solves for all pairs at once, has {glue:text}`delta_age_error_exact:.2f`, and no linear memory
# has less.
#
# So $\beta$ sets the span of a memory, and a layer that predicts $\beta_t$ from the token chooses it again at every
# write.
#
# ## Limits
#
# ````{admonition} Where the delta rule meets its neighbours
# :class: tip
# 1. Orthonormal keys and $\beta = 1$: least squares.
# 2. $\beta \to 0$, rescaled by $1/\beta$: linear attention.
# 3. The gain of recursive least squares: least squares, for any keys.
# 4. $\log\alpha \to -\infty$: only the newest pair is left, $y_t = \beta_t (k_t^\top q_t)\, v_t$.
#
# The cell below executes all four.
# ````

# %%
least_squares = ttr.Design(optimizer=ttr.Exact())
v, q = randn(1, 16, 1, 8), randn(1, 16, 1, 16)
one = torch.ones_like(v[..., 0])

orthonormal = torch.linalg.qr(randn(16, 16)).Q[None, :, None]
y, _ = ttr.regress(delta_net, q, orthonormal, v, step_size=one)
tiny = v.new_full((1, 16), 1e-12)
solved, _ = ttr.oracle.regress(least_squares, q, orthonormal, v, ridge=tiny)
assert_close(y, solved)

k = normalize(randn(1, 16, 1, 16), dim=-1)
summed, _ = ttr.regress(linear_attention, q, k, v)
gaps = []
for beta in (1e-4, 1e-5):
    y, _ = ttr.regress(delta_net, q, k, v, step_size=beta * one)
    gaps.append(y / beta - summed)
assert gaps[0].norm() < 1e-2 * summed.norm()
assert_close(gaps[1], gaps[0] / 10, rtol=1e-2, atol=1e-5)  # of order β

ridge = v.new_full((1, 16), 0.1)
gain, _ = ttr.ops.gains.recursive_least_squares(k, ridge)
y, _ = ttr.ops.delta_rule(q, k, v, gain)
solved, _ = ttr.oracle.regress(least_squares, q, k, v, ridge=ridge)
assert_close(y, solved)

forget = {"log_decay": -1e4 * one, "step_size": one / 2}
y, _ = ttr.regress(gated_delta_net, q, k, v, **forget)
assert_close(y, (k * q).sum(-1, keepdim=True) / 2 * v)

# %% [markdown]
# The third line is the bridge to the rest of the book.
# The delta rule falls short of least squares by its gain and by nothing else.
# Where it stands among all memories is on the page of the {doc}`design space </notebooks/design_space>`.
#
# ## A language model on your own machine
#
# Does any of this matter to a model that is trained?
# We train two, on text that is already on your disk: the sources of Python's standard library, one byte at a time,
# split by file into training and validation.
# They differ in the argument `design`, and in the two small projections that a gated DeltaNet asks for, of its decay
# and its step size.

# %% tags=["hide-input"]
import logging
import warnings

from lightning.pytorch import Callback, Trainer, seed_everything

# Lightning remarks on the machine it finds, so on every machine otherwise.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

# %%

from ttr.tasks import StandardLibraryText
from ttr.training import TokenPrediction


class Curves(Callback):
    """Keeps the training and validation losses in bits a byte."""

    def __init__(self):
        self.train, self.validation = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.train.append(outputs["loss"].item() / math.log(2))

    def on_validation_end(self, trainer, module):
        bits = trainer.callback_metrics["val_loss"].item() / math.log(2)
        self.validation.append((trainer.global_step, bits))


def train(design):
    """One model: the same data, seed and settings for every design."""
    seed_everything(0, workers=True, verbose=False)
    model = {"design": design, **text_sizes["model"]}
    module = TokenPrediction(vocab_size=text.vocab_size, learning_rate=5e-3, warmup_steps=20, **model)
    curves = Curves()
    trainer = Trainer(
        max_epochs=text_sizes["rounds"],
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[curves],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, text)
    return module.model.to(device), curves


text = StandardLibraryText(**text_sizes["data"])
trained = {name: train(name) for name in ("linear_attention", "gated_delta_net")}

# %% [markdown]
# What should the losses be compared with?
# Three scales that need no training: the entropy of single bytes, and what `zlib` needs for the validation files,
# whole, and in pieces as short as the model's windows.

# %%
import zlib

counts = torch.bincount(text.streams["train"], minlength=256) + 1
validation = text.streams["val"]
unigram = -(counts / counts.sum()).log2()[validation.long()].mean()


def compressed(content):
    return 8 * len(zlib.compress(content, 9)) / len(content)


windows = torch.cat([text.draw("val", index)[0] for index in range(text.num_val)])
whole = compressed(validation.numpy().tobytes())
pieces = sum(compressed(bytes(window.tolist())) for window in windows) / len(windows)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Bits a byte on the sources of Python's standard library: training loss (thin, a running mean) and validation loss (dots) of two models that differ in their memory only. The memory that forgets and corrects takes the lead early and keeps it. Dashed: the entropy of single bytes, and what zlib needs for the validation files as a whole.", "name": "delta-fig-language-model"}, "image": {"alt": "Loss in bits a byte against bytes of training text for linear attention and gated DeltaNet; both fall, the validation curve of gated DeltaNet lies below the other; dashed lines mark single bytes above and zlib on all files below."}}
figure, axes = plt.subplots(figsize=(7.5, 4))
step_bytes = text.batch_size * text.length / 1e6
for design, (_, curves) in trained.items():
    smooth = torch.tensor(curves.train).unfold(0, 10, 1).mean(1)
    (line,) = axes.plot(
        step_bytes * torch.arange(10, len(curves.train) + 1),
        smooth,
        linewidth=1,
        alpha=0.7,
    )
    at, bits = zip(*curves.validation, strict=True)
    axes.plot(
        step_bytes * torch.tensor(at),
        bits,
        "o-",
        color=line.get_color(),
        label=ttr.atlas[design].name,
    )
for name, bits in {"single bytes": unigram, "zlib, all files": whole}.items():
    axes.axhline(bits, color="0.4", linewidth=1, linestyle="--")
    label = {"ha": "right", "va": "bottom", "fontsize": 9, "color": "0.3"}
    axes.text(1, bits, name, transform=axes.get_yaxis_transform(), **label)
axes.set(xlabel="training text read, MB", ylabel="bits a byte", ylim=(1.5, 6))
axes.legend()
plt.show()

# %%
final = {design: curves.validation[-1][1] for design, (_, curves) in trained.items()}
record("delta_text_unigram", unigram, corpus=text.digest)
record("delta_text_zlib", whole, rtol=0.02, corpus=text.digest)
record("delta_text_zlib_windows", pieces, rtol=0.02, corpus=text.digest)
for name, bits in final.items():
    record(f"delta_text_{name}", bits, atol=0.15, corpus=text.digest)  # rounding alone moves a short training by .06
megabytes = step_bytes * text.num_train * text_sizes["rounds"]
record("delta_text_megabytes", megabytes, corpus=text.digest)
assert final["gated_delta_net"] < final["linear_attention"] - text_sizes["margin"]
assert final["gated_delta_net"] < min(unigram, pieces)
both = (trained[name][1].validation for name in ("gated_delta_net", "linear_attention"))
assert all(gated < linear for (_, gated), (_, linear) in zip(*both, strict=True))  # from the first validation on
if scale == "smoke":
    assert whole < min(final.values())

# %% [markdown]
# After {glue:text}`delta_text_megabytes:.2f` MB of training text, linear attention is at
# {glue:text}`delta_text_linear_attention:.2f` bits a byte on files it has never seen, gated DeltaNet at
# {glue:text}`delta_text_gated_delta_net:.2f`.
# Single bytes have {glue:text}`delta_text_unigram:.2f`.
# On pieces as short as the model's windows `zlib` needs {glue:text}`delta_text_zlib_windows:.2f`, and on all
# validation files in one piece, where it can point back over 32 kB, {glue:text}`delta_text_zlib:.2f`: at the small
# scale, a short training run does not beat a compressor that may look further back.
#
# This is one seed; the assertion leaves room for others.
# Two things changed at once between the models, the decay and the correction, and these curves cannot tell them
# apart.
# The other two corners of the square, `train(ttr.Design(ttr.Decay()))` and `train("delta_net")`, are one call each.
#
# A language model should also write.
# One byte at a time, each costs the same: the state that is carried does not grow with what was read.

# %%
model, _ = trained["gated_delta_net"]
prompt = torch.tensor(list(b"    def "), device=device)[None]
chance = torch.Generator(device).manual_seed(0)
sampled = model.generate(prompt, 400, temperature=0.7, generator=chance)
print(bytes(sampled[0].tolist()).decode(errors="replace"))

# %% [markdown]
# It has found indentation, `self` and the look of names. It has not found Python.
#
# ## Exercises
#
# ```{exercise} The length of a key
# :label: delta-exercise-nlms
# The length of a key is an accident of the layer that made it.
# Show that with normalised steps ($\varepsilon \to 0$) the share of the error that a write leaves does not depend on
# it, and that multiplying all keys and queries by the same number changes no answer.
# Check both.
# ```
#
# ```{solution-start} delta-exercise-nlms
# :class: dropdown
# ```
#
# $k_t^\top g_t = \beta_t \lVert k_t\rVert^2 / (\varepsilon + \lVert k_t\rVert^2) \to \beta_t$, so by
# {eq}`delta-eq-left` the share $1 - \beta_t$ is left, at any length.
# If $k_t$ becomes $a k_t$, the gain becomes $g_t / a$.
# By induction the memory becomes $S_t / a$, and its answer to $a q_t$ is the old one.

# %%
k, q, v = randn(1, 30, 1, 8), randn(1, 30, 1, 8), randn(1, 30, 1, 4)
beta = randn(1, 30, 1).sigmoid()
design = ttr.Design(optimizer=ttr.GradientDescent(ttr.NLMS(epsilon=1e-12)))
y, _ = ttr.regress(design, q, k, v, step_size=beta)
scaled, _ = ttr.regress(design, 7 * q, 7 * k, v, step_size=beta)
assert_close(scaled, y)

_, memories = delta_rule(k, k, v, ttr.ops.gains.nlms(k, beta, 1e-12))
earlier = torch.cat([torch.zeros_like(memories[:, :1]), memories[:, :-1]], dim=1)
before = v - torch.einsum("bthkv,bthk->bthv", earlier, k)
after = v - torch.einsum("bthkv,bthk->bthv", memories, k)
assert_close(after, (1 - beta)[..., None] * before)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} The implicit step
# :label: delta-exercise-implicit
# Longhorn does not step down a gradient; it solves
# $\min_S \tfrac12\lVert S - \bar S\rVert_F^2 + \tfrac\beta2 \lVert v - S^\top k\rVert^2$ at each token.
# Derive its gain with the formula of Sherman and Morrison,
# $(I + \beta k k^\top)^{-1} = I - \beta k k^\top / (1 + \beta\lVert k\rVert^2)$, and show that no $\beta$ is too
# large. (The published layer then keeps only the diagonal of $k k^\top$.)
# ```
#
# ```{solution-start} delta-exercise-implicit
# :class: dropdown
# ```
#
# The gradient vanishes where
# $(I + \beta k k^\top) S = \bar S + \beta k v^\top = (I + \beta k k^\top)\bar S + \beta k e^\top$.
# So $S = \bar S + (I + \beta k k^\top)^{-1} \beta k\, e^\top$, and the formula gives
# $g = \beta k \bigl(1 - \beta\lVert k\rVert^2 / (1 + \beta\lVert k\rVert^2)\bigr) = \beta k / (1 + \beta\lVert k\rVert^2)$.
# The share of the error left, $1/(1 + \beta\lVert k\rVert^2)$, is in $(0, 1]$ for every $\beta \ge 0$.

# %%
eye = torch.eye(8, dtype=k.dtype, device=device)
memory, answers = k.new_zeros(8, 4), []
tokens = zip(k[0, :, 0], q[0, :, 0], v[0, :, 0], 100 * beta[0, :, 0], strict=True)
for key, query, value, b in tokens:
    normal = eye + b * torch.outer(key, key)
    memory = torch.linalg.solve(normal, memory + b * torch.outer(key, value))
    answers.append(query @ memory)
y, _ = ttr.regress(ttr.atlas["longhorn"], q, k, v, step_size=100 * beta)
assert_close(y[0, :, 0], torch.stack(answers))

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Two reflections
# :label: delta-exercise-reflect
# A memory has stored $(k, v)$ exactly, with $\lVert k\rVert = 1$.
# What does it answer at $k$ after a write of $(k, v')$ with $\beta = 2$? After the same write again?
# What happens to an answer at a key orthogonal to $k$?
# ```
#
# ```{solution-start} delta-exercise-reflect
# :class: dropdown
# ```
#
# By {eq}`delta-eq-left` the error changes its sign:
# $v' - S^\top k = -(v' - v)$, so the answer is $2v' - v$, the reflection of $v$ at $v'$.
# A second reflection undoes the first. Orthogonal keys see nothing of either.

# %%
basis = torch.linalg.qr(randn(8, 8)).Q
k = basis[[0, 1, 1, 1, 0]][None, :, None]
v = randn(5, 4)[[0, 1, 2, 2, 3]][None, :, None]
beta = v.new_tensor([1, 1, 2, 2, 0])[None, :, None]
y, _ = ttr.regress(delta_net, k, k, v, step_size=beta)
assert_close(y[0, 2], 2 * v[0, 2] - v[0, 1])
assert_close(y[0, 3], v[0, 1])
assert_close(y[0, 4], v[0, 0])  # the other key; β = 0 writes nothing

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} A shell game
# :label: delta-exercise-permute
# Let the rows of $S$ be the cups of a shell game.
# The key $(u_i - u_j)/\sqrt2$ with $\beta = 2$ and $v = 0$ swaps the rows $i$ and $j$.
# How many of the $n!$ orders of $n$ rows can one token of DeltaProduct with two steps reach, for $n = 3, 4, 5$?
# Could cleverer keys reach more?
# ```
#
# ```{solution-start} delta-exercise-permute
# :class: dropdown
# ```
#
# Two swaps make a three-cycle or two separate swaps.
# Every order of three rows is one of these, of the identity or of a single swap, so with $n = 3$ one token reaches
# all.
# Cleverer keys reach no more.
# Two rank-one changes leave a space of dimension at least $n - 2$ fixed, and the permutation matrix of a permutation
# with $c$ cycles fixes exactly $c$ dimensions, so $c \ge n - 2$; those are the permutations that two swaps make.
# Below, every choice of two swaps (or of none) is run, and the distinct results counted.

# %%
from itertools import combinations, permutations, product


def cycles(order):
    """The number of cycles of a permutation."""
    seen, number = set(), 0
    for first in range(len(order)):
        number += first not in seen
        while first not in seen:
            seen.add(first)
            first = order[first]
    return number


reached = {}
for n in (3, 4, 5):
    rows = torch.eye(n, dtype=torch.float64, device=device)
    swaps = [(rows[i] - rows[j]) / 2**0.5 for i, j in combinations(range(n), 2)]
    swaps.append(0 * rows[0])  # a key of zeros swaps nothing
    k = torch.stack([torch.stack(two) for two in product(swaps, repeat=2)])
    k = k[:, None, :, None]  # a batch of one token each, two steps, one head
    step_size = k.new_full(k.shape[:-1], 2.0)
    start = ttr.State(memory=rows.expand(len(k), 1, n, n))
    _, state = ttr.regress(
        ttr.atlas["delta_product"],
        k[:, :, 0],
        k,
        0 * k,
        step_size=step_size,
        state=start,
    )
    orders = {tuple(order) for order in state.memory[:, 0].argmax(-1).tolist()}
    assert orders == {o for o in permutations(range(n)) if cycles(o) >= n - 2}
    reached[n] = len(orders)
record("delta_orders_reached", list(reached.values()))
record("delta_orders_all", [math.factorial(n) for n in reached])

# %% [markdown]
# For $n = 3, 4, 5$ one token reaches {glue:text}`delta_orders_reached` of {glue:text}`delta_orders_all` orders.
#
# ```{solution-end}
# ```
#
# ```{exercise} A robust delta rule
# :label: delta-exercise-robust
# The squared error follows an outlier wherever it leads.
# Build a delta rule that does not, as a `ttr.Design` nobody has named, and compare how near it comes to the true map
# when one value in twenty is ten times too large.
# ```
#
# ```{solution-start} delta-exercise-robust
# :class: dropdown
# ```
#
# The Huber loss {cite:p}`huber1964robust` clips the error at $\delta$:
# $S_t = S_{t-1} + \beta_t k_t \operatorname{clip}_{[-\delta, \delta]}(e_t)^\top$.
# The clipped error is no longer linear in the memory, so no triangular system gives it, and the design runs one token
# after the other.

# %%
streams, steps, d = 16, 400, 16
target = randn(streams, 1, d, 4)
k = normalize(randn(streams, steps, 1, d), dim=-1)
v = torch.einsum("sthk,shkv->sthv", k, target) + randn(streams, steps, 1, 4) / 50
outlier = torch.rand(streams, steps, 1, 1, generator=generator).to(device) < 0.05
v = torch.where(outlier, 10 * v, v)
step_size = torch.full_like(k[..., 0], 0.5)

robust = ttr.Design(optimizer=ttr.GradientDescent(), loss=ttr.Huber(delta=0.1))
assert robust.name is None
_, state = ttr.regress(robust, k, k, v, step_size=step_size)
_, squared = ttr.regress(delta_net, k, k, v, step_size=step_size)

distance = {
    name: ((memory - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).median()
    for name, memory in {"Huber": state.memory, "squared error": squared.memory}.items()
}
assert distance["Huber"] < distance["squared error"] / 3
record("delta_robust_huber", distance["Huber"], rtol=0.02)
record("delta_robust_squared", distance["squared error"], rtol=0.02)

# %% [markdown]
# Relative to the size of the map, the distance is {glue:text}`delta_robust_huber:.2f` with the Huber loss and
# {glue:text}`delta_robust_squared:.2f` with the squared error.
#
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`schlag2021linear` is the paper to begin with: fast weights, the capacity argument, and the delta rule in a
# Transformer.
# {cite:t}`yang2024parallelizing` derive the chunk form, {cite:t}`yang2024gateddelta` add the decay,
# {cite:t}`kimi2025linear` a decay a channel.
# {cite:t}`grazzi2024unlocking` and {cite:t}`siems2025deltaproduct` explain what negative eigenvalues and several
# steps can track.
# {cite:t}`liu2024longhorn` read layers as online learners.
# {cite:t}`haykin2002adaptive` is where the gains come from, and {cite:t}`wang2025testtime` is the framework of this
# book.
