"""The command line: `ttr fit --config configs/recall.yaml --model.design gated_delta_net`.

Everything that a run needs (arguments, checkpoints, resuming, loggers, precision, devices) is Lightning's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ttr.commands import COMMANDS, Formatter, add_commands, run_command
from ttr.training.checkpoints import Finite, WholeCheckpointIO, newest_checkpoint, read_checkpoint
from ttr.training.run import SIZES, TrainingRun

DESCRIPTION = "Train, test and use sequence layers that are regressions at test time."

EPILOG = """examples:
  ttr fit --config configs/recall.yaml --model.design delta_net
  ttr sweep --config configs/study.yaml
  ttr atlas gated_delta_net
  ttr fit --help                      everything that a run can be told
  ttr --print_completion shtab-bash   completion; see below

completion:
  eval "$(ttr --print_completion shtab-bash)"               in ~/.bashrc; zsh, fish and tcsh likewise
  eval "$(register-python-argcomplete ttr)"                 the same by argcomplete, slower and always up to date
"""

EXAMPLES = {
    "fit": """examples:
  ttr fit --config configs/recall.yaml --model.design delta_net
  ttr fit --config configs/recall.yaml --ckpt_path last               goes on where the last run stopped
  ttr fit --config configs/recall.yaml --print_config > mine.yaml     all settings, to be changed
  ttr fit --config configs/stdlib_text.yaml --trainer.precision bf16-mixed --trainer.accumulate_grad_batches 4
""",
    "validate": """example:
  ttr validate --config configs/recall.yaml --ckpt_path last
""",
    "test": """example:
  ttr test --config configs/recall.yaml --ckpt_path last
""",
    "predict": """example, which writes inputs, targets and predictions to runs/recall/predictions.npz:
  ttr predict --config configs/recall.yaml --ckpt_path last
""",
}


class _CommandLine(TrainingRun):
    """Puts all of a run under `trainer.default_root_dir`, and adds the commands that are not Lightning's."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # One folder is one run: a resumed one writes to the same names, so that last.ckpt never is an older one's.
        parser.set_defaults({"checkpoint.save_last": "link", "checkpoint.enable_version_counter": False})
        # A fixed folder, so that `--ckpt_path last` finds what an earlier process left.
        parser.link_arguments(
            "trainer.default_root_dir",
            "checkpoint.dirpath",
            compute_fn=lambda root: Path(root, "checkpoints"),
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        add_commands(parser._subcommands_action)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if self.config.subcommand in COMMANDS:
            run_command(parser, self.config.subcommand, config)
            parser.exit()
        for name in SIZES:
            if (size := config.model.init_args.get(name)) is not None:
                parser.error(f"model.{name}: expected nothing, it is the task's, got {size!r}")
        path = config.ckpt_path
        if path in (None, "best", "hpc"):
            return
        if path == "last":
            path = Path(config.checkpoint.dirpath, "last.ckpt")
            # The link dangles between the removal of what it pointed to and its own renewal.
            if not path.exists() and (newest := newest_checkpoint(path.parent)):
                path = newest
            config.ckpt_path = str(path)
        checkpoint = read_checkpoint(Path(path))
        if checkpoint is None:
            missing = "" if Path(path).exists() else ", which does not exist"
            newest = newest_checkpoint(Path(path).parent)
            instead = f"; the newest that is whole is {str(newest)!r}" if newest else ""
            parser.error(f"ckpt_path: expected a Lightning checkpoint, got {str(path)!r}{missing}{instead}")
        saved = checkpoint.get("hyper_parameters", {})
        for name, value in config.model.init_args.items() if self.config.subcommand == "fit" else ():
            plain = all(isinstance(part, (str, int, float)) for part in (value if isinstance(value, list) else [value]))
            if plain and name in saved and name in SHAPING and saved[name] != value:
                parser.error(f"model.{name}: expected {saved[name]!r}, that of {path}, got {value!r}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        if trainer.logger is None:
            root = trainer.default_root_dir
            # Every row at once: what a killed process has logged is part of its curve.
            table = CSVLogger(root, name="csv", flush_logs_every_n_steps=trainer.log_every_n_steps or 1)
            kwargs["logger"] = [table, TensorBoardLogger(root, name="tensorboard")]
        made = super().instantiate_trainer(**kwargs)
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:  # and no plugin of the user's
            made.strategy.checkpoint_io = WholeCheckpointIO()
        return made

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (OSError, FloatingPointError) as error:  # the machine's faults, and numbers that are none
            root = Path(self.trainer.default_root_dir, "checkpoints")
            newest = newest_checkpoint(root) if subcommand == "fit" else None
            kept = f"; the last checkpoint is {str(newest)!r}" if newest else ""
            self.parser.exit(1, f"error: {error}{kept}\n")

    def after_predict(self) -> None:
        """Keep what Lightning only returns: predictions of all batches, end to end, as arrays by name."""
        batches: Any = self.trainer.predict_loop.predictions
        if not batches:  # --return_predictions false
            return
        rank = f".{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.default_root_dir, f"predictions{rank}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}
        np.savez(path, **arrays)
        print(path)


# What a checkpoint's weights were trained as: to go on as something else would be a mistake, not a change of mind.
SHAPING = {
    *("design", "d_model", "num_layers", "num_heads", "mlp_ratio", "key_dim", "value_dim"),
    *("conv_width", "conv_on", "conv_silu", "norm"),
}


def main(args: ArgsType = None) -> None:
    """Run `ttr fit`, `validate`, `test` or `predict`, or one of `ttr.commands`.

    Raises SystemExit with code 2 and one line on standard error for an argument that cannot be, and with code 0 after
    a command that is not Lightning's.
    """
    set_parsing_settings(add_print_completion_argument=True)
    _CommandLine(
        trainer_defaults={"default_root_dir": "runs", "callbacks": [Finite()]},
        parser_kwargs={"prog": "ttr", "description": DESCRIPTION, "epilog": EPILOG, "formatter_class": Formatter}
        | {name: {"epilog": examples, "formatter_class": Formatter} for name, examples in EXAMPLES.items()},
        args=args,
    )


if __name__ == "__main__":
    main()
