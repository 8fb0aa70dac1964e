"""The published points of the design space, a row each, and the cells around them."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ttr._choices import (
    KL,
    L2,
    MLP,
    NLMS,
    Choice,
    ComplexDecay,
    ContinuousDecay,
    Decay,
    DiagonalNewton,
    EluPlusOne,
    Exact,
    Gaussian,
    GradientDescent,
    Hebbian,
    Huber,
    Implicit,
    InputGate,
    Kernel,
    Linear,
    LocalPolynomial,
    Lp,
    Lq,
    Mixture,
    Muon,
    NormalizedLinear,
    OnlineEM,
    PositiveRandom,
    Probe,
    Quadratic,
    SquaredError,
    Taylor,
    Uniform,
    Window,
)
from ttr._cost import Cost
from ttr._design import AXES, PUBLISHED, Design, Publication
from ttr._limits import Limit


@dataclass(frozen=True)
class Row:
    """A published layer: its name, its paper, its design, the designs that go by the same name, and its layer.

    `layer` holds the options of `ttr.layers.RegressionLayer` that are part of what was published.
    """

    publication: Publication
    design: Design
    also: tuple[Design, ...] = ()
    layer: Mapping[str, Any] = field(default_factory=dict)


def _row(slug: str, name: str, year: int, cite: str, design: Design, *also: Design, **layer: Any) -> Row:
    return Row(Publication(slug, name, year, cite), design, also, layer)


_normalized = Hebbian(normalize=True)
_elu, _random, _taylor = Linear(EluPlusOne()), Linear(PositiveRandom()), Linear(Taylor())
_channel = Decay(per="channel")
_mini_batches = GradientDescent(batch=16, average=True)
_constant, _slope, _curve = (LocalPolynomial(degree) for degree in range(3))

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
    _row(
        "mlstm", "mLSTM", 2024, "beck2024xlstm",
        Design(Decay() * InputGate(exponential=True), optimizer=Hebbian(normalize=True, floor=1.0)),
    ),
    _row("s4d", "S4D", 2022, "gu2022s4d", Design(ComplexDecay()), fixed="qk"),
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
    _row("intention", "Intention", 2023, "garnelo2023intention", Design(optimizer=Exact(ridge_decays=False))),
    _row(
        "mesa_net", "MesaNet", 2025, "vonoswald2025mesanet",
        Design(Decay() * InputGate(), optimizer=Exact(ridge_decays=False)),
        Design(Decay(), optimizer=Exact(ridge_decays=False)),
    ),
    _row(
        "softmax_attention", "Softmax attention", 2017, "vaswani2017attention",
        Design(Kernel(), _constant, Exact()), unit=False,
    ),
    _row(
        "qk_norm_attention", "QK-norm attention", 2020, "henry2020querykey",
        Design(Kernel(Gaussian()), _constant, Exact()),
    ),
    _row(
        "sliding_window_attention", "Sliding-window attention", 2020, "beltagy2020longformer",
        Design(Kernel() * Window(64), _constant, Exact()), unit=False,
    ),
    _row(
        "forgetting_attention", "Forgetting attention", 2025, "lin2025forgetting",
        Design(Kernel() * Decay(), _constant, Exact()), unit=False,
    ),
    _row(
        "local_linear_attention", "Local linear attention", 2025, "zuo2025local",
        Design(Kernel(), _slope, Exact()), Design(Kernel(Gaussian()), _slope, Exact()),
    ),
    _row(
        "local_quadratic_attention", "Local quadratic attention", 2025, "wang2025testtime",
        Design(Kernel(), _curve, Exact()),
    ),
    _row("ttt_linear", "TTT-Linear", 2024, "sun2024learning", Design(Uniform(), NormalizedLinear(), _mini_batches)),
    _row("ttt_mlp", "TTT-MLP", 2024, "sun2024learning", Design(Uniform(), MLP(), _mini_batches)),
    _row(
        "titans", "Titans", 2025, "behrouz2025titans",
        Design(Decay(), MLP(), GradientDescent(momentum=True)),
        Design(Decay(), NormalizedLinear(), GradientDescent(momentum=True)),
    ),
    _row("moneta", "Moneta", 2025, "behrouz2025miras", Design(Decay(), MLP(), GradientDescent(), Lp(3.0), Lq())),
    _row("yaad", "Yaad", 2025, "behrouz2025miras", Design(Decay(), MLP(), GradientDescent(), Huber(None))),
    _row("memora", "Memora", 2025, "behrouz2025miras", Design(Decay(), MLP(), GradientDescent(), retention=KL())),
    _row(
        "atlas_memory", "ATLAS", 2025, "behrouz2025atlas",
        Design(Decay() * InputGate(), MLP(Quadratic()), Muon()), Design(Decay(), MLP(Quadratic()), Muon()),
    ),
    _row("swila", "SwiLA", 2026, "lee2026switching", Design(Decay(), Mixture(), OnlineEM())),
    _row("parallax", "Parallax", 2026, "zuo2026parallax", Design(Kernel(), _slope, Probe())),
)  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """A published layer that is no regression: `layer` in `ttr.layers`, and why it has no design."""

    publication: Publication
    layer: str
    why: str


BASELINES = (
    Baseline(
        Publication("orchid", "Orchid", 2024, "karami2024orchid"),
        "OrchidLayer",
        "a convolution weighs values by their distance in time, and its filter has seen the whole sequence: no query "
        "is compared with a key, nothing is fitted, and nothing can be decoded token by token",
    ),
)

PUBLISHED.update({d.structure: row.publication for row in ROWS for d in (row.design, *row.also)})

# What `cells` combines; numbers are examples, since a cell is a kind of memory and not its settings.
CELLS: dict[str, tuple[Choice, ...]] = {
    "weights": (
        Uniform(), Decay(), _channel, Decay(fixed=True), ContinuousDecay(), Window(64),
        Decay() * InputGate(), Decay() * InputGate(exponential=True), ComplexDecay(),
        Kernel(), Kernel(Gaussian()), Kernel() * Decay(), Kernel() * Window(64),
    ),
    "regressor": (
        Linear(), _elu, _random, _taylor,
        _constant, _slope, _curve, NormalizedLinear(), MLP(), MLP(Quadratic()), Mixture(),
    ),
    "optimizer": (
        Hebbian(), _normalized, Hebbian(normalize=True, floor=1.0),
        GradientDescent(), GradientDescent(NLMS()), GradientDescent(Implicit()),
        GradientDescent(DiagonalNewton()), GradientDescent(momentum=True), GradientDescent(steps=2), Exact(),
        Exact(ridge_decays=False), Probe(), _mini_batches, Muon(), OnlineEM(),
    ),
    "loss": (SquaredError(), Huber(), Huber(None), Lp(3.0)),
    "retention": (L2(), Lq(), KL()),
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


SIZES = (
    "Costs are of one head, leading terms: T tokens, d channels of key and value, f features of a key, C a chunk, "
    "n solver steps, w a window."
)


def _line(row: Row) -> tuple[str, ...]:
    design = row.design
    weights, regressor, optimizer, *others = design.choices
    unusual = [str(own) for own, usual in zip(others, Design().choices[3:], strict=True) if own != usual]
    name = f"{row.publication.name} ({row.publication.year})"
    how = ", ".join([str(optimizer), *unusual])
    return name, str(weights), str(regressor), how, ", ".join(design.inputs), *design.cost().as_text().values()


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

    @property
    def baselines(self) -> dict[str, Baseline]:
        """Published layers outside the framework, by slug, each with the reason."""
        return {baseline.publication.slug: baseline for baseline in BASELINES}

    def row(self, slug: str) -> Row:
        """The whole row: publication, design, and the designs that go by the same name."""
        self[slug]
        return self._rows[slug]

    def cells(self) -> Iterator[Design]:
        """Every combination of the choices that makes sense, named or not; one of each kind."""
        kinds = set()
        for choices in product(*CELLS.values()):
            try:
                design = Design(*choices)  # type: ignore[arg-type]
            except ValueError:
                continue
            if design.structure not in kinds:
                kinds.add(design.structure)
                yield design

    def table(self) -> Table:
        """The published points, and how many cells around them the atlas has no name for."""
        rows = [(slug, *_line(row)) for slug, row in self._rows.items()]
        cells = list(self.cells())
        unnamed = sum(cell.name is None for cell in cells)
        outside = ", ".join(f"{b.publication.name} ({b.why})" for b in BASELINES)
        named = f"{len(self)} published points; {unnamed} of {len(cells)} cells have no name here."
        caption = f"{named} {SIZES} Outside the framework: {outside}."
        header = ("slug", "name", "weights", "regressor", "optimizer, loss, retention", "inputs", *Cost._fields)
        return Table(header, rows, caption)


@dataclass(frozen=True)
class Identification:
    """What is known of a design.

    Attributes:
        design: the design.
        publication: where it was published; None where it was not.
        nearest: slugs of the published designs that differ on the fewest axes, each with those axes.
        limits: what it becomes at its ends.
    """

    design: Design
    publication: Publication | None
    nearest: dict[str, tuple[str, ...]]
    limits: tuple[Limit, ...]

    def __str__(self) -> str:
        name = f"{self.publication.name} ({self.publication.year})" if self.publication else "no name in the atlas"
        near = [f"  {slug}: another {' and '.join(axes)}" for slug, axes in self.nearest.items()]
        ends = [f"  {limit}" for limit in self.limits]
        return "\n".join([f"{self.design}: {name}", "nearest:", *near, *(["limits:", *ends] if ends else [])])


def identify(design: Design) -> Identification:
    """Name a design: its publication, the published designs nearest to it, and its limits.

    Numbers (a window's size, a bandwidth) do not count, only kinds. Raises `ValueError` for anything but a design.
    """
    if not isinstance(design, Design):
        raise ValueError(f"design: expected a Design, such as ttr.Design(ttr.Decay()), got {design!r}")
    others = [row for row in ROWS if row.publication != design.publication]
    differing = {
        row.publication.slug: min((_differing(design, form) for form in (row.design, *row.also)), key=len)
        for row in others
    }
    least = min(map(len, differing.values()))
    nearest = {slug: axes for slug, axes in differing.items() if len(axes) == least}
    return Identification(design, design.publication, nearest, tuple(design.limits()))


def _differing(design: Design, other: Design) -> tuple[str, ...]:
    """The axes on which two designs are not of a kind."""
    kinds = zip(AXES, design.structure, other.structure, strict=True)
    return tuple(axis for axis, own, its in kinds if own != its)


atlas = Atlas(ROWS)
