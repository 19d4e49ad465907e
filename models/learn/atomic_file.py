"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the block a path beside `path` to write to, then syncs that file to disk and renames it to `path`.

    If the block raises, `path` stays as it was. The name of the unfinished file contains the process id, so several
    processes may write the same `path`. A process that is killed leaves its unfinished hidden file behind.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
