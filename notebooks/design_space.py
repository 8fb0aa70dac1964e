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
# table below is made from `ttr.atlas`. Type a word or choose on an axis to narrow it. Every row runs and trains: copy
# its line of code, and give it the inputs it names.

# %% tags=["parameters", "remove-cell"]
scale = "smoke"
device = "cpu"

# %% tags=["remove-cell"]
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


# %% tags=["hide-input"]
def code(design):
    """The line that makes this design: by its slug where it has one, else by its choices."""
    publication = design.publication
    if publication and ttr.atlas[publication.slug] == design:
        return f'ttr.atlas["{publication.slug}"]'
    return str(design)


def breakable(choice):
    """The choice as text that a narrow column may break."""
    return escape(str(choice).replace("()", "")).replace("(", "(<wbr>").replace("=", "=<wbr>")


def row(design):
    publication = design.publication
    name = f"{publication.name} ({publication.year})" if publication else "no name in the atlas"
    rule = (
        f'<div class="math notranslate nohighlight">\\[{escape(design.update_rule())}\\]</div>' if publication else ""
    )
    inputs = ", ".join(design.inputs) or "none"
    cost = ", ".join(f"{name} {text}" for name, text in design.cost().as_text().items())
    ends = "".join(f"<li>{escape(str(limit))}</li>" for limit in design.limits() if limit.becomes.name)
    limits = f"<p>Limits:</p><ul>{ends}</ul>" if publication and ends else ""
    cites = f"<p>Cite: <code>{publication.cite}</code>.</p>" if publication else ""
    data = "".join(f' data-{axis}="{escape(str(choice))}"' for axis, choice in zip(AXES, design.choices, strict=True))
    choices = "".join(f"<td>{breakable(choice)}</td>" for choice in design.choices)
    detail = f"{rule}<p>Inputs: {inputs}.</p><p>Cost of a head: {cost}.</p>{limits}{cites}<p><code>{escape(code(design))}</code></p>"
    return (
        f'<tr data-published="{"yes" if publication else "no"}"{data}>'
        f'<th scope="row"><details><summary>{escape(name)}</summary>{detail}</details></th>{choices}</tr>'
    )


def select(axis):
    counts = Counter(str(getattr(design, axis)) for design in cells)
    options = "".join(f'<option value="{escape(choice)}">{escape(choice)}</option>' for choice in counts)
    return f'<label>{axis} <select data-axis="{axis}"><option value="">any</option>{options}</select></label>'


published_first = sorted(cells, key=lambda design: design.publication is None)
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
    "<tbody>" + "".join(map(row, published_first)) + "</tbody></table></div></div>"
    '<link rel="stylesheet" href="../_static/atlas.css"><script defer src="../_static/atlas.js"></script>'
)

# %% [markdown]
# The table holds {glue:text}`space_cells` combinations that make sense. The atlas knows {glue:text}`space_published`
# published names, for {glue:text}`space_named` of them; {glue:text}`space_unnamed` have no name in it, which does not
# say that nobody has used them. Costs are of one head and leading terms only: T tokens, d channels of key and value,
# f features of a key, C a chunk, n the steps of a solver, w a window.
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
