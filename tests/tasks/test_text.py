"""The text task: what is read, how it is split, and what a window is."""

import hashlib
import json.decoder
from pathlib import Path

import pytest
import torch

from ttr.tasks import StandardLibraryText, read_corpus


@pytest.fixture(scope="module")
def standard_library():
    return StandardLibraryText(length=64, batch_size=8, num_train=3, num_val=2)


@pytest.fixture
def folder(tmp_path):
    for number in range(200):
        file = tmp_path / f"part{number % 3}" / f"file{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"<{number}>")
    return tmp_path


def test_the_standard_library_is_read_once_and_as_it_is(standard_library):
    source = Path(json.decoder.__file__).read_bytes()
    streams = {split: stream.numpy().tobytes() for split, stream in standard_library.streams.items()}
    assert sum(stream.count(source) for stream in streams.values()) == 1
    assert not any(b"class TestCase(unittest.TestCase)" in stream for stream in streams.values())
    assert all(len(stream) > 100_000 for stream in streams.values())
    assert standard_library.digest == hashlib.sha256(b"".join(streams.values())).hexdigest()
    assert standard_library.digest == StandardLibraryText().digest


def test_every_file_is_in_one_stream_in_the_order_of_its_path(folder):
    streams = read_corpus(folder)
    assert all(streams.values())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    rest = {split: stream.decode() for split, stream in streams.items()}
    for name in names:
        content = (folder / name).read_text()
        (split,) = (split for split, text in rest.items() if text.startswith(content))
        rest[split] = rest[split].removeprefix(content)
    assert not any(rest.values())


def test_a_new_file_moves_no_other(folder):
    before = read_corpus(folder)
    (folder / "another.txt").write_text("<another>")
    after = {split: stream.replace(b"<another>", b"") for split, stream in read_corpus(folder).items()}
    assert after == before


def test_pattern_skip_and_max_bytes_select(folder):
    (folder / "tests").mkdir()
    (folder / "tests" / "file0.py").write_text("assert True")

    def size(**arguments):
        return sum(map(len, read_corpus(folder, **arguments).values()))

    assert size(pattern="*.py") == len("assert True")
    assert size(pattern="*.py", skip=("test*",)) == 0
    assert size(skip=("part[01]", "*.py")) == sum(len(f"<{n}>") for n in range(2, 200, 3))
    assert size(max_bytes=7) == 7


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_target_is_the_next_byte_of_the_stream(standard_library, split):
    stream = standard_library.streams[split].numpy().tobytes()
    loader = getattr(standard_library, f"{split}_dataloader")()
    num_windows = 0
    for tokens, targets in loader:
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        windows = torch.cat([tokens, targets[:, -1:]], dim=1)
        assert all(bytes(window.tolist()) in stream for window in windows)
        num_windows += len(windows)
    assert num_windows == {"train": 3, "val": 2, "test": 2}[split] * 8


def test_the_windows_can_reach_both_ends_of_the_stream(folder):
    data = StandardLibraryText(length=4, batch_size=2000, corpus=folder, pattern="*.txt", num_train=4)
    for split, stream in data.streams.items():
        seen = torch.cat([tokens for tokens, _ in getattr(data, f"{split}_dataloader")()])
        assert (seen == stream[:4]).all(1).any()
        assert (seen == stream[-5:-1]).all(1).any()


def test_the_seed_moves_the_training_windows_only(folder):
    def first(split, seed):
        data = StandardLibraryText(length=4, batch_size=16, corpus=folder, pattern="*.txt", seed=seed)
        return next(iter(getattr(data, f"{split}_dataloader")()))[0]

    assert torch.equal(first("train", 1), first("train", 1))
    assert not torch.equal(first("train", 1), first("train", 2))
    assert torch.equal(first("val", 1), first("val", 2))


def test_a_corpus_that_cannot_be_is_named(folder):
    with pytest.raises(ValueError, match=r"corpus: expected a folder that exists, got .*nowhere"):
        StandardLibraryText(corpus=folder / "nowhere")
    with pytest.raises(ValueError, match=r"corpus: expected more than length = 256 bytes in the \w+ files"):
        StandardLibraryText(corpus=folder)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        StandardLibraryText(length=0)
