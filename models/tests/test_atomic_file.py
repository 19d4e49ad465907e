from __future__ import annotations

import pytest

from learn import atomic_file
from learn.atomic_file import rename_folder, replacing


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_and_no_partial_file(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as partial:
        partial.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def synced(monkeypatch):
    """The names that are synced, in order."""
    names, sync = [], atomic_file.sync
    monkeypatch.setattr(atomic_file, "sync", lambda path: (names.append(path.name), sync(path)))
    return names


def test_a_file_is_synced_before_its_folder(tmp_path, synced):
    with replacing(tmp_path / "figures.json") as partial:
        partial.write_text("new")
    assert synced == [partial.name, tmp_path.name]


def test_a_folder_is_renamed_once_its_files_are_on_disk(tmp_path, synced):
    made = tmp_path / "made"
    made.mkdir()
    (made / "one").write_text("1")
    rename_folder(made, tmp_path / "final")
    assert synced == ["one", "made", tmp_path.name]
    assert (tmp_path / "final" / "one").read_text() == "1" and not made.exists()


def test_the_folder_of_a_faster_process_stays(tmp_path):
    for name in ("made", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    rename_folder(tmp_path / "made", tmp_path / "final")
    assert (tmp_path / "final" / "who").read_text() == "final"
    with pytest.raises(OSError):
        rename_folder(tmp_path / "made", tmp_path / "nowhere" / "final")
