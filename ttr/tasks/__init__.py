"""Tasks: Lightning data modules that yield (tokens, targets), with the target −100 where nothing is asked."""

from ttr.tasks.recall import Recall, recall_batch
from ttr.tasks.task import IGNORED, Batch, Task
from ttr.tasks.text import StandardLibraryText, read_corpus

__all__ = ["IGNORED", "Batch", "Recall", "StandardLibraryText", "Task", "read_corpus", "recall_batch"]
