from __future__ import annotations

import pytest

from learn.atomic_file import replacing


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
