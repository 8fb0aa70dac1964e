"""A program for torchrun: the gradients of every step, as rank 0 has them before the optimizer takes them."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy

from ttr.tasks import Recall
from ttr.training import TokenPrediction


class Keep(Callback):
    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        self.steps.append(
            {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in gradients.items()}
        )


class Joined(Recall):
    """`joined` batches at once."""

    joined = 1

    def draw(self, split, index):
        batches = [self.one(split, number) for number in range(index * self.joined, (index + 1) * self.joined)]
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))

    def one(self, split, index):
        return super().draw(split, index)


class Uneven(Joined):
    """Batches that ask for different numbers of answers."""

    def one(self, split, index):
        tokens, targets = super().one(split, index)
        if index % 2:
            targets[1:] = -100
        return tokens, targets


def main(out: Path, processes: int, strategy: str, checkpoint_activations: bool) -> None:
    seed_everything(0)
    module = TokenPrediction(
        vocab_size=32,
        d_model=16,
        num_layers=2,
        num_heads=2,
        learning_rate=0.0,  # so that the second step has the weights of the first
        schedule="constant",
        checkpoint_activations=checkpoint_activations,
    )
    data = Uneven(vocab_size=32, length=20, num_pairs=3, batch_size=4, num_train=4, num_val=1)
    if processes == 1:
        data.joined, data.num_train = 2, 2
    kept = Keep()
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ModelParallelStrategy(processes, 1) if strategy == "sharded" else strategy,
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[kept],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if trainer.global_rank == 0:
        torch.save(kept.steps, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "checkpoint")
