"""How a configuration becomes a model, its data and a trainer: the part that `ttr fit` and sweeps share."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ttr.training.training import Training

# What a model takes from its task.
SIZES = {"vocab_size", "input_size", "output_size"}


class TrainingRun(LightningCLI):
    """Model, data and trainer from a configuration; an argument that one of them does not have is an error.

    A user's mistake is stated in one line by the parser: it exits with code 2 or, where it was made with
    `exit_on_error=False`, raises `argparse.ArgumentError`.
    """

    def __init__(self, **arguments: Any):
        super().__init__(
            Training,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            **arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "ttr.training.TokenPrediction"}})
        for size in SIZES:
            parser.link_arguments(f"data.{size}", f"model.init_args.{size}", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            self.parser.error(cause(error), error)


def cause(error: BaseException) -> str:
    """What a constructor said, without what jsonargparse wrapped it in."""
    while error.__cause__:
        error = error.__cause__
    return str(error)
