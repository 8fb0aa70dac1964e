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
# # Associative recall is regression
#
# A novel introduces a ship, the *Halcyon*, on its first page.
# A hundred pages later it says "they went aboard the", and you know the next word.
# No amount of English grammar would have told you: you looked it up in what you had read.
#
# What must a layer compute so that it can look things up?
# This chapter's answer is one sentence long. Storing is fitting a regression, and answering is predicting with it.
# Attention, linear attention, state-space models and fast weights then differ in *which* regression they fit,
# and in how well they fit it.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import textwrap

import matplotlib.pyplot as plt
import torch
from IPython.display import Math
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention
from torch.testing import assert_close

import ttr
from ttr import Decay, Design, Exact, GradientDescent, Hebbian, Kernel, Linear
from ttr.book import record, use_style
from ttr.tasks import recall_batch

use_style()
torch.manual_seed(1)
sizes = {
    "smoke": {
        "capacity": {"key": 32, "draws": 20},
        "task": {"vocab_size": 128, "length": 32, "num_pairs": 6},
        "training": {"d_model": 64, "key_dims": (16, 4), "steps": 300, "seeds": 2},
    },
    "full": {
        "capacity": {"key": 128, "draws": 100},
        "task": {"vocab_size": 512, "length": 64, "num_pairs": 12},
        "training": {"d_model": 128, "key_dims": (32, 8), "steps": 2000, "seeds": 4},
    },
}[scale]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64).to(device)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.float64, device=device)


# %% [markdown]
# ## Why must a sequence model recall?
#
# {cite:t}`arora2023zoology` compared attention with models built from gated convolutions, token by token.
# Most of the difference in perplexity sat on tokens that repeat a pair of words seen before in the same text.
# {cite:t}`olsson2022induction` found attention heads that do just this: they look for an earlier occurrence of the
# current token and copy what came after it. Such heads appear at the time in training when a model's
# predictions begin to improve along the context.
#
# The ability can be tested with nothing else in the way.
# *Multi-query associative recall* shows key–value pairs, then some of the keys again, and asks for their values.
# Here is one small sequence. Letters are keys, digits are values, a dot stands for no token or no question.

# %%
generator = torch.Generator().manual_seed(5)
tokens, targets = recall_batch(generator, batch_size=1, vocab_size=16, length=14, num_pairs=3)
letters = "·abcdefg01234567"
print("tokens ", *(letters[token] for token in tokens[0]))
print("answers", *(letters[target] if target >= 0 else "·" for target in targets[0]))

# %% [markdown]
# A Python dictionary would do. But a dictionary knows only keys that are exactly equal, it cannot be wrong by a
# little, and it has no derivative. A layer has vectors, and vectors are never exactly equal.
# So ask for less: a function that returns *about* the right value at each key.

# %% [markdown]
# ## Storing is fitting, answering is predicting
#
# A layer turns each token into a key $k_i$, a value $v_i$ and a query $q_i$.
# At time $t$ it holds $t$ pairs. We want a map $m_t$ with $m_t(k_i) \approx v_i$ for all of them.
# To find a function from examples of its inputs and outputs is regression:
#
# ```{math}
# :label: recall-eq-memorise
# m_t = \operatorname*{arg\,min}_{m \in \mathcal M} \; \tfrac12 \sum_{i \le t} \gamma_i^{(t)} \lVert v_i - m(k_i) \rVert^2
# ```
#
# and to answer a query is to predict with what was found:
#
# ```{math}
# :label: recall-eq-retrieve
# y_t = m_t(q_t) .
# ```
#
# The regression is solved in the forward pass, anew for every sequence: at test time.
# {cite:t}`wang2025testtime` call a layer of this kind *test-time regression*, and show that it has three free choices.
#
# * The **weights** $\gamma_i^{(t)} \ge 0$. How much does pair $i$ still count at time $t$?
# * The **regressors** $\mathcal M$. Which functions may be fitted?
# * The **optimizer**. Is the minimum found exactly, approached by a few steps, or guessed?
#
# Two more are fixed in this chapter {cite:p}`behrouz2025miras`: the **loss** is the square of the error, and the
# **retention**, which holds a step near the old memory, is a squared distance.
#
# The words of one field are words of the other.
#
# | recall | regression |
# |---|---|
# | a key–value pair | a data point |
# | to write | to fit |
# | to read | to predict |
# | interference between pairs | a residual |
# | forgetting | weighting |
# | capacity | degrees of freedom |
# | a query never seen as a key | interpolation |

# %% [markdown]
# ## A memory in ten lines
#
# The simplest interesting choice: let $m$ be linear, $m(k) = S^\top k$ with a matrix $S$, let old pairs fade by a factor
# $\alpha_t$ at each step, and solve exactly.
# Then $\gamma_i^{(t)} = \alpha_{i+1} \cdots \alpha_t$. A ridge $\Lambda$ keeps the problem well posed while there
# are few pairs, and fades as they do: $\Lambda_t = \alpha_1 \cdots \alpha_t \Lambda$.
#
# ```{prf:theorem} The exact linear memory
# :label: recall-thm-exact
# Let $\gamma_i^{(t)} \ge 0$ and let $\Lambda_t$ be positive definite. The objective
#
# $$
# J(S) = \tfrac12 \sum_{i \le t} \gamma_i^{(t)} \lVert v_i - S^\top k_i \rVert^2 + \tfrac12 \operatorname{tr}(S^\top \Lambda_t S)
# $$
#
# has exactly one minimum, at
#
# $$
# S_t = \Bigl( \sum_{i \le t} \gamma_i^{(t)} k_i k_i^\top + \Lambda_t \Bigr)^{-1} \sum_{i \le t} \gamma_i^{(t)} k_i v_i^\top .
# $$
# ```
#
# ```{prf:proof}
# The gradient is $\nabla J(S) = \bigl( \sum_i \gamma_i^{(t)} k_i k_i^\top + \Lambda_t \bigr) S - \sum_i \gamma_i^{(t)} k_i v_i^\top$.
# The matrix in brackets is a sum of positive semi-definite terms and one positive definite one, so it is positive
# definite. Hence $J$ is strictly convex, the gradient vanishes at one place only, and that place is $S_t$.
# ```
#
# In code, with the weights taken from running sums of $\log \alpha$:


# %%
def least_squares_memory(q, k, v, log_decay, ridge):
    """(time, key), (time, key), (time, value), (time,), (key,) → (time, value)"""
    age, answers = log_decay.cumsum(0), []
    for t in range(len(k)):
        weight = (age[t] - age[: t + 1]).exp().unsqueeze(-1)
        past_k, past_v = k[: t + 1], v[: t + 1]
        moment = (weight * past_k).mT @ past_k + age[t].exp() * ridge.diag()
        memory = torch.linalg.solve(moment, (weight * past_k).mT @ past_v)
        answers.append(memory.mT @ q[t])
    return torch.stack(answers)


# %% [markdown]
# The same choices as a `Design`. Each argument is one axis; the loss is the square unless we say otherwise.
# `update_rule()` writes the memory out.

# %%
design = Design(weights=Decay(), regressor=Linear(), optimizer=Exact())
Math(design.update_rule())

# %% [markdown]
# A design says by what name it was published, if it was, and which tensors it needs beside queries, keys and values.

# %%
print(design.name)
print(design.inputs)

# %% [markdown]
# Tensors have a batch and a head in front of the size of a vector: (batch, time, heads, key).
# `ttr.oracle.regress` computes any design straight from its definition.
# `ttr.regress` computes it by the fastest algorithm that the package has. All three agree.

# %%
T, K, V = 50, 8, 5
q, k, v = randn(1, T, 1, K), randn(1, T, 1, K), randn(1, T, 1, V)
inputs = {"log_decay": -randn(1, T, 1).square() / 10, "ridge": 0.5 * ones(1, K)}

y, state = ttr.regress(design, q, k, v, **inputs)
by_definition, _ = ttr.oracle.regress(design, q, k, v, **inputs)
one_head = (z[0, :, 0] for z in (q, k, v, inputs["log_decay"]))
in_ten_lines = least_squares_memory(*one_head, inputs["ridge"][0])
assert_close(y, by_definition)
assert_close(y[0, :, 0], in_ten_lines)

# %% [markdown]
# ## One data set, four memories
#
# Now hold the data fixed and change the design.
# To see what a memory has learned, let a key be a number $x$ between 0 and 1, so that the memory is a curve.
# A line through the origin would be a poor curve. So we spread $x$ over nine overlapping bumps and scale the result to
# unit length: near numbers get similar keys, far ones nearly orthogonal keys.


# %%
def bumps(x, number=9, width=0.1):
    """A number in [0, 1] as a unit vector."""
    centres = torch.linspace(0, 1, number, dtype=x.dtype, device=x.device)
    distance = (x.unsqueeze(-1) - centres) / width
    return normalize(torch.exp(-(distance**2) / 2), dim=-1)


def target(x):
    return torch.sin(2 * torch.pi * x) + 0.6 * torch.cos(5 * torch.pi * x)


torch.manual_seed(3)
n = 20
x = torch.rand(n, dtype=torch.float64).to(device)
values = target(x) + 0.1 * randn(n)
grid = torch.linspace(0, 1, 201, dtype=torch.float64, device=device)

# %% [markdown]
# Four famous layers read these pairs, in the same order.
#
# **Linear attention** {cite:p}`katharopoulos2020transformers` takes one gradient step on {eq}`recall-eq-memorise` from $S = 0$.
# With all weights one, the gradient there is $-\sum_i k_i v_i^\top$, so a step of size one gives
#
# ```{math}
# :label: recall-eq-hebbian
# S_t = \sum_{i \le t} k_i v_i^\top .
# ```
#
# **The delta rule** {cite:p}`schlag2021linear,widrow1960adaptive` takes a gradient step of size $\beta$ at every
# pair, on that pair alone, from where the last step ended:
#
# ```{math}
# :label: recall-eq-delta
# S_t = S_{t-1} + \beta\, k_t \bigl( v_t - S_{t-1}^\top k_t \bigr)^\top .
# ```
#
# **Least squares** takes no step. It is {prf:ref}`recall-thm-exact` with all weights one and a small ridge.
#
# **Softmax attention** {cite:p}`vaswani2017attention` fits the simplest function there is, a constant $c$, and gives
# large weights to pairs whose keys resemble the query:
#
# ```{math}
# :label: recall-eq-softmax
# y_t = \operatorname*{arg\,min}_c \sum_{i \le t} e^{q_t^\top k_i / h^2} \lVert v_i - c \rVert^2
#     = \frac{\sum_{i \le t} e^{q_t^\top k_i / h^2}\, v_i}{\sum_{i \le t} e^{q_t^\top k_i / h^2}} .
# ```
#
# Set the derivative by $c$ to zero to see the second form.
# Statisticians know it as the kernel smoother of {cite:t}`nadaraya1964estimating` and {cite:t}`watson1964smooth`.
# The bandwidth $h$ says how near is near; with keys of size $d$ attention uses $h^2 = \sqrt d$.

# %%
bandwidth = 0.2
hebbian, delta, exact = (Design(optimizer=o) for o in (Hebbian(), GradientDescent(), Exact()))
softmax = Design(Kernel(bandwidth=bandwidth), ttr.LocalPolynomial(0), Exact())
memories = {
    "linear attention": (hebbian, {}),
    "delta rule": (delta, {"step_size": ones(len(grid), n, 1)}),
    "least squares": (exact, {"ridge": 0.03 * ones(1, 9)}),
    "softmax attention": (softmax, {}),
}

# Every query on the grid is asked at the end of a sequence of its own.
q = bumps(grid)[:, None, None].expand(-1, n, 1, -1)
k = bumps(x)[None, :, None].expand(len(grid), -1, 1, -1)
v = values[None, :, None, None].expand(len(grid), -1, 1, 1)
answers = {}
for name, (design, inputs) in memories.items():
    answers[name], _ = ttr.oracle.regress(design, q, k, v, **inputs)
curves = {name: y[:, -1, 0, 0] for name, y in answers.items()}

# %% [markdown]
# Is the last one really attention? PyTorch's own is the judge. It wants heads before time, and the scale $1/h^2$.

# %%
heads_first = (z.transpose(1, 2) for z in (q, k, v))
attention = scaled_dot_product_attention(*heads_first, is_causal=True, scale=1 / bandwidth**2)
assert_close(answers["softmax attention"], attention.transpose(1, 2))

# %% [markdown]
# One step from zero overshoots: twenty pairs with similar keys add up to far too much.
# To give linear attention its due, we draw it with the step size that comes nearest to the target in hindsight.

# %%
summed = curves["linear attention"]
best_step = (target(grid) @ summed) / (summed @ summed)
curves["linear attention"] = best_step * summed

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Four layers as four answers to one regression. Dots are the stored pairs, the darker the later; the dashed line is what they were drawn from. Linear attention adds up what similar keys say and never compares the sum with a value. The delta rule corrects itself at each pair and is right where it was corrected last. Least squares weighs all pairs against each other. Softmax attention averages the neighbours of the query, in steps where there are gaps.", "name": "fig-recall-four-memories"}, "image": {"alt": "Four panels with the same twenty points and the same dashed curve. The curve of linear attention is a smooth wave that misses most points, the delta rule follows the right shape but drifts off in the second half, least squares lies on the dashed curve, and softmax attention follows it in steps."}}
choices = {
    "linear attention": "linear · one step from zero",
    "delta rule": "linear · one step a pair",
    "least squares": "linear · exact",
    "softmax attention": "constant near the query · exact",
}
fig, axes = plt.subplots(2, 2, figsize=(7, 5.2), sharex=True, sharey=True)
for axis, (name, curve) in zip(axes.flat, curves.items(), strict=True):
    axis.plot(grid.cpu(), target(grid).cpu(), "--", color="black", linewidth=1, label="target")
    axis.plot(grid.cpu(), curve.cpu(), label="memory $m_t(q)$")
    axis.scatter(x.cpu(), values.cpu(), c=range(n), cmap="Greys", vmin=-8, edgecolors="black", s=26, zorder=3)
    axis.set_title(f"{name}\n", fontweight="bold")
    axis.text(0.5, 1.02, choices[name], transform=axis.transAxes, ha="center", va="bottom", fontsize=10)
axes[0, 0].legend(loc="lower left", fontsize=9)
fig.supxlabel("key or query $x$", fontsize=11)
fig.supylabel("value", fontsize=11)
plt.show()

# %%
errors = {name: (curve - target(grid)).square().mean().sqrt() for name, curve in curves.items()}
for name, curve_error in errors.items():
    record(f"recall_curve_error_{name.replace(' ', '_')}", curve_error)
assert 3 * errors["least squares"] < errors["delta rule"] < errors["linear attention"]

# %% [markdown]
# The root mean square error along the curve falls from
# {glue:text}`recall_curve_error_linear_attention:.2f` for linear attention to
# {glue:text}`recall_curve_error_delta_rule:.2f` for the delta rule and
# {glue:text}`recall_curve_error_least_squares:.2f` for least squares, with the same pairs, features and number of
# parameters. Only the optimizer changed.
# Softmax attention has {glue:text}`recall_curve_error_softmax_attention:.2f` and is of another kind. It keeps all pairs, fits
# nothing ahead of time, and fits afresh for every query.
#
# Which is best depends on data, and on what you can pay.
# Try other data in the <a href="../book/explorer.html#memory=delta&amp;beta=1">explorer</a>: it draws these curves while
# you drag the points.

# %% [markdown]
# ## How much fits in?
#
# Twenty pairs on a line are easy. What happens as pairs are added to a memory of fixed size?
# Draw $n$ random unit keys in $d$ dimensions and give each a value of its own, orthogonal to all others.
# Store the pairs, ask for each of them once more, and judge the answer $\hat v_j$ in two ways:
#
# * as a **regression**: the error $\lVert \hat v_j - v_j \rVert^2$;
# * as a **choice**: is $v_j$ the stored value that $\hat v_j$ resembles most, by the dot product?
#
# A linear memory is asked by a product with its state. Softmax attention has no state but the pairs.

# %%
dim, draws = sizes["capacity"]["key"], sizes["capacity"]["draws"]
numbers = [dim * eighths // 8 for eighths in (1, 2, 4, 6, 8, 10, 12, 16)]


def ask_again(n):
    """Each memory's answers to all stored keys, (draws, n, n); pair j has the value e_j."""
    k, v = normalize(randn(draws, n, 1, dim), dim=-1), ones(n).diag().expand(draws, n, n)
    linear = {
        "linear attention": (hebbian, {}),
        "delta rule": (delta, {"step_size": ones(draws, n, 1)}),
        "least squares": (exact, {"ridge": 1e-9 * ones(1, dim)}),
    }
    found = {}
    for name, (design, inputs) in linear.items():
        _, state = ttr.regress(design, k, k, v.unsqueeze(2), **inputs)
        found[name] = k[:, :, 0] @ state.linear_map()[:, 0]
    k = k[:, :, 0]
    found["softmax attention"] = scaled_dot_product_attention(k, k, v, scale=1 / bandwidth**2)
    return found


error = {name: torch.zeros(len(numbers), draws) for name in memories}
choice = {name: torch.zeros(len(numbers), draws) for name in memories}
for row, n in enumerate(numbers):
    for name, y in ask_again(n).items():
        error[name][row] = (y - ones(n).diag()).square().sum(-1).mean(-1)
        choice[name][row] = (y.argmax(-1) == torch.arange(n, device=device)).float().mean(-1)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Pairs recalled after all have been stored; mean over the draws, and a band from the least to the greatest. As a regression, least squares is exact while there are no more pairs than dimensions, and linear attention is off from the start. As a choice among the stored values, linear attention never errs at all, and only the delta rule loses pairs. Three lines lie on top of each other at the upper edge.", "name": "fig-recall-capacity"}, "image": {"alt": "Two panels over the number of pairs divided by the key size, from one eighth to two. Left, error: linear attention rises in a straight line, the delta rule rises more slowly, least squares is zero up to one and then rises, softmax attention stays near zero. Right, share of right choices: linear attention, least squares and softmax attention stay at one, the delta rule falls away from it."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.4), sharex=True)
relative = [n / dim for n in numbers]
for axis, measured in ((left, error), (right, choice)):
    for name, points in measured.items():
        style = "--" if name == "softmax attention" else "-"
        (line,) = axis.plot(relative, points.mean(1), style, label=name)
        axis.fill_between(relative, points.amin(1), points.amax(1), color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("pairs $n$ / key size $d$")
left.set_ylabel(r"error $\Vert \hat v_j - v_j \Vert^2$")
right.set(ylabel="share of right choices", ylim=(0, 1.04))
left.legend(fontsize=9)
plt.show()

# %%
full, overfull = numbers.index(dim), numbers.index(2 * dim)
record("recall_full_linear_attention", error["linear attention"][full].mean(), rtol=1e-2)
record("recall_overfull_least_squares", error["least squares"][overfull].mean(), rtol=1e-2)
delta_choice = choice["delta rule"][overfull].mean()
record("recall_overfull_choice_delta_rule", delta_choice, rtol=0, atol=0.01)

pairs = torch.tensor(numbers)
assert_close(error["linear attention"].mean(1), (pairs - 1) / dim, rtol=0.1, atol=0.02)
unavoidable = (1 - dim / pairs).clamp(min=0)
assert_close(error["least squares"].mean(1), unavoidable, rtol=0, atol=1e-6)
assert all(choice[name].min() == 1 for name in ("linear attention", "least squares", "softmax attention"))
assert delta_choice < 0.8

# %% [markdown]
# With as many pairs as dimensions, linear attention answers with an error of
# {glue:text}`recall_full_linear_attention:.2f`, where an answer of zero would have 1.
# By {eq}`recall-eq-hebbian` its answer is $\hat v_j = v_j + \sum_{i \ne j} (k_i^\top k_j)\, v_i$, and
# $(k_i^\top k_j)^2$ is $1/d$ on average: the error grows as $(n-1)/d$. The cell above asserts that, too.
# Least squares makes no error until the pairs outnumber the dimensions. From there on it makes $1 - d/n$ a pair, for
# any keys that span the space, since it projects $n$ orthonormal values on $d$ directions:
# {glue:text}`recall_overfull_least_squares:.2f` with twice as many pairs as dimensions.
#
# The right panel holds a surprise. Judged by choice, linear attention is perfect throughout.
#
# ```{prf:proposition} Choosing is easier than regressing
# :label: recall-prop-choice
# Let the keys $k_1, \dots, k_n$ be distinct unit vectors and the values orthonormal. Asked for any $k_j$, the memory
# {eq}`recall-eq-hebbian` gives an answer whose dot product with $v_j$ is larger than with any other stored value.
# ```
#
# ```{prf:proof}
# The answer is $\sum_i (k_i^\top k_j) v_i$, so its dot product with $v_i$ is $k_i^\top k_j$.
# That is 1 for $i = j$ and, by Cauchy–Schwarz, less than 1 for every other unit vector.
# ```
#
# The memory then does nothing but look for the nearest key.
# What interference takes away is not the first place but the *margin*, $1 - \max_{i \neq j} k_i^\top k_j$,
# so noise, values that overlap or keys of unequal length bring the errors back.
# Two lessons follow. Accuracy on a recall task says little about how good a regression the layer has solved.
# And keys of unit length are worth a lot; the layers of `ttr` normalise them for this reason.
#
# The two other linear memories have no such guarantee. Least squares makes the sum of squares least and not
# the order right; an exercise finds keys where it puts a wrong value first.
# With twice as many pairs as dimensions the delta rule chooses right in
# {glue:text}`recall_overfull_choice_delta_rule:.2f` of the cases. It is exact at the newest pair and pays with the
# oldest, as {doc}`/notebooks/04_delta_rule` shows.

# %% [markdown]
# ## Any design, and its neighbours
#
# A choice on each axis makes a design, whether somebody has published it or not.
# Here is one from each side. Both have a decay a channel and a gradient step a pair; only the gain differs, for the
# second divides its step by the squared length of the key.

# %%
published = Design(Decay(per="channel"), optimizer=GradientDescent())
unnamed = Design(Decay(per="channel"), optimizer=GradientDescent(ttr.NLMS()))
print(published.name, "|", unnamed.name)
Math(unnamed.update_rule())

# %% [markdown]
# The unnamed one runs and trains like the other.
# Choices that contradict each other are an error that says why.

# %%
try:
    Design(weights=Kernel(), regressor=Linear(), optimizer=GradientDescent())
except ValueError as clash:
    print(textwrap.fill(str(clash), 80))

# %% [markdown]
# And a design knows whom to cite.

# %%
print(exact.citation())

# %% [markdown]
# The points that the atlas names, and the cells between them, are in {doc}`/notebooks/design_space`.
#
# The four memories of this chapter are neighbours in that space: at the edges they meet.
#
# :::{admonition} Limits
# * Orthonormal keys leave nothing to correct: linear attention, the delta rule with $\beta = 1$ and least squares
#   without ridge are then the same memory.
# * A large ridge drowns the keys' second moment: $\Lambda = \lambda I$ with $\lambda \to \infty$ turns
#   $\lambda \cdot$ least squares into linear attention.
# * A wide bandwidth makes every pair a neighbour: softmax attention becomes the mean of all values. A narrow one
#   hears the nearest key only.
# :::


# %%
def ask(design, k, v, **inputs):
    return ttr.oracle.regress(design, k, k, v, **inputs)[0]


n = 12
v = randn(1, n, 1, 3)

orthonormal = torch.linalg.qr(randn(n, n)).Q[None, :, None]
assert_close(ask(hebbian, orthonormal, v), v)
assert_close(ask(delta, orthonormal, v, step_size=ones(1, n, 1)), v)
assert_close(ask(exact, orthonormal, v, ridge=1e-12 * ones(1, n)), v)

k = normalize(randn(1, n, 1, 4), dim=-1)
assert_close(1e9 * ask(exact, k, v, ridge=1e9 * ones(1, 4)), ask(hebbian, k, v))

wide = Design(Kernel(bandwidth=1e6), ttr.LocalPolynomial(0), Exact())
narrow = Design(Kernel(bandwidth=0.02), ttr.LocalPolynomial(0), Exact())
assert_close(ask(wide, k, v)[:, -1], v.mean(1))
assert_close(ask(narrow, k, v), v)

# %% [markdown]
# ## The memory handed on
#
# A decoder sees one token at a time. Does it have to fit the whole past again for each?
#
# `regress` returns a state beside its answers. Give the state to the next call and it goes on where the last one stopped.
# Wherever the sequence is cut, the numbers are the same; cut at every token, this is decoding.

# %%
decaying = Design(Decay(), Linear(), Exact())
q, k, v = randn(1, T, 1, K), randn(1, T, 1, K), randn(1, T, 1, V)
log_decay, ridge = -randn(1, T, 1).square() / 10, ones(1, K)
whole, _ = ttr.regress(decaying, q, k, v, log_decay=log_decay, ridge=ridge)

for length in (30, 7, 1):
    answered, state = [], None
    pieces = (z.split(length, dim=1) for z in (q, k, v, log_decay))
    for *qkv, piece in zip(*pieces, strict=True):
        y, state = ttr.regress(decaying, *qkv, state=state, log_decay=piece, ridge=ridge)
        answered.append(y)
    assert_close(torch.cat(answered, dim=1), whole)

# %% [markdown]
# What is in the state? For this design, the weighted second moment of the keys, and of keys with values.
# In statistics they are *sufficient*: nothing else about the past changes any future answer.
# Their size does not depend on the time.
#
# Softmax attention has no such summary. Its weights depend on the query, which is not known in advance, so it
# must keep every pair: the key–value cache.

# %%
_, half_way = ttr.regress(decaying, *(z[:, : T // 2] for z in (q, k, v)), log_decay=log_decay[:, : T // 2], ridge=ridge)
assert half_way.cross.shape == state.cross.shape
assert half_way.curvature.shape == state.curvature.shape
record("recall_state_least_squares", state.cross.numel() + state.curvature.numel(), rtol=0)
for time in (T // 2, T):
    _, cache = ttr.oracle.regress(softmax, *(z[:, :time] for z in (q, k, v)))
    record(f"recall_state_softmax_{time}", sum(z.numel() for z in cache.history.values()), rtol=0)

# %% [markdown]
# ## Where do keys and values come from?
#
# So far the pairs were given. In text they are not: in the sequence at the top of this chapter the key `a` is one token
# and its value the next. A layer that makes $k_t$ and $v_t$ from token $t$ alone stores, at `a`, that `a` goes with `a`.
# The pair that we want is never formed.
#
# ```{prf:proposition} One token a pair is not enough
# :label: recall-prop-swap
# Let $q_t$, $k_t$ and $v_t$ be functions of token $t$ alone, and let $m_t$ not depend on the order of the pairs,
# as for linear attention, least squares and softmax attention without decay or positions.
# Exchange two values in the part of the sequence where pairs are stored. No answer after both of them changes.
# ```
#
# ```{prf:proof}
# The exchange permutes the tokens before $t$, so it permutes the pairs $(k_i, v_i)$, $i < t$, and leaves pair $t$ and
# the query $q_t$ as they were. By assumption $m_t$ is the same.
# ```
#
# Which value follows which key is drawn at random. So the best that such a layer can do is to guess among the values it
# has seen: one right in as many as there are pairs.
# Later layers could help, for they see what earlier ones wrote. But there is a cheaper way.
# Let $x_t$ now be the vector of token $t$, and let the key be made from tokens $t-1$ and $t$, by a filter two taps
# wide:
#
# ```{math}
# :label: recall-eq-convolution
# \tilde k_t = c_0 \odot W x_t + c_1 \odot W x_{t-1} .
# ```
#
# With $c_0 = 0$ the pair stored at a value's token is (key before it, value), which is what was wanted.
# {cite:t}`fu2022hungry` put such a shift into their layer for the same reason, and {cite:t}`wang2025testtime` read the
# short convolutions of today's recurrent layers in this way. An untrained model shows both: without the filter the
# exchange changes no answer, and with it the answers move.


# %%
def recall_model(design, key_dim, conv_on):
    """One layer, one memory, no MLP; `conv_on="k"` gives its keys the short convolution."""
    return ttr.models.RegressionLM(
        vocab_size=sizes["task"]["vocab_size"],
        d_model=sizes["training"]["d_model"],
        num_layers=1,
        num_heads=1,
        design=design,
        mlp_ratio=0,
        key_dim=key_dim,
        conv_width=2,
        conv_on=conv_on,
    ).to(device)


def effect_of_exchange(conv_on):
    """How far logits after the pairs move when the first two values are exchanged."""
    torch.manual_seed(0)
    model = recall_model("linear_attention", 16, conv_on)
    tokens, _ = recall_batch(torch.Generator().manual_seed(0), **sizes["task"])
    exchanged = tokens.clone()
    exchanged[:, [1, 3]] = tokens[:, [3, 1]]
    questions = slice(2 * sizes["task"]["num_pairs"], None)
    with torch.no_grad():
        change = model(tokens.to(device)) - model(exchanged.to(device))
    return change[:, questions].abs().max().item()


assert effect_of_exchange(conv_on="") < 1e-5 < 1e-2 < effect_of_exchange(conv_on="k")

# %% [markdown]
# ## One layer learns to recall
#
# Everything is in place: a memory, keys from neighbouring tokens, a task. Does training find them?
#
# The model is as small as it gets: an embedding, one layer with one memory, no MLP.
# Every batch is new, so the accuracy on a batch before its step is accuracy on unseen sequences.
# `ttr fit --config configs/recall.yaml` trains the same model from the command line, with a schedule, checkpoints
# and a log.


# %%
def train(design, key_dim, conv_on, seed):
    """The share of right answers on each batch, before the step on it."""
    torch.manual_seed(seed)
    model = recall_model(design, key_dim, conv_on)
    sequences = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    accuracy = []
    for _ in range(sizes["training"]["steps"]):
        tokens, targets = (z.to(device) for z in recall_batch(sequences, **sizes["task"]))
        asked = targets >= 0
        logits, answers = model(tokens)[asked], targets[asked]
        optimizer.zero_grad()
        cross_entropy(logits, answers).backward()
        optimizer.step()
        accuracy.append((logits.argmax(-1) == answers).float().mean())
    return torch.stack(accuracy).cpu()


wide_key, narrow_key = sizes["training"]["key_dims"]
settings = {
    f"key size {wide_key}": (wide_key, "k"),
    f"key size {narrow_key}": (narrow_key, "k"),
    "no convolution": (wide_key, ""),
}
learners = {"linear attention": "linear_attention", "delta rule": "delta_net"}
runs = {}
for setting, how in settings.items():
    for name, slug in learners.items():
        seeds = range(sizes["training"]["seeds"])
        runs[setting, name] = torch.stack([train(slug, *how, seed) for seed in seeds])

# %% tags=["hide-input"] mystnb={"figure": {"caption": "One layer learns multi-query recall, if its keys can see the token before. Each line is one seed, smoothed over ten batches; the dotted line is a guess among the values seen. With fewer dimensions than pairs both stay below one, and how far depends on the seed. Without a convolution neither gets beyond guessing.", "name": "fig-recall-training"}, "image": {"alt": "Three panels of accuracy over training steps, two seeds each for linear attention and the delta rule. With large keys all curves reach one. With small keys the curves level off below one and differ from seed to seed. Without a convolution all curves stay at the dotted line, the level of a guess."}}
chance = 1 / sizes["task"]["num_pairs"]
fig, axes = plt.subplots(1, 3, figsize=(7.6, 3.2), sharex=True, sharey=True)
for axis, setting in zip(axes, settings, strict=True):
    for color, name in zip(("C0", "C1"), learners, strict=True):
        for seed, accuracy in enumerate(runs[setting, name]):
            smooth = accuracy.unfold(0, 10, 1).mean(-1)
            axis.plot(range(10, len(smooth) + 10), smooth, color=color, label=None if seed else name)
    axis.axhline(chance, color="black", linestyle=":", linewidth=1, label="guess")
    axis.set_title(setting, fontsize=11)
axes[1].set_xlabel("training step")
axes[0].set(ylabel="share of right answers", ylim=(0, 1.04))
axes[2].legend(fontsize=9, loc="upper right")
plt.show()

# %%
final = {run: accuracy[:, -20:].mean(1) for run, accuracy in runs.items()}
solved, narrow, blind = settings
for name in learners:
    slug = name.replace(" ", "_")
    record(f"recall_trained_{slug}", final[solved, name].min(), rtol=0, atol=0.01)
    record(f"recall_blind_{slug}", final[blind, name].max(), rtol=0, atol=0.02)
    record(f"recall_narrow_{slug}_least", final[narrow, name].min(), rtol=0, atol=0.3)
    record(f"recall_narrow_{slug}_most", final[narrow, name].max(), rtol=0, atol=0.3)
record("recall_chance", chance)

for name in learners:
    assert final[solved, name].min() > 0.98
    assert chance + 0.1 < final[narrow, name].min() < final[solved, name].min()
    assert (final[blind, name] - chance).abs().max() < 0.03

# %% [markdown]
# With keys large enough, both memories learn the task from every seed
# (at least {glue:text}`recall_trained_linear_attention:.4f` and {glue:text}`recall_trained_delta_rule:.4f`).
# Without the convolution neither leaves the level of a guess, {glue:text}`recall_chance:.2f`
# ({glue:text}`recall_blind_linear_attention:.2f` and {glue:text}`recall_blind_delta_rule:.2f`).
# {prf:ref}`recall-prop-swap` promised that for linear attention. The delta rule does depend on the order of pairs, so
# there it is a finding and not a theorem.
#
# With keys of fewer dimensions than pairs no linear memory can fit all pairs.
# Linear attention answers {glue:text}`recall_narrow_linear_attention_least:.2f` to
# {glue:text}`recall_narrow_linear_attention_most:.2f` of the questions, from its worst seed to its best, and the delta
# rule {glue:text}`recall_narrow_delta_rule_least:.2f` to {glue:text}`recall_narrow_delta_rule_most:.2f`:
# the task asks for a choice, and choosing is easier than regressing ({prf:ref}`recall-prop-choice`), so even a memory
# that is too small beats a guess by far. The spread between seeds is as large as the difference between the rules, so
# this panel ranks neither.
#
# What it does show is that the better regression need not be the better layer.
# It is one when keys are correlated or old values must be replaced:
# {doc}`/notebooks/02_linear_attention` and {doc}`/notebooks/04_delta_rule` measure where.

# %% [markdown]
# ## Exercises
#
# ```{exercise} The ridge as a memory of nothing
# :label: recall-ex-ridge
# Show that a least-squares memory with ridge $\lambda$ is a memory without one that was shown $d$ pairs before the
# sequence began. Which pairs? What does the memory answer to a query that resembles no key?
# ```
#
# ```{solution-start} recall-ex-ridge
# :label: recall-sol-ridge
# :class: dropdown
# ```
# The penalty is $\tfrac12\lambda \operatorname{tr}(S^\top S) = \tfrac12 \sum_j \lVert 0 - S^\top (\sqrt\lambda\, e_j) \rVert^2$.
# That is the loss on $d$ pairs with keys $\sqrt\lambda\, e_j$ and values 0.
# So where no pair says otherwise the answer is 0: the ridge is the memory's prior.

# %%
k, v, q = randn(1, 6, 1, 4), randn(1, 6, 1, 2), randn(1, 6, 1, 4)
with_ridge, _ = ttr.regress(exact, q, k, v, ridge=0.5 * ones(1, 4))

prior = 0.5**0.5 * torch.eye(4, dtype=k.dtype, device=device)[None, :, None]
nothing = torch.zeros_like(v[:, :4])
shown_first = [torch.cat(both, dim=1) for both in ((prior, q), (prior, k), (nothing, v))]
without, _ = ttr.regress(exact, *shown_first, ridge=1e-12 * ones(1, 4))
assert_close(without[:, 4:], with_ridge)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} How wide should attention look?
# :label: recall-ex-bandwidth
# Choose the bandwidth of softmax attention for the twenty pairs of {numref}`fig-recall-four-memories` without
# looking at the target: leave each pair out in turn and predict it from the others.
# ```
#
# ```{solution-start} recall-ex-bandwidth
# :label: recall-sol-bandwidth
# :class: dropdown
# ```
# A weight of zero leaves a pair out: mask the diagonal of the attention matrix. No refitting is needed.

# %%
keys, held_out = bumps(x), ~torch.eye(len(x), dtype=torch.bool, device=device)
bandwidths = torch.logspace(-1.5, 0.5, 21).tolist()
stored = keys, keys, values.unsqueeze(-1), held_out
left_out = [scaled_dot_product_attention(*stored, scale=1 / h**2).squeeze(-1) for h in bandwidths]
left_out_error = torch.stack([(y - values).square().mean().sqrt() for y in left_out])
record("recall_best_bandwidth", bandwidths[left_out_error.argmin()])
assert left_out_error.min() < left_out_error[-1] / 2

# %% [markdown]
# The error of leaving one out is least at $h$ = {glue:text}`recall_best_bandwidth:.2f`, close to the bandwidth of the
# figure.
#
# ```{solution-end}
# ```
#
# ```{exercise} When the better fit makes the worse choice
# :label: recall-ex-choice
# Find three unit keys in two dimensions, with orthonormal values, for which least squares chooses a wrong value
# and linear attention does not. Why are two keys not enough?
# ```
#
# ```{solution-start} recall-ex-choice
# :label: recall-sol-choice
# :class: dropdown
# ```
# Let the rows of $K$ be the keys. The answers to all keys are the rows of the hat matrix $H = K (K^\top K)^{-1} K^\top$, times $V$.
# Two unit keys that are not parallel are independent, so $H = I$ and every choice is right.
# With three, spread the keys like a fan. The fit has two dimensions for three pairs, and the pairs at the ends of the
# fan pull hardest: statisticians call $H_{jj}$ the *leverage* of pair $j$. If the key in the middle is close to one of
# the others, its answer holds more of its neighbour's value than of its own.

# %%
angles = torch.tensor([0.0, 0.3, 1.3], dtype=torch.float64)
K3 = torch.stack([angles.cos(), angles.sin()], dim=-1)
hat = K3 @ torch.linalg.solve(K3.mT @ K3, K3.mT)
assert hat.argmax(-1).tolist() != [0, 1, 2]
assert (K3 @ K3.mT).argmax(-1).tolist() == [0, 1, 2]

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# The framework is {cite:t}`wang2025testtime`; {cite:t}`behrouz2025miras` reach a similar one from losses and retention.
# Associative memories as sums of outer products go back to {cite:t}`kohonen1972correlation`, and as attractors to
# {cite:t}`hopfield1982neural`. {cite:t}`schmidhuber1992learning` had a network write such a memory for itself.
# For recall as a test of language models read {cite:t}`arora2023zoology`, for the heads that do it in transformers
# {cite:t}`olsson2022induction`, and for regression in context {cite:t}`garg2022what` and
# {cite:t}`vonoswald2022transformers`.
