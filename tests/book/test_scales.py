"""What a chapter runs at full size is what it runs at smoke size, with other numbers."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import pytest

CHAPTERS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.py"))
NUMBERED = [path for path in CHAPTERS if path.stem[:2].isdigit()]


def tables(source: str) -> Iterator[dict[str, Any]]:
    """The literal dictionaries that a chapter looks its scale up in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict) and ast.unparse(node.slice) == "scale":
            yield ast.literal_eval(node.value)


def shape(value: Any) -> Any:
    """What is left of sizes without their numbers."""
    if isinstance(value, dict):
        return {name: shape(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [shape(entry) for entry in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def code(path: Path) -> str:
    cells = jupytext.read(path, fmt="py:percent").cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_both_scales_have_the_same_sizes(path):
    for table in tables(code(path)):
        assert list(table) == ["smoke", "full"]
        assert shape(table["smoke"]) == shape(table["full"])


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_a_chapter_has_sizes_of_a_scale_and_a_device(path):
    source = code(path)
    assert 'scale = "smoke"' in source
    assert 'device = "cpu"' in source
    assert source.count("scale") > 1, "the scale changes nothing"
    assert source.count("device") > 1, "the device changes nothing"


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_a_chapter_has_its_parts(path):
    cells = jupytext.read(path, fmt="py:percent").cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "## Exercises" in prose
    assert "## Further reading" in prose
    assert prose.count("```{exercise}") == prose.count("```{solution-start}") == prose.count("```{solution-end}") >= 3
    assert ":label:" in prose
    assert code(path).count("assert") >= 10
