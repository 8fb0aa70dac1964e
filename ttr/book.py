"""What notebooks need beyond the public face: golden numbers, the look of figures, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

# Okabe and Ito's palette, whose colours stay apart under the common forms of colour blindness, without its
# yellow, which cannot be seen as a line on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")

STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "figure.figsize": (7.0, 4.0),
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "white",
    "svg.hashsalt": "ttr",  # without it the ids inside an SVG differ from run to run
}


def use_style() -> None:
    """Give figures the book's palette and sizes; in notebooks make them SVG, equal from run to run."""
    import matplotlib.style
    from cycler import cycler
    from IPython.core.getipython import get_ipython

    matplotlib.style.use(STYLE | {"axes.prop_cycle": cycler(color=OKABE_ITO)})
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """An HTML table that scrolls by itself where it is too wide; the first column names the row."""
    from IPython.display import HTML

    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return HTML(
        f'<div style="overflow-x: auto" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="table">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def record(name: str, value: Any, *, rtol: float = 1e-3, atol: float = 0.0, corpus: str | None = None) -> None:
    """Show a number, make it citable in the prose as ``{glue:text}`name``` and hold it to the golden file.

    Numbers agree where ``|value − golden| ≤ atol + rtol·|golden|``, strings where they are equal.

    Args:
        name: unique in the chapter.
        value: a number, a string or a flat list of these; 0-d and 1-d arrays and tensors are taken as such.
        rtol: relative tolerance of the comparison.
        atol: absolute tolerance of the comparison.
        corpus: digest of the text the value was computed from; another digest is not comparable.

    Raises:
        ValueError: a value of another kind, or one that is not finite.
    """
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    value = value.tolist() if hasattr(value, "tolist") else value
    entries = value if isinstance(value, list) else [value]
    numbers = [entry for entry in entries if not isinstance(entry, str)]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"record {name!r}: expected finite numbers, strings or a flat list of them, got {value!r}")
    if get_ipython() is not None:
        prefix = "application/papermill.record/"  # myst-nb's mark of an output that is stored and not shown
        golden = {"value": value, "rtol": rtol, "atol": atol} | ({"corpus": corpus} if corpus else {})
        metadata = {"scrapbook": {"name": name, "mime_prefix": prefix}, "golden": golden}
        display({f"{prefix}text/plain": str(value)}, raw=True, metadata=metadata)
    shown = [f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in entries]
    print(f"{name} = {', '.join(shown)}")
