"""The bibliography that travels with the package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files


@cache
def _entries() -> dict[str, str]:
    text = files("ttr").joinpath("references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([^,\s]+),.*?^\}", text, flags=re.MULTILINE | re.DOTALL)
    bodies = re.findall(r"^@\w+\{[^,\s]+,.*?^\}", text, flags=re.MULTILINE | re.DOTALL)
    return dict(zip(entries, bodies, strict=True))


def bibtex(keys: Iterable[str]) -> str:
    """The BibTeX entries of these keys, in order, each once.

    Raises `ValueError` for a key that the bibliography lacks.
    """
    keys = list(dict.fromkeys(keys))
    unknown = [key for key in keys if key not in _entries()]
    if unknown:
        raise ValueError(f"keys: expected entries of references.bib, got {unknown}")
    return "\n\n".join(_entries()[key] for key in keys)
