"""Text that is there wherever Python is: the bytes of the standard library's own sources."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from ttr.tasks.task import Batch, Task, require, require_at_least

# Tests repeat each other, installed packages differ from machine to machine, and the build writes its own
# paths into the rest: without them the digest depends on the version of Python alone.
_NOT_STANDARD_LIBRARY = (
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("config-*", "_sysconfigdata*"),
)


def read_corpus(
    folder: str | os.PathLike[str],
    pattern: str = "*",
    skip: tuple[str, ...] = (),
    max_bytes: int | None = None,
) -> dict[str, bytearray]:
    """The files under a folder, in order of their relative path, as three byte streams: train, val and test.

    A file goes where the hash of its relative path sends it: 18 in 20 to train, one each to val and test. No
    file is in two streams, and adding one moves no other. `pattern` selects file names and `skip` drops files
    and folders by name, both as the shell matches; reading stops after `max_bytes` bytes in all.

    Raises ValueError naming `corpus` if the folder does not exist.
    """
    folder = Path(folder)
    require(folder.is_dir(), "corpus", "a folder that exists", str(folder))
    streams = {split: bytearray() for split in ("train", "val", "test")}
    left = sys.maxsize if max_bytes is None else max_bytes
    require_at_least(1, max_bytes=left)
    for name in sorted(_file_names(folder, pattern, skip)):
        content = (folder / name).read_bytes()[:left]
        left -= len(content)
        bucket = hashlib.sha256(name.encode()).digest()[0] % 20
        streams[{0: "val", 1: "test"}.get(bucket, "train")] += content
        if not left:
            break
    return streams


def _file_names(folder: Path, pattern: str, skip: tuple[str, ...]) -> Iterator[str]:
    def kept(name: str) -> bool:
        return not any(fnmatchcase(name, skipped) for skipped in skip)

    for parent, folders, files in os.walk(folder):
        folders[:] = filter(kept, folders)  # os.walk then does not enter the others
        for name in files:
            if fnmatchcase(name, pattern) and kept(name):
                yield (Path(parent) / name).relative_to(folder).as_posix()


class StandardLibraryText(Task):
    """Next-byte prediction on Python's standard library, or on any folder of text.

    Training windows start anywhere, drawn anew each epoch; validation and test windows are spread evenly over
    files that are never trained on, and are the same for every seed.

    Args:
        length: bytes in a window.
        batch_size: windows in a batch.
        num_train: batches in an epoch.
        num_val: batches to validate on, and as many others to test on.
        max_bytes: how much to read, in order of the files' paths; all of it if None.
        seed: of the training windows; the model's seed is the trainer's.
        corpus: a folder to read instead of the standard library.
        pattern: which of the folder's file names to read.

    Attributes: `streams`, the bytes of each split; `digest`, the SHA-256 of the three one after another.
    Another version of Python has other sources, hence another digest.

    Raises ValueError if the folder does not exist, or a split of it is no longer than a window.
    """

    vocab_size = 256

    def __init__(
        self,
        length: int = 256,
        batch_size: int = 16,
        num_train: int = 100,
        num_val: int = 16,
        max_bytes: int | None = None,
        seed: int = 0,
        corpus: str | os.PathLike[str] | None = None,
        pattern: str = "*.py",
    ):
        super().__init__(batch_size, num_train, num_val, seed)
        require_at_least(1, length=length)
        if corpus is None:
            streams = read_corpus(sysconfig.get_path("stdlib"), pattern, _NOT_STANDARD_LIBRARY, max_bytes)
        else:
            streams = read_corpus(corpus, pattern, max_bytes=max_bytes)
        for split, stream in streams.items():
            expected = f"more than length = {length} bytes in the {split} files that match {pattern!r}"
            require(len(stream) > length, "corpus", expected, len(stream))
        self.length = length
        self.digest = hashlib.sha256(b"".join(streams.values())).hexdigest()
        self.streams = {split: torch.frombuffer(stream, dtype=torch.uint8) for split, stream in streams.items()}

    def draw(self, split: str, index: int) -> Batch:
        stream = self.streams[split]
        num_starts = len(stream) - self.length
        if split == "train":
            starts = torch.randint(num_starts, (self.batch_size,), generator=self.generator(split, index))
        else:
            spread = torch.linspace(0, num_starts - 1, self.num_val * self.batch_size, dtype=torch.float64)
            starts = spread.long()[index * self.batch_size :][: self.batch_size]
        pieces = stream.unfold(0, self.length + 1, 1)[starts].long()
        return pieces[:, :-1], pieces[:, 1:]
