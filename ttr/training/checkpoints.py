"""Checkpoints that can be relied upon: written whole or not at all, and never of a model that has diverged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ttr.training.files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's files, which a killed process or a full disk leaves as they were.

    Lightning's own are written to the folder of temporary files and moved: copied, where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint. Raises `OSError` naming the path where that cannot be."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, buffer.getbuffer())


class Finite(Callback):
    """Ends a run whose loss is no number, and keeps weights that are none from being saved.

    The loss is looked at where it is on the CPU already, else every `log_every_n_steps` batches and before a
    checkpoint, so that a GPU need not wait. Raises `FloatingPointError` with the first step that went wrong.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # step of the first loss that is no number; −1 for none

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._first = torch.tensor(-1, device=module.device)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._first is not None
        loss = outputs["loss"].detach()
        wrong = ~loss.isfinite() & (self._first < 0)
        self._first = torch.where(wrong, torch.full_like(self._first, trainer.global_step), self._first)
        every = trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        if loss.device.type == "cpu" or (batch_idx + 1) % every == 0:
            self._check()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check()
        if trainer.training and not all(_local(parameter).isfinite().all() for parameter in module.parameters()):
            raise FloatingPointError(f"weights: expected finite numbers, got others after step {trainer.global_step}")

    def _check(self) -> None:
        if self._first is not None and self._first >= 0:
            raise FloatingPointError(
                f"train_loss: expected a finite number, got another at step {int(self._first)};"
                " a lower learning_rate or trainer.gradient_clip_val may help"
            )


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint without its weights' data; None for anything else."""
    sharded = path.is_dir()
    if sharded and not (path / ".metadata").exists():
        return None
    expected = {"pytorch-lightning_version"} if sharded else {"pytorch-lightning_version", "state_dict"}
    try:
        file = path / "meta.pt" if sharded else path
        checkpoint = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        return checkpoint if expected <= set(checkpoint) else None
    except Exception:  # a missing file, or any other: torch has no error of its own for what it cannot read
        return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that was written last, of those that are whole."""
    paths = [path for path in folder.glob("*.ckpt") if path.exists() and not path.is_symlink()]
    paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in paths if read_checkpoint(path) is not None), None)
