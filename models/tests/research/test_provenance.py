"""The commit of a work tree, with and without changes, and without git."""

from __future__ import annotations

import subprocess

import pytest

from research import provenance


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def work_tree(tmp_path):
    for name in ("learn", "research", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_commit_says_whether_the_code_differs_from_it(work_tree):
    head = git(work_tree, "rev-parse", "HEAD")
    assert provenance.commit_of(work_tree) == head
    (work_tree / "tests" / "a.py").write_text("x = 2\n")
    assert provenance.commit_of(work_tree) == head
    (work_tree / "research" / "new.py").write_text("x = 2\n")
    assert provenance.commit_of(work_tree) == f"{head}+changes"


def test_without_git_or_outside_a_work_tree_it_is_unknown(work_tree, tmp_path_factory, monkeypatch):
    assert provenance.commit_of(work_tree / "absent") == "unknown"
    outside = tmp_path_factory.mktemp("outside")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(outside.parent))
    assert provenance.commit_of(outside) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert provenance.commit_of(work_tree) == "unknown"


def test_the_first_answer_of_a_process_stays():
    assert provenance.commit() == provenance.commit() != ""
