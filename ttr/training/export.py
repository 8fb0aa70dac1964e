"""A trained model in a folder: weights as safetensors, everything else as JSON. Reading it runs no code."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

import ttr
from ttr import models
from ttr._design import Design
from ttr._design_data import designs_from_data, designs_to_data, from_data, to_data
from ttr.layers import RegressionLayer
from ttr.training.training import Training

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
FORMAT = 1

# The models by the training modules that make them: a name in a file selects from these and imports nothing.
MADE_BY = {
    "TokenPrediction": "RegressionLM",
    "TokenReconstruction": "RegressionAutoencoder",
    "ValueRegression": "RegressionModel",
}
TRAINING = set(inspect.signature(Training).parameters)


def load_checkpoint(path: str | os.PathLike[str]) -> nn.Module:
    """The model of a checkpoint that `ttr fit` left, on the CPU; unpickles tensors and designs, nothing else.

    Raises `ValueError` naming ckpt_path for anything but such a checkpoint.
    """
    return _load(path)[0]


def _load(path: str | os.PathLike[str]) -> tuple[nn.Module, str, dict[str, Any]]:
    """The model, the name of its class and the arguments that it was made with."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        hyper_parameters, weights = saved["hyper_parameters"], saved["state_dict"]
        module = hyper_parameters.get("_class_path", "ttr.training.TokenPrediction").rpartition(".")[2]
        name = MADE_BY[module]
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        why = reason if Path(path).exists() else "which does not exist"
        raise ValueError(f"ckpt_path: expected a checkpoint of ttr fit, got {str(path)!r}, {why}") from error
    arguments = {key: value for key, value in hyper_parameters.items() if key not in TRAINING and key[0] != "_"}
    model = _make(name, arguments)
    model.load_state_dict({key.removeprefix("model."): x for key, x in weights.items() if key.startswith("model.")})
    return model.eval(), name, arguments


def export(ckpt_path: str | os.PathLike[str], folder: str | os.PathLike[str], transformers: bool = False) -> None:
    """Write the model of a checkpoint as `model.safetensors` and `model.json`.

    With `transformers`, write a `RegressionLM` as that library does instead, for `AutoModelForCausalLM` after an
    `import ttr.models.hf`.

    The description has the arguments of the model, a design among them as its slug or as under `model.design` of a
    configuration, and the design of every layer in full: should a later version mean something else by a slug,
    `load_exported` says so.

    Raises `ValueError` for anything but a checkpoint of `ttr fit`, for choices that are not `ttr`'s, and for a model
    that is no `RegressionLM` where transformers has to read it.
    """
    model, name, arguments = _load(ckpt_path)
    if transformers:
        _save_pretrained(model, arguments, folder)
        return
    if "design" in arguments:
        arguments["design"] = designs_to_data(arguments["design"])
    description = {
        "format": FORMAT,
        "class": name,
        "arguments": arguments,
        "designs": [to_data(design) for design in _designs(model)],
        "versions": {"ttr": ttr.__version__, "torch": str(torch.__version__)},
    }
    text = json.dumps(description, indent=2, allow_nan=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS))
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _save_pretrained(model: nn.Module, arguments: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    try:
        from ttr.models.hf import RegressionConfig, RegressionForCausalLM
    except ImportError as error:
        raise ValueError(str(error)) from error
    if not isinstance(model, models.RegressionLM):
        raise ValueError(f"transformers: expected a RegressionLM, got a {type(model).__name__}")
    vocab_size = arguments.pop("vocab_size")
    pretrained = RegressionForCausalLM(RegressionConfig(vocab_size, arguments))
    pretrained.model.load_state_dict(model.state_dict())
    pretrained.save_pretrained(folder)


def load_exported(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that `export` wrote, on the CPU. Nothing is unpickled and nothing imported by name.

    Raises `ValueError` for a folder without the two files, another format, a class, an argument, a choice or a weight
    that does not fit, and for a slug that means another design than it did.
    """
    folder = Path(folder)
    missing = [name for name in (DESCRIPTION, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"folder: expected {DESCRIPTION} and {WEIGHTS}, got {str(folder)!r} without {missing[0]}")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        written, name, arguments, designs = (description[key] for key in ("format", "class", "arguments", "designs"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DESCRIPTION}: expected what ttr export writes, got {error!r}") from error
    if written != FORMAT:
        raise ValueError(f"format: expected {FORMAT}, got {written!r}")
    if name not in MADE_BY.values():
        raise ValueError(f"class: expected one of {', '.join(MADE_BY.values())}, got {name!r}")
    try:
        model = _make(name, arguments)
    except TypeError as error:
        raise ValueError(f"arguments: expected those of {name}, but {error}") from error
    if _designs(model) != [from_data(data) for data in designs]:
        raise ValueError(f"design: expected the exported {designs}, but {arguments.get('design')!r} is another one now")
    try:
        load_model(model, str(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: expected the weights of {DESCRIPTION}, got {error}") from error
    return model.eval()


def _make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    made = dict(arguments)
    if "design" in made:
        made["design"] = designs_from_data(made["design"])
    return getattr(models, name)(**made)


def _designs(model: nn.Module) -> list[Design]:
    return [layer.design for layer in model.modules() if isinstance(layer, RegressionLayer)]
