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
# # Keys and values: short convolutions, one-layer recall
#
# A memory stores pairs. A text is a row of tokens, and nothing in it says which token is a key and which a value.
# Where do the pairs come from?
#
# From neighbours. A key that has seen the token *before* its value is all that a single layer needs, and a convolution
# of two taps provides it.
#
# This chapter first proves what a layer without it cannot do. Then it builds the pairs by hand, and four memories of
# this book turn into four ways to count which token follows which.
# A transformer without convolutions needs two layers for the same, and we build those by hand too.
# At the end layers are trained, and we look at the keys that they found.

# %% tags=["parameters"]
scale = "smoke"  # "full": the sizes of a GPU run
device = "cpu"

# %%
import itertools
import math
import warnings

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import normalize, one_hot
from torch.testing import assert_close

import ttr
from ttr.book import record, use_style

use_style()
sizes = {
    "smoke": {
        "task": {"vocab_size": 128, "length": 32, "num_pairs": 6},
        "model": {"d_model": 64},
        "key_dims": (16, 4),
        "training": {"steps": 150, "batch_size": 64, "learning_rate": 1e-2, "seeds": 2},
        "draws": 400,
    },
    "full": {
        "task": {"vocab_size": 8192, "length": 256, "num_pairs": 32},
        "model": {"d_model": 256},
        "key_dims": (64, 16),
        "training": {"steps": 10_000, "batch_size": 64, "learning_rate": 3e-3, "seeds": 3},
        "draws": 4000,
    },
}[scale]
num_pairs = sizes["task"]["num_pairs"]
hebbian, delta_net, least_squares = (ttr.atlas[slug] for slug in ("linear_attention", "delta_net", "intention"))


def softmax(bandwidth):
    return ttr.Design(ttr.Kernel(bandwidth=bandwidth), ttr.LocalPolynomial(0), ttr.Exact())


# %% [markdown]
# ## What a layer cannot know from single tokens
#
# The task is multi-query recall {cite:p}`arora2023zoology`: keys and values alternate, then every key comes again, and
# the model has to name its value.

# %%
from ttr.tasks import Recall, recall_batch

generator = torch.Generator().manual_seed(5)
tokens, targets = recall_batch(generator, batch_size=1, vocab_size=16, length=14, num_pairs=3)
letters = "·abcdefg01234567"
print("tokens ", *(letters[token] for token in tokens[0]))
print("answers", *(letters[target] if target >= 0 else "·" for target in targets[0]))

# %% [markdown]
# Suppose that $q_t$, $k_t$ and $v_t$ are functions of token $t$ alone, as in a plain attention layer.
# Then the pair stored at the token `a` binds something made of `a` to something made of `a`.
# Whatever the functions, nothing ties `a` to the token behind it.
#
# ```{prf:theorem} Single tokens make a bag
# :label: keys-theorem-bag
# Let $q_t$, $k_t$ and $v_t$ be functions of token $x_t$ alone, and let the memory give all pairs weights that do not
# depend on their place, and be the unique minimiser of its regression or the sum of its outer products: linear attention,
# least squares, softmax attention.
# Then $y_t$ is a function of $x_t$ and of the multiset $\{x_1, \dots, x_{t-1}\}$.
#
# So on a recall task of $P$ pairs with different values, whose bindings are all equally likely, no function of $y_t$
# and $x_t$ is right more often than once in $P$ times on average.
# ```
#
# ```{prf:proof}
# The weighted sum of losses and the sum of outer products are sums over $i \le t$ with terms
# that depend on $x_i$ and, through the weight of a kernel, on $x_t$. Permuting $x_1, \dots, x_{t-1}$ permutes
# the terms. The sums, the minimisers and $y_t = m_t(q_t)$ stay the same.
#
# Now fix the keys, the set of values and the places of the questions, and bind the values to the keys in all $P!$ ways.
# The question at $t$ has the same $x_t$ and the same multiset before it each time, so the answer is the same token each time.
# If that token is one of the values, it is the right one in $(P-1)!$ of the $P!$ bindings; else in none.
# ```
#
# {doc}`/notebooks/01_associative_recall` exchanged two values to see this. Here are all $P!$ bindings, on layers with
# random weights. Each question is answered by the best of the values that occur in the sequence.
# The delta rule is not in the theorem, because it does depend on the order of its pairs, and neither is a memory that
# forgets. We count the delta rule all the same.

# %%
P, vocab_size = 4, 32
tokens, targets = recall_batch(torch.Generator().manual_seed(0), 1, vocab_size, 20, P)
orders = torch.tensor(list(itertools.permutations(range(P))))
bound = tokens.repeat(len(orders), 1)
bound[:, 1 : 2 * P : 2] = tokens[0, 1 : 2 * P : 2][orders]
asked = (targets[0] >= 0).nonzero().flatten()
asked_key = (tokens[0, : 2 * P : 2] == tokens[0, asked, None]).int().argmax(1)
right_answer = orders[:, asked_key]  # as a number among the values of the sequence


def random_model(design, conv_on, seed):
    torch.manual_seed(seed)
    model = ttr.models.RegressionLM(
        vocab_size, d_model=32, num_layers=1, num_heads=1, design=design, mlp_ratio=0, conv_width=2, conv_on=conv_on
    )
    return model.double().to(device)


moved, share = {}, {}
for design in ("linear_attention", "intention", "softmax_attention", "delta_net"):
    for conv_on in ("", "k"):
        for seed in range(3):
            with torch.no_grad():
                logits = random_model(design, conv_on, seed)(bound.to(device))[:, asked].cpu()
            place = design, conv_on, seed
            moved[place] = (logits - logits[:1]).abs().max().item()
            answers = logits[:, :, tokens[0, 1 : 2 * P : 2]].argmax(-1)
            share[place] = (answers == right_answer).double().mean().item()

for (design, conv_on, seed), change in moved.items():
    if conv_on == "" and design != "delta_net":
        assert change < 1e-12
        assert share[design, conv_on, seed] == 1 / P  # not about: exactly
    else:
        assert change > 1e-4
    if conv_on == "":
        assert abs(share[design, conv_on, seed] - 1 / P) < 0.1

# %% [markdown]
# Random weights with a convolution are not a good model either. But their answers *move* when the bindings change, and
# what moves can be trained.
#
# The theorem is about one layer. A second one escapes it: what the first layer writes at token $t$ depends on which
# tokens came before $t$, so its outputs are no longer functions of single tokens.
# A code for the place of each token breaks the symmetry of the theorem, yet every stored pair still sees one token only.
#
# {cite:t}`sanford2024onelayer` prove a bound of another kind. Take the number of heads, their width and the bits of a
# number. For one layer of attention to name what followed the last occurrence of a token, the product of the three has
# to grow in proportion to the length of the sequence. Two layers need its logarithm only.
#
# ## Neighbours make pairs
#
# {cite:t}`wang2025testtime` therefore count the making of keys and values among the things that a layer of test-time
# regression has to get right, and read the short convolutions of today's recurrent layers as this.
# The smallest version is a filter of two taps on the keys, a channel at a time:
#
# ```{math}
# :label: keys-eq-convolution
# k_t = c_1 \odot W_k x_{t-1} + c_0 \odot W_k x_t, \qquad v_t = W_v x_t, \qquad q_t = W_q x_t .
# ```
#
# With $c_1 = 1$ and $c_0 = 0$ the pair stored at a token is (token before it, token itself).
# Take the shift and nothing else: let $x_t$ be a one-hot vector and all matrices the identity.
# Write $N_t(a, b)$ for the number of times that $b$ has followed $a$ so far, $N_t(a)$ for the number of times that
# anything has, and $U_t(b)$ for the number of times that $b$ has occurred.
#
# ```{prf:proposition} Four memories of neighbours
# :label: keys-proposition-bigram
# Let $k_t$ be the one-hot vector of $x_{t-1}$ (zero for the first token), $v_t$ and $q_t$ that of $x_t$, and
# $a = x_t$. Entry $b$ of the answer $y_t$ is
#
# $$
# \begin{aligned}
# \text{linear attention} \quad & N_t(a, b), \\
# \text{least squares, ridge } \lambda \quad & \frac{N_t(a, b)}{N_t(a) + \lambda}, \\
# \text{delta rule} \quad & \textstyle\sum_{j \ge 0} \beta (1 - \beta)^j \,[\text{the follower of } a \text{, } j \text{ before the last, is } b], \\
# \text{softmax, } w = e^{1/h^2} \quad & \frac{(w - 1)\, N_t(a, b) + U_t(b)}{(w - 1)\, N_t(a) + t} .
# \end{aligned}
# $$
# ```
#
# ```{prf:proof}
# $\sum_i k_i v_i^\top$ has the entries $N_t(a, b)$, and $\sum_i k_i k_i^\top$ is diagonal with the entries $N_t(a)$:
# the first two lines.
# One-hot keys are orthogonal, so the delta rule touches row $a$ only when $k_t$ is $a$, and then
# takes it to $(1 - \beta)$ times itself plus $\beta$ times the one-hot vector of the new follower.
# In softmax attention a token behind an $a$ has the weight $w$, any other has the weight 1.
# The sum of the weights of tokens $b$ is $w N_t(a, b) + U_t(b) - N_t(a, b)$.
# ```
#
# So each memory is a language model of pairs of words, a *bigram* model, estimated from its context.
# Linear attention counts. Least squares divides by the count, and its ridge holds back the answer to a token that was
# seldom seen. The delta rule averages with a preference for what was seen last. Softmax mixes the frequencies behind $a$ with the
# frequencies of all tokens, and its bandwidth sets the mixture.
#
# {cite:t}`olsson2022induction` call the heads that look for an earlier $a$ and copy what stood behind it *induction
# heads*. {cite:t}`akyurek2024incontext` find heads in trained transformers that count followers of one and of more
# tokens.
#
# All four without regression, from tables of counts:


# %%
def follower_tables(tokens, vocab_size, step_size, ridge, bandwidth):
    """The four answers at every token, by counting."""
    N, recent = torch.zeros(2, vocab_size, vocab_size, dtype=torch.float64)
    U, w = torch.zeros(vocab_size, dtype=torch.float64), math.exp(1 / bandwidth**2)
    answers = {"linear attention": [], "least squares": [], "delta rule": [], "softmax": []}
    for t, b in enumerate(tokens):
        if t > 0:
            before = tokens[t - 1]
            N[before, b] += 1
            recent[before] = (1 - step_size) * recent[before] + step_size * one_hot(b, vocab_size)
        U[b] += 1
        answers["linear attention"].append(N[b].clone())
        answers["least squares"].append(N[b] / (N[b].sum() + ridge))
        answers["delta rule"].append(recent[b].clone())
        answers["softmax"].append(((w - 1) * N[b] + U) / ((w - 1) * N[b].sum() + t + 1))
    return {name: torch.stack(rows) for name, rows in answers.items()}


# %% [markdown]
# And as memories. The only thing that is made by hand is the shift:


# %%
def shifted(x, by=1):
    """The sequence, later by some tokens: zeros come first."""
    return torch.cat([torch.zeros_like(x[:, :by]), x[:, : x.shape[1] - by]], dim=1)


def neighbours(tokens, vocab_size):
    """Queries, keys and values of one head from tokens (batch, time): a token's key is the token before it."""
    x = one_hot(tokens.to(device), vocab_size).double().unsqueeze(2)
    return x, shifted(x), x


def memories(step_size, ridge, bandwidth, like):
    """Each memory, and what it needs beside queries, keys and values."""
    step_size = torch.full_like(like[..., 0], step_size)
    return {
        "linear attention": (hebbian, {}),
        "least squares": (least_squares, {"ridge": like.new_full((1, like.shape[-1]), ridge)}),
        "delta rule": (delta_net, {"step_size": step_size}),
        "softmax": (softmax(bandwidth), {}),
    }


settings = {"step_size": 0.5, "ridge": 0.3, "bandwidth": 0.7}
random_text = torch.randint(6, (1, 80), generator=generator)
counted = follower_tables(random_text[0], 6, **settings)
q, k, v = neighbours(random_text, 6)
for name, (design, inputs) in memories(**settings, like=k).items():
    y, _ = ttr.regress(design, q, k, v, **inputs)
    assert_close(y[0, :, 0].cpu(), counted[name])

# %% [markdown]
# A word that repeats itself shows how they differ. What follows an `a` in *abracadabra*?

# %%
word, alphabet = "abracadabra", "abcdr"
text = torch.tensor([[alphabet.index(letter) for letter in word]])
answers = {name: rows[-1] for name, rows in follower_tables(text[0], len(alphabet), **settings).items()}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "What may follow the last letter of abracadabra, asked of four memories whose keys are the letters one place earlier. All know that b has followed a most often. Linear attention answers with counts, least squares with shares, the delta rule favours the follower seen last, and softmax attention mixes in the letters that never followed an a.", "name": "keys-fig-word"}, "image": {"alt": "Four bar charts over the letters a, b, c, d and r. In all of them b is highest. Linear attention has whole numbers, least squares and the delta rule have shares and zeros at a and r, and softmax attention has small bars at a and r too."}}
figure, axes = plt.subplots(1, 4, figsize=(9, 2.5), sharex=True)
for axis, (name, answer) in zip(axes, answers.items(), strict=True):
    axis.bar(list(alphabet), answer, color="C0")
    axis.set_title(name)
    axis.set_xlabel("next letter")
axes[0].set_ylabel("answer, entry b of y")
plt.show()

# %%
assert all(alphabet[answer.argmax()] == "b" for answer in answers.values())
assert answers["linear attention"].tolist() == [0, 2, 1, 1, 0]
b = alphabet.index("b")
assert answers["delta rule"][b] > answers["least squares"][b]  # the last follower was a b
assert answers["softmax"][alphabet.index("r")] > 0 == answers["least squares"][alphabet.index("r")]

# %% [markdown]
# **And the other tap?** A filter with $c_0 \neq 0$ also stores each token under its own name.
# For linear attention the answer is then $c_1 N_t(a, b)$ plus an echo, $c_0\, U_t(a)$ at entry $a$:
# it is told what follows `a`, and that `a` has occurred.
# A trained layer can take the echo out again, by a $W_v$ that is zero on the tokens that are never an answer.
# Hence the taps need not be pure for the pairs to be.

# %%
c0, c1 = 0.4, 0.8
y, _ = ttr.regress(hebbian, q, c1 * k + c0 * q, v)
echo = q[0, :, 0] * q[0, :, 0].cumsum(0)  # U_t(a), at entry a
assert_close(y[0, :, 0].cpu(), c1 * counted["linear attention"] + c0 * echo.cpu())

# %% [markdown]
# ## By hand: one layer with a convolution, or two without
#
# The layer of the package has everything that is needed. We write the identity into its projections and $(1, 0)$ into
# its filter, whose first entry belongs to the token before.

# %%
vocab_size = sizes["task"]["vocab_size"] if scale == "smoke" else 512
by_hand = {**sizes["task"], "vocab_size": vocab_size}
layer = ttr.layers.RegressionLayer(
    hebbian, d_model=vocab_size, num_heads=1, conv_width=2, conv_on="k", conv_silu=False, unit=False, norm=False
)
with torch.no_grad():
    for projection in (*layer.projections.values(), layer.output):
        torch.nn.init.eye_(projection.weight)
    layer.convolutions["k"].filter.weight[:] = torch.tensor([1.0, 0.0])
layer = layer.double().to(device)

tokens, targets = recall_batch(torch.Generator().manual_seed(1), batch_size=64, **by_hand)
asked = targets >= 0
with torch.no_grad():
    answers = layer(one_hot(tokens, vocab_size).double().to(device)).cpu()
assert_close(answers[asked], one_hot(targets[asked], vocab_size).double())

# %% [markdown]
# Every question is answered by the one-hot vector of its value, and by nothing else. No training took place.
#
# A transformer has no convolution, so it must look back by attention, and attention finds things by their content.
# The trick is to make the place part of the content.
#
# 1. **The previous-token head.** Give each token the one-hot vector of its place. The query is the place before, the key
#    is the place, the value is the token. With a small bandwidth the answer at $t$ is token $t - 1$. Write it next to
#    token $t$.
# 2. **The matching head.** The query is the token, the key is the copy that layer 1 wrote, the value is the token.
#
# The second layer is the one-layer memory above; the first one does the work of the convolution.
# It compares all places with all others to find the one that is always next door.
# Training has to find both heads. The page {doc}`/notebooks/study` trains two layers that are told no places, and they
# stay at chance.


# %%
def induction(tokens, vocab_size, bandwidth=0.15):
    """Two layers of softmax attention without training; the answers, and what each layer looks at."""
    token = one_hot(tokens.to(device), vocab_size).double().unsqueeze(2)
    here = torch.eye(tokens.shape[1], dtype=token.dtype, device=device).expand(len(tokens), -1, -1).unsqueeze(2)
    before = shifted(here)
    attend = softmax(bandwidth)
    copied, _ = ttr.regress(attend, before, here, token)
    answers, _ = ttr.regress(attend, token, copied, token)
    looked_at = [ttr.regress(attend, q, k, here)[0][:, :, 0].cpu() for q, k in ((before, here), (token, copied))]
    return answers[:, :, 0].cpu(), looked_at


start = torch.zeros_like(tokens[:, :1])  # the first token has no token before it: let it be one that is never asked
with_start = torch.cat([start, tokens], dim=1)
answers, _ = induction(with_start, vocab_size)
found = answers[:, 1:][asked].argmax(-1)
assert (found == targets[asked]).all()

# %% [markdown]
# The start token is needed because attention has to look somewhere. A convolution begins with zeros.

# %%
shown, asks = recall_batch(torch.Generator().manual_seed(5), batch_size=1, vocab_size=16, length=14, num_pairs=3)
shown, asks = (torch.cat([torch.zeros_like(z[:, :1]), z], dim=1) for z in (shown, asks))
asks = asks.clamp_min(0)  # zero where nothing is asked
_, (previous, matching) = induction(shown, 16)
q, k, _ = neighbours(shown, 16)
convolved = (q[0, :, 0] @ k[0, :, 0].mT).tril().cpu()
maps = {
    "two layers: previous token": previous[0],
    "two layers: match": matching[0],
    "one layer: keys shifted by one": convolved,
}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "The same recall, by two layers of attention and by one layer with a convolution. A row is a token that asks, a column is a token that is looked at; letters are keys, digits values, and the outlined rows are questions. The first layer of the transformer finds the token next door. With its copies as keys, the second layer looks at the token behind the earlier occurrence. Keys that are shifted by one look at the same place at once.", "name": "keys-fig-induction"}, "image": {"alt": "Three square maps over the tokens of one sequence. The first has a dark line just below the diagonal. The second and third have, in each row of a question, one dark cell at the digit that stands behind the earlier occurrence of the letter asked for; other rows of the second map are spread over many cells."}}
ticks = ["·abcdefg01234567"[token] for token in shown[0]]
figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.7), sharey=True)
for axis, (name, weights) in zip(axes, maps.items(), strict=True):
    axis.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axis.set_title(name, fontsize=11)
    axis.set(xticks=range(len(ticks)), xticklabels=ticks, yticks=range(len(ticks)), yticklabels=ticks)
    axis.grid(visible=False)
    axis.set_xlabel("token looked at")
    for row in asks[0].nonzero().flatten().tolist():
        axis.axhspan(row - 0.5, row + 0.5, fill=False, edgecolor="C1", linewidth=1)
axes[0].set_ylabel("token that asks")
plt.show()

# %%
assert_close(previous[0, 1:].argmax(-1), torch.arange(len(ticks) - 1))
for row in asks[0].nonzero().flatten():
    answer = (shown[0] == asks[0, row]).nonzero().item()
    assert matching[0, row, answer] > 0.999
    assert convolved[row].argmax() == answer
    assert convolved[row].sum() == convolved[row, answer] == 1

# %% [markdown]
# What does each way cost? The previous-token head compares $T^2/2$ pairs of places. A filter of two taps takes two
# products a channel and token, and in decoding it keeps one token.
#
# Others have made their pairs in other ways.
#
# | who | where the neighbour comes from |
# |---|---|
# | softmax attention in two layers {cite:p}`olsson2022induction` | a previous-token head in the layer below |
# | H3 {cite:p}`fu2022hungry` | a state-space model that shifts, on the keys |
# | Mamba-2 {cite:p}`dao2024mamba2`, DeltaNet {cite:p}`yang2024parallelizing` | short convolutions, of width four as a rule |
# | in-context regression {cite:p}`vonoswald2022transformers` | a token that holds $x$ and $y$ side by side |
# | test-time regression {cite:p}`wang2025testtime` | keys made of neighbouring tokens, for any memory |
#
# ## Trained
#
# Does training find the shift? The model is an embedding, one memory with one head, and no MLP; keys have a filter of two
# taps. It has no SiLU behind it, so that keys stay linear in the tokens and can be read.
# Besides the two memories of {doc}`/notebooks/01_associative_recall` there are now softmax attention and exact least
# squares.
# Each is trained with keys large enough for the pairs, with keys too small, and without the convolution.

# %% tags=["hide-input"]
import logging

from lightning.pytorch import Trainer, seed_everything

# Lightning remarks on the machine it finds, so on every machine otherwise.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

# %%
from ttr.training import TokenPrediction


def train(design, key_dim, conv_on, seed):
    """A trained model of one layer, and its accuracy on sequences it has not seen."""
    seed_everything(seed, workers=True, verbose=False)
    how = sizes["training"]
    task = Recall(**sizes["task"], batch_size=how["batch_size"], num_train=how["steps"], num_val=8, seed=seed)
    module = TokenPrediction(
        vocab_size=task.vocab_size,
        design=design,
        **sizes["model"],
        **{"num_layers": 1, "num_heads": 1, "mlp_ratio": 0, "key_dim": key_dim},
        **{"conv_width": 2, "conv_on": conv_on, "conv_silu": False},
        **{"learning_rate": how["learning_rate"], "warmup_steps": 0, "weight_decay": 0.0},
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, task)
    return module.model.to(device).eval(), trainer.callback_metrics["val_accuracy"].item()


wide, narrow = sizes["key_dims"]
set_ups = {
    f"keys of {wide}": {"key_dim": wide, "conv_on": "k"},
    f"keys of {narrow}": {"key_dim": narrow, "conv_on": "k"},  # one more seed: here they differ most
    "no convolution": {"key_dim": wide, "conv_on": ""},
}
learners = {
    "linear attention": "linear_attention",
    "delta rule": "delta_net",
    "least squares": "intention",
    "softmax": "softmax_attention",
}
seeds = range(sizes["training"]["seeds"])
seeds_of = {set_up: range(len(seeds) + (how["key_dim"] == narrow)) for set_up, how in set_ups.items()}
trained = {
    (set_up, name, seed): train(slug, **how, seed=seed)
    for set_up, how in set_ups.items()
    for name, slug in learners.items()
    for seed in seeds_of[set_up]
}
accuracy = {
    (set_up, name): torch.tensor([trained[set_up, name, seed][1] for seed in seeds_of[set_up]])
    for set_up in set_ups
    for name in learners
}

# %% [markdown]
# What should keys too small be compared with? With the same memories built by hand, at every size of a key:
# random unit vectors for keys, one-hot vectors for values.
# To choose the right value is not hard, and linear attention always does with such keys, by
# {prf:ref}`recall-prop-choice`.
# What small keys take away is the *margin*, by which the entry of the right value exceeds the largest other entry, and
# the margin is what the rest of a model has to work with.
# {doc}`/notebooks/02_linear_attention` and {doc}`/notebooks/06_exact_least_squares` measure capacity at length;
# this is the slice at as many pairs as the task has.

# %%
draws, key_sizes = sizes["draws"], [size * wide // 16 for size in (2, 3, 4, 6, 8, 12, 16, 24)]
generator = torch.Generator().manual_seed(2)
margins, itself = {name: [] for name in learners}, torch.eye(num_pairs, dtype=torch.bool)
for size in key_sizes:
    k = normalize(torch.randn(draws, num_pairs, 1, size, generator=generator, dtype=torch.float64), dim=-1).to(device)
    v = torch.eye(num_pairs, dtype=k.dtype, device=device).expand(draws, -1, -1).unsqueeze(2)
    q, k = torch.cat([k, k], dim=1), torch.cat([k, torch.zeros_like(k)], dim=1)  # questions come last, store nothing
    v = torch.cat([v, torch.zeros_like(v)], dim=1)
    for name, (design, inputs) in memories(step_size=1.0, ridge=1e-9, bandwidth=0.35, like=k).items():
        y, _ = ttr.regress(design, q, k, v, **inputs)
        y = y[:, num_pairs:, 0].cpu()
        margin = y.diagonal(dim1=1, dim2=2) - y.masked_fill(itself, -math.inf).amax(-1)
        margins[name].append(margin.mean(1))
margins = {name: torch.stack(means) for name, means in margins.items()}

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: the margin of the right value in memories built by hand, with random keys, against the size of a key; bands are twice the standard error over draws, the grey line marks as many channels as pairs. Least squares has the whole margin from there on, softmax attention much of it before. Right: recall by trained layers, a point a seed. Dotted: chance, one in the number of pairs. With a convolution and room for the keys every memory solves the task. With fewer channels than pairs softmax attention alone does. Without a convolution none leaves chance.", "name": "keys-fig-trained"}, "image": {"alt": "Two plots. Left: four curves of the margin against key size; softmax attention is highest while there are fewer channels than pairs, least squares jumps to one where there are as many, linear attention and the delta rule rise slowly and stay below. Right: points for four memories in three groups; the first group is at one, in the second softmax attention alone is at one and the others are between chance and one, and the third group lies on the dotted line of chance."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), width_ratios=(1, 1.15))
chance = 1 / num_pairs
markers = dict(zip(learners, "osD^", strict=True))
for color, (name, means) in enumerate(margins.items()):
    mean, spread = means.mean(1), 2 * means.std(1) / draws**0.5
    left.plot(key_sizes, mean, color=f"C{color}", marker=markers[name], markersize=5, label=name)
    left.fill_between(key_sizes, mean - spread, mean + spread, color=f"C{color}", alpha=0.25, linewidth=0)
    for group, set_up in enumerate(set_ups):
        at = group + (color - 1.5) / 6
        right.scatter(
            [at] * len(seeds_of[set_up]),
            accuracy[set_up, name],
            color=f"C{color}",
            marker=markers[name],
            s=36,
            zorder=3,
        )
right.axhline(chance, color="0.4", linestyle=":", linewidth=1)
for axis in (left, right):
    axis.set_ylim(-0.15 if axis is left else 0, 1.05)
left.axvline(num_pairs, color="0.7", linewidth=1)
left.set(xlabel="channels of a key", ylabel="margin of the right value")
right.set(xticks=range(len(set_ups)), xticklabels=list(set_ups), xlim=(-0.5, len(set_ups) - 0.5))
right.set(xlabel="trained layer", ylabel="accuracy on new sequences")
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %%
solved, small, blind = set_ups
record("keys_chance", chance)
for name in learners:
    slug = name.replace(" ", "_")
    record(f"keys_solved_{slug}", accuracy[solved, name].min(), rtol=0, atol=0.02)
    record(f"keys_small_{slug}", accuracy[small, name].mean(), rtol=0, atol=0.03 if name == "softmax" else 0.4)
    record(f"keys_blind_{slug}", accuracy[blind, name].max(), rtol=0, atol=0.03)
    assert accuracy[solved, name].min() > 0.96
    assert (accuracy[blind, name] - chance).abs().max() < 0.04
    if name != "softmax":
        assert chance + 0.1 < accuracy[small, name].min() <= accuracy[small, name].max() < 0.97
assert accuracy[small, "softmax"].min() > 0.97

at_small = key_sizes.index(narrow)
for name in learners:
    record(f"keys_margin_{name.replace(' ', '_')}", margins[name][at_small].mean(), rtol=0, atol=0.03)
    if name != "softmax":
        assert margins[name][at_small].mean() < margins["softmax"][at_small].mean() - 0.1
enough = [size >= num_pairs for size in key_sizes]
assert margins["least squares"][enough].mean(1).min() > 0.99  # as many channels as pairs

# %% [markdown]
# With the convolution each memory solves the task. In its worst seed it answers
# {glue:text}`keys_solved_linear_attention:.3f` (linear attention), {glue:text}`keys_solved_delta_rule:.3f` (delta rule),
# {glue:text}`keys_solved_least_squares:.3f` (least squares) and {glue:text}`keys_solved_softmax:.3f` (softmax) of the
# questions.
# Without it, in its best seed: {glue:text}`keys_blind_linear_attention:.3f`, {glue:text}`keys_blind_delta_rule:.3f`,
# {glue:text}`keys_blind_least_squares:.3f` and {glue:text}`keys_blind_softmax:.3f`. Chance is
# {glue:text}`keys_chance:.3f`.
#
# With keys of fewer channels than pairs a linear memory cannot give back each value free of the others.
# The means over seeds are {glue:text}`keys_small_linear_attention:.2f` (linear attention),
# {glue:text}`keys_small_delta_rule:.2f` (delta rule) and {glue:text}`keys_small_least_squares:.2f` (least squares), and
# that of softmax attention is {glue:text}`keys_small_softmax:.2f`.
# It stores the pairs themselves, and a few channels are plenty to tell as many directions apart.
# By hand, with random keys of this size, its margin is {glue:text}`keys_margin_softmax:.2f`, that of
# least squares {glue:text}`keys_margin_least_squares:.2f`, of linear attention
# {glue:text}`keys_margin_linear_attention:.2f` and of the delta rule {glue:text}`keys_margin_delta_rule:.2f`.
#
# The figure does not rank the three linear memories: other seeds and longer training change their order, as the
# recorded runs on the page {doc}`/notebooks/study` show.
#
# ## What the layer has learnt
#
# The filter first. Each channel has two taps, and the sign of a channel means nothing, so we compare sizes.

# %%
taps = {
    (name, seed): trained[solved, name, seed][0].backbone.blocks[0].mixer.convolutions["k"].filter.weight.detach()
    for name in learners
    for seed in seeds
}
taps = {place: weight.squeeze(1).abs().cpu() for place, weight in taps.items()}  # (channels, 2): before, now
weight_before = {place: (t[:, 0].square().sum() / t.square().sum()).item() for place, t in taps.items()}
record("keys_taps_least", min(weight_before.values()), rtol=0, atol=0.15)
record("keys_taps_most", max(weight_before.values()), rtol=0, atol=0.1)
assert min(weight_before.values()) > 0.55

# %% [markdown]
# The taps began at random, the two of a channel alike on average. After training the tap on the token before holds
# {glue:text}`keys_taps_least:.2f` to {glue:text}`keys_taps_most:.2f` of their squared weight, from the lowest to the
# highest of all memories and seeds.
# It is not all of it, and it need not be, as we saw above: what counts is what a question reads.
#
# Linear attention answers $y_t = \sum_i (q_t^\top k_i)\, v_i$, so token $i$ contributes a vector of length
# $\lvert q_t^\top k_i\rvert\,\lVert v_i\rVert$. Here are these lengths for a trained layer.


# %%
def contributions(model, tokens):
    """|q·k| ‖v‖ for every pair of tokens: (batch, asking, looked at)."""
    block = model.backbone.blocks[0]
    x, mixer = block.mixer_norm(model.embedding(tokens)), block.mixer
    q, k, v = (mixer.projections[name](x) for name in "qkv")
    if "k" in mixer.convolutions:
        k, _ = mixer.convolutions["k"](k)
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    return ((q @ k.mT).abs() * v.norm(dim=-1)[:, None]).tril()


tokens, targets = recall_batch(torch.Generator().manual_seed(3), batch_size=64, **sizes["task"])
batch, row = (targets >= 0).nonzero(as_tuple=True)
column = (tokens[batch] == targets[batch, row, None]).int().argmax(1)  # where the value stands
looked, right = {}, {}
for set_up, seed in itertools.product((solved, blind), seeds):
    with torch.no_grad():
        lengths = contributions(trained[set_up, "linear attention", seed][0], tokens.to(device)).cpu()
    looked[set_up, seed] = lengths
    right[set_up, seed] = (lengths[batch, row].argmax(-1) == column).double().mean().item()
record("keys_reads_right", min(right[solved, seed] for seed in seeds), rtol=0, atol=0.06)
record("keys_reads_blind", max(right[blind, seed] for seed in seeds), rtol=0, atol=0.15)
assert min(right[solved, seed] for seed in seeds) > 0.85
assert max(right[blind, seed] for seed in seeds) < 0.5

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Left: the two taps of every channel of the trained key filters, in size; most lie above the diagonal, where the token before weighs more. Middle and right: how much each token of the pairs (column) adds to the answer at each question (row) in a trained linear attention, for one sequence, as a share of the row's largest; dots mark the value that is asked for. With the convolution a question reads its value. Without it, all questions look at the same tokens.", "name": "keys-fig-inside"}, "image": {"alt": "Left: a scatter of points for four memories, most above the diagonal. Middle: a map with one dark cell a row, each under a dot. Right: a map with dark cells in other places than those marked by dots."}}
figure, (scatter, *maps) = plt.subplots(1, 3, figsize=(9.8, 3.7), width_ratios=(1, 1.1, 1.1))
for color, name in enumerate(learners):
    points = torch.cat([taps[name, seed] for seed in seeds])
    look = {"color": f"C{color}", "marker": markers[name], "label": name}
    scatter.scatter(points[:, 1], points[:, 0], s=14, alpha=0.8, **look)
top = max(t.max().item() for t in taps.values()) * 1.05
scatter.plot([0, top], [0, top], color="0.5", linewidth=1, linestyle=":")
scatter.set(xlabel="tap on the token itself", ylabel="tap on the token before", xlim=(0, top), ylim=(0, top))
questions, pairs = (targets[0] >= 0).nonzero().flatten(), 2 * num_pairs
for axis, set_up in zip(maps, (solved, blind), strict=True):
    rows = looked[set_up, 0][0, questions, :pairs]
    axis.imshow(rows / rows.amax(-1, keepdim=True), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    values = [(tokens[0] == targets[0, t]).int().argmax().item() for t in questions]
    axis.plot(values, range(len(values)), "o", color="C1", markersize=5)
    axis.set_title("with convolution" if set_up == solved else "without", fontsize=11)
    if num_pairs < 10:
        axis.set(xticks=range(pairs), xticklabels=[f"{'kv'[n % 2]}{n // 2 + 1}" for n in range(pairs)])
        axis.set(yticks=range(num_pairs), yticklabels=range(1, num_pairs + 1))
        axis.tick_params(labelsize=9)
    axis.set(xlabel="token looked at", ylabel="question")
    axis.grid(visible=False)
figure.legend(*scatter.get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# With the convolution the largest contribution to an answer comes from the right token in at least
# {glue:text}`keys_reads_right:.2f` of all questions. Without it, in at most {glue:text}`keys_reads_blind:.2f`.
# The trained layer has found the map in the right panel of {numref}`keys-fig-induction`.
#
# ## Limits
#
# ````{admonition} Where the making of keys meets the memories
# :class: tip
# 1. Only the present tap ($c_1 = 0$): single tokens, and {prf:ref}`keys-theorem-bag`.
# 2. One-hot shifted keys, none twice, $\beta = 1$ and $\lambda \to 0$: linear attention, the delta rule and least
#    squares are the same table.
# 3. A key that comes again: $\beta = 1$ keeps the last follower, least squares their mean, linear attention their sum.
# 4. $h \to 0$: softmax attention becomes least squares with $\lambda \to 0$, wherever the key has been seen.
# 5. One token at a time: a layer with a filter of width $w$ carries its memory and $w - 1$ tokens.
# ````

# %%
sequence = torch.randint(1, 32, (1, 12), generator=torch.Generator().manual_seed(4))
permuted = torch.cat([sequence[:, :11].flip(1), sequence[:, 11:]], dim=1)
model = random_model("intention", "k", seed=0)
with torch.no_grad():
    model.backbone.blocks[0].mixer.convolutions["k"].filter.weight[..., 0] = 0  # c₁
    assert_close(model(permuted.to(device))[:, -1], model(sequence.to(device))[:, -1])


def last_answers(*tokens):
    """What each memory says of the last token's followers."""
    q, k, v = neighbours(torch.tensor([tokens]), 10)
    asked = memories(step_size=1.0, ridge=1e-9, bandwidth=0.15, like=k)
    return {name: ttr.regress(design, q, k, v, **inputs)[0][0, -1, 0].cpu() for name, (design, inputs) in asked.items()}


y = last_answers(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0)
assert_close(y["delta rule"], y["linear attention"])
assert_close(y["least squares"], y["linear attention"])
assert_close(y["softmax"], y["linear attention"])

y = last_answers(0, 1, 0, 2, 0)  # followed by 1, then by 2
assert y["linear attention"][:3].tolist() == [0, 1, 1]
assert y["delta rule"][:3].tolist() == [0, 0, 1]
assert_close(y["least squares"][:3], torch.tensor([0, 0.5, 0.5]).double())
assert_close(y["softmax"], y["least squares"])

x, cache, steps = one_hot(tokens[:2, :8] % vocab_size, vocab_size).double().to(device), None, []
with torch.no_grad():
    for t in range(x.shape[1]):
        step, cache = layer.step(x[:, t], cache)
        steps.append(step)
    assert_close(torch.stack(steps, dim=1), layer(x))
assert cache.past["k"].shape[1] == 1  # width two: one token

# %% [markdown]
# ## Exercises
#
# ```{exercise} A value that comes late
# :label: keys-exercise-gap
# Let there be a filler between every key and its value. Which filter recalls now, and what is the narrowest that can?
# Build it.
# ```
#
# ```{solution-start} keys-exercise-gap
# :class: dropdown
# ```
#
# The value must see the token two places back, so the filter needs width three and the taps $(1, 0, 0)$.
# With width two the memory stores (key, filler), (filler, value) and (value, next key). None of the three holds a key
# together with its own value.

# %%
tokens, targets = recall_batch(torch.Generator().manual_seed(6), 64, vocab_size=64, length=32, num_pairs=6)
spaced, answers = torch.zeros(64, 18, dtype=torch.long), torch.full((64, 18), -100)
spaced[:, 0::3], spaced[:, 2::3] = tokens[:, 0:12:2], tokens[:, 1:12:2]
spaced, answers = torch.cat([spaced, tokens[:, 12:]], dim=1), torch.cat([answers, targets[:, 12:]], dim=1)
x = one_hot(spaced, 64).double().unsqueeze(2)
x[..., 0] = 0  # a filler is no value
share = {}
for by in (1, 2):
    y, _ = ttr.regress(hebbian, x, shifted(x, by), x)
    share[by] = (y[:, :, 0][answers >= 0].argmax(-1) == answers[answers >= 0]).double().mean().item()
assert share == {1: 0.0, 2: 1.0}

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} The other direction
# :label: keys-exercise-reverse
# Put the filter on the values instead of the keys. What does the memory recall? Why can no causal filter on the values
# make it recall forwards?
# ```
#
# ```{solution-start} keys-exercise-reverse
# :class: dropdown
# ```
#
# Now the pair stored at a token is (token itself, token before it): asked for a value, it gives the key.
# To recall forwards with $k_t = x_t$ one needs $v_t = x_{t+1}$, which is not known at time $t$.
# The pair can be made when its second half has come, and then it is the *key* that lies in the past.

# %%
x = one_hot(tokens, 64).double().unsqueeze(2)
y, _ = ttr.regress(hebbian, x, x, shifted(x))
assert_close(y[:, 1:12:2], x[:, 0:12:2])  # at a value: its key

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} Two tokens back
# :label: keys-exercise-trigram
# Which keys turn linear attention into a table of what follows each *pair* of tokens? How large is the state?
# ```
#
# ```{solution-start} keys-exercise-trigram
# :class: dropdown
# ```
#
# $k_t = x_{t-1} \otimes x_{t-2}$ and $q_t = x_t \otimes x_{t-1}$: a feature map behind a filter of width three.
# With a vocabulary of $n$ tokens the state has $n^2 \times n$ entries instead of $n \times n$.

# %%
text = torch.randint(4, (1, 300), generator=generator)
x = one_hot(text, 4).double()
both = (x.unsqueeze(-1) * shifted(x).unsqueeze(-2)).flatten(2).unsqueeze(2)  # the token and the one before
_, state = ttr.regress(hebbian, both, shifted(both), x.unsqueeze(2))
counts = torch.zeros(4, 4, 4, dtype=torch.float64)
for first, second, third in zip(text[0], text[0, 1:], text[0, 2:], strict=False):
    counts[second, first, third] += 1
assert_close(state.memory[0, 0], counts.flatten(0, 1))

# %% [markdown]
# ```{solution-end}
# ```
#
# ```{exercise} How sharp must attention be?
# :label: keys-exercise-bandwidth
# A softmax memory with shifted one-hot keys answers with its largest entry. By
# {prf:ref}`keys-proposition-bigram`, for which bandwidths does it recall a pair that was seen once, when the
# value has occurred once, and the commonest token that never followed the key $U$ times?
# ```
#
# ```{solution-start} keys-exercise-bandwidth
# :class: dropdown
# ```
#
# The entry of the value is $(w - 1) + 1$ and that of the other token $U$, over the same denominator.
# So $w > U$, that is $h < 1 / \sqrt{\log U}$.
# The rarer a pair is among all tokens, the sharper attention has to be. Linear attention and least squares do not care:
# a token that never followed the key has an entry of zero there.

# %%
U = 20
text = torch.tensor([[1, 2, *[0] * U, 1]])  # 1 is followed by 2, then U fillers, then the question
q, k, v = neighbours(text, 3)
critical = 1 / math.log(U) ** 0.5
for h, value in ((0.99 * critical, 2), (1.01 * critical, 0)):
    y, _ = ttr.regress(softmax(h), q, k, v)
    assert y[0, -1, 0].argmax() == value

# %% [markdown]
# ```{solution-end}
# ```
#
# ## Further reading
#
# {cite:t}`arora2023zoology` made multi-query recall the measure of efficient language models, and
# {cite:t}`olsson2022induction` found the heads that do it.
# {cite:t}`sanford2024onelayer` is the lower bound for a single layer of attention.
# {cite:t}`fu2022hungry` put a shift into a layer in order to recall, {cite:t}`wang2025testtime` place the making of pairs
# in front of every memory, and {cite:t}`akyurek2024incontext` go on to more than two tokens.
# Which memory to put behind the keys is the subject of {doc}`/notebooks/11_training_on_tasks`, and the recorded
# study of this task is on the page {doc}`/notebooks/study`.
