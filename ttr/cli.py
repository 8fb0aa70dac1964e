"""The command line: `ttr fit --config configs/recall.yaml --model.design gated_delta_net`.

Everything that a run needs (arguments, checkpoints, resuming, loggers, precision, devices) is Lightning's.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ttr.training import Training


class _CommandLine(LightningCLI):
    """Puts all of a run under `trainer.default_root_dir`, and states a user's mistake in one line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": "ttr.training.TokenPrediction"}})
        for size in SIZES:
            parser.link_arguments(f"data.{size}", f"model.init_args.{size}", apply_on="instantiate")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": "link"})
        # A fixed folder, so that `--ckpt_path last` finds what an earlier process left.
        parser.link_arguments(
            "trainer.default_root_dir",
            "checkpoint.dirpath",
            compute_fn=lambda root: Path(root, "checkpoints"),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        for name in SIZES:
            if (size := config.model.init_args.get(name)) is not None:
                parser.error(f"model.{name}: expected nothing, it is the task's, got {size!r}")
        path = config.ckpt_path
        if path in (None, "best", "hpc"):
            return
        if path == "last":
            path = Path(config.checkpoint.dirpath, "last.ckpt")
        checkpoint = _read_checkpoint(Path(path))
        if checkpoint is None:
            missing = "" if Path(path).exists() else ", which does not exist"
            parser.error(f"ckpt_path: expected a Lightning checkpoint, got {str(path)!r}{missing}")
        saved = checkpoint.get("hyper_parameters", {})
        for name, value in config.model.init_args.items() if self.config.subcommand == "fit" else ():
            if isinstance(value, (str, int, float)) and name in saved and name in SHAPING and saved[name] != value:
                parser.error(f"model.{name}: expected {saved[name]!r}, that of {path}, got {value!r}")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__:  # jsonargparse wraps what a constructor raised
                cause = cause.__cause__
            self.parser.error(str(cause), error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        if trainer.logger is None:
            root = trainer.default_root_dir
            kwargs["logger"] = [CSVLogger(root, name="csv"), TensorBoardLogger(root, name="tensorboard")]
        return super().instantiate_trainer(**kwargs)


# What a model takes from its task.
SIZES = {"vocab_size", "input_size", "output_size"}

# What a checkpoint's weights were trained as: to go on as something else would be a mistake, not a change of mind.
SHAPING = {
    *("design", "d_model", "num_layers", "num_heads", "mlp_ratio", "key_dim", "value_dim"),
    *("conv_width", "conv_on", "conv_silu", "norm"),
}


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint without its weights' data; None for anything else."""
    if path.is_dir():  # a sharded one
        return {} if (path / ".metadata").exists() else None
    try:
        checkpoint = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        return checkpoint if {"state_dict", "pytorch-lightning_version"} <= set(checkpoint) else None
    except Exception:  # a missing file, or any other: torch has no error of its own for what it cannot read
        return None


def main(args: ArgsType = None) -> None:
    """Run `ttr fit`, `ttr validate` or `ttr test`.

    Raises SystemExit with code 2 and one line on standard error for an argument that cannot be.
    """
    _CommandLine(
        Training,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={"default_root_dir": "runs"},
        parser_kwargs={"prog": "ttr"},
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    main()
