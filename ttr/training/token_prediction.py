"""Tokens: predict the one that the task asks for, or all of them from one vector."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ttr.models import RegressionAutoencoder, RegressionLM
from ttr.training.training import Training


class TokenPrediction(Training):
    """Trains a `RegressionLM` by cross entropy wherever the target is not −100.

        loss = −1/N Σ_t log softmax(model(tokens))_t[target_t]        (nats a target)

    Args:
        **training: the arguments of `Training` and of `RegressionLM`; the command line takes vocab_size from the task.

    Raises ValueError for a cosine over a run without an end.
    """

    def make_model(self, vocab_size: int, **model: Any) -> nn.Module:
        return RegressionLM(vocab_size, **model)

    def answer(self, outputs: Float[Tensor, "batch time vocab"]) -> Int[Tensor, "batch time"]:
        return outputs.argmax(-1)

    def measure(
        self, batch: tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]
    ) -> tuple[dict[str, Tensor], int]:
        tokens, targets = batch
        asked = targets >= 0
        logits, answers = self(tokens).flatten(0, 1), targets.flatten()
        if not asked.all():  # to choose takes longer than the loss itself, and text leaves nothing out
            logits, answers = logits[asked.flatten()], answers[asked.flatten()]
        loss = F.cross_entropy(logits, answers)
        accuracy = (logits.argmax(-1) == answers).float().mean()
        return {"loss": loss, "accuracy": accuracy}, len(answers)


class TokenReconstruction(TokenPrediction):
    """Trains a `RegressionAutoencoder` in the same way: every target has to come out of the last token's vector.

    Args:
        **training: the arguments of `Training` and of `RegressionAutoencoder`.

    Raises ValueError for a cosine over a run without an end.
    """

    def make_model(self, vocab_size: int, **model: Any) -> nn.Module:
        return RegressionAutoencoder(vocab_size, **model)
