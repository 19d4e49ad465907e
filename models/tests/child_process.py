"""Python code in a process of its own, also one that is killed in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import MODELS


def run_interpreter(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments; its code can import `learn` and the tests' helpers."""
    command = [sys.executable, *map(str, arguments)]
    paths = os.pathsep.join([str(MODELS / "tests"), str(MODELS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the code with arguments in `sys.argv[1:]`."""
    return run_interpreter("-c", code, *arguments)


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the script in two processes of one training."""
    # Without the dashes, torchrun takes some of the arguments for its own.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
    return run_interpreter(*launcher, script, *arguments)


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
