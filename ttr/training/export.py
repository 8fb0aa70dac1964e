"""A trained language model in a folder: weights as safetensors, everything else as JSON. Reading it runs no code."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ttr
from ttr._design import Design
from ttr._design_data import from_data, to_data
from ttr.models import RegressionLM

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FORMAT = 1


def load_checkpoint(path: str | os.PathLike[str]) -> RegressionLM:
    """The language model of a checkpoint that `ttr fit` left, on the CPU; unpickles tensors and designs, nothing else.

    Raises `ValueError` naming ckpt_path for anything but a checkpoint of a `RegressionLM`.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        arguments, weights = _arguments(saved["hyper_parameters"]), saved["state_dict"]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        why = "which does not exist" if not Path(path).exists() else type(error).__name__
        raise ValueError(f"ckpt_path: expected a checkpoint of ttr fit, got {str(path)!r} ({why})") from error
    if "vocab_size" not in arguments:
        raise ValueError(f"ckpt_path: expected a checkpoint of a language model, got {str(path)!r}")
    model = RegressionLM(**arguments)
    model.load_state_dict({n.removeprefix("model."): x for n, x in weights.items() if n.startswith("model.")})
    return model.eval()


def export(ckpt_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write the model of a checkpoint as `model.safetensors` and `model.json`.

    The description has the arguments of `RegressionLM`, with a design as its slug or as in `model.design` of a
    configuration, and the design of every block in full: should a later version mean something else by a slug,
    `load_exported` says so.

    Raises `ValueError` for anything but a checkpoint of a `RegressionLM`, and for choices that are not `ttr`'s.
    """
    from safetensors.torch import save_model  # the extra `train`

    saved = torch.load(ckpt_path, map_location="meta", weights_only=True) if Path(ckpt_path).is_file() else {}
    model = load_checkpoint(ckpt_path)
    arguments = _arguments(saved["hyper_parameters"])
    arguments["design"] = _each(arguments.get("design", _default_design()), _name)
    description = {
        "format": FORMAT,
        "class": "ttr.models.RegressionLM",
        "arguments": arguments,
        "designs": [to_data(block.mixer.design) for block in model.blocks],  # type: ignore[union-attr, arg-type]
        "versions": {"ttr": ttr.__version__, "torch": str(torch.__version__)},
    }
    text = json.dumps(description, indent=2, allow_nan=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS))
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_exported(folder: str | os.PathLike[str]) -> RegressionLM:
    """The language model that `export` wrote, on the CPU. Nothing is unpickled and nothing imported by name.

    Raises `ValueError` for a folder without the two files, another format, an argument, a choice or a weight that does
    not fit, and for a slug that means another design than it did.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model  # the extra `train`

    folder = Path(folder)
    missing = [name for name in (DESCRIPTION, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"folder: expected {DESCRIPTION} and {WEIGHTS}, got {str(folder)!r} without {missing[0]}")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        written, arguments, designs = (description[key] for key in ("format", "arguments", "designs"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION}: expected what ttr export writes, got {error!r}") from error
    if written != FORMAT:
        raise ValueError(f"format: expected {FORMAT}, got {written!r}")
    unknown = [name for name in arguments if name not in _parameters()]
    if unknown:
        raise ValueError(f"arguments: expected those of RegressionLM, got {unknown[0]!r}")
    model = RegressionLM(**_arguments(arguments))
    own = [block.mixer.design for block in model.blocks]  # type: ignore[union-attr]
    if own != [from_data(data) for data in designs]:
        raise ValueError(f"design: expected the exported {designs}, but {arguments['design']!r} is another one by now")
    try:
        load_model(model, str(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: expected the weights of {DESCRIPTION}, got {error}") from error
    return model.eval()


def _parameters() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(RegressionLM).parameters


def _default_design() -> Any:
    return _parameters()["design"].default


def _arguments(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the saved arguments that are `RegressionLM`'s, designs as designs; a slug brings options of its own."""
    arguments = {name: value for name, value in saved.items() if name in _parameters()}
    if "design" in arguments:
        arguments["design"] = _each(arguments["design"], lambda own: own if isinstance(own, str) else from_data(own))
    return arguments


def _each(design: Any, function: Any) -> Any:
    """One design, or one for each block."""
    return [function(own) for own in design] if isinstance(design, (list, tuple)) else function(design)


def _name(design: str | Design) -> str | dict[str, Any]:
    return design if isinstance(design, str) else to_data(design)
