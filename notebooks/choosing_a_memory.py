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
# # Choosing a memory
#
# Which memory should I use?
#
# Ask these questions in their order and stop at the first yes. An answer is a design of the atlas, with its operations and
# its state for one head over $T$ tokens of $d$ channels ($C$ is a chunk, $n$ the steps of a solver), and what it cannot do.
# Further down each answer is checked, in the record of {doc}`/notebooks/study` or in a small experiment that runs here.
#
# 1. **Must any pair of the context come back, however many there are?** `qk_norm_attention`, {doc}`/notebooks/08_softmax_attention`.
#    Operations {glue:text}`choose_flops_qk_norm_attention`, state {glue:text}`choose_state_qk_norm_attention`. But the state grows with the text.
# 2. **Is a curved function of the key to be learned in context?** `local_linear_attention`, {doc}`/notebooks/09_higher_order_attention`.
#    Operations {glue:text}`choose_flops_local_linear_attention`, state {glue:text}`choose_state_local_linear_attention`. But it needs a bandwidth, and pairs near every query.
# 3. **Is it a linear function, from few examples with noise?** `recursive_least_squares`, {doc}`/notebooks/06_exact_least_squares`.
#    Operations {glue:text}`choose_flops_recursive_least_squares`, state {glue:text}`choose_state_recursive_least_squares`. But old regimes count for ever unless the weights decay.
# 4. **Does the answer depend on the order of events, as the state of a machine does?** `delta_product`, {doc}`/notebooks/04_delta_rule`.
#    Operations {glue:text}`choose_flops_delta_product`, state {glue:text}`choose_state_delta_product`. But only with `max_step_size=2`, and two steps a token cost twice as much as one.
# 5. **Are some values wrong by far?** `yaad`, or a linear map with `ttr.Huber()`, {doc}`/notebooks/07_neural_memories`.
#    Operations {glue:text}`choose_flops_yaad`, state {glue:text}`choose_state_yaad`. But the threshold must suit the noise, and it is exact only one token at a time.
# 6. **Does what was stored become false later?** `gated_delta_net`, {doc}`/notebooks/04_delta_rule`.
#    Operations {glue:text}`choose_flops_gated_delta_net`, state {glue:text}`choose_state_gated_delta_net`. But old pairs are lost by overwriting, wanted or not.
# 7. **None of these, and every operation counts?** `mamba2`, {doc}`/notebooks/03_state_space_models`.
#    Operations {glue:text}`choose_flops_mamba2`, state {glue:text}`choose_state_mamba2`. But it adds and fades, and never sees its own errors.
# 8. **Several at once?** A list, one design a layer, such as `["gated_delta_net", "qk_norm_attention"]`,
#    {doc}`/notebooks/12_language_modelling`. Costs add up. But one layer of attention is enough for a state that grows with the text.

# %% tags=["parameters", "remove-cell"]
scale = "smoke"
device = "cpu"

# %% tags=["remove-cell"]
import sys
from pathlib import Path

import torch
from IPython.display import Markdown
from torch.nn.functional import normalize

sys.path.insert(0, "..")  # the records are beside the package, not in it
import ttr
from benchmarks import studies
from ttr.book import record

seeds = {"smoke": 16, "full": 64}[scale]
generator = torch.Generator().manual_seed(21)
configuration = Path("../configs/study.yaml")
made = studies.load(configuration)
slugs = [
    *("qk_norm_attention", "local_linear_attention", "recursive_least_squares", "delta_product"),
    *("yaad", "gated_delta_net", "mamba2"),
]
for slug in slugs:
    for name, text in ttr.atlas[slug].cost().as_text().items():
        if name != "memory":
            record(f"choose_{name}_{slug}", text)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def studied(metric, task):
    """What every design reached on a task of the study."""
    return {row["design"]: row[metric] for row in made["rows"] if row["task"] == task}


# %% tags=["remove-input"]
Markdown(f"The study: {studies.sentence(made, configuration)}")

# %% [markdown]
# ## Does every pair have to come back?
#
# A linear memory whose keys have $K$ channels holds about $K$ pairs. Attention keeps them all. In the study, keys have four
# channels, and eight pairs are asked for:

# %%
recall = studied("test_accuracy", "recall_8")
lists = {slug for slug, design in ttr.atlas.items() if {"T", "w"} & set(design.cost().as_text()["state"])}
assert "qk_norm_attention" in lists  # they keep the pairs themselves, all or (w) those in a window as long as the task
assert all(recall[slug] > 0.95 for slug in lists)
own_features = ("based", "performer")  # their maps make many more features of four channels
fixed = {slug: reached for slug, reached in recall.items() if slug not in {*lists, *own_features}}
assert max(fixed.values()) < 0.7
assert all(recall[slug] > 0.9 for slug in own_features)

# %% [markdown]
# More features buy more pairs: `based` and `performer` recall nearly all of them with a state of fixed size.
#
# ## Is there a function to learn?
#
# A lookup returns values that were stored; a regression predicts at keys that were not. For a linear function, exact
# least squares is the estimator to beat, and in the study nobody does:

# %%
error = studied("test_loss", "in_context_regression")
exact = error["recursive_least_squares"]
assert exact <= min(error.values()) + 1e-3
assert exact < 0.2 * min(error["delta_net"], error["gated_delta_net"], error["softmax_attention"])

# %% [markdown]
# For a curved one a single linear map is wrong everywhere. A fit near the query follows the curve, and a line does so
# with less bias than a constant. Two-dimensional keys, a wave, and noise:

# %%
x, queries = 2 * torch.rand(2, seeds, 256, 1, 2, generator=generator, dtype=torch.float64).to(device) - 1


def wave(x):
    return (2.5 * x[..., :1]).sin() + x[..., 1:] ** 2


y = wave(x) + 0.05 * randn(seeds, 256, 1, 1)
near = ttr.Kernel(ttr.Gaussian(), bandwidth=0.2)
fits = {
    "least squares": (ttr.Design(optimizer=ttr.Exact()), torch.full((1, 2), 1e-2)),
    "a constant near the query": (ttr.Design(near, ttr.LocalPolynomial(0), ttr.Exact()), None),
    "a line near the query": (ttr.Design(near, ttr.LocalPolynomial(1), ttr.Exact()), torch.full((1,), 1e-3)),
}
curved = {}
for name, (design, ridge) in fits.items():
    inputs = {} if ridge is None else {"ridge": ridge.to(x)}
    answers, _ = ttr.regress(design, queries, x, y, **inputs)
    curved[name] = (answers - wave(queries))[:, 128:].square().mean((1, 2, 3))
linear, constant, line = curved.values()
assert (line < constant).all()
assert (constant < linear).all()
record("choose_curved_constant", (constant.sqrt()).median(), rtol=0.05)
record("choose_curved_line", (line.sqrt()).median(), rtol=0.05)

# %% [markdown]
# The root of the mean squared error is {glue:text}`choose_curved_line:.2f` for the line and
# {glue:text}`choose_curved_constant:.2f` for the constant, the kind of fit that softmax attention makes.
#
# ## Does the order of events matter?
#
# Parity and the permutations of three things ($S_3$) need a state that is turned and not only faded:

# %%
parity, permutations = studied("test_accuracy", "parity"), studied("test_accuracy", "s3")
assert parity["delta_product"] > 0.95
assert permutations["delta_product"] > 0.95
assert all(max(parity[slug], permutations[slug]) < 0.7 for slug in ("mamba2", "gla", "softmax_attention", "retnet"))

# %% [markdown]
# Those were trained with steps up to two. The $S_3$ of the study is a stream of swaps, for which one step a token can do,
# and gated DeltaNet follows it there. For all elements of $S_3$ it takes two steps a token, as {doc}`/notebooks/study` shows.
#
# ## Are some values wrong?
#
# One value in twenty is ten times too large. The squared error follows it, the Huber loss does not:

# %%
steps, d = 400, 16
target = randn(seeds, 1, d, 4)
k = normalize(randn(seeds, steps, 1, d), dim=-1)
v = torch.einsum("sthk,shkv->sthv", k, target) + 0.02 * randn(seeds, steps, 1, 4)
wrong = torch.rand(seeds, steps, 1, 1, generator=generator).to(device) < 0.05
beta = torch.full_like(k[..., 0], 0.5)
robust = ttr.Design(optimizer=ttr.GradientDescent(), loss=ttr.Huber(delta=0.1))
distance = {}
for name, design in {"squared": ttr.atlas["delta_net"], "huber": robust}.items():
    _, state = ttr.regress(design, k, k, torch.where(wrong, 10 * v, v), step_size=beta)
    distance[name] = ((state.memory - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)).median()
assert distance["huber"] < distance["squared"] / 3

# %% [markdown]
# ## Does the world change?
#
# The linear map is another one in every stretch of 128 tokens, and the memory is asked before it is told. Exact least
# squares averages over all maps it has seen. With a decay it forgets, and is the best of these; the delta rule forgets
# by overwriting, with fewer operations.

# %%
stretches, length = 6, 128
maps = randn(seeds, stretches, 1, d, 4).repeat_interleave(length, dim=1)
k = normalize(randn(seeds, stretches * length, 1, d), dim=-1)
v = torch.einsum("sthk,sthkv->sthv", k, maps) + 0.05 * randn(seeds, stretches * length, 1, 4)
ridge, decay = torch.full((1, d), 0.01).to(k), torch.full_like(k[..., 0], 0.9).log()
memories = {
    "exact": (ttr.atlas["recursive_least_squares"], {"ridge": ridge}),
    "exact_decay": (ttr.Design(ttr.Decay(), optimizer=ttr.Exact()), {"ridge": ridge, "log_decay": decay}),
    "delta": (ttr.atlas["gated_delta_net"], {"log_decay": decay * 0, "step_size": torch.ones_like(decay)}),
    "fading_sum": (ttr.Design(ttr.Decay()), {"log_decay": decay}),
}
missed = {}
for name, (design, inputs) in memories.items():
    asked = torch.cat([k[:, 1:], k[:, :1]], dim=1)
    answers, _ = ttr.regress(design, asked, k, v, **inputs)
    error = (answers[:, :-1] - v[:, 1:])[:, length:].square().mean((1, 2, 3))
    missed[name] = error / v[:, length:].square().mean((1, 2, 3))
    record(f"choose_switch_{name}", missed[name].median(), rtol=0.05)
assert (missed["exact_decay"] < missed["exact"]).all()
assert missed["exact_decay"].median() < min(missed[name].median() for name in ("delta", "fading_sum"))
assert (missed["delta"] < missed["exact"]).all()
assert (missed["delta"] < missed["fading_sum"]).all()

# %% [markdown]
# Shares of the variance missed, the median over seeds: least squares {glue:text}`choose_switch_exact:.2f`, with a decay
# {glue:text}`choose_switch_exact_decay:.2f`, the delta rule {glue:text}`choose_switch_delta:.2f`, a fading sum
# {glue:text}`choose_switch_fading_sum:.2f`.
#
# ## What does an operation buy?
#
# The cheapest of these memories, at the sizes of a usual head, and what the others pay over it:

# %%
sizes = {"T": 4096, "d": 128, "f": 128, "C": 64, "n": 10, "w": 256}
flops = {slug: ttr.atlas[slug].cost().at(**sizes)[0] for slug in slugs}
assert min(flops, key=flops.get) == "mamba2"
for slug, operations in sorted(flops.items(), key=lambda pair: pair[1]):
    print(f"{slug:25} {operations / flops['mamba2']:7.1f}")

# %% [markdown]
# Counts of operations are not times: {doc}`/notebooks/speed` has those. And a design that is trained inside a model may
# find another way than the one it was chosen for. Where two answers fit, train both: `ttr fit` takes either name.
