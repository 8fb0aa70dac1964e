"""What every training module shares: the optimizer, its schedule, and which parameters decay."""

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ttr import _choices
from ttr._design import Design
from ttr.models.backbone import Block

# torch reads no class from a checkpoint that it has not been told of; a design is data and nothing else.
torch.serialization.add_safe_globals(
    [
        Design,
        *(
            choice
            for choice in vars(_choices).values()
            if isinstance(choice, type) and issubclass(choice, _choices.Choice)
        ),
    ]
)


class Training(LightningModule, ABC):
    """Trains the model that `make_model` makes by the loss that `measure` measures.

    AdamW; weight decay on weight matrices only, not on scales, biases, rates and temperatures. The learning
    rate rises over `warmup_steps` optimizer steps to `learning_rate`, then stays or falls along a cosine to
    zero at the last step of the run.

    Args:
        learning_rate: the highest learning rate.
        weight_decay: of AdamW, on weight matrices.
        betas: decay rates of AdamW's two moments.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: what follows the warm-up.
        compile: whether torch.compile compiles the blocks, or the name of its backend; true is "inductor".
        **model: the arguments of `make_model`.

    On several processes the gradient is that of their joined batch, however many answers each is asked for. Gradient
    accumulation averages means over batches: the same where all batches ask for as many, as those of most tasks do.

    Raises ValueError for a cosine over a run without an end, and for tensor parallelism.
    """

    def __init__(
        self,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 50,
        schedule: Literal["constant", "cosine"] = "cosine",
        compile: bool | str = False,
        **model: Any,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name in inspect.signature(self.make_model).parameters:
            if self.hparams.get(name, 0) is None:  # the command line links to it, and the task does not have it
                raise ValueError(f"{name}: expected that of a task for {type(self).__name__}, got a task without")
        self.model = self.make_model(**model)
        if compile:
            for block in self._blocks():
                block.compile(backend="inductor" if compile is True else compile)

    def _blocks(self) -> list[Block]:
        return [module for module in self.model.modules() if isinstance(module, Block)]

    def configure_model(self) -> None:
        """Shard the model where Lightning's ModelParallelStrategy asks for it; one block at a time is gathered."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.model, FSDPModule):
            return
        if (size := mesh["tensor_parallel"].size()) > 1:
            raise ValueError(f"tensor_parallel_size: expected 1, and all processes data-parallel, got {size}")
        for block in self._blocks():
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    @abstractmethod
    def make_model(self, *sizes: Any, **model: Any) -> nn.Module:
        """The model to train."""

    @abstractmethod
    def measure(self, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], int]:
        """What is logged of a batch, the loss to be lowered among it, and of how many answers it is the mean."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The batch, and the answers beside it."""
        inputs, targets = batch
        return {"inputs": inputs, "targets": targets, "predictions": self.answer(self(inputs))}

    def answer(self, outputs: Tensor) -> Tensor:
        """What is predicted: the model's outputs themselves where they are values."""
        return outputs

    def _step(self, batch: tuple[Tensor, Tensor], split: str) -> Tensor:
        measured, answers = self.measure(batch)
        metrics = {f"{split}_{name}": value for name, value in measured.items()}
        self.log_dict(metrics, prog_bar=True, batch_size=answers, sync_dist=split != "train")
        return measured["loss"] * _weight(answers, measured["loss"]) if split == "train" else measured["loss"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            _decay_groups(self.model, self.hparams["weight_decay"]),
            lr=self.hparams["learning_rate"],
            betas=self.hparams["betas"],
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        warmup, last = self.hparams["warmup_steps"], self.trainer.estimated_stepping_batches
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.hparams["schedule"] == "constant":
            return 1.0
        if math.isinf(last):
            raise ValueError(
                "schedule: expected 'constant' where no max_steps or max_epochs ends the run, got 'cosine'"
            )
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, last - warmup))))


def _weight(answers: int, like: Tensor) -> Tensor | int:
    """What makes the processes' mean of their means the mean over all answers: answers / mean answers of a process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    total = like.new_tensor(answers, dtype=torch.float32)
    dist.all_reduce(total)
    return answers * dist.get_world_size() / total


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices decay; scales, offsets, rates and temperatures have a meaning that is not zero."""
    # By their modules, and not by their shape: sharded parameters can be flat.
    decaying = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv1d))}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
