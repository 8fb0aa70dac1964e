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
# # Adding a memory
#
# My memory is not a combination of what exists. How do I add it, and how do I know that it is right?
#
# From the smallest step to the largest: combine choices; write a choice that is a function; write a gain and use the
# op that takes any; add a choice to the package. This page walks through all four with one example, and has a list of
# checks, in code, that any memory of your own should pass.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from IPython.display import Markdown
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

import ttr
from ttr.book import record

sizes = {
    "smoke": {"streams": 20, "seeds": 3, "steps": 200},
    "full": {"streams": 100, "seeds": 10, "steps": 400},
}[scale]
generator = torch.Generator().manual_seed(15)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


# %% [markdown]
# ## First, combine
#
# A `ttr.Design` is one choice on each of five axes, and most combinations have no name and no code of their own.
# {doc}`/notebooks/14_make_your_own` is about them; {doc}`/notebooks/design_space` shows which are taken.
# If yours is one of them, there is nothing to add.
#
# ## A choice that is a function
#
# Losses, feature maps and similarities are functions, and the package calls whatever it is given.
# A loss of your own is a frozen dataclass. Here is that of Cauchy, for which an error far beyond $c$ pulls less the
# larger it is. (Huber's keeps pulling, {doc}`/notebooks/07_neural_memories`.)


# %%
@dataclass(frozen=True)
class Cauchy(ttr.Loss):
    """c²/2 log(1 + e²/c²), a channel at a time."""

    c: float = 1.0
    influence = r"\tfrac{%s}{1 + e^2/c^2}"

    def __call__(self, error):
        return self.c**2 / 2 * (error / self.c).square().log1p()


robust = ttr.Design(optimizer=ttr.GradientDescent(), loss=Cauchy(0.5))
assert robust.name is None
k, v = normalize(randn(1, 30, 2, 8), dim=-1), randn(1, 30, 2, 4)
with warnings.catch_warnings(record=True) as caught:
    y, _ = ttr.regress(robust, k, k, v, step_size=torch.ones_like(k[..., 0]))
print(caught[0].category.__name__, caught[0].message, sep=": ")
assert caught[0].category is ttr.SlowPathWarning
layer = ttr.layers.RegressionLayer(robust, d_model=16, num_heads=2).to(device)
assert layer(randn(1, 10, 16).float()).shape == (1, 10, 16)

# %% [markdown]
# It runs, trains and decodes. The warning says the price: it runs on its definition, one token after the other.
#
# ## A new gain
#
# A larger step: an online learner with another idea of what a small change is.
# One step of the delta rule at $\beta = 1$ changes the memory as little as it can, *in the Euclidean norm*, to store
# the newest pair ({doc}`/notebooks/04_delta_rule`). What about another norm?
#
# ```{prf:proposition} The smallest change in another norm
# :label: add-proposition-norm
# Let $k \ne 0$, $p > 1$ and $1/p + 1/q = 1$. Among all $S$ with $S^\top k = v$, the one whose every column is nearest to that of
# $\bar S$ in the $q$-norm is $S = \bar S + g\, e^\top$, with $e = v - \bar S^\top k$ and
#
# $$g = \frac{\lvert k \rvert^{p-1} \circ \operatorname{sgn} k}{\lVert k \rVert_p^p} .$$
# ```
#
# ```{prf:proof}
# $k^\top g = 1$, so the pair is stored. A column $\delta$ of any change that stores it has $\delta^\top k = e_j$, so
# $\lvert e_j \rvert \le \lVert \delta \rVert_q \lVert k \rVert_p$ by Hölder's inequality. For $\delta = g\, e_j$ this is
# an equality, as $(p - 1)\,q = p$ gives $\lVert g \rVert_q = \lVert k \rVert_p^{p-1} / \lVert k \rVert_p^p$.
# ```
#
# At $p = 2$ this is Kaczmarz' projection. $p \to 1$ writes along the signs of the key, large $p$ along its largest
# channel. It is a gain, so the fast algorithm exists already:


# %%
def p_norm_gain(k, step_size, p=1.5, epsilon=1e-6):
    size = k.abs()
    direction = size.clamp_min(torch.finfo(k.dtype).tiny).pow(p - 1) * k.sign()
    return direction * (step_size / (epsilon + size.pow(p).sum(-1)))[..., None]


def p_norm_rule(state, q, k, v, step_size):
    return ttr.ops.delta_rule(q, k, v, p_norm_gain(k, step_size), initial_state=state)


k, beta = randn(2, 40, 2, 8), randn(2, 40, 2).sigmoid()
assert_close(p_norm_gain(k, beta, p=2), ttr.ops.gains.nlms(k, beta))

# %% [markdown]
# Is it of any use? Fit a fixed map from keys whose channels have equal scales, and from keys whose channels do not.

# %%
target, keys = randn(sizes["streams"], 1, 32, 4), randn(sizes["streams"], 256, 1, 32)


def distance(k, p):
    """To the map, relative to its size, for each stream."""
    gain = p_norm_gain(k, torch.full_like(k[..., 0], 0.5), p)
    _, memory = ttr.ops.delta_rule(k, k, torch.einsum("sthk,shkv->sthv", k, target), gain)
    return (memory - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)


unequal = randn(sizes["streams"], 1, 1, 32).exp() * keys
assert distance(keys, 2.0).median() < distance(keys, 1.25).median()
nearer = (distance(unequal, 1.25) < distance(unequal, 2.0)).double().mean()
assert nearer > 0.8
record("add_nearer", nearer, atol=0.1)

# %% [markdown]
# With equal scales the Euclidean step comes nearer to the map. With log-normal scales a step with $p$ near one does, in
# a share of {glue:text}`add_nearer:.2f` of the streams: its entries $\lvert k\rvert^{p-1}$ hardly depend on a channel's scale.
#
# ## Is it right?
#
# What an op must pass, as one function. It takes your memory and its definition, written as differently as possible.


# %%
def near(found, exact, bound, what):
    distance = (found - exact).norm() / exact.norm().clamp_min(1e-30)
    assert distance <= bound, f"{what}: {distance:.1e}"  # NaN fails, too


def checklist(memory, definition, start, **inputs):
    """Hold memory(start, **inputs) → (y, state) to its definition, in float64."""
    T, names = inputs["q"].shape[1], ("start", *inputs)

    def derived(form, inputs):
        leaves = [x.detach().requires_grad_() for x in (start, *inputs.values())]
        y, state = form(leaves[0], **dict(zip(inputs, leaves[1:], strict=True)))
        total = y.square().sum() + state.square().sum()
        return y, state, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    of_both = derived(memory, inputs), derived(definition, inputs)
    for name, found, exact in zip(("y", "state", *names), *of_both, strict=True):
        near(found, exact, 1e-10, f"not its definition, or not its gradient: {name}")

    def by_place(start, *tensors):
        return memory(start, **dict(zip(inputs, tensors, strict=True)))

    short = [x.detach().requires_grad_() for x in (start[:1], *(x[:1, :5] for x in inputs.values()))]
    assert torch.autograd.gradcheck(by_place, short)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    for gradient in torch.autograd.grad(by_place(start, *leaves)[0][:, T // 2].sum(), leaves):
        assert (gradient[:, T // 2 + 1 :] == 0).all(), "the future matters"
    y, final = memory(start, **inputs)
    for at in (0, 1, T // 2, T):
        first, state = memory(start, **{name: x[:, :at] for name, x in inputs.items()})
        second, state = memory(state, **{name: x[:, at:] for name, x in inputs.items()})
        near(torch.cat([first, second], dim=1), y, 1e-10, f"split at {at}: answers")
        near(state, final, 1e-10, f"split at {at}: state")
    for found in derived(memory, inputs | {"k": torch.zeros_like(inputs["k"])}):
        assert found.isfinite().all(), "keys of zero"
    single = memory(start.float(), **{name: x.float() for name, x in inputs.items()})
    near(single[0].double(), y, 1e-5, "float32")


# %% [markdown]
# The definition of ours: differentiate the loss, and take the step of steepest descent that the $q$-norm has,
# $\arg\min_\Delta \langle \nabla, \Delta\rangle + \lVert\Delta\rVert_q^2 / 2\eta =
# -\eta\, \lVert\nabla\rVert_p^{2-p}\, \lvert\nabla\rvert^{p-1} \circ \operatorname{sgn} \nabla$ for each column.


# %%
def definition(S, q, k, v, step_size, p=1.5, epsilon=1e-6):
    def loss(S, key, value):
        return (value - torch.einsum("bhkv,bhk->bhv", S, key)).square().sum() / 2

    answers = []
    for t in range(q.shape[1]):
        gradient = torch.func.grad(loss)(S, k[:, t], v[:, t])
        size = k[:, t].norm(p, dim=-1)
        rate = step_size[:, t] * size ** (p - 2) / (epsilon + size**p)
        steepest = gradient.abs() ** (p - 1) * gradient.sign()
        scale = rate[..., None, None] * gradient.norm(p, dim=-2, keepdim=True) ** (2 - p)
        S = S - scale * steepest
        answers.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(answers, dim=1), S


pairs = (2, 40, 2)
inputs = {"q": randn(*pairs, 8), "k": randn(*pairs, 8), "v": randn(*pairs, 4), "step_size": beta}
start = randn(2, 2, 8, 4)
checklist(p_norm_rule, definition, start, **inputs)

# %% [markdown]
# Would the list notice a mistake? Three that are easily made: the root of a channel that is zero has no gradient; a
# scale taken over the whole sequence sees the future, in the definition as in the op; a state that is not handed on.


# %%
def rootless(state, q, k, v, step_size):
    size = step_size / (1e-6 + k.abs().pow(1.5).sum(-1))
    return ttr.ops.delta_rule(q, k, v, k.abs().pow(0.5) * k.sign() * size[..., None], initial_state=state)


def foresighted(form):
    def scaled(state, q, k, v, step_size):
        length = k.norm(dim=-1, keepdim=True).mean(1, keepdim=True)
        return form(state, q, k / length, v, step_size)

    return scaled


def forgetful(state, q, k, v, step_size):
    return p_norm_rule(torch.zeros_like(state), q, k, v, step_size)


mistakes = {
    "no gradient at zero": (rootless, definition),
    "a scale of the whole sequence": (foresighted(p_norm_rule), foresighted(definition)),
    "a state that is not handed on": (forgetful, definition),
}
for name, (wrong, meant) in mistakes.items():
    try:
        checklist(wrong, meant, start, **inputs)
    except AssertionError as fault:
        print(f"{name}: {fault}")
    else:
        raise AssertionError(f"{name}: passed")

# %% [markdown]
# ## As a layer
#
# A layer in a model of this package has one method, `extend`: a stretch of tokens and a cache in, answers and a cache
# out. With it the model trains and generates.


# %%
from ttr.tasks import recall_batch


class PNormLayer(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.projection = nn.Linear(d_model, 3 * d_model, bias=False)
        self.convolution = ttr.layers.ShortConvolution(3 * d_model, width=4)
        self.step_size = nn.Linear(d_model, num_heads)
        self.norm = nn.RMSNorm(d_model // num_heads, eps=1e-5)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.num_heads = num_heads

    def extend(self, x, cache=None):
        state, past = (cache.state.memory, cache.past["qkv"]) if cache else (None, None)
        z, past = self.convolution(self.projection(x), past)
        q, k, v = z.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        y, state = p_norm_rule(state, q, k, v, self.step_size(x).sigmoid())
        cache = ttr.layers.Cache(ttr.State(memory=state), {"qkv": past})
        return self.output(self.norm(y).flatten(2)), cache


def trained(seed):
    torch.manual_seed(seed)
    model = ttr.models.RegressionLM(64, d_model=64, num_layers=1, num_heads=2)
    model.backbone.blocks[0].mixer = PNormLayer(64, num_heads=2)
    model, draws = model.to(device), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(sizes["steps"] + 1):
        batch = recall_batch(draws, batch_size=32, vocab_size=64, length=24, num_pairs=4)
        tokens, targets = (x.to(device) for x in batch)
        logits, asked = model(tokens), targets >= 0
        optimizer.zero_grad()
        cross_entropy(logits[asked], targets[asked]).backward()
        optimizer.step()
    return model, (logits[asked].argmax(-1) == targets[asked]).float().mean().item()


models, accuracies = zip(*(trained(seed) for seed in range(sizes["seeds"])), strict=True)
assert min(accuracies) > 0.6  # a guess among the values of the sequence has one in four
record("add_recall_worst", min(accuracies), atol=0.15)

tokens = torch.arange(1, 13, device=device)[None]
model = models[0].eval()
logits, caches = model.extend(tokens[:, :5])
rest, _ = model.extend(tokens[:, 5:], caches)
assert_close(torch.cat([logits, rest], dim=1), model(tokens), rtol=1e-4, atol=1e-4)

# %% [markdown]
# After a few hundred steps on associative recall, the worst of the seeds answers {glue:text}`add_recall_worst:.2f` of
# the queries.
#
# ## As part of the package
#
# To make it a choice that combines with every decay and trains from a configuration, it takes a class, its meaning,
# and the way to its op. These are edits of six files; `git grep NLMS` shows the places. In the diff, the class and
# the lines of `oracle.py` are enough to run. The rest makes it fast.

# %% tags=["hide-input"]
CHOICE = '''@dataclass(frozen=True)
class PNorm(Gain):
    """The smallest step in the norm dual to p: g = β|k|^(p−1) sgn k / (ε + ‖k‖_p^p)."""

    p: float = 1.5
    epsilon: float = 1e-6

    cites = ("kaczmarz1937angenaherte",)
    formula = r"\\beta_t |k_t|^{p-1} \\operatorname{sgn} k_t / (\\varepsilon + \\lVert k_t\\rVert_p^p)"

    def __post_init__(self) -> None:
        self._require("p", 1 < self.p < float("inf"), "a number above 1")
        self._require_positive("epsilon")


'''
MEANING = """    if isinstance(gain, PNorm):
        # Steepest descent in the dual norm, a column at a time.
        length, norm = key.norm(gain.p, dim=-1).clamp_min(1e-30), scaled.norm(gain.p, dim=-2, keepdim=True)
        unit = scaled / norm.clamp_min(1e-30)
        rate = length ** (gain.p - 2) / (gain.epsilon + length**gain.p)
        return rate[..., None, None] * norm * unit.abs().pow(gain.p - 1) * unit.sign()
"""
FAST = """    elif isinstance(optimizer.gain, PNorm):
        gain = ops.gains.p_norm(k, step_size, optimizer.gain.p, optimizer.gain.epsilon)
"""
OP = '''def p_norm(k: Keys, step_size: StepSize, p: float = 1.5, epsilon: float = 1e-6) -> Keys:
    r"""The smallest step in the norm dual to p: :math:`g_t = \\beta_t |k_t|^{p-1} \\operatorname{sgn} k_t / \\lVert k_t\\rVert_p^p`."""
    _check(k, step_size)
    size = k.abs()
    direction = size.clamp_min(torch.finfo(k.dtype).tiny).pow(p - 1) * k.sign()
    return direction * (step_size / (epsilon + size.pow(p).sum(-1))).unsqueeze(-1)


'''
before = lambda text, new: (text, new + text)  # noqa: E731
RUNS = {
    "_choices/optimizers.py": [before("@dataclass(frozen=True)\nclass GradientDescent", CHOICE)],
    "_choices/__init__.py": [before("    Probe,\n)", "    PNorm,\n"), before('    "Probe",\n', '    "PNorm",\n')],
    "__init__.py": [
        before("    PositiveRandom,\n", "    PNorm,\n"),
        before('    "PositiveRandom",\n', '    "PNorm",\n'),
    ],
    "oracle.py": [before("    Probe,\n", "    PNorm,\n"), before("    if isinstance(gain, LMS):\n", MEANING)],
}
FAST_TOO = {
    "ops/gains.py": [before("def implicit(", OP)],
    "_lowerings.py": [
        before("    SquaredError,\n    Window,\n", "    PNorm,\n"),
        ("(LMS, NLMS, Implicit, DiagonalNewton)", "(LMS, NLMS, Implicit, DiagonalNewton, PNorm)"),
        before("    elif isinstance(optimizer.gain, Implicit):\n", FAST),
    ],
}


def edited(text, changes):
    for old, new in changes:
        assert text.count(old) == 1, f"the package has changed: {old!r}"
        text = text.replace(old, new)
    return text


package, lines = Path(ttr.__file__).parent, []
for name, changes in (RUNS | FAST_TOO).items():
    old = (package / name).read_text()
    new = edited(old, changes)
    lines += difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/ttr/{name}", f"b/ttr/{name}", n=1)
Markdown(f"```diff\n{''.join(lines)}```")

# %% [markdown]
# Both stages, applied to a copy of the package: the choice runs on its definition with a warning, then on the op with
# the same numbers and without one. The decay and the layer come with it.

# %%
TRIAL = """
import json, warnings, torch, ttr
generator = torch.Generator().manual_seed(0)
design = ttr.Design(ttr.Decay(), optimizer=ttr.GradientDescent(ttr.PNorm(1.5)))
q, k, v = torch.randn(3, 2, 20, 2, 8, generator=generator, dtype=torch.float64)
inputs = {"log_decay": -k[..., 0].square(), "step_size": v[..., 0].sigmoid()}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y, state = ttr.regress(design, q, k, v, **inputs)
exact, _ = ttr.oracle.regress(design, q, k, v, **inputs)
layer = ttr.layers.RegressionLayer(design, d_model=16, num_heads=2)
layer(torch.randn(1, 9, 16, generator=generator)).sum().backward()
print(json.dumps({
    "slow": any(issubclass(w.category, ttr.SlowPathWarning) for w in caught),
    "error": ((y - exact).norm() / exact.norm()).item(),
    "formula": "p-1" in design.update_rule(),
    "trains": all(p.grad.isfinite().all().item() for p in layer.parameters()),
    "name": design.name,
}))
"""


def with_edits(edits):
    """What the trial prints with these edits of a copy of the package."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder, "ttr"), ignore=shutil.ignore_patterns("__pycache__"))
        for name, changes in edits.items():
            path = Path(folder, "ttr", name)
            path.write_text(edited(path.read_text(), changes))
        environment = os.environ | {"PYTHONPATH": folder}
        command = [sys.executable, "-c", TRIAL]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


for edits, slow in ((RUNS, True), (RUNS | FAST_TOO, False)):
    found = with_edits(edits)
    assert found.pop("error") < 1e-10
    assert found == {"slow": slow, "formula": True, "trains": True, "name": None}

# %% [markdown]
# The name is `None`, for nobody has published this point; a row of `ttr/_atlas.py` is for what somebody has, with an
# entry in `ttr/references.bib`. What is left before it can be merged is in `CONTRIBUTING.md`:
#
# - `tests/ops` and `tests/test_regress.py`: the checks above with random splits, shapes and decays;
# - `ttr/_limits.py`: a row for each limit, here $p = 2$, which is `NLMS()`; limits are tests and lines in the book;
# - `ttr/layers/regression.py`, where a gain that measures its own step says so;
# - golden numbers of the pages that count designs: `python book/execute.py design_space --update-golden`;
# - a kernel only if the op is new. This one is the delta rule's, so it runs on a GPU already.
#
# ```{exercise} Two pairs at once
# :label: add-exercise-projection
# The *affine projection* of adaptive filtering stores the newest pair and leaves the one before it stored:
# $g_t = \beta k^\perp / \lVert k^\perp \rVert^2$, with $k^\perp$ the part of $k_t$ orthogonal to $k_{t-1}$.
# It needs the last key beside the memory. Write it and check that both pairs are recalled.
# Which line of the checklist would catch a version without the last key in its state?
# ```
#
# ```{solution-start} add-exercise-projection
# :class: dropdown
# ```
#
# $k_t^\top g_t = \beta$ and $k_{t-1}^\top g_t = 0$, so the write does not reach the pair before. Without the last key in
# the state a sequence and its pieces differ: the split.

# %%


def projection_gain(k, last):
    before = torch.cat([last, k[:, :-1]], dim=1)
    share = (k * before).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True).clamp_min(1e-12)
    apart = k - share * before
    return apart / (1e-12 + apart.square().sum(-1, keepdim=True))


k, v, last = inputs["k"], inputs["v"], torch.zeros_like(inputs["k"][:, :1])
gain = projection_gain(k, last)
assert_close(ttr.ops.delta_rule(k, k, v, gain)[0], v)  # the newest pair
earlier = ttr.ops.delta_rule(torch.cat([last, k[:, :-1]], dim=1), k, v, gain)[0]
assert_close(earlier[:, 1:], v[:, :-1])  # and the one before
assert not torch.allclose(projection_gain(k[:, 20:], last), gain[:, 20:])
assert_close(projection_gain(k[:, 20:], k[:, 19:20]), gain[:, 20:])

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`haykin2002adaptive` is a catalogue of gains, most of which no sequence layer has tried.
# {cite:t}`behrouz2025miras` go the same way with losses and retentions, and {cite:t}`wang2025testtime` is the
# framework that all of these are choices in.
