"""No interruption while a bundle replaces another one loses both: neither an exception, nor a kill, nor two of them."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import tomli_w
from child_process import killing_before, run_python

from learn import atomic_file
from learn.serving import bundle_format, placing

OLD = {"a.onnx": "old a", "b.onnx": "old b", "gone.weights": "old weights"}
NEW = {"a.onnx": "new a", "b.onnx": "old b", "c.onnx": "new c"}
FOREIGN = {"notes.txt": "of somebody else"}
# What `_replace` does to the disk for these two bundles, one call after the other: links, renames, removals and syncs.
N_STEPS = 25
STEPS = pytest.mark.parametrize("step", range(1, N_STEPS + 1))


PREVIOUS = ".bundle.previous-bundle"
UNDOING = ((Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (placing, "sync"), (atomic_file, "sync"))


class Killed(BaseException):
    """Stands for the end of the process."""


def write_files(folder, files, name):
    """Writes the files of a bundle and a manifest that lists them."""
    folder.mkdir(exist_ok=True)
    for path, text in files.items():
        (folder / path).write_text(text)
    entries = [bundle_format.file_entry(folder / path, "encoder") for path in files]
    (folder / "manifest.toml").write_text(tomli_w.dumps({"name": name, "files": entries}))


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "bundle"
    write_files(folder, OLD, "old")
    (folder / "notes.txt").write_text(FOREIGN["notes.txt"])
    return folder


@pytest.fixture
def states(out, tmp_path_factory):
    """What the folder holds before the write and after it."""
    new = tmp_path_factory.mktemp("new")
    write_files(new, NEW, "new")
    return contents(out), contents(new) | FOREIGN


def place(out):
    with placing.placing(out) as folder:
        write_files(folder, NEW, "new")


def siblings(out):
    return sorted(path.name for path in out.parent.iterdir())


class Steps:
    """Counts what `placing` does to the disk, and ends it before the step `at`: once, or for good as a kill does."""

    def __init__(self, monkeypatch, at=None, error=KeyboardInterrupt):
        self.n, self.at, self.error, self.log = 0, at, error, []
        for owner, name in ((os, "link"), *UNDOING):
            monkeypatch.setattr(owner, name, self.counting(name, getattr(owner, name)))

    def counting(self, name, do):
        def counted(*arguments, **options):
            if name == "rmtree" and not str(arguments[0]).endswith(PREVIOUS):
                return do(*arguments, **options)  # The temporary folder, which is nobody's loss.
            self.n += 1
            if self.n == self.at or (self.error is Killed and self.at is not None and self.n > self.at):
                raise self.error
            self.log.append((name, *(Path(argument).name for argument in arguments)))
            return do(*arguments, **options)

        return counted


def test_the_new_bundle_replaces_the_old_one_and_leaves_files_that_no_manifest_names(out, states):
    place(out)
    assert contents(out) == states[1] and siblings(out) == ["bundle"]


def test_the_steps_below_are_all_that_there_are(out, monkeypatch):
    with monkeypatch.context() as patched:
        steps = Steps(patched)
        place(out)
    assert steps.n == N_STEPS, steps.log


@STEPS
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_the_folder_is_as_it_was_or_new(out, states, monkeypatch, step, error):
    with monkeypatch.context() as patched:
        Steps(patched, step, error)
        with pytest.raises(error):
            place(out)
    # Once the last file has been removed, nothing is left to undo; what remains is removed by the next write.
    is_done = step > N_STEPS - 3
    assert contents(out) == states[is_done]
    assert is_done or siblings(out) == ["bundle"]
    placing.recover(out)
    assert contents(out) == states[is_done] and siblings(out) == ["bundle"]


@STEPS
def test_after_a_kill_the_next_write_finds_a_complete_bundle(out, states, monkeypatch, capsys, step):
    with monkeypatch.context() as patched:
        steps = Steps(patched, step, Killed)
        with pytest.raises(Killed):
            place(out)
    has_moved = any(entry[0] == "replace" and entry[-1] != placing.MOVES for entry in steps.log)
    is_new = ("replace", "manifest.toml", "manifest.toml") in steps.log
    assert contents(out) in states or (has_moved and PREVIOUS in siblings(out))
    placing.recover(out)
    assert contents(out) == states[is_new] and siblings(out) == ["bundle"]
    shown = capsys.readouterr().out
    if has_moved and not is_new:
        assert shown == f"{out}: an earlier write was interrupted; the files from before it are back in place\n"
    elif shown and is_new:
        assert shown == f"{out}: an earlier write was interrupted after its last file; the bundle is complete\n"
    place(out)
    assert contents(out) == states[1] and siblings(out) == ["bundle"] and capsys.readouterr().out == ""


@STEPS
def test_a_kill_while_files_are_put_back_is_recovered_from(out, states, monkeypatch, tmp_path, step):
    saved = shutil.copytree(out, tmp_path / "saved")
    for later in itertools.count(1):
        shutil.rmtree(out)
        shutil.copytree(saved, out)
        with monkeypatch.context() as patched:
            # First an exception, and then, while it is handled, a kill.
            Steps(patched, step + later - 1, Killed)
            Steps(patched, step, KeyboardInterrupt)
            try:
                place(out)
            except Killed:
                is_killed = True
            except KeyboardInterrupt:
                is_killed = False
        placing.recover(out)
        assert contents(out) in states and siblings(out) == ["bundle", "saved"]
        if not is_killed:
            return
    raise AssertionError("the exception was never handled")


@STEPS
def test_a_bundle_that_is_new_is_whole_or_absent(tmp_path, monkeypatch, step):
    out = tmp_path / "fresh"
    with monkeypatch.context() as patched:
        steps = Steps(patched, step, KeyboardInterrupt)
        try:
            place(out)
        except KeyboardInterrupt:
            assert not out.exists() or "manifest.toml" in contents(out)
        else:
            assert steps.n < step and contents(out).keys() == {*NEW, "manifest.toml"}
    placing.recover(out)
    assert siblings(out) in ([], ["fresh"])


def test_a_new_folder_is_removed_again_if_the_block_wrote_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError), placing.placing(tmp_path / "fresh") as folder:
        (folder / "a.onnx").write_text("new a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", range(N_STEPS - 2, N_STEPS + 1))
def test_a_clean_up_that_fails_leaves_a_complete_bundle_and_says_so(out, states, monkeypatch, capsys, step):
    with monkeypatch.context() as patched:
        Steps(patched, step, OSError)
        place(out)
    assert contents(out) == states[1] and siblings(out) == [PREVIOUS, "bundle"]
    assert f"{PREVIOUS} cannot be removed (" in capsys.readouterr().out
    place(out)
    assert contents(out) == states[1] and siblings(out) == ["bundle"]


def test_a_clean_up_that_fails_does_not_hide_the_error_before_it(out, states, monkeypatch):
    def fail(*_arguments):
        raise OSError("no clean-up")

    with monkeypatch.context() as patched:
        patched.setattr(placing, "_remove", lambda *_: (_ for _ in ()).throw(RuntimeError("no removal")))
        patched.setattr(placing, "_discard", fail)
        with pytest.raises(RuntimeError, match="no removal"):
            place(out)
    assert contents(out) == states[0] and siblings(out) == [PREVIOUS, "bundle"]
    placing.recover(out)
    assert contents(out) == states[0] and siblings(out) == ["bundle"]


def test_a_new_folder_stays_for_the_next_write_if_its_clean_up_fails(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError("no removal")

    with monkeypatch.context() as patched:
        patched.setattr(placing, "_remove", fail)
        patched.setattr(placing, "_discard", fail)
        with pytest.raises(OSError, match="no removal"):
            place(tmp_path / "fresh")
    place(tmp_path / "fresh")
    assert contents(tmp_path / "fresh").keys() == {*NEW, "manifest.toml"}
    assert [path.name for path in tmp_path.iterdir()] == ["fresh"]


def test_a_temporary_folder_that_cannot_be_removed_is_no_error(out, states, monkeypatch):
    rmdir = os.rmdir

    def refuse(path, **options):
        if ".bundle-" in str(path):
            raise OSError("no removal")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", refuse)
    place(out)
    assert contents(out) == states[1]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"format = ", "Invalid value"),
        (b"name = '\xff'", "can't decode byte 0xff"),
        (b"files = 3", "files is 3"),
        (b"[[files]]\npart = 'cvr'", "path is missing"),
        (b"[[files]]\npath = ['cvr.onnx']", "path is ['cvr.onnx']"),
    ],
)
def test_a_broken_manifest_in_the_folder_is_refused_before_anything_is_written(out, raw, message):
    (out / "manifest.toml").write_bytes(raw)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError) as caught, placing.placing(out):
        raise AssertionError("the block ran")
    assert str(caught.value).startswith(f"{out}/manifest.toml: ") and message in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and siblings(out) == ["bundle"]


def test_a_folder_that_was_changed_after_a_kill_is_left_alone(out, monkeypatch):
    with monkeypatch.context() as patched:
        steps = Steps(patched)
        move = Path.replace

        def kill(path, target):
            if path.name == "b.onnx":
                raise Killed
            return move(path, target)

        patched.setattr(Path, "replace", kill)
        patched.setattr(placing, "_put_back", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            place(out)
    assert steps.n < N_STEPS
    write_files(out, {"a.onnx": "third a"}, "third")
    before = contents(out)
    message = r"was changed after a write of it was interrupted: copy the files from before that write, which are in .*"
    for action in (placing.recover, place):
        with pytest.raises(ValueError, match=message):
            action(out)
    assert contents(out) == before
    assert contents(out.parent / PREVIOUS / "files")["a.onnx"] == "old a"


def test_files_are_synced_before_they_are_moved_and_the_folder_before_and_after_the_manifest(out, monkeypatch):
    with monkeypatch.context() as patched:
        steps = Steps(patched)
        place(out)
    log = steps.log
    moves = [entry for entry in log if entry[0] == "replace" and entry[-1] in (*NEW, "manifest.toml")]
    assert [entry[-1] for entry in moves] == [*sorted(NEW), "manifest.toml"]
    first, manifest = log.index(moves[0]), log.index(moves[-1])
    synced = [entry[1] for entry in log[:first] if entry[0] == "sync"]
    assert {*NEW, "manifest.toml", "files", out.parent.name} <= set(synced)
    journal = next(place for place, entry in enumerate(log) if entry[0] == "replace" and entry[-1] == placing.MOVES)
    # The journal says that everything is set aside, so it is written after that and before any move.
    assert max(place for place, entry in enumerate(log) if entry[0] == "link") < journal < first
    assert log[manifest - 1] == log[manifest + 1] == ("sync", "bundle")


def test_a_file_system_without_hard_links_gets_copies(out, states, monkeypatch):
    def refuse(*_arguments, **_options):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    place(out)
    assert contents(out) == states[1]
    with pytest.raises(RuntimeError), placing.placing(out) as folder:
        write_files(folder, OLD, "old")
        monkeypatch.setattr(placing, "_remove", lambda *_: (_ for _ in ()).throw(RuntimeError))
    assert contents(out) == states[1] and siblings(out) == ["bundle"]


def test_a_link_to_the_folder_is_followed(out, states, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current"
    link.symlink_to(out)
    with placing.placing(link) as folder:
        # Beside the folder itself, as files cannot be renamed from one file system to another.
        assert folder.parent == out.parent
        write_files(folder, NEW, "new")
    assert link.is_symlink() and contents(out) == states[1] and siblings(out) == ["bundle", "links"]


def test_a_manifest_that_names_files_elsewhere_makes_nothing_there_disappear(out, tmp_path):
    names = ["../victim", str(tmp_path / "victim"), "sub/notes.txt", "manifest.toml", "..", ""]
    (tmp_path / "victim").write_text("here")
    text = tomli_w.dumps({"name": "old", "files": [{"path": name, "part": "cvr", "sha256": ""} for name in names]})
    (out / "manifest.toml").write_text(text)
    place(out)
    assert (tmp_path / "victim").read_text() == "here" and (out / "notes.txt").exists()
    assert 'name = "new"' in (out / "manifest.toml").read_text()


KILLED_WRITE = f"""{killing_before("manifest.toml")}
from learn.serving import placing
with placing.placing(Path(sys.argv[1])) as folder:
    for name in ("a.onnx", "c.onnx", "manifest.toml"):
        (folder / name).write_text("name = 'new'")
    Path.replace = kill
"""


def test_a_real_kill_before_the_manifest_is_undone(out, states):
    assert run_python(KILLED_WRITE, out).returncode == -signal.SIGKILL
    assert (out / "a.onnx").read_text() == "name = 'new'" and 'name = "old"' in (out / "manifest.toml").read_text()
    placing.recover(out)
    assert contents(out) == states[0] and PREVIOUS not in siblings(out)
