"""Files and folders that are written whole or not at all, and that a power failure does not take back."""

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
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_folder(made: Path, folder: Path) -> None:
    """Syncs the files of a finished folder and renames it to `folder`, unless another process was faster."""
    for path in made.iterdir():
        sync(path)
    sync(made)
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    sync(folder.parent)
