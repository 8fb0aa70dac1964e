"""What every task is: batches that are a function of a split and an index, so that nothing is stored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

Batch = tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]
ValueBatch = tuple[Float[Tensor, "batch time input"], Float[Tensor, "batch time output"]]
IGNORED = -100  # the target that torch's cross entropy skips

_STREAMS = {"train": 0, "val": 1, "test": 2}


class Task(LightningDataModule, ABC):
    """Batches of (inputs, targets), drawn when they are asked for.

    An epoch is `num_train` batches that no epoch had before. Lightning tells the sampler which epoch it is and
    how many of its batches were trained on: a resumed run sees what the uninterrupted run would have seen, and
    no two devices see the same batch.

    A task of tokens has a `vocab_size`, and the target −100 where nothing is asked; a task of vectors has an
    `input_size` and an `output_size`, and the target NaN where nothing is asked.

    Args:
        batch_size: sequences in a batch.
        num_train: batches in an epoch.
        num_val: batches to validate on, and as many others to test on.
        seed: of the data; the model's seed is the trainer's.

    Raises ValueError for a count below one or a negative seed.
    """

    def __init__(self, batch_size: int = 64, num_train: int = 100, num_val: int = 16, seed: int = 0):
        super().__init__()
        require_at_least(1, batch_size=batch_size, num_train=num_train, num_val=num_val)
        require_at_least(0, seed=seed)
        self.batch_size, self.num_train, self.num_val, self.seed = batch_size, num_train, num_val, seed

    @abstractmethod
    def draw(self, split: str, index: int) -> Batch | ValueBatch:
        """The batch number `index` ≥ 0 of "train", "val" or "test"."""

    def generator(self, split: str, index: int) -> torch.Generator:
        """The generator of one batch: independent streams for different (seed, split, index)."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(_STREAMS[split], index))
        return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def train_dataloader(self) -> DataLoader[Batch | ValueBatch]:
        devices, device = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = _Split(self, "train", self.num_train)
        sampler = _NewEveryEpoch(batches, num_replicas=devices, rank=device, shuffle=False)
        sampler.trainer = self.trainer
        return _ResumableLoader(batches, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Batch | ValueBatch]:
        return DataLoader(_Split(self, "val", self.num_val), batch_size=None)

    def test_dataloader(self) -> DataLoader[Batch | ValueBatch]:
        return DataLoader(_Split(self, "test", self.num_val), batch_size=None)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()


class _Split(Dataset[Batch | ValueBatch]):
    def __init__(self, task: Task, split: str, num_batches: int):
        self.task, self.split, self.num_batches = task, split, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> Batch | ValueBatch:
        return self.task.draw(self.split, index)


class _ResumableLoader(DataLoader[Batch | ValueBatch]):
    """Tells Lightning, which asks for a state, that an epoch can be resumed: the position is the trainer's count."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _NewEveryEpoch(DistributedSampler[int]):
    """Epoch e of n batches is e·n … e·n + n − 1, dealt out over the devices, without what a resumed run has seen."""

    trainer: Trainer | None = None

    def __iter__(self) -> Iterator[int]:
        # A generator, so that all is read with the first batch: Lightning sets it after calling iter().
        seen = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0
        for index in islice(super().__iter__(), seen, None):
            yield self.epoch * len(self.dataset) + index  # type: ignore[arg-type]


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError that names the argument, what was expected and what came."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def require_at_least(smallest: int, **arguments: int) -> None:
    """Hold each named argument to its smallest value."""
    for name, value in arguments.items():
        require(value >= smallest, name, f"at least {smallest}", value)
