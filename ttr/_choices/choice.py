"""What every choice is: the inputs it needs, its formula, its sources."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from typing import Any, ClassVar


class Choice:
    """One choice on one axis: the inputs it needs, its formula, its sources."""

    cites: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = ""

    @property
    def inputs(self) -> dict[str, str]:
        """Name and axes of every tensor that this choice needs beside q, k and v."""
        return {}

    @property
    def structure(self) -> tuple[Any, ...]:
        """What makes two choices the same kind of memory: all but their numbers, which are settings."""
        return type(self), *(
            value.structure if isinstance(value, Choice) else value
            for value in self._values().values()
            if isinstance(value, (Choice, str, bool))
        )

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in self._fields()}

    def _fields(self) -> tuple[Field[Any], ...]:
        return fields(self) if is_dataclass(self) else ()

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in self._fields()}
        changed = {name: value for name, value in self._values().items() if value != defaults[name]}
        shown = [f"{name}={value if isinstance(value, Choice) else repr(value)}" for name, value in changed.items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            got = getattr(self, name)
            raise ValueError(f"{type(self).__name__}.{name}: expected {expected}, got {got!r}")

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        valid = isinstance(value, (int, float)) and 0 < value < float("inf")
        self._require(name, valid, "a positive finite number")
