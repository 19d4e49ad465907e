"""Puts a finished bundle in the place of an earlier one. No interruption, not even of the machine, loses both.

`out` is the bundle's folder, and `.NAME.previous-bundle` lies beside it while files are moved:

1. The new files are written, checked and synced in a temporary folder beside `out`.
2. Each file of `out` that will be replaced or removed is linked into `.NAME.previous-bundle/files`. `moves.json`, which
   says what will happen to `out`, is written last.
3. The new files are moved to `out` one by one, the manifest last, so that they count only once it names them.
4. Files that only the earlier bundle had are removed, and then `.NAME.previous-bundle`.

After an exception, the earlier files are put back at once. After a killed process, `recover` does so the next time that
this bundle is written, unless the new manifest is in its place: then the new bundle is complete, and is kept. A killed
process also leaves its temporary folder (`.bundle-*`) behind, which nothing reads.

Only one process at a time may write a bundle. A reader that comes between two moves sees files of both bundles, and
detects that by their digests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from learn.atomic_file import replacing, sync
from learn.serving.bundle_format import MANIFEST, is_file_name, parse_manifest, sha256

MOVES = "moves.json"
FILES = "files"


@dataclass(frozen=True)
class _Moves:
    """What happens to the names in `out`. Digests of manifests are empty where there is none."""

    # Files of the earlier bundle that are replaced or removed.
    aside: list[str]
    # Files that `out` did not have.
    added: list[str]
    # Files that the new bundle does not have.
    removed: list[str]
    old_manifest: str
    new_manifest: str


@contextlib.contextmanager
def placing(out: Path) -> Iterator[Path]:
    """Gives the block an empty folder to write a bundle to, then moves its files to `out`, the manifest last.

    Files that only the previous bundle in `out` had are removed; files that no manifest names stay. If anything raises
    until the last file is in place, `out` is as it was. A clean-up that fails is no error: what it leaves is removed by
    the next write. An earlier write that was interrupted is undone or finished first (`recover`). Raises ValueError
    before the block runs for a manifest in `out` that cannot be read.
    """
    out = out.resolve()
    recover(out)
    named_before = named(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        yield folder
        _replace(out, folder, named_before)


def recover(out: Path) -> None:
    """Undoes or finishes a write of the bundle in `out` that was interrupted, and prints which; else does nothing.

    Raises ValueError if `out` was changed since, because then neither is safe.
    """
    out = out.resolve()
    previous = _previous(out)
    if not previous.is_dir():
        return
    if (previous / MOVES).is_file():
        moves = _Moves(**json.loads((previous / MOVES).read_text(encoding="utf-8")))
        found = _manifest_digest(out)
        # Equal manifests do not tell how far the write came, and putting files back is safe at any point of it.
        if found == moves.new_manifest != moves.old_manifest:
            _remove(out, moves.removed)
            print(f"{out}: an earlier write was interrupted after its last file; the bundle is complete")
        elif found == moves.old_manifest:
            _put_back(out, moves)
            print(f"{out}: an earlier write was interrupted; the files from before it are back in place")
        else:
            raise ValueError(
                f"{out} was changed after a write of it was interrupted: copy the files from before that write, which "
                f"are in {previous / FILES}, to where you need them, then remove {previous}"
            )
    # Without moves.json, nothing was moved yet, or everything was.
    _discard(previous)


def _replace(out: Path, folder: Path, named_before: set[str]) -> None:
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == MANIFEST, name))
    for name in names:
        sync(folder / name)
    is_new = not out.exists()
    removed = [name for name in sorted(named_before - named(folder) - set(names)) if os.path.lexists(out / name)]
    replaced = [name for name in names if os.path.lexists(out / name)]
    moves = _Moves(
        aside=[*replaced, *removed],
        added=[name for name in names if name not in replaced],
        removed=removed,
        old_manifest=_manifest_digest(out),
        new_manifest=sha256(folder / MANIFEST),
    )
    previous = _previous(out)
    try:
        out.mkdir(exist_ok=True)
        _set_aside(out, previous, moves)
        for name in names:
            if name == MANIFEST:
                sync(out)
            (folder / name).replace(out / name)
        sync(out)
        _remove(out, removed)
    except BaseException:
        if (previous / MOVES).is_file():
            _put_back(out, moves)
        _clean_up(previous)
        # If the clean-up failed, the next `recover` needs the folder.
        if is_new and not previous.is_dir():
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    _clean_up(previous)


def _set_aside(out: Path, previous: Path, moves: _Moves) -> None:
    (previous / FILES).mkdir(parents=True)
    for name in moves.aside:
        try:
            os.link(out / name, previous / FILES / name, follow_symlinks=False)
        except OSError:  # Not every file system has hard links.
            shutil.copy2(out / name, previous / FILES / name, follow_symlinks=False)
            if not (previous / FILES / name).is_symlink():
                sync(previous / FILES / name)
    sync(previous / FILES)
    with replacing(previous / MOVES) as partial:
        partial.write_text(json.dumps(asdict(moves), indent=1) + "\n", encoding="utf-8")
    sync(previous.parent)


def _put_back(out: Path, moves: _Moves) -> None:
    """Restores `out`. If this is interrupted as well, the next `recover` continues it.

    The manifest comes first: `recover` must not take a bundle for the new one while its files change back.
    """
    for name in sorted({*moves.aside, *moves.added}, key=lambda name: (name != MANIFEST, name)):
        kept = _previous(out) / FILES / name
        if name in moves.added:
            (out / name).unlink(missing_ok=True)
        elif os.path.lexists(kept):
            kept.replace(out / name)
        if name == MANIFEST:
            sync(out)
    sync(out)


def _remove(out: Path, names: list[str]) -> None:
    for name in names:
        (out / name).unlink(missing_ok=True)
    sync(out)


def _clean_up(previous: Path) -> None:
    try:
        _discard(previous)
    except OSError as error:
        print(f"{previous} cannot be removed ({error}); the next write of this bundle removes it")


def _discard(previous: Path) -> None:
    """Removes the earlier files, and moves.json before them: without it, the rest means nothing."""
    (previous / MOVES).unlink(missing_ok=True)
    if previous.is_dir():
        sync(previous)
        shutil.rmtree(previous)


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous-bundle")


def _manifest_digest(folder: Path) -> str:
    path = folder / MANIFEST
    return sha256(path) if path.is_file() else ""


def named(folder: Path) -> set[str]:
    """Returns the files that the manifest in `folder` names; an empty set if there is no manifest.

    Raises ValueError for a manifest that cannot be read, in whose place `placing` would not write.
    """
    if not (folder / MANIFEST).is_file():
        return set()
    paths = [entry["path"] for entry in parse_manifest(folder)["files"]]
    return {path for path in paths if is_file_name(path)}
