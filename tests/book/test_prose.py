"""No figure of a run is typed into the prose: it comes from the run, through `ttr.book.record` and glue."""

import re
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(ROOT.glob("notebooks/*.py"))

# What is no prose: code, formulas, roles such as glue and citations, addresses.
NO_PROSE = re.compile(
    r"```\{math\}.*?```|^```[a-z]*\n.*?^```|~~~.*?~~~|\{[a-z:]+\}`[^`]*`|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|https?://\S+",
    re.DOTALL | re.MULTILINE,
)
# What reads like a result: a decimal, a share, a ratio, a time or a size.
RESULT = re.compile(
    r"\b\d+\.\d+\b(?!\.\d)|\b\d+(?:\.\d+)?\s*(?:%|per cent|percent)"
    r"|\b\d[\d.,]*\s*(?:×|times (?:as|faster|slower|more|less|smaller|larger|better|worse)|-fold)"
    r"|\b\d[\d.,]*\s*(?:ms|µs|milliseconds|seconds|minutes|GFLOP|TFLOP|[KMG]i?B)\b"
)
# A version or the number of an arXiv paper is no result.
NUMBERED = re.compile(
    r"(?:arXiv|Python|torch|triton|Triton|transformers|CUDA|version|Lightning|Theorem|Section)\s*[≥>=]*\s*\d[\d.]*"
)


def typed_results(text: str) -> list[str]:
    return [match.group() for match in RESULT.finditer(NUMBERED.sub(" ", NO_PROSE.sub(" ", text)))]


def prose(path: Path) -> str:
    """The Markdown of a chapter, and the captions and alternative texts of its figures."""
    cells = jupytext.read(path, fmt="py:percent").cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    for cell in cells:
        shown = cell.metadata.get("mystnb", {})
        texts += [shown.get("figure", {}).get("caption", ""), shown.get("image", {}).get("alt", "")]
    return "\n\n".join(texts)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_result_is_typed(path):
    assert typed_results(prose(path)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The error is 0.48 here.", ["0.48"]),
        ("It is 3 times faster, 40 % of it.", ["3 times faster", "40 %"]),
        ("A step takes 12 ms.", ["12 ms"]),
        ("The error is {glue:text}`x:.2f`, $0.5$ and `0.3`, see arXiv 2501.12352.", []),
        ("```{math}\nx = 0.5\n```\nThree of 16 keys.", []),
    ],
)
def test_what_counts_as_a_result(text, found):
    assert typed_results(text) == found


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_figure_has_a_caption_and_a_description(path):
    for cell in jupytext.read(path, fmt="py:percent").cells:
        if cell.cell_type == "code" and "plt.show()" in cell.source:
            shown = cell.metadata.get("mystnb", {})
            drawn_here = "def " not in cell.source
            assert not drawn_here or (shown["figure"]["caption"] and shown["image"]["alt"])
