"""Python code in a process of its own, also one that is killed in the middle."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import MODELS


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the code, which can import `learn`, with arguments in `sys.argv[1:]`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(MODELS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def killing_before(name: str) -> str:
    """Returns the beginning of code for `run_python`.

    After `Path.replace = kill`, the process ends by SIGKILL before it moves a file of that name.
    """
    return f"""
import os, signal, sys
from pathlib import Path
move = Path.replace
def kill(path, target):
    if path.name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return move(path, target)
"""
