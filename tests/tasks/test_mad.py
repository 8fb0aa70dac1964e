"""The tasks of the MAD suite: every target by reading the sequence as a person would."""

import pytest
import torch

from ttr.tasks import Compression, FuzzyRecall, Memorization, NoisyRecall, SelectiveCopy


def sequences(task, split="train"):
    tokens, targets = task.draw(split, 0)
    return list(zip(tokens.tolist(), targets.tolist(), strict=True))


def test_the_copies_are_the_tokens_without_the_blanks():
    for tokens, targets in sequences(SelectiveCopy(vocab_size=7, length=20, num_tokens=5)):
        order = tokens.index(6)
        assert order == 14
        assert targets[order + 1 :] == [token for token in tokens[:order] if token != 5]
        assert tokens[order + 1 :] == [5] * 5
        assert targets[: order + 1] == [-100] * 15


def test_tokens_to_copy_stand_anywhere():
    tokens, _ = SelectiveCopy(vocab_size=7, length=20, num_tokens=5, batch_size=4000).draw("train", 0)
    share = (tokens[:, :14] != 5).float().mean(0)
    assert (share - 5 / 14).abs().max() < 4 * (5 / 14 * 9 / 14 / 4000) ** 0.5


@pytest.mark.parametrize(("noise", "noise_vocab_size"), [(0.4, 4), (0.0, 4), (0.0, 0)])
def test_noisy_recall_asks_at_every_key_that_came_before(noise, noise_vocab_size):
    task = NoisyRecall(vocab_size=16, length=24, noise=noise, noise_vocab_size=noise_vocab_size, batch_size=200)
    first_noise = 16 - noise_vocab_size
    num_noise = 0
    for tokens, targets in sequences(task):
        bound = {}
        for place in range(0, 24, 2):
            key, value = tokens[place : place + 2]
            if key >= first_noise:
                assert value >= first_noise
                assert targets[place] == -100
                num_noise += 1
            else:
                assert key < first_noise // 2 <= value < first_noise
                assert targets[place] == bound.get(key, -100)
                assert bound.setdefault(key, value) == value
            assert targets[place + 1] == -100
        assert targets[22] >= 0
    # Of twelve pairs two are never noise: one before the last, and the last.
    assert num_noise / 200 / 12 == pytest.approx(noise * 10 / 12, abs=0.05)


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_recall_asks_for_every_token_of_a_repeated_key_s_value(split):
    task = FuzzyRecall(vocab_size=9, length=40, batch_size=200)
    key_sizes, value_sizes = [], []
    for tokens, targets in sequences(task, split):
        last = targets[-1]  # the token after the sequence, the last of the last value
        assert last >= 0
        stream, expected = [*tokens, last], [-100] * 40
        place = next(i for i, token in enumerate(stream) if token != 8)
        assert set(stream[:place]) <= {8}
        bound = {}
        while place < len(stream):
            ends = place
            while stream[ends] < 4:
                ends += 1
            key, values = tuple(stream[place:ends]), ends
            while ends < len(stream) and 4 <= stream[ends] < 8:
                ends += 1
            value = tuple(stream[values:ends])
            assert len(set(key)) == len(key)
            assert len(set(value)) == len(value)
            if key in bound:
                assert bound[key] == value
                expected[values - 1 : ends - 1] = value
            bound[key] = value
            key_sizes.append(len(key))
            value_sizes.append(len(value))
            place = ends
        assert targets == expected
    assert set(key_sizes) == ({1, 2, 3} if split == "train" else {3})
    assert set(value_sizes) == {1, 2, 3}


def test_memorization_has_one_map_for_all_splits_and_another_for_another_seed():
    bound = {}
    task = Memorization(vocab_size=20, length=10)
    for split in ("train", "val", "test"):
        for tokens, targets in sequences(task, split):
            assert tokens[1::2] == [19] * 5
            assert targets[::2] == [-100] * 5
            for key, value in zip(tokens[::2], targets[1::2], strict=True):
                assert key < 9 <= value < 19
                assert bound.setdefault(key, value) == value
    assert len(bound) == len(set(bound.values())) == 9
    other = Memorization(vocab_size=20, seed=1)
    assert not torch.equal(other.value_of, task.value_of)


def test_compression_asks_for_the_tokens_themselves():
    for tokens, targets in sequences(Compression(vocab_size=9, length=12)):
        assert tokens[-1] == 8
        assert max(tokens[:-1]) < 8
        assert targets == [*tokens[:-1], -100]
