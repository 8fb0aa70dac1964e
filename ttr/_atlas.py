"""The published points of the design space, a row each, and the cells around them."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from ttr._choices import (
    NLMS,
    Choice,
    ContinuousDecay,
    Decay,
    DiagonalNewton,
    EluPlusOne,
    Exact,
    GradientDescent,
    Hebbian,
    Huber,
    Implicit,
    Kernel,
    Linear,
    LocalPolynomial,
    PositiveRandom,
    SquaredError,
    Taylor,
    Uniform,
    Window,
)
from ttr._design import AXES, PUBLISHED, Design, Publication


@dataclass(frozen=True)
class Row:
    """A published layer: its name, its paper, its design, and the designs that go by the same name."""

    publication: Publication
    design: Design
    also: tuple[Design, ...] = ()


def _row(slug: str, name: str, year: int, cite: str, design: Design, *also: Design) -> Row:
    return Row(Publication(slug, name, year, cite), design, also)


_normalized = Hebbian(normalize=True)
_elu, _random, _taylor = Linear(EluPlusOne()), Linear(PositiveRandom()), Linear(Taylor())
_channel = Decay(per="channel")

ROWS = (
    _row(
        "linear_attention", "Linear attention", 2020, "katharopoulos2020transformers", Design(),
        Design(regressor=_elu), Design(regressor=_elu, optimizer=_normalized),
    ),
    _row(
        "performer", "Performer", 2020, "choromanski2020performers",
        Design(regressor=_random, optimizer=_normalized), Design(regressor=_random),
    ),
    _row(
        "based", "Based", 2024, "arora2024based",
        Design(regressor=_taylor, optimizer=_normalized), Design(regressor=_taylor),
    ),
    _row("retnet", "RetNet", 2023, "sun2023retnet", Design(Decay(fixed=True))),
    _row("mamba2", "Mamba-2", 2024, "dao2024mamba2", Design(ContinuousDecay())),
    _row("gla", "Gated linear attention", 2023, "yang2023gated", Design(_channel)),
    _row("delta_net", "DeltaNet", 2021, "schlag2021linear", Design(optimizer=GradientDescent())),
    _row("gated_delta_net", "Gated DeltaNet", 2024, "yang2024gateddelta", Design(Decay(), optimizer=GradientDescent())),
    _row("kda", "Kimi Delta Attention", 2025, "kimi2025linear", Design(_channel, optimizer=GradientDescent())),
    _row(
        "delta_product", "DeltaProduct", 2025, "siems2025deltaproduct",
        Design(optimizer=GradientDescent(steps=2)), Design(Decay(), optimizer=GradientDescent(steps=2)),
    ),
    _row("nlms", "Normalised LMS", 1967, "nagumo1967learning", Design(optimizer=GradientDescent(NLMS()))),
    _row("longhorn", "Longhorn", 2024, "liu2024longhorn", Design(optimizer=GradientDescent(Implicit()))),
    _row(
        "momentum_delta_net", "Momentum DeltaNet", 2026, "huang2026mdn",
        Design(Decay(), optimizer=GradientDescent(momentum=True)),
    ),
    _row(
        "preconditioned_delta_net", "Preconditioned DeltaNet", 2026, "tumma2026preconditioned",
        Design(Decay(), optimizer=GradientDescent(DiagonalNewton())),
    ),
    _row(
        "recursive_least_squares", "Recursive least squares", 1950, "plackett1950some",
        Design(optimizer=Exact()), Design(Decay(), optimizer=Exact()),
    ),
)  # fmt: skip

PUBLISHED.update({d.structure: row.publication for row in ROWS for d in (row.design, *row.also)})

# What `cells` combines; numbers are examples, since a cell is a kind of memory and not its settings.
CELLS: dict[str, tuple[Choice, ...]] = {
    "weights": (
        Uniform(), Decay(), _channel, Decay(fixed=True), ContinuousDecay(), Window(64),
        Kernel(), Kernel() * Decay(), Kernel() * Window(64),
    ),
    "regressor": (
        Linear(), _elu, _random, _taylor, LocalPolynomial(0), LocalPolynomial(1), LocalPolynomial(2),
    ),
    "optimizer": (
        Hebbian(), _normalized, GradientDescent(), GradientDescent(NLMS()), GradientDescent(Implicit()),
        GradientDescent(DiagonalNewton()), GradientDescent(momentum=True), GradientDescent(steps=2), Exact(),
        Exact(ridge_decays=False),
    ),
    "loss": (SquaredError(), Huber()),
}  # fmt: skip


class Table:
    """Rows that print as text in a terminal and as HTML in a notebook."""

    def __init__(self, header: tuple[str, ...], rows: list[tuple[str, ...]], caption: str):
        self.header, self.rows, self.caption = header, rows, caption

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([body[0], "  ".join("-" * width for width in widths), *body[1:], "", self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>"
        return f"<table>{caption}<thead>{line(self.header, 'th')}</thead><tbody>{body}</tbody></table>"


class UnknownDesign(KeyError, ValueError):
    """A slug that the atlas does not have."""

    __str__ = ValueError.__str__  # a KeyError would show its message quoted


class Atlas(Mapping[str, Design]):
    """The published designs by slug: `ttr.atlas["gated_delta_net"]`."""

    def __init__(self, rows: tuple[Row, ...]):
        self._rows = {row.publication.slug: row for row in rows}

    def __getitem__(self, slug: str) -> Design:
        if slug not in self._rows:
            near = difflib.get_close_matches(str(slug), self._rows, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UnknownDesign(f"design: expected one of {', '.join(self._rows)}, got {slug!r}{hint}")
        return self._rows[slug].design

    def __contains__(self, slug: object) -> bool:
        return slug in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Atlas({', '.join(self)})"

    def row(self, slug: str) -> Row:
        """The whole row: publication, design, and the designs that go by the same name."""
        self[slug]
        return self._rows[slug]

    def cells(self) -> Iterator[Design]:
        """Every combination of the choices that makes sense, named or not."""
        for choices in product(*CELLS.values()):
            try:
                yield Design(*choices)  # type: ignore[arg-type]
            except ValueError:
                continue

    def table(self) -> Table:
        """The published points, and how many cells around them the atlas has no name for."""
        rows = []
        for slug, row in self._rows.items():
            _, name, year, _ = row.publication
            rows.append((slug, f"{name} ({year})", *map(str, row.design.choices), ", ".join(row.design.inputs)))
        cells = list(self.cells())
        unnamed = sum(cell.name is None for cell in cells)
        caption = f"{len(self)} published points; {unnamed} of {len(cells)} cells have no name here."
        return Table(("slug", "name", *AXES, "inputs"), rows, caption)


atlas = Atlas(ROWS)
