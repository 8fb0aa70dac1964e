"""The one training objective of the book: predict the token that the task asks for."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ttr import _choices
from ttr._design import Design
from ttr.models import RegressionLM
from ttr.tasks import Batch

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


class TokenPrediction(LightningModule):
    """Trains a `RegressionLM` by cross entropy wherever the target is not −100.

        loss = −1/N Σ_t log softmax(model(tokens))_t[target_t]        (nats a target)

    AdamW; weight decay on weight matrices only, not on scales, biases, rates and temperatures. The learning
    rate rises over `warmup_steps` optimizer steps to `learning_rate`, then stays or falls along a cosine to
    zero at the last step of the run.

    Args:
        vocab_size: number of tokens; the command line takes it from the task.
        learning_rate: the highest learning rate.
        weight_decay: of AdamW, on weight matrices.
        betas: decay rates of AdamW's two moments.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: what follows the warm-up.
        **model: every other argument of `RegressionLM`.

    Raises ValueError for a cosine over a run without an end.
    """

    def __init__(
        self,
        vocab_size: int,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 50,
        schedule: Literal["constant", "cosine"] = "cosine",
        **model: Any,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.model = RegressionLM(vocab_size, **model)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        return self.model(tokens)

    def training_step(self, batch: Batch) -> Tensor:
        return self._predict(batch, "train")

    def validation_step(self, batch: Batch) -> None:
        self._predict(batch, "val")

    def test_step(self, batch: Batch) -> None:
        self._predict(batch, "test")

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """The task's tokens and targets, and beside them the likeliest token at every position."""
        tokens, targets = batch
        return {"tokens": tokens, "targets": targets, "predictions": self(tokens).argmax(-1)}

    def _predict(self, batch: Batch, split: str) -> Tensor:
        tokens, targets = batch
        asked = targets >= 0
        logits, answers = self(tokens)[asked], targets[asked]
        loss = F.cross_entropy(logits, answers)
        accuracy = (logits.argmax(-1) == answers).float().mean()
        metrics = {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, batch_size=len(answers), sync_dist=split != "train")
        return loss

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


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices decay; scales, offsets, rates and temperatures have a meaning that is not zero."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return name.endswith("weight") and parameter.ndim > 1

    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
