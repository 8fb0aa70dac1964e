"""Tasks: Lightning data modules that yield (inputs, targets), drawn as they are asked for.

Inputs are tokens, with the target −100 where nothing is asked, or vectors, with the target NaN there.
"""

from ttr.tasks.mad import Compression, FuzzyRecall, Memorization, NoisyRecall, SelectiveCopy
from ttr.tasks.recall import Recall, recall_batch
from ttr.tasks.regression import (
    DriftingRegression,
    LinearRegression,
    PiecewiseRegression,
    RegressionTask,
    SystemIdentification,
)
from ttr.tasks.state_tracking import StateTracking, group_elements
from ttr.tasks.task import IGNORED, Batch, Task, ValueBatch
from ttr.tasks.text import StandardLibraryText, read_corpus
from ttr.tasks.tokenized_text import TokenizedText

__all__ = [
    "IGNORED",
    "Batch",
    "Compression",
    "DriftingRegression",
    "FuzzyRecall",
    "LinearRegression",
    "Memorization",
    "NoisyRecall",
    "PiecewiseRegression",
    "Recall",
    "RegressionTask",
    "SelectiveCopy",
    "StandardLibraryText",
    "StateTracking",
    "SystemIdentification",
    "Task",
    "TokenizedText",
    "ValueBatch",
    "group_elements",
    "read_corpus",
    "recall_batch",
]
