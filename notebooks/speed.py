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
# # Speed
#
# What does each memory cost, and from which length on is it cheaper than softmax attention?
#
# Times of one machine say little about another. So everything here was measured in one run, op beside op, and is
# compared with two things of that same run: PyTorch's own `scaled_dot_product_attention`, and a large matrix product,
# which is about as fast as this machine can compute. `make bench` makes the record that this page reads. The page
# itself times nothing.

# %% tags=["parameters", "remove-cell"]
scale = "smoke"
device = "cpu"

# %% tags=["remove-cell"]
import sys

import matplotlib.pyplot as plt
from IPython.display import Markdown

sys.path.insert(0, "..")  # the record and what reads it are beside the package, not in it
from benchmarks import cases, estimate, provenance, record
from ttr.book import OKABE_ITO, table, use_style

use_style()
recorded = record.load()
figures = record.Figures(recorded)

# %% tags=["remove-input"]
product = recorded["matrix_product"]
products_a_second = product["flops"] / record.median(product)
Markdown(
    f"{record.provenance(recorded)} A large float32 matrix product runs at {products_a_second / 1e9:.0f} GFLOP/s there."
)

# %% [markdown]
# ## Time over length
#
# Four heads, keys and values of 64 channels, float32. A line of slope one is a cost in proportion to the length; a line
# of slope two is a cost for every pair of tokens. The recurrent memories read two sequences at once, the local
# polynomials one, and each panel has attention at the same size.


# %% tags=["remove-cell"]
RECURRENT = {
    "linear attention": record.HEBBIAN,
    "delta rule": record.DELTA,
    "least squares (ridge decays)": record.FADING,
    "least squares (ridge stays)": record.STAYING,
    "TTT-MLP": "neural_memory, TTT-MLP",
}
LOCAL = {
    "degree 0": "local_polynomial, degree 0",
    "Parallax": "local_polynomial, Parallax",
    "degree 1 (conjugate gradients)": record.SLOPE,
    "degree 1 (direct)": "local_polynomial, degree 1, direct",
}
PANELS = ((RECURRENT, 2), (LOCAL, 1))


def over_lengths(op, batch, figure, direction="forward"):
    """The lengths at which an op was measured, and a figure of each."""
    rows = [row for row in recorded["rows"] if (row["op"], row["batch"], row["direction"]) == (op, batch, direction)]
    return [row["time"] for row in rows], [figure(row) for row in rows]


def plot(figure, label, reference=None):
    """A panel for the recurrent memories and one for the local polynomials, each with attention in black."""
    _, axes = plt.subplots(1, 2, figsize=(8.6, 5.4), sharey=True)
    for ax, (ops, batch) in zip(axes, PANELS, strict=True):
        for (name, op), colour, marker in zip(ops.items(), OKABE_ITO, "os^Dv", strict=False):
            ax.loglog(*over_lengths(op, batch, figure), color=colour, marker=marker, markersize=4, label=name)
        attention = over_lengths(record.ATTENTION, batch, figure)
        ax.loglog(*attention, color="black", marker="x", linestyle="--", label="softmax attention")
        if reference:
            first, op = next(iter(ops.items()))
            bound = over_lengths(op, batch, reference)
            ax.loglog(*bound, color="grey", linestyle=":", label=f"matrix products of {first}")
        ax.set(xlabel="length $T$ (tokens)", title="recurrent memories" if batch == 2 else "local polynomials")
        ax.set_xscale("log", base=2)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8)
    axes[0].set_ylabel(label)
    plt.show()


# %% tags=["remove-input"] mystnb={"figure": {"caption": "Seconds of a forward over the length, both axes logarithmic; the median of the repetitions. The dotted line is the time that the first op of the legend would take if all its operations ran at the rate of a large matrix product.", "name": "fig-speed-time"}, "image": {"alt": "Two log-log plots of seconds against length. Left, five recurrent memories up to the longest sequences and, dashed and steeper, softmax attention up to shorter ones. Right, four local polynomials, whose lines are as steep as that of softmax attention. A dotted grey line in each panel marks the rate of matrix products."}}
plot(record.median, "seconds, forward", lambda row: row["flops"] / products_a_second)


# %% tags=["remove-input"]
def first_faster(op, direction):
    """The shortest measured length from which on an op takes less time than attention; None where there is none."""
    own, attention = (
        dict(zip(*over_lengths(name, 2, record.median, direction), strict=True)) for name in (op, record.ATTENTION)
    )
    slower = [time for time in own if time in attention and own[time] >= attention[time]]
    return min((time for time in own if time in attention and time > max(slower, default=0)), default=None)


def listed(direction):
    starts = {name: first_faster(op, direction) for name, op in RECURRENT.items()}
    return "; ".join(
        f"{name} from {time} tokens on" if time else f"{name} at no measured length" for name, time in starts.items()
    )


growth = max(figures.growth(op) for op in RECURRENT.values())
local = "; ".join(f"{name}: {figures.ratio(op, record.ATTENTION, 2048, batch=1):.1f}" for name, op in LOCAL.items())
Markdown(
    f"Cheaper than softmax attention in a forward: {listed('forward')}. With the backward pass: "
    f"{listed('forward+backward')}. Twice the length costs the recurrent memories in the left panel at most "
    f"{growth:.2f} times as much. At 2048 tokens the local polynomials take so many times as long as attention: {local}."
)

# %% [markdown]
# ## Memory over length
#
# What does a call need beside its inputs? Each figure is from a process of its own: the growth of its largest resident
# size during the call, outputs included.

# %% tags=["remove-input"] mystnb={"figure": {"caption": "Peak memory of a forward beyond its inputs, over the length, both axes logarithmic.", "name": "fig-speed-memory"}, "image": {"alt": "Two log-log plots of peak memory in mebibytes against length, recurrent memories left and local polynomials right, each with softmax attention dashed."}}
page_size = 4096  # a call that fits into what the process already had has no growth, which a logarithm cannot show
plot(lambda row: max(row["peak_bytes"], page_size) / 2**20, "MiB, forward")

# %% tags=["remove-input"]
longest = min(max(over_lengths(op, 2, record.median)[0]) for op in RECURRENT.values())
needs = {name: figures.row(op, longest)["peak_bytes"] / 2**20 for name, op in RECURRENT.items()}
Markdown(
    f"At {longest} tokens: " + "; ".join(f"{name}: {need:.0f} MiB" for name, need in needs.items()) + ". "
    f"One of the inputs q, k and v is {4 * 2 * longest * cases.HEADS * cases.DIM / 2**20:.0f} MiB."
)

# %% [markdown]
# ## Token by token
#
# A language model writes one token at a time. Then a memory takes a step from its state, and what counts is the
# latency: one sequence, eight heads, 64 channels.


# %% tags=["remove-input"]
steps = sorted(recorded["steps"], key=record.median)
table(
    f"A single step of the designs in the atlas, from {1e6 * record.median(steps[0]):.0f} to "
    f"{1e6 * record.median(steps[-1]):.0f} µs",
    ("design", "µs", "relative error"),
    [(row["design"], f"{1e6 * record.median(row):.0f}", f"{row['error']:.0e}") for row in steps],
)

# %% [markdown]
# ## What was aimed at
#
# How good is good enough? Each of these ratios has an aim. Where one is missed, the table says so.

# %% tags=["remove-input"]
missed = [ratio["name"] for ratio in recorded["ratios"] if not record.reached(ratio)]
table(
    f"{len(recorded['ratios']) - len(missed)} of {len(recorded['ratios'])} aims are reached",
    ("ratio", "measured", "aim", "reached"),
    [
        (ratio["name"], f"{ratio['value']:.3g}", record.bound(ratio), "yes" if record.reached(ratio) else "no")
        for ratio in recorded["ratios"]
    ],
)

# %% [markdown]
# ## All figures
#
# The error stands beside the time: that of the float32 answers against the same call in float64. With the backward
# pass it is the largest among the gradients. A solver that iterates stops at a tolerance, and is held to answers with
# a much smaller one.

# %% tags=["remove-input"]
rows = sorted(recorded["rows"], key=lambda row: (row["op"], row["batch"], row["direction"], row["time"]))
table(
    f"All {len(rows)} measurements: median of the repetitions, peak memory beyond the inputs",
    ("op", "sequences", "direction", "T", "ms", "MiB", "relative error"),
    [
        (
            row["op"], str(row["batch"]), row["direction"], str(row["time"]), f"{1e3 * record.median(row):.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{row['error']:.0e}",
        )
        for row in rows
    ],
)  # fmt: skip

# %% [markdown]
# ## On a GPU: an estimate
#
# How fast are the Triton kernels? Nobody has measured them yet: there was no GPU. What can be said without one is how
# much they compute and move, and what the compiler made of them. No op is faster than the *least time*: its
# operations at the GPU's peak, or its inputs and outputs at the bandwidth of its memory, whichever takes longer. The
# *estimate* adds up the launches: what each computes, what it moves, and how many products wait for one another.
# `python -m benchmarks.estimate` makes it anew, and `make bench DEVICE=cuda` measures.

# %% tags=["remove-input"]
estimated = provenance.load(estimate.RECORDED)
forwards = [row for row in estimated["rows"] if row["direction"] == "forward" and "roofline" in row]
furthest = max(forwards, key=lambda row: row["seconds"] / row["roofline"])
nearest = min(forwards, key=lambda row: row["seconds"] / row["roofline"])
Markdown(
    f"{provenance.sentence(estimated)} Forwards the estimates are {nearest['seconds'] / nearest['roofline']:.1f} times "
    f"the least time ({nearest['op']}) to {furthest['seconds'] / furthest['roofline']:.1f} times "
    f"({furthest['op']}; most of it in {estimate.slowest(furthest)})."
)

# %% tags=["remove-input"]
table(
    f"An estimate, not a measurement: {len(estimated['rows'])} calls on an {estimated['device']}, bfloat16",
    ("op", "direction", "shape", "ms, estimated", "ms, least", "GFLOP", "MiB moved", "FLOP a byte", "slowest kernel"),
    [estimate.cells(row) for row in estimated["rows"]],
)
