"""The recall task: what a sequence is, what it can be solved with, and what it may depend on."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from ttr.tasks import IGNORED, Recall, recall_batch
from ttr.tasks.recall import distinct_integers


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.integers(0, 1000))
def test_every_key_is_asked_for_once_and_answered_by_its_value(num_pairs, more_length, more_vocab, seed):
    vocab_size, length = 2 * (num_pairs + 1) + more_vocab, 3 * num_pairs + more_length
    tokens, targets = recall_batch(generator(seed), 4, vocab_size, length, num_pairs)
    assert tokens.shape == targets.shape == (4, length)
    assert tokens.dtype == targets.dtype == torch.int64
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs, rest = sequence[: 2 * num_pairs], sequence[2 * num_pairs :]
        value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == num_pairs
        assert all(0 < key < vocab_size // 2 <= value < vocab_size for key, value in value_of.items())
        assert sorted(rest) == [0] * (len(rest) - num_pairs) + sorted(value_of)
        assert answers == [IGNORED] * len(pairs) + [value_of.get(token, IGNORED) for token in rest]


def test_a_shifted_hebbian_memory_answers_everything_and_an_unshifted_one_nothing():
    tokens, targets = recall_batch(generator(0))
    asked = targets >= 0
    one_hot = F.one_hot(tokens, 128).float()
    before = one_hot.roll(1, dims=1)  # what a convolution of width two on the keys can produce
    before[:, 0] = 0

    def answers(keys):
        scores = torch.einsum("btk,bsk,bsv->btv", one_hot, keys, one_hot)
        return scores[..., 64:][asked]

    assert torch.equal(answers(before).argmax(-1) + 64, targets[asked])
    assert not answers(one_hot).any()


def test_position_and_order_do_not_give_the_answer_away():
    num_pairs = 6
    tokens, targets = recall_batch(generator(1), 6000, num_pairs=num_pairs)
    first_query = (targets >= 0).int().argmax(1, keepdim=True)
    answer = targets.gather(1, first_query)
    place = (tokens[:, 1 : 2 * num_pairs : 2] == answer).int().argmax(1)
    share = place.bincount(minlength=num_pairs) / len(place)
    standard_error = (num_pairs - 1) ** 0.5 / num_pairs / len(place) ** 0.5
    assert (share - 1 / num_pairs).abs().max() < 4 * standard_error


def test_queries_after_power_law_gaps_stand_at_every_second_place_with_its_weight():
    """One pair alone is drawn from the weights themselves; all of them, key after key, are not in order but near it."""
    _, targets = recall_batch(generator(2), 20_000, length=34, num_pairs=1, placement="power_law", power_a=0.3)
    assert not (targets[:, 3::2] >= 0).any()
    share = (targets[:, 2::2] >= 0).float().mean(0)
    weights = torch.arange(1.0, 17.0) ** (0.3 - 1)
    expected = weights / weights.sum()
    assert ((share - expected).abs() < 4 * (expected / 20_000).sqrt()).all()

    tokens, targets = recall_batch(generator(3), 2000, length=64, num_pairs=16, placement="power_law")
    first, last = ((tokens[:, 32:] == tokens[:, place, None]).int().argmax(1).float().mean() for place in (0, 30))
    assert first < 10 < 16 < last


@pytest.mark.parametrize("placement", ["uniform", "power_law"])
def test_the_benchmark_s_own_sizes_answer_every_key_once(placement):
    tokens, targets = recall_batch(generator(4), 3, 8192, 1024, 256, placement)
    for sequence, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(sequence[:512:2], sequence[1:512:2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == 256
        assert all(0 < key < 4096 <= value < 8192 for key, value in value_of.items())
        asked = [(key, value) for key, value in zip(sequence, answers, strict=True) if value >= 0]
        assert dict(asked) == value_of
        assert len(asked) == 256


def test_few_of_many_integers_are_drawn_without_favour():
    drawn = distinct_integers(generator(5), 3000, 1024, 40)
    assert all(len(set(row)) == 40 for row in drawn[:200].tolist())
    counts = drawn.flatten().bincount(minlength=1024).float()
    expected = 3000 * 40 / 1024
    assert ((counts - expected).square() / expected).sum() < 1024 + 5 * (2 * 1024) ** 0.5
    ends = (drawn[:, 0] < 512).float().mean(), (drawn[:, -1] < 512).float().mean()
    assert all(abs(end - 0.5) < 4 * 0.5 / 3000**0.5 for end in ends)


def batches(loader):
    return torch.stack([tokens for tokens, _ in loader])


def test_a_batch_depends_on_seed_and_index_alone():
    data = Recall(batch_size=3, num_train=4, num_val=2, seed=5)
    again = Recall(batch_size=3, num_train=4, num_val=2, seed=5)
    assert torch.equal(batches(data.train_dataloader()), batches(again.train_dataloader()))
    assert torch.equal(batches(data.val_dataloader()), batches(again.val_dataloader()))
    assert torch.equal(data.train_dataloader().dataset[2][0], batches(again.train_dataloader())[2])
    other = Recall(batch_size=3, num_train=4, num_val=2, seed=6)
    assert not torch.equal(batches(data.train_dataloader()), batches(other.train_dataloader()))


def test_no_sequence_is_in_two_splits_or_two_epochs():
    data = Recall(batch_size=8, num_train=5, num_val=5)
    loader = data.train_dataloader()
    drawn = [batches(loader)]
    loader.sampler.set_epoch(1)
    drawn += [batches(loader), batches(data.val_dataloader()), batches(data.test_dataloader())]
    sequences = torch.cat(drawn).flatten(0, 1)
    assert len(sequences) == 4 * 5 * 8
    assert len(sequences.unique(dim=0)) == len(sequences)


def test_devices_share_out_the_batches_of_an_epoch():
    shares = []
    for device in range(2):
        data = Recall(batch_size=2, num_train=6)
        data.trainer = Mock(spec=Trainer, world_size=2, global_rank=device, fit_loop=Mock())
        data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 0
        shares.append(batches(data.train_dataloader()))
    whole = batches(Recall(batch_size=2, num_train=6).train_dataloader())
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pairs": 0}, "num_pairs: expected at least 1, got 0"),
        ({"num_pairs": 11}, r"length: expected at least 3 \* num_pairs = 33, got 32"),
        ({"vocab_size": 13}, r"vocab_size: expected at least 2 \* \(num_pairs \+ 1\) = 14, got 13"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_numbers_that_leave_no_room_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        recall_batch(generator(0), **arguments)
    with pytest.raises(ValueError, match=message):
        Recall(**arguments)


@pytest.mark.parametrize("name", ["num_train", "num_val", "seed"])
def test_a_negative_count_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        Recall(**{name: -1})
