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
# # The design space
#
# Which memories have a name, which have none, and what is the difference between two of them?
#
# A memory is a choice on five axes: the *weights* of past pairs, the *regressor* that is fitted, the *optimizer* that
# (nearly) solves the fit, the *loss*, and the *retention* that holds an optimizer's steps near the old memory. The
# table below is made from `ttr.atlas`. Type a word or choose on an axis to narrow it. Choose a memory to see its update
# rule, its cost, the chapter that derives it, its citation, and the line of code that makes it. Every row runs and
# trains: copy the line, and give it the inputs it names.

# %% tags=["parameters", "remove-cell"]
scale = "smoke"
device = "cpu"

# %% tags=["remove-cell"]
import json
import re
import textwrap
from collections import Counter
from html import escape

from IPython.display import HTML

import ttr
from ttr.book import record

AXES = ("weights", "regressor", "optimizer", "loss", "retention")
cells = list(ttr.atlas.cells())
unnamed = [design for design in cells if design.name is None]

# %% tags=["remove-cell"]
record("space_published", len(ttr.atlas))
record("space_cells", len(cells))
record("space_named", len(cells) - len(unnamed))
record("space_unnamed", len(unnamed))
assert all(design in cells for design in ttr.atlas.values())

# %% tags=["remove-cell"]
# The chapter that derives each published memory.
CHAPTERS = {
    ("02_linear_attention", "Linear attention"): "linear_attention performer based",
    ("03_state_space_models", "State-space models"): "retnet mamba2 gla mlstm s4d",
    ("04_delta_rule", "Fast weights: the delta rule"): (
        "delta_net gated_delta_net kda delta_product momentum_delta_net"
    ),
    ("05_online_learners", "Online learners"): "nlms longhorn preconditioned_delta_net",
    ("06_exact_least_squares", "Exact least squares"): "recursive_least_squares intention mesa_net",
    ("07_neural_memories", "Neural memories"): ("ttt_linear ttt_mlp titans moneta yaad memora atlas_memory swila"),
    ("08_softmax_attention", "Softmax attention"): (
        "softmax_attention qk_norm_attention sliding_window_attention forgetting_attention"
    ),
    ("09_higher_order_attention", "Higher-order attention"): (
        "local_linear_attention local_quadratic_attention parallax"
    ),
}
chapter_of = {slug: chapter for chapter, slugs in CHAPTERS.items() for slug in slugs.split()}
assert set(chapter_of) == set(ttr.atlas)


# %% tags=["remove-cell"]
def code(design):
    """The line that makes this design: by its slug where it has one, else by its choices."""
    publication = design.publication
    if publication and ttr.atlas[publication.slug] == design:
        return f'ttr.atlas["{publication.slug}"]'
    return re.sub(r"\b([A-Z][A-Za-z0-9]*\()", r"ttr.\1", str(design))


assert all(eval(code(design), {"ttr": ttr}) == design for design in cells)


class Numbered(dict):
    """Each text once, by number: rows share most of what they say."""

    def __call__(self, text):
        return self.setdefault(text, len(self))


def about(design):
    """All that the page shows of a design, as numbers of texts."""
    publication = design.publication
    row = {
        "choices": [choices[axis](str(choice)) for axis, choice in zip(AXES, design.choices, strict=True)],
        "rule": [rules(line) for line in lines_of(design)],
        "cost": costs(", ".join(f"{name} {text}" for name, text in design.cost().as_text().items())),
        "inputs": inputs(", ".join(design.inputs) or "none"),
        "cites": [references(key) for key in design.cites()],
    }
    if publication is None:
        nearest = ttr.identify(design).nearest
        return row | {"near": [[slug, *(AXES.index(axis) for axis in axes)] for slug, axes in nearest.items()][:4]}
    row |= {"name": f"{publication.name} ({publication.year})", "slug": publication.slug}
    if code(design) == f'ttr.atlas["{publication.slug}"]':
        row["line"] = code(design)
    limits = [str(limit) for limit in design.limits() if limit.becomes.name]
    return row | ({"limits": limits} if limits else {})


def lines_of(design):
    """The lines of the update rule inside its LaTeX environment."""
    inside = design.update_rule().removeprefix(r"\begin{aligned}").removesuffix(r"\end{aligned}")
    return inside.split(r" \\ ")


published_first = sorted(cells, key=lambda design: design.publication is None)
choices = {axis: Numbered() for axis in AXES}
rules, costs, inputs, references = (Numbered() for _ in range(4))
rows = [about(design) for design in published_first]
bibtex = {}
for design in cells:
    bibtex |= zip(design.cites(), design.citation().split("\n\n"), strict=True)
data = {
    "choices": {axis: list(texts) for axis, texts in choices.items()},
    "rules": list(rules),
    "costs": list(costs),
    "inputs": list(inputs),
    "references": [[key, bibtex[key]] for key in references],
    "chapters": {slug: [f"{file}.html", f"{int(file[:2])}. {title}"] for slug, (file, title) in chapter_of.items()},
    "rows": rows,
}


# %% tags=["hide-input"]
def select(axis):
    counts = Counter(str(getattr(design, axis)) for design in cells)
    options = "".join(f'<option value="{escape(choice)}">{escape(choice)}</option>' for choice in counts)
    return f'<label>{axis} <select data-axis="{axis}"><option value="">any</option>{options}</select></label>'


def line(design):
    """A row for readers without scripts, and for the search; scripts build their own from the data."""
    publication = design.publication
    file, title = chapter_of[publication.slug]
    return (
        f'<tr><th scope="row">{escape(publication.name)} ({publication.year}), <a href="{file}.html">{title}</a></th>'
        + "".join(f"<td>{escape(str(choice))}</td>" for choice in design.choices)
        + "</tr>"
    )


HTML(
    '<div class="ttr-atlas"><div class="ttr-atlas-filters">'
    '<label>search <input type="search" data-search></label>'
    + "".join(map(select, AXES))
    + '<label><input type="checkbox" data-unnamed> show cells without a name in the atlas</label></div>'
    '<p role="status" data-count></p>'
    '<div class="ttr-atlas-scroll" tabindex="0" role="region" aria-label="Design space"><table>'
    '<thead><tr><th scope="col">memory</th>'
    + "".join(f'<th scope="col">{axis}</th>' for axis in AXES)
    + "</tr></thead>"
    "<tbody>" + "".join(map(line, ttr.atlas.values())) + "</tbody></table></div>"
    '<p><button type="button" data-more hidden>show more</button></p>'
    '<script type="application/json" data-atlas>'
    + json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    + "</script></div>"
    '<link rel="stylesheet" href="../_static/atlas.css"><script defer src="../_static/atlas.js"></script>'
)

# %% [markdown]
# The table holds {glue:text}`space_cells` combinations that make sense. The atlas knows {glue:text}`space_published`
# published names, for {glue:text}`space_named` of them (a name may have several forms). The other
# {glue:text}`space_unnamed` have no name in it, which does not say that nobody has used them.
# {doc}`/notebooks/14_make_your_own` takes some of these and trains them.
#
# Costs are of one head and leading terms only: T tokens, d channels of key and value, f features of a key, C a chunk,
# n the steps of a solver, w a window.
#
# A combination that makes no sense is refused, with the two choices that clash:

# %%
try:
    ttr.Design(weights=ttr.Kernel(), optimizer=ttr.GradientDescent())
except ValueError as error:
    print(textwrap.fill(str(error), 80))

# %% [markdown]
# ## What the choices mean
#
# Weights say how much each past pair counts. They multiply: `Kernel() * Decay()` counts pairs that are near the query
# *and* recent. A design whose optimizer keeps one memory for all queries cannot use weights that change with the query.
#
# Which known memory is near a design, and what does it become at its ends? `ttr.identify` says:

# %%
print(ttr.identify(ttr.Design(ttr.Decay(), optimizer=ttr.GradientDescent(), loss=ttr.Huber())))

# %% [markdown]
# One layer of the literature stays outside, and the atlas says why:

# %% tags=["hide-input"]
for baseline in ttr.atlas.baselines.values():
    print(textwrap.fill(f"{baseline.publication.name}: {baseline.why}.", 80))

# %% [markdown]
# A cell without a name is not a promise. It is a memory that runs on its definition (`ttr.oracle`, with a
# `ttr.SlowPathWarning`) or on a fast op, and that trains like any other:

# %%
robust = ttr.Design(ttr.Decay(), optimizer=ttr.GradientDescent(), loss=ttr.Huber())
print(robust.name, "takes", robust.inputs)

# %% tags=["hide-input"]
from IPython.display import Math

Math(robust.update_rule())

# %% [markdown]
# To cite the works behind a design, ask it: `print(robust.citation())`.
