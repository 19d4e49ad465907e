"""`learn upgrade` as a process: on a machine without PyTorch, and killed in the middle."""

from __future__ import annotations

import shutil
import signal

from child_process import killing_before, run_python
from conftest import OLD_BUNDLE

from learn.cli import main
from learn.serving import bundle_check, upgrade
from learn.serving.upgrade import UpgradeConfig


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What needs PyTorch or its exporter, which a machine that only upgrades bundles need not have.
NO_TORCH = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnxscript", "onnx_ir", "accelerate", "peft"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocker())
from learn.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_pytorch_is_needed(tmp_path):
    result = run_python(NO_TORCH, "upgrade", OLD_BUNDLE, "--out", tmp_path / "blocked")
    assert result.returncode == 0, result.stderr
    upgrade.upgrade(UpgradeConfig(OLD_BUNDLE, tmp_path / "new"))
    assert contents(tmp_path / "blocked") == contents(tmp_path / "new")
    # The blocker works: another command fails on it.
    result = run_python(NO_TORCH, "train", "--run", tmp_path / "run")
    assert result.returncode != 0 and "blocked: torch" in result.stderr


KILLED_UPGRADE = f"""{killing_before("user_tower.onnx")}
from learn.cli import main
Path.replace = kill
main(sys.argv[1:])
"""


def test_an_upgrade_in_place_that_is_killed_can_be_run_again(tmp_path, capsys):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    command = ["upgrade", str(folder), "--out", str(folder), "--keeps", "all"]
    assert run_python(KILLED_UPGRADE, *command).returncode == -signal.SIGKILL
    # The item tower is already the new one, and the user tower and the manifest are the old ones.
    changed = {name for name, raw in contents(OLD_BUNDLE).items() if (folder / name).read_bytes() != raw}
    assert changed == {"golden.json", "item_tower.onnx"}
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(
        f"{folder}: an earlier write was interrupted; the files from before it are back in place\n"
        f"format-1 4 is now in format 2: {folder}\n"
    )
    bundle_check.verify(folder)
    assert not (tmp_path / ".bundle.previous-bundle").exists()
