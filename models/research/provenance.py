"""Which code wrote a record: the commit of the git work tree that this package lies in."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

MODELS = Path(__file__).resolve().parents[1]
# The folders whose code decides what a run computes. A change in tests or in documents does not change a result.
CODE = ("learn", "research")
UNKNOWN = "unknown"
CHANGED = "+changes"
SECONDS = 30


@cache
def commit() -> str:
    """The commit, with `CHANGED` behind it if the code differs from it; `UNKNOWN` without git or outside a work tree.

    The first call of a process decides, because that is closest to the code that the process has loaded. Call it before
    a long training, not after it.
    """
    return commit_of(MODELS)


def commit_of(folder: Path) -> str:
    """The same for the folders `CODE` in `folder`, asked anew at each call."""
    head = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", *CODE)
    if not head or changes is None:
        return UNKNOWN
    return head + CHANGED if changes else head


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it fails. It takes no locks, so it disturbs nobody who works in the same tree."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
