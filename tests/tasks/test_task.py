"""What holds for every task: batches are a function of seed, split and index, and mistakes are named."""

import inspect

import pytest
import torch

from ttr import tasks
from ttr.tasks import (
    Compression,
    DriftingRegression,
    FuzzyRecall,
    LinearRegression,
    Memorization,
    NoisyRecall,
    PiecewiseRegression,
    Recall,
    SelectiveCopy,
    StateTracking,
    SystemIdentification,
    Task,
)

SMALL = {"batch_size": 3, "num_train": 2, "num_val": 2}
TASKS = {
    Compression: {},
    DriftingRegression: {"length": 40},
    FuzzyRecall: {"length": 40},
    LinearRegression: {"num_queries": 3},
    Memorization: {},
    NoisyRecall: {"length": 40},
    PiecewiseRegression: {"segment": 8, "cone": 0.3},
    Recall: {"placement": "power_law"},
    SelectiveCopy: {"length": 40, "num_tokens": 12},
    StateTracking: {"group": "S3", "elements": "generators"},
    SystemIdentification: {"length": 40, "saturation": 1.1},
}
OWN_TESTS = {"RegressionTask", "StandardLibraryText", "Task", "TokenizedText"}


def make(kind, **arguments):
    return kind(**(SMALL | TASKS[kind] | arguments))


def inputs(loader):
    return torch.stack([inputs for inputs, _ in loader])


def test_no_task_is_left_out():
    everything = {name for name, kind in vars(tasks).items() if inspect.isclass(kind) and issubclass(kind, Task)}
    assert everything - OWN_TESTS == {kind.__name__ for kind in TASKS}


@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_depends_on_seed_split_and_index_alone(kind):
    data, same, other = make(kind, seed=5), make(kind, seed=5), make(kind, seed=6)
    drawn = []
    for split in ("train", "val", "test"):
        torch.manual_seed(0)
        whole = inputs(getattr(data, f"{split}_dataloader")())
        torch.manual_seed(1)
        assert torch.equal(whole, inputs(getattr(same, f"{split}_dataloader")()))
        assert torch.equal(same.draw(split, 1)[0], whole[1])
        assert not torch.equal(whole, inputs(getattr(other, f"{split}_dataloader")()))
        drawn.append(whole)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    sequences = torch.cat([*drawn, inputs(loader)]).flatten(0, 1)
    assert len(sequences) == 4 * 2 * 3
    if kind is not NoisyRecall:  # whose sequences are drawn from few tokens, but
        assert len(sequences.unique(dim=0)) == len(sequences)


@pytest.mark.parametrize("kind", TASKS)
def test_something_is_asked_for_in_every_sequence_and_has_the_kind_that_the_model_needs(kind):
    data = make(kind)
    given, targets = data.draw("val", 0)
    assert given.shape[:2] == targets.shape[:2]
    if hasattr(data, "vocab_size"):
        assert given.dtype == targets.dtype == torch.int64
        asked = targets >= 0
        assert (targets[~asked] == -100).all()
        assert 0 <= given.min() <= given.max() < data.vocab_size
        assert targets.max() < data.vocab_size
    else:
        assert given.dtype == targets.dtype == torch.float32
        assert (given.shape[2], targets.shape[2]) == (data.input_size, data.output_size)
        assert given.isfinite().all()
        asked = ~targets.isnan().all(-1)
    assert asked.any(1).all()


@pytest.mark.parametrize("kind", TASKS)
def test_a_parameter_that_a_task_does_not_have_is_an_error(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'dimension'"):
        make(kind, dimension=3)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Compression, {"length": 1}, "length: expected at least 2, got 1"),
        (DriftingRegression, {"drift": 1.5}, r"drift: expected a number in \[0, 1\], got 1.5"),
        (DriftingRegression, {"dim": 0}, "dim: expected at least 1, got 0"),
        (FuzzyRecall, {"vocab_size": 6}, r"vocab_size: expected at least 1 \+ 2 \* max\(max_key, max_value\) = 7"),
        (FuzzyRecall, {"length": 11}, r"length: expected at least 2 \* \(max_key \+ max_value\) = 12, got 11"),
        (LinearRegression, {"noise": -1.0}, "noise: expected at least 0, got -1.0"),
        (LinearRegression, {"num_pairs": 0}, "num_pairs: expected at least 1, got 0"),
        (Memorization, {"length": 5}, "length: expected an even number, at least 2, got 5"),
        (NoisyRecall, {"length": 5}, "length: expected an even number, at least 4, got 5"),
        (NoisyRecall, {"noise": 1.0}, r"noise: expected a share in \[0, 1\), got 1.0"),
        (NoisyRecall, {"noise_vocab_size": 0}, "noise_vocab_size: expected at least 1 where there is noise, got 0"),
        (NoisyRecall, {"vocab_size": 17}, r"vocab_size: expected at least noise_vocab_size \+ 2 = 18, got 17"),
        (PiecewiseRegression, {"cone": 0.0}, "cone: expected a positive number, or None, got 0.0"),
        (PiecewiseRegression, {"segment": 0}, "segment: expected at least 1, got 0"),
        (Recall, {"power_a": 0.0}, r"power_a: expected a number in \(0, 1\], got 0.0"),
        (Recall, {"num_pairs": 9}, r"length: expected at least 4 \* num_pairs = 36, got 32"),
        (SelectiveCopy, {"length": 24}, r"length: expected at least 2 \* num_tokens \+ 1 = 25, got 24"),
        (SelectiveCopy, {"vocab_size": 2}, "vocab_size: expected at least 3, got 2"),
        (StateTracking, {"val_length": 0}, "val_length: expected at least 1, got 0"),
        (SystemIdentification, {"saturation": -1.0}, "saturation: expected a positive number, or None, got -1.0"),
        (SystemIdentification, {"window": 0}, "window: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Recall, {"placement": "normal"}), (StateTracking, {"group": "S5"}), (StateTracking, {"elements": "some"})],
)
def test_a_choice_that_is_none_is_named(kind, arguments):
    (name,) = arguments
    with pytest.raises((ValueError, TypeError), match=name):  # the second, where annotations are checked as here
        make(kind, **arguments)
