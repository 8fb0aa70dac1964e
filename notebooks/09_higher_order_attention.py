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
# # Higher-order attention
#
# Softmax attention fits a constant around every query.
# What does one gain by fitting a line instead?
#
# The answer is right where the neighbours are not: at the edge of the keys, between unevenly spread keys, and in
# many dimensions, where every query is at an edge.
# The price is a small linear system for every query, and weights that may be negative.
# This chapter derives local linear attention, proves what the slope removes, looks at its weights, and finds data on
# which it beats memories of a fixed size, and data on which it loses to them.
# Parallax, its cheap relative, learns what the linear system would have computed.

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
    "smoke": {
        "bias": {"pairs": [128, 256, 512, 1024, 2048], "seeds": 200},
        "dimension": {"keys": [2, 4, 8, 16, 32], "pairs": 1024, "draws": 8, "queries": 32},
        "switch": {"segments": 8, "tuning": 4, "test": 12},
    },
    "full": {
        "bias": {"pairs": [128, 512, 2048, 8192], "seeds": 400},
        "dimension": {"keys": [2, 4, 8, 16, 32, 64], "pairs": 8192, "draws": 16, "queries": 64},
        "switch": {"segments": 32, "tuning": 8, "test": 32},
    },
}[scale]
softmax_attention, local_linear_attention = ttr.atlas["softmax_attention"], ttr.atlas["local_linear_attention"]
generator = torch.Generator().manual_seed(9)


def randn(*shape):
    """Standard normal numbers in float64, the same on every device."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def unit(*shape):
    """Independent directions, uniform on the unit sphere of the last axis."""
    return normalize(randn(*shape), dim=-1)


def local(degree, weights):
    return ttr.Design(weights, ttr.LocalPolynomial(degree), ttr.Exact())


# %% [markdown]
# ## A line for every query
#
# {doc}`/notebooks/08_softmax_attention` chose a constant $c$ for every query, by weighted least squares.
# A smooth function is better described by its value and its slope.
# So fit a line in the offset $k_i - q_t$, and read it where the offset is zero:
#
# ```{math}
# :label: local-eq-problem
# (c, B) = \operatorname*{arg\,min}_{c,\, B} \sum_{i \le t} p_i\, \lVert v_i - c - B (k_i - q_t) \rVert^2
# + \lambda \lVert B \rVert_F^2, \qquad y_t = c .
# ```
#
# The $p_i$ are the weights of softmax attention, $p_i \propto e^{q_t^\top k_i / h^2}$, scaled to sum to one.
# The ridge $\lambda$ holds the slope and leaves the constant alone.
# Only the regressor has changed; Parallax, at the end of the chapter, changes the optimizer, too:
#
# | choice | softmax | local linear {cite:p}`zuo2025local` | local quadratic {cite:p}`wang2025testtime` | Parallax {cite:p}`zuo2026parallax` |
# |---|---|---|---|---|
# | weights | kernel | kernel | kernel | kernel |
# | regressor | constant | line | parabola | line |
# | optimizer | exact | exact | exact | a learned probe |
#
# {cite:t}`cleveland1979robust` made such lines popular in statistics, and {cite:t}`fan1996local` is the book about why
# they work.
#
# In code the degree is a choice of columns.
# The function below builds the columns, solves the normal equations, and reads the constant.


# %%
def monomials(x, degree):
    """The columns 1, x and, at degree 2, the products of two entries; mixed ones count twice in the norm of xxᵀ."""
    row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    twice = torch.where(row == column, 1.0, 2**0.5).to(x.dtype)
    columns = [torch.ones_like(x[..., :1]), x, twice * x[..., row] * x[..., column]]
    return torch.cat(columns[: degree + 1], dim=-1)


def local_polynomial(q, k, v, degree, ridge=0.0, bandwidth=1.0):
    """Local regression for one head: q and k (time, key), v (time, value)."""
    outputs = []
    for t in range(len(q)):
        p = (k[: t + 1] @ q[t] / bandwidth**2).softmax(0)
        X = monomials(k[: t + 1] - q[t], degree)
        penalty = ridge * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        penalty[0, 0] = 0.0  # the constant is free
        coefficients = torch.linalg.solve(X.T @ (p[:, None] * X) + penalty, X.T @ (p[:, None] * v[: t + 1]))
        outputs.append(coefficients[0])
    return torch.stack(outputs)


# %%
q, k, v = randn(2, 60, 3, 4), randn(2, 60, 3, 4), randn(2, 60, 3, 5)
one_head = tuple(x[0, :, 0] for x in (q, k, v))
ridge = k.new_full((3,), 0.1)
for degree, slug in enumerate(["softmax_attention", "local_linear_attention", "local_quadratic_attention"]):
    inputs = {"ridge": ridge} if degree else {}
    y, _ = ttr.regress(ttr.atlas[slug], q, k, v, **inputs)
    assert ttr.atlas[slug] == local(degree, ttr.Kernel())
    assert_close(y[0, :, 0], local_polynomial(*one_head, degree, 0.1))
    direct, _ = ttr.ops.local_polynomial(q, k, v, degree, **inputs)
    assert_close(direct, y)

# %% [markdown]
# ## The closed form
#
# Degree one has a form without columns. Write $\mathbb E$ and $\operatorname{Cov}$ for means and covariances under
# the weights $p_i$ of one query, and $\mu = \mathbb E[k]$.
#
# ```{prf:proposition} The centred form
# :label: local-proposition-centred
# The solution of {eq}`local-eq-problem` is
#
# $$
# y = \mathbb E[v] + \operatorname{Cov}(v, k)\, \bigl(\operatorname{Cov}(k, k) + \lambda I\bigr)^{-1} (q - \mu) .
# $$
# ```
#
# ```{prf:proof}
# For a fixed $B$ the best constant is $c = \mathbb E[v] - B(\mu - q)$.
# Put it in: what is left is
# $\sum_i p_i \lVert (v_i - \mathbb E[v]) - B(k_i - \mu)\rVert^2 + \lambda\lVert B\rVert_F^2$, a ridge regression of
# centred values on centred keys, with the solution
# $B = \operatorname{Cov}(v, k) (\operatorname{Cov}(k, k) + \lambda I)^{-1}$. Then $y = c$.
# ```
#
# Softmax attention answers with the mean value of the neighbours. It is the right answer for a query at their mean
# key.
# The second term walks from $\mu$ to $q$ along the slope of the data.


# %%
def moments(q, k, bandwidth):
    """Weights, mean key and covariance of the keys for each query: q (…, queries, key), k (…, pairs, key)."""
    p = (q @ k.mT / bandwidth**2).softmax(-1)
    mean = p @ k
    second = p @ (k[..., :, None] * k[..., None, :]).flatten(-2)
    return p, mean, second.unflatten(-1, (k.shape[-1], -1)) - mean[..., :, None] * mean[..., None, :]


def probe_of(q, mean, covariance, ridge):
    """u = (Cov + λI)⁻¹ (q − μ)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(covariance + ridge * eye, (q - mean)[..., None])[..., 0]


def equivalent_weights(p, mean, u, k):
    """What each value counts in the answer."""
    return p * (1 + u @ k.mT - (u * mean).sum(-1, keepdim=True))


q1, k1, v1 = one_head[0][-1:], *one_head[1:]  # the last query, which sees all pairs
p, mean, covariance = moments(q1, k1, 1.0)
value_mean = p @ v1
cross = torch.einsum("ti,ik,iv->tkv", p, k1 - mean, v1 - value_mean)
u = probe_of(q1, mean, covariance, 0.1)
y = value_mean + torch.einsum("tkv,tk->tv", cross, u)
assert_close(y[0], local_polynomial(*one_head, 1, 0.1)[-1], rtol=1e-12, atol=1e-12)
assert_close(equivalent_weights(p, mean, u, k1) @ v1, y)

# %% [markdown]
# ## Weights that may be negative
#
# The answer is linear in the values, as with every exact fit. Collect what each value counts, the $H_i(q)$ of the
# page {doc}`/book/notation`, here $\ell_i$:
#
# ```{math}
# :label: local-eq-weights
# \begin{aligned}
# y &= \sum_i \ell_i\, v_i, \qquad \ell_i = p_i \bigl(1 + u^\top (k_i - \mu)\bigr), \\
# u &= \bigl(\operatorname{Cov}(k, k) + \lambda I\bigr)^{-1} (q - \mu) .
# \end{aligned}
# ```
#
# ```{prf:proposition} The equivalent weights
# :label: local-proposition-weights
# $\sum_i \ell_i = 1$ and $\sum_i \ell_i k_i = q - \lambda u$.
# With $\lambda = 0$ and an invertible covariance the weights have their centre of mass at the query, and every affine
# function is reproduced exactly. If $q$ lies outside the convex hull of the keys, some $\ell_i$ are then negative.
# ```
#
# ```{prf:proof}
# $\sum_i p_i (k_i - \mu) = 0$ gives the first sum. The second is
# $\mu + \operatorname{Cov}(k, k)\, u = \mu + (q - \mu) - \lambda u$.
# For $v_i = a + A k_i$ the answer is $a + A \sum_i \ell_i k_i = a + A q$ at $\lambda = 0$.
# Weights that are not negative and sum to one have their centre of mass in the convex hull.
# ```
#
# Softmax attention has $u = 0$: its centre of mass is $\mu$, wherever the neighbours happen to be.
# Ask memories of all three degrees for their weights at two queries, one amid the keys and one at the end of them.
# We need no formula: store $v_i$ as the $i$-th unit vector, and the memory prints them.


# %%
def ask(design, q, k, v, **inputs):
    """What a memory that holds all pairs answers: q (batch, queries, key), k and v (batch, pairs, …)."""
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1], -1) for x in (k, v))  # a head a query
    past = ttr.State(history={"k": k[:, :-1], "v": v[:, :-1]})
    inputs = {name: k.new_full((q.shape[1],), number) for name, number in inputs.items()}
    return ttr.regress(design, q[:, None], k[:, -1:], v[:, -1:], state=past, **inputs)[0][:, 0]


names = ("softmax (constant)", "local linear", "local quadratic")
kernel = ttr.Kernel(ttr.Gaussian(), 0.25)
k = torch.linspace(-1, 1, 41, dtype=torch.float64, device=device)[None, :, None]
q = k.new_tensor([[[0.0], [1.0]]])
stored = torch.eye(41, dtype=k.dtype, device=device)[None]
hats = {
    name: ask(local(degree, kernel), q, k, stored, **({"ridge": 1e-9} if degree else {}))[0]
    for degree, name in enumerate(names)
}
for name, weights in hats.items():
    assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
    center = weights @ k[0, :, 0]
    assert abs(center[0]) < 1e-9
    assert (weights[1].min() < -1e-3) == (name != names[0])
    if name == names[0]:
        assert center[1] < 0.85
    else:
        assert abs(center[1] - 1) < 1e-6

# %% tags=["hide-input"] mystnb={"figure": {"caption": "What each stored value counts in the answer, against its key, for a query amid the keys (left) and at their end (right); dotted: the query, triangles below: the centre of mass of the weights. Amid the keys, constant and line have the same weights. At the end the constant's centre of mass lies inside, away from the query. The line pulls it back by negative weights on far pairs, and the parabola swings once more.", "name": "local-fig-weights"}, "image": {"alt": "Two plots of weights against keys between minus one and one. Left: three bumps around zero, two of them equal, the third narrower with negative sides. Right: at the right end the softmax weights are all positive; those of local linear fall below zero at a distance; those of local quadratic oscillate. Triangles mark centres of mass: that of softmax is left of the query, the others on it."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True)
keys, hats = k[0, :, 0].cpu(), {name: weights.cpu() for name, weights in hats.items()}
for panel, query, column in zip(panels, q[0, :, 0].tolist(), (0, 1), strict=True):
    panel.axhline(0, color="0.4", linewidth=0.8)
    panel.axvline(query, color="0.4", linewidth=1, linestyle=":")
    for place, ((name, weights), style) in enumerate(zip(hats.items(), ("o-", "s--", "^-."), strict=True)):
        (line,) = panel.plot(keys, weights[column], style, markersize=3.5, linewidth=1.2, label=name)
        center = (weights[column] @ keys).item()
        panel.plot(center, -0.12 - 0.02 * place, "^", color=line.get_color(), markersize=7, clip_on=False)
    panel.set(xlabel="key of the pair", title=f"query at {query:g}", xlim=(-1.05, 1.05))
panels[0].set(
    ylabel="weight in the answer", ylim=(-0.18, 1.05 * max(weights.max().item() for weights in hats.values()))
)
panels[0].legend(fontsize=9)
plt.show()

# %% [markdown]
# In the {doc}`/book/explorer` these weights are the lower plot; drag the query over the edge.
#
# ## What the slope removes
#
# How much is gained? Expand the function around the query,
# $m(k) = m(q) + m'(q)(k - q) + \text{rest}$.
# The weights of the line sum to one and are centred, so both first terms come out right, whatever the keys are.
# For one-dimensional keys, values without noise and $\lambda = 0$, Taylor's theorem leaves
#
# ```{math}
# :label: local-eq-bound
# \lvert y - m(q) \rvert \le \tfrac12 \max \lvert m'' \rvert \sum_i \lvert \ell_i \rvert\, (k_i - q)^2 .
# ```
#
# The kernel reaches about $h$ far, so the sum is of order $h^2$: at the boundary and in the interior, for any smooth
# density.
# The constant has no such luck. Its first-order term is $m'(q)(\mu - q)$, and at an edge $\mu - q$ is of order $h$.
#
# ```{prf:theorem} Boundary bias
# :label: local-theorem-boundary
# Let keys be independent draws from a density $f$ that is positive on $[a, b]$ with bounded derivative, let $m$ have
# two continuous derivatives, $\lambda = 0$, and let $h \to 0$ with $nh \to \infty$.
# Take the Gaussian kernel $\kappa$, a query $q = b - \tau h$ with $\tau$ fixed, and the moments
# $\mu_j = \int_{-\infty}^{\tau} z^j \kappa(z)\, dz$. Then, in probability over the keys, the biases are
#
# $$
# \text{constant:} \quad h\, m'(q)\, \frac{\mu_1}{\mu_0} + o(h), \qquad
# \text{line:} \quad \frac{h^2}{2}\, m''(q)\, \frac{\mu_2^2 - \mu_1 \mu_3}{\mu_0 \mu_2 - \mu_1^2} + o(h^2) .
# $$
#
# So at the boundary the constant errs by order $h$ and the line by order $h^2$.
# For a fixed query in the interior the same holds with $\tau = \infty$. There $\mu_1 = 0$: the line keeps its order, and
# the mean bias of the constant is the $h^2$ of {doc}`/notebooks/08_softmax_attention`.
# ```
#
# ```{prf:proof}
# (Sketch; {cite:t}`fan1996local`, section 3.2, have it in full, {cite:t}`ruppert1994multivariate` in $d$ dimensions.)
# With many pairs $\sum_i w_i (k_i - q)^j \approx n h^{j+1} f(q)\, \mu_j$; the upper limit of the moment is where the
# keys end.
# *Constant.* The leading term of the error is $m'(q)$ times the mean offset, which is $h \mu_1 / \mu_0$.
# *Line.* Only $\tfrac12 m''(q)(k - q)^2$ is left to be fitted. Its local line has the constant
# $\tfrac12 m''(q)$ times the first entry of
# $\begin{pmatrix}\mu_0 & h\mu_1\\ h\mu_1 & h^2\mu_2\end{pmatrix}^{-1} \begin{pmatrix} h^2\mu_2 \\ h^3\mu_3 \end{pmatrix}$,
# which is $h^2$ times the fraction. For $\tau = \infty$ the odd moments vanish and the fraction is
# $\mu_2 / \mu_0 = 1$.
# ```
#
# At the very end, $\tau = 0$, the constant's factor is $-\sqrt{2/\pi}$.
# A parabola removes one more order in the same way, at the boundary; in the interior it gains two, because odd terms
# drop out there.
#
# The experiment: keys uniform on $[-1, 1]$, $m(k) = e^k$ (every derivative is $m$ itself), no noise, and the bandwidth
# $h = 0.3\, n^{-1/5}$ that {doc}`/notebooks/08_softmax_attention` found to be of the best order.
# What is left of the mean error over seeds is bias.

# %%
bias_sizes = sizes["bias"]
seeds, ends = bias_sizes["seeds"], {"boundary": 1.0, "interior": 0.0}
errors = {name: [] for name in names}
for n in bias_sizes["pairs"]:
    k = 2 * torch.rand(seeds, n, 1, generator=generator, dtype=torch.float64).to(device) - 1
    q = k.new_tensor(list(ends.values())).expand(seeds, 2)[..., None]
    for degree, name in enumerate(names):
        design = local(degree, ttr.Kernel(ttr.Gaussian(), 0.3 * n**-0.2))
        y = ask(design, q, k, k.exp(), **({"ridge": 1e-10} if degree else {}))
        errors[name].append((y - q.exp())[..., 0].cpu())
errors = {name: torch.stack(e) for name, e in errors.items()}  # (numbers of pairs, seeds, two queries)

h = 0.3 * torch.tensor(bias_sizes["pairs"], dtype=torch.float64) ** -0.2
half = [0.5, (2 * math.pi) ** -0.5, 0.5, 2 * (2 * math.pi) ** -0.5]  # the moments up to τ = 0
line_constant = (half[2] ** 2 - half[1] * half[3]) / (half[0] * half[2] - half[1] ** 2) / 2
theory = {
    (names[0], "boundary"): -h * math.e * (2 / math.pi) ** 0.5,
    (names[1], "boundary"): h**2 * math.e * line_constant,
    (names[0], "interior"): h**2 / 2,
    (names[1], "interior"): h**2 / 2,
}
bias = {name: e.mean(1) for name, e in errors.items()}
for (name, place), expected in theory.items():
    measured = bias[name][:, list(ends).index(place)]
    assert_close(measured[-2:], expected[-2:], rtol=0.35, atol=0)
assert (bias[names[0]][:, 0].abs() > 10 * bias[names[1]][:, 0].abs()).all()
assert (bias[names[1]][:, 0].abs() > 3 * bias[names[2]][:, 0].abs()).all()

# %% tags=["hide-cell"]
short = dict(zip(names, ("constant", "line", "parabola"), strict=True))
for name in names:
    for column, place in enumerate(ends):
        record(f"local_bias_{short[name]}_{place}", bias[name][-1, column].abs(), rtol=0.1, atol=1e-4)
ratio = bias[names[0]][:, 0].abs() / bias[names[1]][:, 0].abs()
record("local_bias_ratio_least", ratio.min(), rtol=0.15)
record("local_bias_ratio_most", ratio.max(), rtol=0.15)
slopes = {}
for name, order in zip(names, (1, 2, 3), strict=True):
    logs, x = bias[name][:, 0].abs().log(), h.log()
    slopes[name] = ((x - x.mean()) * logs).sum() / (x - x.mean()).square().sum()
    record(f"local_bias_order_{short[name]}", slopes[name], atol=0.25)
    assert abs(slopes[name] - order) < 0.5

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Size of the bias against the number of pairs, with a bandwidth that shrinks as the theory of the previous chapter asks; bands are two standard errors over seeds, dashed grey lines the leading terms of the theorem. At the boundary every degree gains an order. In the interior, with evenly spread keys, constant and line are equal, and only the parabola is better.", "name": "local-fig-bias"}, "image": {"alt": "Two plots with logarithmic axes of bias against number of pairs. Boundary: three falling lines far apart, softmax on top, local linear far below, local quadratic lower still and steeper. Interior: softmax and local linear lie on each other and on the dashed line, local quadratic far below."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.7), sharey=True)
for column, (panel, place) in enumerate(zip(panels, ends, strict=True)):
    for name, style in zip(names, ("o-", "s--", "^-."), strict=True):
        e = errors[name][:, :, column]
        size, wide = e.mean(1).abs(), 2 * e.std(1) / seeds**0.5
        (line,) = panel.plot(bias_sizes["pairs"], size, style, label=name, markersize=5)
        low = (size - wide).clamp_min(1e-6)
        panel.fill_between(bias_sizes["pairs"], low, size + wide, color=line.get_color(), alpha=0.2, linewidth=0)
        if (name, place) in theory:
            panel.plot(bias_sizes["pairs"], theory[name, place].abs(), color="0.4", linewidth=1, linestyle="--")
    panel.set(xlabel="pairs, n", title=place, xscale="log", yscale="log")
    panel.set_xticks(bias_sizes["pairs"], bias_sizes["pairs"])
    panel.minorticks_off()
panels[0].set(ylabel="size of the bias", ylim=(1e-6, 1))
panels[1].legend(fontsize=9)
plt.show()

# %% [markdown]
# At the boundary the bias of the constant is between {glue:text}`local_bias_ratio_least:.0f` and
# {glue:text}`local_bias_ratio_most:.0f` times that of the line.
# As a power of $h$ it falls with the exponents {glue:text}`local_bias_order_constant:.2f`,
# {glue:text}`local_bias_order_line:.2f` and {glue:text}`local_bias_order_parabola:.2f` for the three degrees.
# In the interior, with the largest number of pairs, constant and line are off by
# {glue:text}`local_bias_constant_interior:.4f` and {glue:text}`local_bias_line_interior:.4f`.
#
# ### What the slope costs
#
# Negative weights are large weights: they must cancel. With noise of variance $s^2$ the variance of an answer is
# $s^2 \sum_i \ell_i^2$, and at the boundary the line has more of it.
# Integrals of the same kind as in the theorem, with $\kappa^2$ for $\kappa$, say how much more.

# %%
k = torch.linspace(-1, 1, 4001, dtype=torch.float64, device=device)[:, None]
width = 0.1
p = (-(k - 1).square() / (2 * width**2))[:, 0].softmax(0)
mean, spread = p @ k, p @ k.square() - (p @ k) ** 2
ell = p * (1 + (1 - mean) / spread * (k - mean).T)[0]
variance_ratio = ell.square().sum() / p.square().sum()
squares = [math.pi**0.5 / 2, 0.5, math.pi**0.5 / 4]  # ∫ zʲ e^{−z²} over the half line
top = half[2] ** 2 * squares[0] - 2 * half[1] * half[2] * squares[1] + half[1] ** 2 * squares[2]
line_variance = top / (half[0] * half[2] - half[1] ** 2) ** 2
assert_close(variance_ratio.item(), line_variance / (squares[0] / half[0] ** 2), rtol=0.01, atol=0)
record("local_variance_ratio", variance_ratio, rtol=1e-2)

# %% [markdown]
# At the edge the line has {glue:text}`local_variance_ratio:.2f` times the variance of the constant; in the interior
# they are equal.
# So a slope is worth its price where the bias is larger than the noise that the neighbourhood leaves, and the ridge
# $\lambda$ moves between the two: at $\lambda \to \infty$ the slope is gone.
#
# ## In many dimensions everything is an edge
#
# One end of a line matters little. But the neighbours of a point in $d$ dimensions are few, and they lie around it
# unevenly.
# So the mean of their keys is off, and the constant pays for it with the gradient of the function.
#
# We take unit keys, a function that is linear with a little curvature, a fixed number of pairs and a little noise.
# Each memory gets the best bandwidth and ridge of a grid.
# For the cost of a slope we count the steps that conjugate gradients {cite:p}`hestenes1952methods` need for
# $(\operatorname{Cov} + \lambda I)u = q - \mu$.


# %%
def conjugate_gradient_steps(covariance, right, ridge, tolerance):
    """How many steps each system needs until its residual has fallen by the tolerance."""
    x, r = torch.zeros_like(right), right
    direction, steps = r, torch.zeros(right.shape[:-1], device=right.device)
    while (open_ := r.norm(dim=-1) > tolerance * right.norm(dim=-1)).any():
        steps += open_
        product = (covariance @ direction[..., None])[..., 0] + ridge * direction
        old = r.square().sum(-1, keepdim=True)
        step = open_[..., None] * old / (direction * product).sum(-1, keepdim=True)
        x, r = x + step * direction, r - step * product
        direction = r + r.square().sum(-1, keepdim=True) / old * direction
    return steps


many = sizes["dimension"]
squared, steps = {name: [] for name in names[:2]}, {1e-3: [], 1e-6: []}
for d in many["keys"]:
    k, q = unit(many["draws"], many["pairs"], d), unit(many["draws"], many["queries"], d)
    W, Q = randn(many["draws"], d, 1), randn(many["draws"], d, d) / d**0.5

    def m(x, W=W, Q=Q):
        return x @ W + 0.5 * (x @ Q * x).sum(-1, keepdim=True)

    v = m(k) + 0.1 * randn(many["draws"], many["pairs"], 1)
    constant, line = [], []
    for width in (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0):
        p, mean, covariance = moments(q, k, width)
        constant.append((p @ v - m(q)).square().mean((1, 2)))
        for small in (1e-5, 1e-3):
            ell = equivalent_weights(p, mean, probe_of(q, mean, covariance, small), k)
            line.append((ell @ v - m(q)).square().mean((1, 2)))
        if width == 0.5:
            for tolerance, counts in steps.items():
                counts.append(conjugate_gradient_steps(covariance, q - mean, 1e-3, tolerance).cpu())
    for name, tried in zip(names, (constant, line), strict=False):
        tried = torch.stack(tried)
        squared[name].append(tried[tried.mean(1).argmin()].cpu())
squared = {name: torch.stack(e) for name, e in squared.items()}
gain = squared[names[0]] / squared[names[1]]
assert (gain.log().mean(1).exp() > 2).all()
assert gain[-1].log().mean() > gain[0].log().mean() + 1
for d, ratios in zip(many["keys"], gain, strict=True):
    record(f"local_gain_{d}", ratios.log().mean().exp(), rtol=0.3)
few, enough = (torch.stack([c.mean() for c in counts]) for counts in steps.values())
assert enough[-1] < many["keys"][-1] / 2  # fewer steps than channels
assert enough[0] > many["keys"][0] / 4
at_32 = many["keys"].index(32)
assert few[at_32] < 32 / 4
record("local_steps_32", enough[at_32], rtol=0.1)
record("local_few_steps_32", few[at_32], rtol=0.1)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: squared error of softmax attention over that of local linear attention, each at its best bandwidth, against the size of the keys; points are draws, the line their geometric mean. The slope is worth more in more dimensions. Right: conjugate gradient steps a query, to two accuracies (bands run over all queries), and the number at which forming the covariance costs as much. Steps grow more slowly than the key, so iterating pays for large keys and rough answers.", "name": "local-fig-dimension"}, "image": {"alt": "Left: ratio of errors rising with the key size on logarithmic axes. Right: number of steps against key size; the two curves rise, the dotted break-even line starts below them, crosses the lower one and comes near the upper one at the largest key."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7))
jitter = torch.linspace(0.94, 1.06, many["draws"])
left.plot(many["keys"], gain.log().mean(1).exp(), "s-")
for d, ratios in zip(many["keys"], gain, strict=True):
    left.plot(d * jitter, ratios, ".", color="C0", markersize=3, alpha=0.6)
left.axhline(1, color="0.4", linewidth=1, linestyle=":")
left.set(xlabel="size of a key, d", ylabel="error of softmax / local linear", xscale="log", yscale="log")
for (tolerance, counts), style in zip(steps.items(), ("o-", "s--"), strict=True):
    (line,) = right.plot(many["keys"], [c.mean() for c in counts], style, label=f"residual {tolerance:.0e}")
    low, high = [c.min() for c in counts], [c.max() for c in counts]
    right.fill_between(many["keys"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
right.plot(
    many["keys"], [d / 4 for d in many["keys"]], color="0.4", linewidth=1, linestyle=":", label="break even, d/4"
)
right.set(xlabel="size of a key, d", ylabel="steps", xscale="log", ylim=(0, None))
right.legend(fontsize=9)
for panel in (left, right):
    panel.set_xticks(many["keys"], many["keys"])
    panel.minorticks_off()
plt.show()

# %% [markdown]
# The error ratio rises from {glue:text}`local_gain_2:.1f` at $d = 2$ to {glue:text}`local_gain_32:.0f` at $d = 32$.
#
# ## What a query costs
#
# A step of conjugate gradients needs $\operatorname{Cov}(k, k)\,x = \sum_i p_i (k_i - \mu)(k_i - \mu)^\top x$, and no
# matrix has to be formed for that: two passes over the keys, $4d$ operations a pair.
# Forming the covariance costs $d^2$ operations a pair, half of the square because it is symmetric.
# So a solve with fewer than about $d/4$ steps is cheaper, if the $d^3/3$ of the factorisation does not matter.
# The figure says that the plain method gets there for large keys only.
# At $d = 32$ it takes {glue:text}`local_few_steps_32:.1f` steps to three digits and
# {glue:text}`local_steps_32:.1f` to six.
# `ttr.ops.local_polynomial` therefore preconditions with the mean covariance of a block of queries, which they share,
# and factorises each query's own for small keys. Its `solver` argument forces one or the other.
#
# Memory is as for attention: weights are computed block by block and thrown away, so nothing of size $T^2$ or $T d^2$
# is kept, and the backward pass, a solve with the same matrix, computes them again.
# The state is the same list of pairs.

# %%
for slug in ("softmax_attention", "local_linear_attention", "parallax", "local_quadratic_attention"):
    design = ttr.atlas[slug]
    print(f"{design.name:26} {design.cost()}")

q, k, v = unit(1, 300, 2, 16), unit(1, 300, 2, 16), randn(1, 300, 2, 8)
ridge = k.new_full((2,), 1e-3)
by_steps, _ = ttr.ops.local_polynomial(q, k, v, 1, 0.5, ridge, solver="conjugate_gradients")
by_factors, state = ttr.ops.local_polynomial(q, k, v, 1, 0.5, ridge, solver="direct")
assert_close(by_steps, by_factors)
assert state.k.shape[1] == 300

# %% [markdown]
# ## Where it wins, and where it loses
#
# A sequence of several segments: each has a linear function of its own, values are $v = w_s^\top k$ with a little noise,
# and every value is asked for before it is shown.
# A memory of one matrix must forget the old segment to learn the new one.
# A memory that looks at neighbours need not, **if the keys tell the segments apart**.
#
# So there are two tasks. In the first, the keys of a segment lie in a cone of their own.
# In the second, all segments share the sphere of keys, and only time tells them apart.
# `ttr.tasks.PiecewiseRegression` draws both.
# Every memory chooses its settings on a few sequences and is tested on others; we look at the second half of the
# segments, when there is something to forget.

# %% tags=["remove-stderr"]
from ttr.tasks import PiecewiseRegression

switch = sizes["switch"]
segment, d, sequences = 128, 16, switch["tuning"] + switch["test"]
length = switch["segments"] * segment


def at_rate(alpha):
    return torch.full((sequences, length - 1, 1), math.log(alpha), device=device)


def penalty(number, *shape):
    return torch.full(shape, number, device=device)


mesa = ttr.Design(ttr.Decay(), optimizer=ttr.Exact(ridge_decays=False))
candidates = {
    "local linear": [
        (local(1, ttr.Kernel(bandwidth=width)), {"ridge": penalty(small, 1)})
        for width in (0.14, 0.2, 0.3, 0.5)
        for small in (1e-4, 1e-3)
    ],
    "local linear, decay": [
        (
            local(1, ttr.Kernel(bandwidth=width) * ttr.Decay()),
            {"ridge": penalty(1e-3, 1), "log_decay": at_rate(alpha)},
        )
        for width in (0.2, 0.3, 1.0)
        for alpha in (0.9, 0.95, 0.98)
    ],
    "softmax": [(local(0, ttr.Kernel(bandwidth=width)), {}) for width in (0.1, 0.14, 0.2, 0.3, 0.5)],
    "delta rule": [
        (ttr.atlas["delta_net"], {"step_size": penalty(beta, sequences, length - 1, 1)}) for beta in (0.5, 0.7, 1.0)
    ],
    "least squares, best decay": [
        (mesa, {"ridge": penalty(small, 1, d), "log_decay": at_rate(alpha)})
        for small in (1e-3, 1e-2)
        for alpha in (0.8, 0.85, 0.9, 0.95, 0.98)
    ],
    "least squares, no decay": [(mesa, {"ridge": penalty(1e-2, 1, d), "log_decay": at_rate(1.0)})],
}


def errors_of(design, inputs, x, y, noisy):
    """Squared errors (sequences, tokens) where each value is asked for before it is shown."""
    answers, _ = ttr.regress(design, x[:, 1:, None], x[:, :-1, None], noisy[:, :-1, None, None], **inputs)
    return (answers[..., 0, 0] - y[:, 1:]).square().cpu()


late = torch.arange(1, length) >= length // 2
results = {}
for task, cone in {"own cone": 0.45, "shared sphere": None}.items():
    draws = torch.Generator().manual_seed(90)
    source = PiecewiseRegression(d, switch["segments"], segment, cone=cone, batch_size=sequences)
    x, y = (z.to(device) for z in source.sample(draws))
    noisy = y + source.noise * torch.randn(y.shape, generator=draws).to(device)
    for name, tried in candidates.items():
        tried = [errors_of(design, inputs, x, y, noisy) for design, inputs in tried]
        chosen = min(tried, key=lambda e: e[: switch["tuning"], late].mean())
        results[task, name] = chosen[switch["tuning"] :]

overall = {key: e[:, late].mean(1) for key, e in results.items()}
mean = {key: e.mean().item() for key, e in overall.items()}
for (task, name), value in mean.items():
    label = "_".join(name.replace(",", "").split())
    record(f"local_{task.split()[0]}_{label}", value, rtol=0.15)

# Keys that tell: neighbours win, in the mean and in most sequences.
better = overall["own cone", "local linear"] < overall["own cone", "least squares, best decay"]
record("local_own_sequences", len(better))
record("local_own_better", int(better.sum()), atol=1.5)
assert better.double().mean() > 0.5
assert mean["own cone", "local linear"] < 0.85 * mean["own cone", "least squares, best decay"]
for name in ("softmax", "delta rule", "least squares, no decay"):
    assert mean["own cone", "local linear"] < mean["own cone", name] / 2
# Keys that do not: it loses to everything that forgets.
for name in ("delta rule", "least squares, best decay"):
    assert mean["shared sphere", "local linear"] > 2 * mean["shared sphere", name]
# A factor in time repairs it, and costs nothing where it is not needed.
assert mean["shared sphere", "local linear, decay"] < mean["shared sphere", "local linear"] / 2
assert mean["own cone", "local linear, decay"] < 1.15 * mean["own cone", "local linear"]
assert local(1, ttr.Kernel() * ttr.Decay()).name is None

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Squared error by the place in a segment, on a logarithmic scale, averaged over the later segments; bands are two standard errors over sequences. Left, where each segment has keys of its own, local linear attention is lowest almost throughout: it has all pairs of the segment and hardly any of the others. Right, where segments share their keys, it mixes old functions with the new one and is among the worst, until a decay is added to its kernel.", "name": "local-fig-switch"}, "image": {"alt": "Two plots of error against the number of pairs seen in the segment for six memories. Left: all fall after the switch; the two local linear curves end lowest, least squares with decay levels off above them, softmax and the delta rule higher, least squares without decay highest. Right: local linear, softmax and least squares without decay stay near one, the memories that decay and the delta rule fall far below."}}
figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True)
lines = {"local linear": "-", "local linear, decay": "--", "softmax": "-.", "delta rule": ":"}
lines |= {"least squares, best decay": (0, (5, 1, 1, 1, 1, 1)), "least squares, no decay": (0, (1, 3))}
for panel, task in zip(panels, ("own cone", "shared sphere"), strict=True):
    for name, style in lines.items():
        e = results[task, name][:, late].unflatten(1, (-1, segment)).mean(1).unflatten(1, (-1, 8)).mean(2)
        center, wide = e.mean(0), 2 * e.std(0) / len(e) ** 0.5
        place = 8 * torch.arange(segment // 8) + 4
        (line,) = panel.plot(place, center, linestyle=style, label=name)
        low = (center - wide).clamp_min(1e-4)
        panel.fill_between(place, low, center + wide, color=line.get_color(), alpha=0.15, linewidth=0)
    panel.set(xlabel="pairs of the segment seen", title=f"keys: {task}", yscale="log")
panels[0].set_ylabel("squared error")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
plt.show()

# %% [markdown]
# With a cone for each segment, local linear attention has the error {glue:text}`local_own_local_linear:.3f`,
# least squares with its best decay {glue:text}`local_own_least_squares_best_decay:.3f`, softmax attention
# {glue:text}`local_own_softmax:.3f`, the delta rule {glue:text}`local_own_delta_rule:.3f`, and least squares without
# decay {glue:text}`local_own_least_squares_no_decay:.3f`. (An answer of zero has about 1.)
# It beats least squares with decay in {glue:text}`local_own_better` of {glue:text}`local_own_sequences` sequences; where
# two cones happen to overlap, time is the better guide.
# It needs a slope, because each function is linear, and neighbours, because there are several functions.
#
# With shared keys its error is {glue:text}`local_shared_local_linear:.2f`, and it **loses** to the delta rule with
# {glue:text}`local_shared_delta_rule:.2f` and to least squares with decay,
# {glue:text}`local_shared_least_squares_best_decay:.2f`.
# Pairs of old functions lie among the neighbours of every query, and nothing in the keys says which are old.
# (The settings were chosen for the mean over a segment, which its first pairs dominate. So least squares forgets fast
# and levels off, while the delta rule, which has no decay, overtakes it late in the segment.)
#
# The last curve multiplies the kernel by a decay: {glue:text}`local_own_local_linear_decay:.3f` on the first task and
# {glue:text}`local_shared_local_linear_decay:.2f` on the second.
# That design, `Kernel() * Decay()` with a line, has no name in the atlas.
#
# ## Parallax: learn the answer of the solve
#
# All the cost of a line is in $u = (\operatorname{Cov} + \lambda I)^{-1}(q - \mu)$.
# Parallax {cite:p}`zuo2026parallax` keeps {eq}`local-eq-weights` and replaces $u$ by a vector $r_t$ that the layer
# computes from the token, as it computes a query:
#
# ```{math}
# :label: local-eq-parallax
# y_t = \mathbb E[v] + \operatorname{Cov}(v, k)\, r_t = \sum_i p_i \bigl(1 + r_t^\top (k_i - \mu)\bigr)\, v_i .
# ```
#
# No system, no ridge, no conditioning: one more product with the keys than softmax attention.
# (The paper subtracts the second term, so its probe is the negative of ours.)
# With $r_t = u$ it is local linear attention; with $r_t = 0$ it is softmax attention.


# %%
def parallax(q, k, v, probe):
    """One head, one token after the other."""
    outputs = []
    for t in range(len(q)):
        p = (k[: t + 1] @ q[t]).softmax(0)
        along = k[: t + 1] @ probe[t]
        outputs.append((p * (1 + along - p @ along)) @ v[: t + 1])
    return torch.stack(outputs)


q, k, v, probe = randn(2, 60, 3, 4), randn(2, 60, 3, 4), randn(2, 60, 3, 5), randn(2, 60, 3, 4)
y, _ = ttr.regress(ttr.atlas["parallax"], q, k, v, probe=probe)
assert_close(y[0, :, 0], parallax(*(x[0, :, 0] for x in (q, k, v, probe))))

softmax, _ = ttr.regress(softmax_attention, q, k, v)
assert_close(ttr.regress(ttr.atlas["parallax"], q, k, v, probe=0 * probe)[0], softmax)

causal = torch.full((60, 60), -torch.inf, dtype=q.dtype, device=device).triu(1)
p = (torch.einsum("bthk,bihk->bhti", q, k) + causal).softmax(-1)
mean = torch.einsum("bhti,bihk->bthk", p, k)
second = torch.einsum("bhti,bihk,bihl->bthkl", p, k, k)
u = probe_of(q, mean, second - mean[..., :, None] * mean[..., None, :], 0.1)
exact, _ = ttr.regress(local_linear_attention, q, k, v, ridge=k.new_full((3,), 0.1))
assert_close(ttr.regress(ttr.atlas["parallax"], q, k, v, probe=u)[0], exact)

# %% [markdown]
# What is lost? The exact $u$ depends on the covariance of the keys around the query, that is on everything read so
# far. A probe made from the token alone cannot know it. It can learn a covariance that is the same in all sequences.
#
# The smallest experiment uses $r = M q$ with one matrix $M$ for all sequences.
# The answer is linear in $M$, so the best $M$ is a least-squares solution. We fit it on sequences with isotropic keys.
# Then half of the directions shrink, for keys and queries, and nothing else changes.

# %%
d, n = 8, 512
width, stretch = 0.5, torch.tensor([1.0] * 4 + [0.3] * 4, dtype=torch.float64, device=device)


def linear_sequences(stretch, number=24):
    k, q = (normalize(stretch * randn(number, size, d), dim=-1) for size in (n, 64))
    W = randn(number, d, 1)
    return q, k, k @ W + 0.1 * randn(number, n, 1), q @ W


def relative(y, target):
    """Squared error of each sequence, relative to the target."""
    return ((y - target).square().mean((1, 2)) / target.square().mean((1, 2))).cpu()


q, k, v, target = linear_sequences(torch.ones_like(stretch))
p, mean, _ = moments(q, k, width)
cross = torch.einsum("sqi,sik,siv->sqkv", p, k, v) - mean[..., None] * (p @ v)[..., None, :]
columns = torch.einsum("sqk,sql->sqkl", cross[..., 0], q).flatten(2).flatten(0, 1)
M = torch.linalg.lstsq(columns, (target - p @ v).flatten(0, 1)).solution.view(d, d)

shifted = {}
for keys, scales in {"as in training": torch.ones_like(stretch), "stretched": stretch}.items():
    q, k, v, target = linear_sequences(scales)
    p, mean, covariance = moments(q, k, width)
    u = probe_of(q, mean, covariance, 1e-3)
    shifted[keys] = {
        "softmax": relative(p @ v, target),
        "Parallax, r = Mq": relative(equivalent_weights(p, mean, q @ M.T, k) @ v, target),
        "local linear": relative(equivalent_weights(p, mean, u, k) @ v, target),
    }
for keys, by_name in shifted.items():
    for name, e in by_name.items():
        record(f"local_{keys.split()[-1]}_{name.split()[0].strip(',').lower()}", e.mean(), rtol=0.15)
trained, changed = shifted["as in training"], shifted["stretched"]
assert trained["Parallax, r = Mq"].mean() < trained["softmax"].mean() / 4
assert changed["Parallax, r = Mq"].mean() > 2 * trained["Parallax, r = Mq"].mean()
assert changed["local linear"].mean() < changed["Parallax, r = Mq"].mean() / 10

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Relative squared error on linear functions, a point a sequence, the bar their geometric mean. A linear probe, fitted to sequences with isotropic keys, gives most of what the slope gives on such sequences. When the keys stretch it keeps only part of that, since it cannot see the covariance; local linear attention solves with the covariance it sees.", "name": "local-fig-parallax"}, "image": {"alt": "Error on a logarithmic axis for three memories, each with two groups of points. Softmax highest in both, Parallax well below it with training keys and closer to it with stretched keys, local linear orders of magnitude lower in both."}}
figure, axes = plt.subplots(figsize=(7, 3.5))
for group, ((keys, by_name), marker) in enumerate(zip(shifted.items(), ("o", "^"), strict=True)):
    for place, e in enumerate(by_name.values()):
        at = place + 0.3 * (group - 0.5)
        jitter = torch.linspace(-0.08, 0.08, len(e), dtype=torch.float64)
        label = f"keys {keys}" if place == 0 else None
        axes.plot(at + jitter, e, marker, color=f"C{group}", markersize=3.5, alpha=0.6, label=label, linestyle="")
        axes.plot([at - 0.12, at + 0.12], [e.log().mean().exp()] * 2, color=f"C{group}", linewidth=2.5)
axes.set_xticks(range(3), list(trained))
axes.set(ylabel="relative squared error", yscale="log")
axes.legend(fontsize=9)
plt.show()

# %% [markdown]
# With keys as in training the error falls from {glue:text}`local_training_softmax:.2f` to
# {glue:text}`local_training_parallax:.3f` by the probe, and to {glue:text}`local_training_local:.5f` by the solve.
# With stretched keys the probe has {glue:text}`local_stretched_parallax:.2f` where softmax attention has
# {glue:text}`local_stretched_softmax:.2f` and the solve {glue:text}`local_stretched_local:.5f`.
#
# This is a probe at its simplest. A trained layer makes $r_t$ from a token that has passed through other layers and may
# know more, and the paper trains language models with it. The experiment shows what the probe has to learn, and what
# local linear attention need not learn.
#
# ## What it cannot do
#
# Like all attention it keeps every pair. It has one more number to choose, $\lambda$, whose size is that of a squared
# distance between keys.
# Outside the keys it follows the last slope as far as one asks, where softmax attention stays among the values.
# That can be better or much worse.

# %%
k = torch.linspace(-1, 1, 200, dtype=torch.float64, device=device)[None, :, None]
far = k.new_tensor([[[2.0], [3.0]]])
design = local(1, ttr.Kernel(ttr.Gaussian(), 0.3))
line = ask(design, far, k, 2 * k, ridge=1e-9)[0, :, 0]
assert_close(line, 2 * far[0, :, 0], rtol=1e-5, atol=0)  # a line is continued
wave = ask(design, far, k, (3 * k).sin(), ridge=1e-9)[0, :, 0]
assert (wave < -1.5).all()  # and so is a wave, which never leaves [−1, 1]
assert ask(local(0, ttr.Kernel(ttr.Gaussian(), 0.3)), far, k, (3 * k).sin()).abs().max() <= 1

# %% [markdown]
# ## Limits
#
# Local linear attention stands between two older memories. Let the ridge grow, and the slope dies: softmax attention.
# Let the kernel widen, and all pairs count the same: least squares with an intercept.

# %%
for slug in ("local_linear_attention", "local_quadratic_attention", "parallax"):
    for limit in ttr.atlas[slug].limits():
        if limit.becomes.name == softmax_attention.name:
            print(f"{ttr.atlas[slug].name} is {limit}")

q, k, v = randn(2, 50, 2, 4), randn(2, 50, 2, 4), randn(2, 50, 2, 3)
stiff, _ = ttr.regress(local_linear_attention, q, k, v, ridge=k.new_full((2,), 1e12))
assert_close(stiff, ttr.regress(softmax_attention, q, k, v)[0], rtol=1e-10, atol=1e-10)

# The last answer, since a ridge of λ against weights that sum to one is a ridge of nλ against n pairs.
wide, _ = ttr.regress(local(1, ttr.Kernel(bandwidth=1e6)), q, k, v, ridge=k.new_full((2,), 0.1))
with_one = [torch.cat([torch.ones_like(x[..., :1]), x], dim=-1) for x in (q, k)]
penalties = k.new_tensor([1e-11] + [50 * 0.1] * 4).expand(2, 5)
regression, _ = ttr.regress(ttr.atlas["intention"], *with_one, v, ridge=penalties)
assert_close(wide[:, -1], regression[:, -1], rtol=1e-10, atol=1e-10)

# A line through affine data is exact at every query, wherever the keys are.
A = randn(4, 3)
y, _ = ttr.regress(local_linear_attention, q, k, k @ A + 1, ridge=k.new_full((2,), 1e-12))
assert_close(y[:, 10:], (q @ A + 1)[:, 10:], rtol=1e-5, atol=1e-5)

# %% [markdown]
# The second limit is the least-squares memory of {doc}`/notebooks/06_exact_least_squares`.
# {cite:t}`zuo2025local` call local linear attention an interpolation of the two for this reason.
#
# ## Exercises
#
# ```{exercise} Uneven keys
# :label: local-exercise-density
# Keys have the density $f(k) \propto e^{ak}$ on $[-1, 1]$. Values are $v = k$, and the query is in the middle.
# Predict the bias of softmax attention from the previous chapter's formula
# $h^2 (\tfrac12 m'' + m' f'/f)$, and that of local linear attention. Check both.
# ```
#
# ```{solution-start} local-exercise-density
# :class: dropdown
# ```
#
# $m' = 1$, $m'' = 0$ and $f'/f = a$, so the constant errs by $a h^2$. The line errs by nothing.
# Statisticians say that the line is *design-adaptive*: its bias does not contain the density.

# %%
a, width = 1.5, 0.15
even = torch.linspace(0, 1, 4001, dtype=torch.float64, device=device)
k = ((even * (math.exp(a) - math.exp(-a)) + math.exp(-a)).log() / a)[None, :, None]  # quantiles of the density
q = torch.zeros_like(k[:, :1])
constant = ask(local(0, ttr.Kernel(ttr.Gaussian(), width)), q, k, k)
line = ask(local(1, ttr.Kernel(ttr.Gaussian(), width)), q, k, k, ridge=1e-10)
assert_close(constant.item(), a * width**2, rtol=0.02, atol=0)
assert abs(line.item()) < 1e-6

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} The units of a ridge
# :label: local-exercise-units
# All keys and queries are multiplied by 3. What must happen to $h$ and $\lambda$ so that no answer changes?
# And what if a constant vector is added to all keys and queries?
# ```
#
# ```{solution-start} local-exercise-units
# :class: dropdown
# ```
#
# $q^\top k / h^2$ stays if $h$ is multiplied by 3. The covariance grows by 9, so $\lambda$ must, too.
# Under a common shift $c$ the covariance, $q - \mu$ and the Gaussian weights stay.
# The exponential weights change by $e^{c^\top k_i / h^2}$, so there the answers change.

# %%
q, k, v = randn(1, 40, 1, 4), randn(1, 40, 1, 4), randn(1, 40, 1, 2)
ridge, shift = k.new_full((1,), 0.05), randn(4)
y, _ = ttr.regress(local(1, ttr.Kernel()), q, k, v, ridge=ridge)
scaled, _ = ttr.regress(local(1, ttr.Kernel(bandwidth=3.0)), 3 * q, 3 * k, v, ridge=9 * ridge)
assert_close(scaled, y)
gaussian = local(1, ttr.Kernel(ttr.Gaussian()))
y, _ = ttr.regress(gaussian, q, k, v, ridge=ridge)
assert_close(ttr.regress(gaussian, q + shift, k + shift, v, ridge=ridge)[0], y)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Ask a little further out
# :label: local-exercise-twice
# Show that the derivative of softmax attention in its query is $\operatorname{Cov}(v, k)/h^2$.
# What does Parallax with probe $r$ have to do with softmax attention at the query $q + h^2 r$?
# If $\operatorname{Cov}(k, k) \approx h^2 I$, which query does local linear attention ask in this sense?
# ```
#
# ```{solution-start} local-exercise-twice
# :class: dropdown
# ```
#
# $\partial p_i / \partial q = p_i (k_i - \mu)/h^2$, so $\partial y/\partial q = \sum_i v_i\, p_i (k_i - \mu)^\top / h^2
# = \operatorname{Cov}(v, k)/h^2$.
# Parallax is the first-order expansion of softmax attention at $q + h^2 r$.
# With $u \approx (q - \mu)/h^2$ that query is $2q - \mu$: to move the mean key from $\mu$ to $q$, ask as far beyond
# $q$ as the mean fell short of it.

# %%
q, k, v, probe = unit(1, 40, 1, 4), unit(1, 40, 1, 4), randn(1, 40, 1, 2), unit(1, 40, 1, 4)
width = 0.6


def attend(q):
    return ttr.regress(local(0, ttr.Kernel(bandwidth=width)), q, k, v)[0]


by_probe, _ = ttr.regress(
    ttr.Design(ttr.Kernel(bandwidth=width), ttr.LocalPolynomial(1), ttr.Probe()), q, k, v, probe=probe
)
step = 1e-4 * width**2 * probe
derivative = (attend(q + step) - attend(q - step)) / 2e-4
assert_close(by_probe, attend(q) + derivative, rtol=1e-6, atol=1e-6)

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} How many neighbours does a parabola need?
# :label: local-exercise-quadratic
# How many pairs must a local quadratic fit see before it reproduces every quadratic function of $d$ variables?
# Check it by the first token at which it does.
# ```
#
# ```{solution-start} local-exercise-quadratic
# :class: dropdown
# ```
#
# There are $1 + d + d(d+1)/2 = (d+1)(d+2)/2$ coefficients, so that many pairs in general position are enough.
# A normal matrix has the square of this many entries, which puts degree two out of reach at $d = 64$.

# %%
d = 3
k, q = randn(1, 20, 1, d), randn(1, 20, 1, d)
A, b = randn(d, d), randn(d)


def quadratic(x):
    return (x @ A * x).sum(-1, keepdim=True) + (x @ b)[..., None] - 1


y, _ = ttr.regress(
    local(2, ttr.Kernel(bandwidth=3.0)), q, k, quadratic(k), ridge=torch.full((1,), 1e-11, dtype=k.dtype, device=device)
)
wrong = (y - quadratic(q)).abs().flatten() > 1e-4
needed = (d + 1) * (d + 2) // 2
assert not wrong[needed - 1 :].any()
assert wrong[: needed - 1].all()

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`cleveland1979robust` is the paper that made local lines popular, {cite:t}`fan1996local` the book, and
# {cite:t}`ruppert1994multivariate` the theory in many dimensions.
# {cite:t}`zuo2025local` made local linear regression an attention layer, with a blockwise algorithm and an analysis of
# its bias and variance; {cite:t}`zuo2026parallax` replaced the solve and trained language models.
# {cite:t}`wang2025testtime` have local polynomials of every degree as points of the framework.
# All of it can be tried by hand in the {doc}`/book/explorer`.
