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
# # Language modelling on real text
#
# What do these memories do on real text?
#
# They recall. Most of what a short context tells about the next byte can be counted once for all texts, in a table.
# What the table cannot know is this text: the names it uses, the phrases it repeats.
# That part has to be stored while reading, and there the memories differ.
#
# The chapter reads the sources of Python's standard library, one byte at a time. It computes what counting alone
# achieves, finds the bytes that only the context can tell, asks untrained memories for them, and then trains small
# models on top of the counts. At the end a model writes, with a state that does not grow.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import math
import warnings
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize, one_hot
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
sizes = {
    "smoke": {
        "data": {"length": 256, "batch_size": 4, "num_train": 400, "num_val": 1},
        "windows": {"length": 1024, "batch_size": 8, "num_train": 1, "num_val": 6},
        "model": {"d_model": 64, "num_layers": 1, "num_heads": 1},
        "plain": {"d_model": 96, "num_layers": 1, "num_heads": 2},
        "recall": {"windows": 16, "length": 512, "sizes": [16, 32, 64, 128, 256], "draws": 3},
        "seeds": 2,
        "margin": 0.25,  # in bits a byte: how clear a lead must be
    },
    "full": {
        "data": {"length": 1024, "batch_size": 16, "num_train": 2000, "num_val": 1},
        "windows": {"length": 4096, "batch_size": 8, "num_train": 1, "num_val": 6},
        "model": {"d_model": 256, "num_layers": 1, "num_heads": 1},
        "plain": {"d_model": 256, "num_layers": 4, "num_heads": 4},
        "recall": {"windows": 32, "length": 2048, "sizes": [16, 32, 64, 128, 256, 512], "draws": 5},
        "seeds": 3,
        "margin": 0.0,
    },
}[scale]
train_length, memory_span = sizes["data"]["length"], 6  # how many bytes make a context that can come again

# %% [markdown]
# ## Bits a byte
#
# A language model gives the next byte $x_{t+1}$ a probability $p(x_{t+1} \mid x_1 \dots x_t)$.
# Training lowers the mean of $-\ln p$, the cross-entropy, in nats. An arithmetic coder that uses the model writes a text
# of $n$ bytes in less than
#
# ```{math}
# :label: lm-eq-bits
# 2 - \sum_{t=0}^{n-1} \log_2 p(x_{t+1} \mid x_1 \dots x_t)
# \quad\text{bits}, \qquad
# \text{bits a byte} = \frac{1}{n \ln 2} \sum_{t=0}^{n-1} -\ln p(x_{t+1} \mid x_1 \dots x_t) .
# ```
#
# So the loss divided by $\ln 2$ is the length of the compressed text, a byte. Knowing nothing costs
# $\log_2 256 = 8$ bits a byte. {cite:t}`shannon1951prediction` asked the same of people who guessed English letters.
# Models that cut the text into different tokens can still be compared by it, which is why we count bits a *byte*.
#
# The text is split by file: nothing that we validate on was trained on. We take windows, evenly spread over the
# validation files, that are longer than the windows of the training.


# %%
from ttr.tasks import StandardLibraryText


def bits(logits, tokens):
    """−log₂ p of every next byte: (batch, time), from logits (batch, time, 256)."""
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none") / math.log(2)


text = StandardLibraryText(**sizes["data"])
long_text = StandardLibraryText(**sizes["windows"])
drawn = (long_text.draw("val", index) for index in range(long_text.num_val))
windows = torch.cat([torch.cat([x, y[:, -1:]], dim=1) for x, y in drawn]).to(device)
stream = text.streams["train"].to(device).long()

uniform = bits(torch.zeros(*windows[:, 1:].shape, 256, device=device), windows)
assert_close(uniform, torch.full_like(uniform, 8.0))

# %% [markdown]
# ## Counting is regression
#
# The oldest language models count. An $n$-gram model looks at the last $n - 1$ bytes, the context $c$, and answers with
# the shares of the bytes that followed $c$ in the training text. Most long contexts are rare, so the shares are smoothed
# towards those of the shorter context:
#
# ```{math}
# :label: lm-eq-smoothed
# p(x \mid c) = \frac{N(c, x) + \lambda\, p_0(x \mid c)}{N(c) + \lambda} ,
# ```
#
# with $N$ the counts and $p_0$ the model of order $n - 1$. This is the predictive distribution of a Dirichlet prior
# {cite:p}`mackay1995hierarchical`. It is also a memory of this book: exact least squares, with a key for every context.
#
# ```{prf:proposition} An n-gram table is ridge regression on exact keys
# :label: lm-proposition-counts
# Let the key of a pair be the one-hot vector $\phi(c_i)$ of its context, its value the one-hot vector $v_i$ of the byte
# that follows, and let row $c$ of $S_0$ be $p_0(\cdot \mid c)$. The minimiser of
#
# $$
# \tfrac12 \sum_i \lVert v_i - S^\top \phi(c_i) \rVert^2 + \tfrac\lambda2\, \lVert S - S_0 \rVert_F^2
# $$
#
# has the rows $p(\cdot \mid c)$ of {eq}`lm-eq-smoothed`.
# ```
#
# ```{prf:proof}
# The gradient vanishes where $(G + \lambda I)\, S = C + \lambda S_0$, with $G = \sum_i \phi(c_i)\phi(c_i)^\top$ and
# $C = \sum_i \phi(c_i) v_i^\top$. One-hot keys make $G$ diagonal with entries $N(c)$, and row $c$ of $C$ holds the
# counts $N(c, x)$. Divide row by row.
# ```
#
# Here $G$ is diagonal because different contexts have orthogonal keys: nothing interferes, and the price is one row for
# each context. In ten lines, for contexts of one byte that are stored while a text is read:


# %%
def counting_memory(tokens, prior, ridge):
    """After each byte, the shares of what has followed it so far in this text: (time, 256)."""
    counts, answers = torch.zeros_like(prior), []
    for before, now in pairwise(tokens.tolist()):
        counts[before, now] += 1
        row = counts[now]
        answers.append((row + ridge * prior[now]) / (row.sum() + ridge))
    return torch.stack(answers)


start = windows[0, :300]
chance = torch.Generator().manual_seed(12)
prior = torch.rand(256, 256, generator=chance, dtype=torch.float64).to(device)
prior = prior / prior.sum(1, keepdim=True)
counted = counting_memory(start, prior, ridge=0.5)

hot = one_hot(start, 256).double()[None, :, None]
before, now = hot[:, :-1], hot[:, 1:]
least_squares = ttr.atlas["recursive_least_squares"]
ridge = torch.full((1, 256), 0.5, dtype=torch.float64, device=device)
y, _ = ttr.regress(least_squares, now, before, now - before @ prior, ridge=ridge)
assert_close(prior[start[1:]] + y[0, :, 0], counted)

# %% [markdown]
# The memory stores the pair (byte before, byte now) and is asked for the byte now. That is one tap of a shift on the
# keys, the subject of {doc}`/notebooks/10_keys_and_values`.
#
# For the training text the same table is made at once. Single bytes, contexts of one byte, contexts of two:

# %%
STRENGTH = 5.0  # λ, in counts


def smoothed(counts, prior, strength=STRENGTH):
    return (counts + strength * prior) / (counts.sum(-1, keepdim=True) + strength)


def counts_of(*followed):
    """How often each combination of bytes occurs at these places one after the other."""
    index = sum(x * 256**place for place, x in enumerate(reversed(followed)))
    return torch.bincount(index, minlength=256 ** len(followed)).view(-1, 256).float()


single = smoothed(counts_of(stream), 1 / 256)
double = smoothed(counts_of(stream[:-1], stream[1:]), single)
triple = smoothed(counts_of(stream[:-2], stream[1:-1], stream[2:]), double.repeat(256, 1)).log_()


def count_logits(tokens):
    """log p of every next byte from the last two: (batch, time, 256)."""
    first = double[tokens[:, :1]].log()
    return torch.cat([first, triple[256 * tokens[:, :-1] + tokens[:, 1:]]], dim=1)


seen = windows[:, :-1]
tables = {
    "single bytes": bits(single.log().expand(*seen.shape, 256), windows),
    "one byte of context": bits(double[seen].log(), windows),
    "two bytes of context": bits(count_logits(seen), windows),
}
counts = tables["two bytes of context"]
for name, table in zip(("unigram", "bigram", "trigram"), tables.values(), strict=True):
    record(f"lm_{name}", table.mean(), rtol=1e-2, corpus=text.digest)
means = [table.mean() for table in (uniform, *tables.values())]
assert all(longer < shorter - 0.5 for shorter, longer in pairwise(means))

# %% [markdown]
# From 8 bits a byte, single bytes get to {glue:text}`lm_unigram:.2f`, one byte of context to {glue:text}`lm_bigram:.2f`,
# two to {glue:text}`lm_trigram:.2f`. No network was trained. One pass over the training text made the tables, and they
# are hard to beat for a small network: remember the last number.
#
# ## What the table cannot know
#
# The tables are the same for every file. But a file repeats *itself*.
# Call a byte a **repeat** if the context of the last $k$ bytes has occurred before in the window, and this byte
# followed it then. {cite:t}`arora2023zoology` made this split for words, as the places where a language model can recall,
# and found there most of the gap between attention and the gated convolutions of its time.
# They count only pairs that are rare in the training text, since a frequent one can be known without looking back.
# We keep both kinds of repeats, apart:
# those whose $k + 1$ bytes stand somewhere in the training text, and those that do not. Of the second kind a model can
# know only what the window tells.

# %%


def grams(tokens, size):
    """A number for every `size` bytes in a row; size is at most 7, so that it fits."""
    count = tokens.shape[-1] - size + 1
    return sum(tokens[..., place : place + count] * 256**place for place in range(size))


def repeats(tokens, size):
    """Of each next byte: has its context been seen in the window, and has the byte followed it there?"""
    contexts, following = grams(tokens, size)[:, :-1], tokens[:, size:]
    masks = []
    for context, byte in zip(contexts, following, strict=True):
        earlier = (context[:, None] == context).tril(-1)
        masks.append(torch.stack([earlier.any(1), (earlier & (byte[:, None] == byte)).any(1)]))
    return F.pad(torch.stack(masks, dim=1), (size - 1, 0))


context_seen, repeated = repeats(windows, memory_span)
known = F.pad(torch.isin(grams(windows, memory_span + 1), grams(stream, memory_span + 1)), (memory_span - 1, 0))
kinds = {
    "repeats, not in\nthe training text": repeated & ~known,
    "repeats, also in\nthe training text": repeated & known,
    "all other bytes": ~repeated,
}
own, common, other = kinds.values()
assert (context_seen >= repeated).all()
assert (own | common | other).all()

record("lm_share_repeats", repeated.float().mean(), rtol=1e-2, corpus=text.digest)
record("lm_share_own", own.float().mean(), rtol=2e-2, corpus=text.digest)
record("lm_right", (repeated.sum() / context_seen.sum()), rtol=1e-2, corpus=text.digest)
record("lm_trigram_own", counts[own].mean(), rtol=1e-2, corpus=text.digest)
record("lm_trigram_common", counts[common].mean(), rtol=1e-2, corpus=text.digest)
record("lm_trigram_other", counts[other].mean(), rtol=1e-2, corpus=text.digest)
assert repeated.float().mean() > 0.2
assert counts[own].mean() > counts[common].mean() + 0.3

# %% [markdown]
# With $k = 6$, a share of {glue:text}`lm_share_repeats:.2f` of all bytes are repeats, and
# {glue:text}`lm_share_own:.2f` of all bytes are repeats of something that the training text has nowhere.
# When a context comes back, the share of times that one of its old followers comes back too is
# {glue:text}`lm_right:.2f`.
# The table pays {glue:text}`lm_trigram_own:.2f` bits for a repeat that the training text lacks. A memory whose
# keys are the last six bytes could save much of that.
#
# How often is there something to recall? It depends on how far back one can look.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Share of bytes that repeat the window itself, against their position in it: means over all windows, with the standard error over windows as a band. The further into the window, the more bytes repeat it, and some of these repeats are nowhere in the training text.", "name": "lm-fig-repeats"}, "image": {"alt": "Two rising curves against the position in the window on a logarithmic axis: the share of all repeats, and below it the share of repeats that are not in the training text."}}
edges = [2**power for power in range(4, int(math.log2(long_text.length)) + 1)]
middles = [(low * high) ** 0.5 for low, high in pairwise(edges)]
figure, axes = plt.subplots(figsize=(7, 3.4))
for name, mask, marker in (("all repeats", repeated, "o"), ("not in the training text", own, "s")):
    shares = torch.stack([mask[:, low:high].float().mean(1) for low, high in pairwise(edges)], dim=1).cpu()
    mean, error = shares.mean(0), shares.std(0) / len(shares) ** 0.5
    (line,) = axes.plot(middles, mean, marker=marker, label=name)
    axes.fill_between(middles, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
axes.set(xlabel="position in the window, bytes", ylabel="share of bytes", xscale="log", ylim=(0, None))
axes.set_xticks(edges, [str(edge) for edge in edges])
axes.minorticks_off()
axes.legend()
plt.show()

# %%
late, early = repeated[:, train_length:].float().mean(), repeated[:, : train_length // 4].float().mean()
assert late > early + 0.1

# %% [markdown]
# ## Untrained memories on real text
#
# Before we train anything: could a memory of fixed size hold a window of real text at all?
# Give every context of $k$ bytes a random unit key of $d$ channels, and store the one-hot vector of the byte that
# followed. When the context returns, does the memory's largest entry name the right byte?
# {doc}`/notebooks/01_associative_recall` asks this of random pairs. Text is kinder, because the same pair is
# stored again and again, and harsher, because the queries are not spread evenly.
#
# The keys can be made in two ways. **One a context**: contexts that differ in a single byte have nothing in common.
# **Added**: each of the $k$ places has a table of random vectors, a vector a byte, and the key is their sum, brought to
# unit length. A short convolution without a nonlinearity makes keys of this kind. Contexts that share most of their bytes,
# such as any that end in spaces, then have keys that overlap.
# In {doc}`/notebooks/02_linear_attention` correlated keys are what breaks a sum and leaves least squares whole.
#
# A handful of draws of the keys, and the text as it is:

# %%
recall = sizes["recall"]
excerpts = windows[: recall["windows"], : recall["length"] + 1]
_, asked = repeats(excerpts, memory_span)
contexts = excerpts.unfold(1, memory_span, 1)[:, :-1]
_, identity = contexts.flatten(0, 1).unique(dim=0, return_inverse=True)
identity = identity.view(contexts.shape[:2])
following = excerpts[:, memory_span:]
asked = asked[:, memory_span - 1 :][:, 1:]


def keys_of(kind, d, seed):
    chance = torch.Generator().manual_seed(seed)
    if kind == "one key a context":
        keys = torch.randn(int(identity.max()) + 1, d, generator=chance).to(device)[identity]
    else:
        table = torch.randn(memory_span, 256, d, generator=chance).to(device)
        keys = sum(table[place][contexts[..., place]] for place in range(memory_span))
    return normalize(keys, dim=-1).unsqueeze(2)


def recalled(design, keys, **inputs):
    """The share of repeats whose byte is the largest entry of the answer; each pair is stored one byte late."""
    values = one_hot(following[:, :-1], 256).float().unsqueeze(2)
    y, _ = ttr.regress(design, keys[:, 1:], keys[:, :-1], values, **inputs)
    return (y.squeeze(2).argmax(-1) == following[:, 1:])[asked].float().mean().item()


accuracy = {}
for kind in ("one key a context", "keys added up from bytes"):
    for d in recall["sizes"]:
        for draw in range(recall["draws"]):
            keys = keys_of(kind, d, seed=draw)
            half = torch.full_like(keys[:, 1:, :, 0], 0.5)
            near = ttr.Design(ttr.Kernel(ttr.Gaussian(), bandwidth=0.15), ttr.LocalPolynomial(0), ttr.Exact())
            fits = {
                "linear attention": (ttr.atlas["linear_attention"], {}),
                "delta rule, β = 1/2": (ttr.atlas["delta_net"], {"step_size": half}),
                "least squares": (least_squares, {"ridge": torch.full((1, d), 0.05, device=device)}),
                "softmax, h = 0.15": (near, {}),
            }
            for name, (design, inputs) in fits.items():
                accuracy.setdefault((kind, name), []).append(recalled(design, keys, **inputs))
accuracy = {place: torch.tensor(found).view(len(recall["sizes"]), -1) for place, found in accuracy.items()}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Untrained memories read real text and are asked to repeat it: share of the repeated bytes that they name, against the size of their keys. Lines are means over draws of the keys, bands run from the worst to the best. With one key a context (left) every memory gets nearer to softmax attention as its keys get more channels, least squares first; attention, which keeps all pairs, does not depend on the size. With keys added up from bytes (right), which overlap, the sum of linear attention stops short, and the memories that correct themselves do not.", "name": "lm-fig-recall"}, "image": {"alt": "Two panels of accuracy against key channels on a logarithmic axis for linear attention, the delta rule, least squares and softmax attention. Left, three curves rise towards the flat curve of softmax attention. Right, least squares and the delta rule rise as before, and linear attention stays low."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
styles = dict(zip(fits, (("o", "-"), ("s", "--"), ("D", "-."), ("^", ":")), strict=True))
for axes, kind in zip(panels, ("one key a context", "keys added up from bytes"), strict=True):
    for name, (marker, line_style) in styles.items():
        found = accuracy[kind, name]
        (line,) = axes.plot(recall["sizes"], found.mean(1), marker=marker, linestyle=line_style, label=name)
        low, high = found.amin(1), found.amax(1)
        axes.fill_between(recall["sizes"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(title=kind, xlabel="channels of a key, d", xscale="log", ylim=(0, 1))
    axes.set_xticks(recall["sizes"], [str(d) for d in recall["sizes"]])
    axes.minorticks_off()
panels[0].set_ylabel("repeated bytes named")
panels[0].legend(loc="lower right")
plt.show()

# %%
exact, votes = "one key a context", "keys added up from bytes"
assert accuracy[exact, "softmax, h = 0.15"].min() > accuracy[exact, "linear attention"][0].max() + 0.2
assert accuracy[exact, "least squares"][-1].min() > accuracy[exact, "softmax, h = 0.15"].min() - 0.05
assert all(accuracy[exact, "least squares"][i].min() > accuracy[exact, "linear attention"][i].max() for i in (2, 3, 4))
assert accuracy[votes, "least squares"][-1].min() > accuracy[votes, "softmax, h = 0.15"].min() - 0.05
hebbian, corrected = accuracy[votes, "linear attention"][-1], accuracy[votes, "delta rule, β = 1/2"][-1]
assert accuracy[exact, "linear attention"][-1].min() > hebbian.max() + 0.05
assert corrected.min() > hebbian.max() + 0.05
for kind, short in ((exact, "exact"), (votes, "added")):
    for name, slug in zip(fits, ("hebbian", "delta", "least_squares", "softmax"), strict=True):
        record(f"lm_recall_{short}_{slug}", accuracy[kind, name][2].mean(), atol=0.03, corpus=text.digest)

# %% [markdown]
# At $d = 64$ with one key a context, linear attention names {glue:text}`lm_recall_exact_hebbian:.2f` of the repeats, the
# delta rule {glue:text}`lm_recall_exact_delta:.2f`, least squares {glue:text}`lm_recall_exact_least_squares:.2f` and
# softmax attention {glue:text}`lm_recall_exact_softmax:.2f`. Attention is not perfect either, since a context
# may have had several followers.
#
# With added keys they name {glue:text}`lm_recall_added_hebbian:.2f`, {glue:text}`lm_recall_added_delta:.2f`,
# {glue:text}`lm_recall_added_least_squares:.2f` and {glue:text}`lm_recall_added_softmax:.2f`.
# So a state of fixed size *can* hold a window of text this long, if it is large enough and the keys are good.
# A trained layer has to find such keys by itself.

# %% [markdown]
# ## Small models on top of the counts
#
# A short training spends its budget on what a table knows already. So we give it the table: the model's logits are
# *added* to the logarithms of the two-byte counts, and training has to learn only what these miss. It takes one method.

# %% tags=["hide-input"]
import logging

from lightning.pytorch import Trainer, seed_everything

# Lightning remarks on the machine it finds, so on every machine otherwise.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

# %%
from ttr.training import TokenPrediction


class AboveCounts(TokenPrediction):
    """Next-byte prediction whose logits start from log p of the two-byte table."""

    def forward(self, tokens):
        return self.model(tokens) + count_logits(tokens)


def train(kind, seed, **model):
    """The same windows in the same order, and the same settings, for every design; the seed is that of the weights."""
    seed_everything(seed, workers=True, verbose=False)
    module = kind(vocab_size=256, learning_rate=1e-2, warmup_steps=20, **model)
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, StandardLibraryText(**sizes["data"]))
    return module.to(device).eval()


def losses(module, tokens=windows):
    """Bits of every next byte of the windows, a batch at a time."""
    with torch.no_grad():
        return torch.cat([bits(module(batch[:, :-1]), batch) for batch in tokens.split(8)])


slugs = ["linear_attention", "gated_delta_net", "recursive_least_squares", "qk_norm_attention"]
short = {"conv_on": "qk", "conv_silu": False, "mlp_ratio": 0}  # a convolution of queries and keys, and the memory alone
models, lost = {}, {}
for slug in slugs:
    trained = [train(AboveCounts, seed, design=slug, **short, **sizes["model"]) for seed in range(sizes["seeds"])]
    models[slug] = trained[0]
    lost[slug] = torch.stack([losses(module) for module in trained])
plain = train(TokenPrediction, 0, design="gated_delta_net", **sizes["plain"])
without_counts = losses(plain)

# %% [markdown]
# Each of the four models is one memory between an embedding and a head: no MLP, a convolution of four taps on queries
# and keys, so that a key can hold some of the bytes before. They differ in the argument `design`.
# Attention comes with unit queries and keys and a learned temperature, `qk_norm_attention`, for the reasons of
# {doc}`/notebooks/08_softmax_attention`. A fifth model, an ordinary one with an MLP and a wider embedding, trains as long
# without the counts.
#
# Where does the loss fall? In the figure zero is the table, and up is better.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Bits a byte that a trained memory saves over the two-byte table, mean of the seeds, each seed a dot (left) or the band between seeds (right). Left: by kind of byte, inside the training length. All memories save a little where nothing repeats; attention alone saves much, and it does so on repeats. Right: by position in the window; the dotted line marks the length of the training windows. Attention starts below the table, then gains with every byte of context, and goes on gaining beyond the length it was trained on. The others gain the same everywhere.", "name": "lm-fig-where"}, "image": {"alt": "Left: grouped bars of bits saved for three kinds of bytes and four memories; the bars of attention on both kinds of repeats are by far the tallest. Right: bits saved against position on a logarithmic axis; three nearly flat curves and one, attention, that rises from below zero to the top."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.15, 1))
within = torch.zeros_like(repeated)
within[:, 32:train_length] = True
saved = {slug: counts - found for slug, found in lost.items()}
marks = dict(zip(slugs, (("o", "-"), ("s", "--"), ("D", "-."), ("^", ":")), strict=True))
for column, (slug, gain) in enumerate(saved.items()):
    by_kind = torch.stack([gain[:, mask & within].mean(1) for mask in kinds.values()]).cpu()
    at = torch.arange(len(kinds)) + 0.2 * (column - 1.5)
    left.bar(at, by_kind.mean(1), width=0.18, label=ttr.atlas[slug].name, alpha=0.8)
    left.plot(at.repeat_interleave(gain.shape[0]), by_kind.flatten(), ".", color="black", markersize=4)
    by_place = torch.stack([gain[:, :, low:high].mean((1, 2)) for low, high in pairwise([0, *edges])]).cpu()
    marker, line_style = marks[slug]
    (line,) = right.plot([8, *middles], by_place.mean(1), marker=marker, linestyle=line_style)
    right.fill_between(
        [8, *middles], by_place.amin(1), by_place.amax(1), color=line.get_color(), alpha=0.2, linewidth=0
    )
left.axhline(0, color="0.4", linewidth=1)
left.set_xticks(range(len(kinds)), list(kinds))
left.set(ylabel="bits a byte saved over the table")
left.grid(visible=False, axis="x")
right.axhline(0, color="0.4", linewidth=1)
right.axvline(train_length, color="0.4", linewidth=1, linestyle=":")
right.set(xlabel="position in the window, bytes", xscale="log", ylabel="bits a byte saved over the table")
right.set_xticks([8, *edges], [str(edge) for edge in [8, *edges]])
right.minorticks_off()
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %%
attention, rest = "qk_norm_attention", slugs[:-1]
total = {slug: found[:, :, :train_length].mean((1, 2)) for slug, found in lost.items()}
on_own = {slug: gain[:, own & within].mean(1) for slug, gain in saved.items()}
on_common = {slug: gain[:, common & within].mean(1) for slug, gain in saved.items()}
on_other = {slug: gain[:, other & within].mean(1) for slug, gain in saved.items()}
for slug in slugs:
    record(f"lm_{slug}", total[slug].mean(), atol=0.06, corpus=text.digest)
record("lm_plain", without_counts[:, :train_length].mean(), atol=0.15, corpus=text.digest)
record("lm_own_attention", on_own[attention].mean(), atol=0.3, corpus=text.digest)
record("lm_own_gated", on_own["gated_delta_net"].mean(), atol=0.15, corpus=text.digest)
record("lm_other_attention", on_other[attention].mean(), atol=0.1, corpus=text.digest)
record("lm_other_gated", on_other["gated_delta_net"].mean(), atol=0.1, corpus=text.digest)
gap = (lost["gated_delta_net"].mean(0) - lost[attention].mean(0)) * within
record("lm_gap_share", (gap * repeated).sum() / gap.sum(), atol=0.15, corpus=text.digest)

margin = sizes["margin"]
assert all(on_own[attention].min() > on_own[slug].max() + 4 * margin for slug in rest)
assert all(total[attention].max() < total[slug].min() - margin / 5 for slug in rest)
assert all(gain.min() > 0 for gain in on_other.values())
if scale == "smoke":
    assert without_counts[:, :train_length].mean() > counts[:, :train_length].mean()
    assert (gap * repeated).sum() > 0.5 * gap.sum()

# %% [markdown]
# Inside the training length the four models are at {glue:text}`lm_linear_attention:.2f` (linear attention),
# {glue:text}`lm_gated_delta_net:.2f` (gated DeltaNet), {glue:text}`lm_recursive_least_squares:.2f` (recursive least
# squares) and {glue:text}`lm_qk_norm_attention:.2f` bits a byte (attention).
# The ordinary model, after as many steps, is at {glue:text}`lm_plain:.2f`: still worse than the table it does not have.
#
# The averages hide what happens. On repeats that the training text lacks, attention saves
# {glue:text}`lm_own_attention:.2f` bits a byte and gated DeltaNet {glue:text}`lm_own_gated:.2f`. On bytes that are no
# repeats, they save {glue:text}`lm_other_attention:.2f` and {glue:text}`lm_other_gated:.2f`.
# The share {glue:text}`lm_gap_share:.2f` of the gap between the two models is made on repeats.
# {cite:t}`arora2023zoology` found the same of models many sizes larger.
#
# Why do the other three not recall? It is not for lack of state alone: untrained memories of the same size
# recalled most repeats above. They were given good keys; a trained layer has to find them, and in a few hundred steps
# only attention does. A likely reason, which we do not test: its weights can be sharp at a key that is a little nearer
# than the rest, so half a solution pays already, while a memory of fixed size pays for half-good keys with interference.
# {cite:t}`olsson2022induction` saw that recall in transformers, too, arrives in a sudden step of training; ours were
# stopped before such a step came to the others, if it comes.
#
# ## Beyond the training length
#
# The right panel of {numref}`lm-fig-where` asks the models about windows longer than any they were trained on. What they
# save over the table does not fall off. Nothing in these layers counts positions, so nothing is out of range, and a memory that is handed
# on is the memory of the whole text. A window read in pieces gives the same numbers as one read at once:

# %%
one = windows[:1, : 2 * train_length]
for slug in slugs:
    model = models[slug].model
    with torch.no_grad():
        whole = model(one)
        caches, pieces = None, []
        for piece in one.split([1, train_length - 1, 100, train_length - 100], dim=1):
            logits, caches = model.extend(piece, caches)
            pieces.append(logits)
    assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=1e-3)

beyond = {slug: gain[:, :, train_length:].mean((1, 2)) for slug, gain in saved.items()}
inside = {slug: gain[:, :, :train_length].mean((1, 2)) for slug, gain in saved.items()}
assert (beyond[attention] > inside[attention] + margin / 3).all()
assert all((beyond[slug] > inside[slug] - 0.1).all() for slug in rest)
record("lm_attention_inside", inside[attention].mean(), atol=0.06, corpus=text.digest)
record("lm_attention_beyond", beyond[attention].mean(), atol=0.08, corpus=text.digest)

# %% [markdown]
# Attention saves {glue:text}`lm_attention_inside:.2f` bits a byte inside the training length and
# {glue:text}`lm_attention_beyond:.2f` beyond it.
# What would the state be worth if it were dropped? Read the second half of each window twice, once with the state handed
# on from the first half and once from nothing:

# %%
half_way = long_text.length // 2
fresh = windows[:, half_way:]
handed_on = {}
for slug in slugs:
    anew = losses(models[slug], fresh)
    ahead = lost[slug][0][:, half_way:]
    handed_on[slug] = (anew - ahead)[:, 2:].mean(1)  # the table needs two bytes
    record(f"lm_handed_on_{slug}", handed_on[slug].mean(), atol=0.06, corpus=text.digest)
assert handed_on[attention].mean() > max(handed_on[slug].mean() for slug in rest) + margin / 3
standard_error = handed_on[attention].std() / len(fresh) ** 0.5
assert handed_on[attention].mean() > 3 * standard_error

# %% [markdown]
# The first half is worth {glue:text}`lm_handed_on_qk_norm_attention:.2f` bits a byte to attention in the second half, and
# {glue:text}`lm_handed_on_gated_delta_net:.3f` to gated DeltaNet, which had no use for it.
#
# ## Writing with a state that does not grow
#
# To write, a model samples a byte, reads it, and samples the next. What it keeps between two bytes is a cache: the
# memory of each block, and the last inputs of its convolutions. How large is it?


# %%
def tensors(kept):
    """All tensors in a cache, however deep."""
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, dict | list):
        for part in kept.values() if isinstance(kept, dict) else kept:
            yield from tensors(part)
    elif hasattr(kept, "__dict__"):
        yield from tensors(vars(kept))


def cache_bytes(model, length):
    with torch.no_grad():
        _, caches = model.extend(windows[:1, :length])
    return sum(x.numel() * x.element_size() for x in tensors(caches))


early, late = ({slug: cache_bytes(models[slug].model, length) for slug in slugs} for length in (10, 500))
for slug in slugs:
    print(f"{ttr.atlas[slug].name:25} {early[slug]:7} bytes after 10 tokens, {late[slug]:7} after 500")
    record(f"lm_state_{slug}", [early[slug], late[slug]])
assert all(early[slug] == late[slug] for slug in rest)
key_dim = sizes["model"]["d_model"] // sizes["model"]["num_heads"]
per_token = 4 * 2 * key_dim * sizes["model"]["num_heads"]  # a key and a value in float32
assert late[attention] - early[attention] == 490 * per_token
grows = {slug: "T" in ttr.atlas[slug].cost().as_text()["state"] for slug in slugs}
assert [slug for slug in slugs if grows[slug]] == [attention]  # what the atlas says

# %% [markdown]
# The state of the first three stays as large as it was. Attention keeps a key and a value for every byte it has read,
# and every new byte is compared with all of them. Exact least squares has two matrices, for the keys' second moments
# and the cross moments.
#
# `RegressionLM.generate` samples a number of tokens, `RegressionLM.stream` goes on for as long as one asks; on the
# command line it is `ttr generate`. The temperature $\tau$ divides the logits (that of
# {doc}`/notebooks/08_softmax_attention` multiplies), so $p_\tau \propto p^{1/\tau}$: at 1 the model's own distribution,
# towards 0 the likeliest byte each time. The ordinary model writes:

# %%
prompt = torch.tensor([list(b"    def ")], device=device)
for temperature in (0.0, 0.5, 1.0):
    chance = torch.Generator(device).manual_seed(0)
    written = plain.model.generate(prompt, 160, temperature=temperature, generator=chance)
    print(f"--- temperature {temperature}\n{bytes(written[0].tolist()).decode(errors='replace')}")

# %% [markdown]
# How surprised is the two-byte table by what was written, and how much does the text repeat itself? Several samples for
# each temperature:

# %%
temperatures = [0.25, 0.5, 0.75, 1.0, 1.25]
prompts = prompt.expand(8, -1)
surprise, again = [], []
for temperature in temperatures:
    chance = torch.Generator(device).manual_seed(1)
    written = plain.model.generate(prompts, 400, temperature=temperature, generator=chance)
    surprise.append(bits(count_logits(written[:, :-1]), written)[:, prompt.shape[1] :].mean(1).cpu())
    again.append(repeats(written, memory_span)[1][:, prompt.shape[1] :].float().mean(1).cpu())
surprise, again = torch.stack(surprise), torch.stack(again)
assert surprise[-1].mean() > surprise[0].mean() + 0.5
assert again[0].mean() > again[-1].mean() + 0.2

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Samples of the ordinary model at several temperatures, a dot each, and their mean: bits a byte under the two-byte table (left) and the share of bytes that repeat the sample itself (right); dashed, the same of real text of that length. Cold samples repeat themselves more than text does and surprise the table less, hot ones do the opposite; in between, both means cross those of the text.", "name": "lm-fig-temperature"}, "image": {"alt": "Two plots against temperature. Left, bits a byte rise from temperature one half on and cross the dashed line of real text. Right, the share of repeats falls from there on and crosses the dashed line of real text."}}
figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.2))
real = windows[:, :400]
references = bits(count_logits(real[:, :-1]), real).mean(), repeats(real, memory_span)[1].float().mean()
labels = "bits a byte under the table", "share of repeats"
for axes, found, reference, label in zip(panels, (surprise, again), references, labels, strict=True):
    axes.plot(temperatures, found.mean(1), "o-")
    axes.plot(temperatures, found, ".", color="0.35", markersize=4)
    axes.axhline(reference.cpu(), color="0.4", linewidth=1, linestyle="--")
    axes.set(xlabel="temperature", ylabel=label)
plt.show()

# %% [markdown]
# It has found indentation, `self` and the look of names, and does not write Python.
#
# ## From the command line
#
# All of this is a file of settings away. The same text and model, with checkpoints and logs:
#
# ```bash
# ttr fit --config configs/stdlib_text.yaml --model.design mesa_net
# ttr fit --config configs/stdlib_text.yaml --ckpt_path last
# ttr generate --ckpt_path runs/stdlib_text/checkpoints/last.ckpt --prompt 'def ' --temperature 0.7
# ```
#
# Any folder of text is read in the same way, and split by file into training, validation and test. With the extra `hf`,
# and the network once, any text data set of the Hugging Face Hub comes with any of its tokenizers. Its loss is in nats
# a token: divide by $\ln 2$ and by the mean number of bytes of a token to compare. A larger
# model is a change of numbers, several designs are a list:
#
# ```bash
# ttr fit --config configs/stdlib_text.yaml --data.corpus some/folder --data.pattern '*.txt'
# ttr fit --config configs/tokenized_text.yaml --model.d_model 512 --model.num_layers 12
# ttr fit --config configs/stdlib_text.yaml --model.num_layers 4 \
#   --model.design '[gated_delta_net, gated_delta_net, gated_delta_net, qk_norm_attention]'
# ```
#
# The last line is a hybrid: three memories of fixed size and one attention, the usual bargain between a small state and
# exact recall {cite:p}`kimi2025linear`.
#
# ## What this scale cannot say
#
# - **Who wins.** The models are tiny and trained for seconds. A gap in their loss is not a gap between architectures; with
#   more layers, nonlinear keys and longer training, memories of fixed size learn to recall as well, up to what their
#   state holds {cite:p}`arora2024based,jelassi2024repeat`.
# - **Bits, in general.** Source code repeats itself more than prose does. The share of repeats is a property of the text.
# - **Long context.** Windows here are a page long. Nothing shows how a state behaves after a book.
# - **Speed.** That the state is constant is asserted; what it buys in time is on the page about {doc}`/notebooks/speed`.
# - **The counts.** Adding a table helps a small model. Whether a large one would still gain, these runs do not tell.
#
# ## Limits
#
# ````{admonition} Where counting meets the memories
# :class: tip
# 1. One-hot keys, exact least squares, ridge $\lambda$: smoothed counts, {eq}`lm-eq-smoothed`. Executed above.
# 2. The ridge grows, answers times the ridge: linear attention, and its one-hot answers are the raw counts.
# 3. One-hot keys, kernel weights, $h \to 0$: unsmoothed shares wherever the context has been seen, as $\lambda \to 0$.
# 4. One-hot keys, delta rule with $\beta = 1$: the *last* follower only, the shortest memory of all.
# ````

# %%
y, _ = ttr.regress(ttr.atlas["linear_attention"], now, before, now)
follows = torch.stack(
    [now[0, : t + 1, 0][before[0, : t + 1, 0] @ now[0, t, 0] > 0].sum(0) for t in range(len(start) - 1)]
)
assert_close(y[0, :, 0], follows)  # raw counts

large = torch.full_like(ridge, 1e9)
scaled, _ = ttr.regress(least_squares, now, before, now, ridge=large)
assert_close(1e9 * scaled, y, rtol=1e-5, atol=1e-5)
assert "Linear attention" in {limit.becomes.name for limit in least_squares.limits()}

total = follows.sum(1, keepdim=True)
narrow = ttr.Design(ttr.Kernel(ttr.Gaussian(), bandwidth=0.1), ttr.LocalPolynomial(0), ttr.Exact())
shares, _ = ttr.regress(narrow, now, before, now)
came_before = total[:, 0] > 0
assert_close(shares[0, came_before, 0], (follows / total)[came_before])

last, _ = ttr.regress(ttr.atlas["delta_net"], now, before, now, step_size=torch.ones_like(now[..., 0]))
for t in torch.nonzero(came_before).flatten().tolist()[:50]:
    places = torch.nonzero(before[0, : t + 1, 0] @ now[0, t, 0]).flatten()
    assert_close(last[0, t, 0], now[0, places[-1], 0])

# %% [markdown]
# ## Exercises
#
# ```{exercise} A cache without training
# :label: lm-exercise-cache
# {cite:t}`kuhn1990cache` mixed a table with counts of the text that is being read.
# Where the context of the last $k$ bytes has been seen in the window, give half of the probability to the bytes that
# followed it there. How near does that come to the trained attention, inside the training length?
# ```
#
# ```{solution-start} lm-exercise-cache
# :class: dropdown
# ```
#
# The share of the target among the followers is all that is needed.

# %%
inner = windows[:, : train_length + 1]
contexts, following = grams(inner, memory_span)[:, :-1], inner[:, memory_span:]
cached = []
for context, byte in zip(contexts, following, strict=True):
    earlier = (context[:, None] == context).tril(-1)
    hits = (earlier & (byte[:, None] == byte)).sum(1)
    cached.append(torch.where(earlier.any(1), hits / earlier.sum(1).clamp(min=1), -1.0))
cached = torch.stack(cached)
table = torch.exp2(-counts[:, memory_span - 1 : train_length])
mixed = torch.where(cached >= 0, (cached + table) / 2, table)
cache_bits = -mixed.log2().mean()
plain_table = counts[:, memory_span - 1 : train_length].mean()
trained_bits = lost[attention][:, :, memory_span - 1 : train_length].mean()
record("lm_cache", cache_bits, rtol=2e-2, corpus=text.digest)
assert cache_bits < plain_table - 0.1
print(f"table {plain_table:.3f}, with the cache {cache_bits:.3f}, trained attention {trained_bits:.3f}")

# %% [markdown]
# The cache comes to {glue:text}`lm_cache:.2f` bits a byte. Choosing the share better, by $k$ and by how often the
# context was seen, is what compressors of the PPM family do. {cite:t}`grave2016improving` replaced the
# equal contexts by near hidden states, which is kernel smoothing.
#
# ```{solution-end}
# ```
#
# ```{exercise} A mixture of two models
# :label: lm-exercise-mixture
# Show that the mixture $\tfrac12 p + \tfrac12 q$ never costs more than one bit above the better of the two, on any
# byte. Mix attention with gated DeltaNet, byte by byte. Then mix them as Bayes would: with weights proportional to how
# well each has predicted this window so far. What does the second mixture cost at most for a whole text?
# ```
#
# ```{solution-start} lm-exercise-mixture
# :class: dropdown
# ```
#
# $-\log_2(\tfrac12 p + \tfrac12 q) \le -\log_2 \tfrac12 p = 1 - \log_2 p$, and the same for $q$.
# With Bayesian weights the probabilities of the bytes multiply to $\tfrac12 p(\text{text}) + \tfrac12 q(\text{text})$,
# so the same line says one bit for the whole text, not for each byte.

# %%
first, second = lost[attention][0].double(), lost["gated_delta_net"][0].double()
even = -(torch.exp2(-first) / 2 + torch.exp2(-second) / 2).log2()
assert (even <= torch.minimum(first, second) + 1 + 1e-9).all()

so_far = F.pad((second - first).cumsum(1), (1, -1))  # log₂ of how much better attention has been
weight = (so_far * math.log(2)).sigmoid()
bayes = -(weight * torch.exp2(-first) + (1 - weight) * torch.exp2(-second)).log2()
assert (bayes.sum(1) <= torch.minimum(first.sum(1), second.sum(1)) + 1 + 1e-6).all()
if scale == "smoke":
    assert bayes.mean() < even.mean()
record("lm_mixture_even", even.mean(), atol=0.06, corpus=text.digest)
record("lm_mixture_bayes", bayes.mean(), atol=0.06, corpus=text.digest)
record("lm_mixture_better", min(first.mean(), second.mean()), atol=0.06, corpus=text.digest)

# %% [markdown]
# On the long windows the better model has {glue:text}`lm_mixture_better:.2f`, the Bayesian mixture
# {glue:text}`lm_mixture_bayes:.2f`, the even one {glue:text}`lm_mixture_even:.2f`.
# Bayes bets on one model for all bytes and is soon sure which. The even mixture pays wherever attention is sure of a repeat
# and gated DeltaNet is not. A layer that chooses byte by byte whom to trust would do better than either mixture; that is
# what a gate between two memories can learn.
#
# ```{solution-end}
# ```
#
# ```{exercise} How long should a key look back?
# :label: lm-exercise-context
# A long context that comes back is a safe bet, and it comes back less often. For $k = 2, \dots, 7$: which share of bytes
# has a context that was seen before, and how often was one of its followers right? Which $k$ names most bytes?
# ```
#
# ```{solution-start} lm-exercise-context
# :class: dropdown
# ```
#
# "One of its followers" is too kind to short contexts, which have many. Ask for the most frequent one instead, as a
# memory must answer with one.

# %%
named = {}
for size in range(2, 8):
    contexts, following = grams(inner, size)[:, :-1], inner[:, size:]
    votes = torch.stack(
        [(c[:, None] == c).tril(-1).float() @ one_hot(f, 256).float() for c, f in zip(contexts, following, strict=True)]
    )
    asked = votes.sum(-1) > 0
    right = (votes.argmax(-1) == following) & asked
    named[size] = asked.float().mean().item(), (right.sum() / asked.sum()).item(), right.float().mean().item()
    print("k = {}: seen {:.2f}, then right {:.2f}, named {:.2f}".format(size, *named[size]))
seen_share, then_right, _ = zip(*named.values(), strict=True)
assert sorted(seen_share, reverse=True) == list(seen_share)
assert then_right[0] < then_right[1] < then_right[2]
record("lm_best_context", max(named, key=lambda size: named[size][2]), atol=1, corpus=text.digest)

# %% [markdown]
# Seen falls with $k$ and right rises, until it levels off; most bytes are named with $k$ of {glue:text}`lm_best_context`. A good memory
# would use them all, the longest that matches.
#
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`shannon1951prediction` is where bits a letter come from, and still a pleasure.
# {cite:t}`mackay1995hierarchical` derive smoothing from a prior, {cite:t}`kuhn1990cache` let a table read its own text.
# {cite:t}`grave2016improving` and {cite:t}`khandelwal2019generalization` put kernel smoothing over hidden states on top
# of a trained model, which is a memory of this book beside one.
# {cite:t}`olsson2022induction` watch the circuit that completes repeats appear in training.
# {cite:t}`arora2023zoology` measure what recall is worth on real text, {cite:t}`arora2024based` what it costs in state,
# and {cite:t}`jelassi2024repeat` prove that a state of fixed size cannot copy what is longer than itself.
# {cite:t}`wang2025testtime` is the framework of this book.
