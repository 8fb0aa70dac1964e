"""What a sweep runs: the axes, the configuration of each task, and the exceptions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse.typing import register_type

from ttr._atlas import atlas
from ttr._design_data import from_data
from ttr.tasks.task import require


class Config:
    """What `ttr fit` would be given, as plain data. (jsonargparse would make the objects that a `dict` describes.)"""

    def __init__(self, data: object):
        if not isinstance(data, dict):
            raise ValueError(f"config: expected a mapping, got {data!r}")
        self.data = data


def _as_config(value: object) -> Config:
    return Config(yaml.safe_load(value) if isinstance(value, str) else value)


register_type(Config, serializer=lambda config: config.data, deserializer=_as_config)

# A slug, or choices by axis as under `model.design` of a configuration, or a list of these: one for each block.
DesignData = str | Config | list[str | Config]


@dataclass(frozen=True)
class Override:
    """A configuration for some designs, some tasks or both.

    Args:
        config: what `ttr fit` would be given in addition.
        designs: which designs it is for; all if None.
        tasks: which tasks it is for; all if None.
    """

    config: Config
    designs: list[str] | None = None
    tasks: list[str] | None = None

    def applies(self, design: str, task: str) -> bool:
        return design in (self.designs or [design]) and task in (self.tasks or [task])


@dataclass(frozen=True)
class Run:
    """One configuration of `ttr fit` and its place on the axes; `hash` identifies it."""

    design: str
    task: str
    learning_rate: float
    seed: int
    config: dict[str, Any]

    @property
    def hash(self) -> str:
        text = json.dumps([self.task, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """design × task × learning rate × seed.

    A run's configuration is that of `common`, of the task's base, of the task and of the overrides that apply, in this
    order: what comes later wins, key by key. Arguments of the model and of the data stand under `init_args` there; the
    model is `ttr.training.TokenPrediction` unless its `class_path` says otherwise. The design, the learning rate and
    the seed, of model and data, come last.

    Args:
        folder: where the results go.
        tasks: by name, a configuration of `ttr fit`, and under `base` the name of the one that it changes.
        designs: slugs of the atlas, choices by axis or lists of both, one for each block; "atlas" for all of its rows.
        learning_rates: the highest learning rate of each run.
        seeds: of model and data.
        bases: by name, configurations that several tasks share.
        common: the configuration that all share.
        overrides: exceptions, the later ones over the earlier ones.

    Raises ValueError for an empty axis, a design, base or task that does not exist, and two of one name.
    """

    folder: Path
    tasks: dict[str, Config]
    designs: Literal["atlas"] | list[DesignData] = "atlas"
    learning_rates: list[float] = field(default_factory=lambda: [3e-3])
    seeds: list[int] = field(default_factory=lambda: [0])
    bases: dict[str, Config] = field(default_factory=dict)
    common: Config = field(default_factory=lambda: Config({}))
    overrides: list[Override] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [name for name, _ in self._designs()]
        axes: dict[str, list[Any]] = {"tasks": list(self.tasks), "designs": names}
        axes |= {"learning_rates": self.learning_rates, "seeds": self.seeds}
        for axis, values in axes.items():
            require(0 < len(set(values)) == len(values), axis, "at least one, none twice", values)
        for task, config in self.tasks.items():
            base = config.data.get("base")
            require(base is None or base in self.bases, f"tasks.{task}.base", f"one of {list(self.bases)}", base)
        for override in self.overrides:
            for axis, chosen in {"designs": override.designs, "tasks": override.tasks}.items():
                unknown = [name for name in chosen or () if name not in axes[axis]]
                require(not unknown, f"overrides.{axis}", f"those of the study ({', '.join(axes[axis])})", unknown)

    def _designs(self) -> list[tuple[str, DesignData]]:
        designs: Sequence[DesignData] = [*atlas] if self.designs == "atlas" else self.designs
        return [(_name(design), design) for design in designs]

    def runs(self) -> list[Run]:
        """All runs, the learning rates and seeds of one design and task next to each other."""
        return [
            Run(name, task, learning_rate, seed, self._config(name, design, task, learning_rate, seed))
            for task in self.tasks
            for name, design in self._designs()
            for learning_rate in self.learning_rates
            for seed in self.seeds
        ]

    def _config(self, name: str, design: DesignData, task: str, learning_rate: float, seed: int) -> dict[str, Any]:
        own = dict(self.tasks[task].data)
        base = self.bases[own.pop("base")].data if "base" in own else {}
        overrides = [override.config.data for override in self.overrides if override.applies(name, task)]
        usual = {"model": {"class_path": "ttr.training.TokenPrediction"}}
        axes = {
            "model": {"init_args": {"design": _plain(design), "learning_rate": learning_rate}},
            "data": {"init_args": {"seed": seed}},
            "seed_everything": seed,
        }
        return reduce(_merged, [usual, self.common.data, base, own, *overrides, axes])


def _merged(config: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(config[key], value) if isinstance(value, dict) and isinstance(config.get(key), dict) else value
        for key, value in over.items()
    }
    return {**config, **both}


def _plain(design: DesignData) -> Any:
    """As it stands in a configuration."""
    if isinstance(design, list):
        return [_plain(own) for own in design]
    return design.data if isinstance(design, Config) else design


def _name(design: DesignData) -> str:
    """The slug, or the design as it prints; of a hybrid, its blocks'."""
    if isinstance(design, list):
        return " + ".join(map(_name, design))
    found = from_data(_plain(design))
    return design if isinstance(design, str) else str(found)
