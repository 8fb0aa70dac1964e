"""A design as plain data and back: names and numbers, as they stand in a YAML or JSON file.

    {"weights": {"class_path": "ttr.Decay", "init_args": {"per": "head", "fixed": false}}, …}

is what jsonargparse reads as well, so that an exported design can stand under `model.design` of a configuration.
Only the choices of `ttr` have a name here: reading a file imports nothing and runs none of its contents.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from ttr import _choices
from ttr._atlas import atlas
from ttr._choices import Choice
from ttr._design import AXES, Design

_CHOICES: dict[str, type[Choice]] = {
    name: kind
    for name, kind in vars(_choices).items()
    if isinstance(kind, type) and issubclass(kind, Choice) and is_dataclass(kind)
}


def to_data(design: Design) -> dict[str, Any]:
    """Every choice of the design with all its fields.

    Raises `ValueError` for a choice that is not one of `ttr`: a class of one's own has no name that others know.
    """
    return {axis: _choice_to_data(choice) for axis, choice in zip(AXES, design.choices, strict=True)}


def from_data(data: object) -> Design:
    """The design of such data, equal to the one that it was made from; a slug of the atlas is such data, too.

    Fields that are left out have their defaults. Raises `ValueError` for an axis, a choice or a field that does not
    exist, and for choices that clash.
    """
    if isinstance(data, Design):
        return data
    if isinstance(data, str):
        return atlas[data]
    if not isinstance(data, dict) or not set(data) <= set(AXES):
        raise ValueError(f"design: expected a slug, or choices on {', '.join(AXES)}, got {data!r}")
    return Design(**{axis: _from_plain(value, axis) for axis, value in data.items()})


def designs_to_data(designs: object) -> Any:
    """As data what a model takes for its designs: one for all blocks or a list of them, each a `Design` or a slug.

    A slug stays one: it brings options of the layer that were published with it. Raises as `to_data`.
    """
    if isinstance(designs, (list, tuple)):
        return [designs_to_data(design) for design in designs]
    return designs if isinstance(designs, str) else to_data(from_data(designs))


def designs_from_data(data: object) -> Any:
    """What `designs_to_data` was given. Raises as `from_data`."""
    if isinstance(data, (list, tuple)):
        return [designs_from_data(design) for design in data]
    return data if isinstance(data, str) else from_data(data)


def _choice_to_data(choice: Choice) -> dict[str, Any]:
    name = type(choice).__name__
    if _CHOICES.get(name) is not type(choice):
        raise ValueError(f"design: expected choices of ttr, got {choice!r} of {type(choice).__module__}")
    return {"class_path": f"ttr.{name}", "init_args": {n: _to_plain(value) for n, value in choice._values().items()}}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return _choice_to_data(value)
    return [_to_plain(part) for part in value] if isinstance(value, tuple) else value


def _from_plain(value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_from_plain(part, where) for part in value)
    if not isinstance(value, dict):
        return value
    path = value.get("class_path")
    package, _, name = str(path).rpartition(".")
    kind = _CHOICES.get(name)
    if kind is None or package.partition(".")[0] != "ttr" or not set(value) <= {"class_path", "init_args"}:
        raise ValueError(f"{where}: expected class_path and init_args of one of {', '.join(_CHOICES)}, got {path!r}")
    arguments = value.get("init_args", {})
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise ValueError(f"{where}: expected arguments of {name} ({', '.join(known) or 'none'}), got {unknown[0]!r}")
    missing = [n for n, field in known.items() if field.default is MISSING and n not in arguments]
    if missing:
        raise ValueError(f"{where}: expected {name} with its {missing[0]}, got none")
    return kind(**{n: _from_plain(argument, f"{where}.{n}") for n, argument in arguments.items()})
