"""Files that are whole or not there, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write under another name in the same folder, bring it to the disk, and rename.

    Raises `OSError`, which names the file, where that cannot be; what stood under the name before then still does.
    """
    # A name of its own for each writer; the leading dot and the ending keep it from every reader.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say for which file
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming, too
    finally:
        os.close(folder)
