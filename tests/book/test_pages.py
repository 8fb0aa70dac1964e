"""Pages and README keep pace with the package."""

from __future__ import annotations

import re
from pathlib import Path

import ttr

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"layers", "models", "ops", "oracle"}  # a section each


def test_the_reference_has_all_of_the_public_face() -> None:
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"auto(?:class|function|exception):: (?:ttr\.)?(\w+)", page))
    assert set(ttr.__all__) - MODULES - {"atlas"} <= listed
    assert all(f"ttr.{module}" in page for module in (*MODULES, "atlas"))


def test_the_lines_in_the_readme_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["y"].shape == (1, 1024, 4, 64)  # type: ignore[attr-defined]


def test_files_that_pages_show_exist() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("book/*.md")):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} shows {target}"
