"""A study while it runs: time left, the processes of its runs, data that are prepared once, and the closing table."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MODELS, write_movielens

from learn import data
from research.retrieval.prepare_once import prepare_once
from research.retrieval.progress import PlannedRun, Progress, Timed, expected_seconds
from research.retrieval.workers import Event, work_off


def planned(model, seed=1, kind="sasrec", steps=100):
    return PlannedRun(model, seed, kind, steps, {})


def test_the_time_of_a_run_comes_from_what_is_most_like_it():
    run = planned("a", 2)
    other_kind, same_kind, same_model = (
        Timed(planned("learn", kind="learn", steps=100), 1000.0),
        Timed(planned("b", steps=50), 100.0),
        Timed(planned("a"), 60.0),
    )
    assert expected_seconds(run, [], []) is None
    assert expected_seconds(run, [other_kind], []) == pytest.approx(1000.0)
    assert expected_seconds(run, [other_kind, same_kind], []) == pytest.approx(200.0)
    assert expected_seconds(run, [other_kind, same_kind, same_model], []) == pytest.approx(60.0)
    # A run of the model that is under way tells more than a finished one of its kind, and less than one of the model.
    half = Timed(planned("a", 3), 40.0, 0.5)
    assert expected_seconds(run, [same_kind], [half]) == pytest.approx(80.0)
    assert expected_seconds(run, [same_model], [half]) == pytest.approx(60.0)
    assert expected_seconds(run, [], [Timed(planned("a", 3), 40.0, 0.0)]) is None
    popular = planned("popularity", kind="popularity", steps=0)
    assert expected_seconds(popular, [other_kind], []) == 0.0
    assert expected_seconds(popular, [Timed(popular, 7.0)], []) == 7.0


def test_progress_names_model_and_seed_and_knows_the_time_left(capsys):
    now = [0.0]
    runs = [planned("a"), planned("b"), planned("a", 2), planned("b", 2)]
    progress = Progress(runs, [], n_workers=2, clock=lambda: now[0])
    progress.note(Event(0, "started"))
    progress.note(Event(1, "started"))
    assert progress.seconds_left() is None
    now[0] = 30.0
    progress.note(Event(0, "report", {"step": 50, "ndcg_at_10": 0.0712}))
    # `a` takes 60 s and so do the runs of `b`, which is of its kind: two rounds of two runs, 30 s of which are over.
    assert progress.seconds_left() == pytest.approx(90.0)
    now[0] = 60.0
    progress.note(Event(0, "done"))
    progress.note(Event(2, "started"))
    progress.note(Event(1, "report", {"step": 50}))
    # `b` takes 120 s: 60 s for this run, then 120 s for the next one.
    assert progress.seconds_left() == pytest.approx(180.0)
    progress.note(Event(1, "failed", "out of luck"))
    assert [str(run) for run in progress.failed] == ["b seed 1"]
    lines = capsys.readouterr().out
    assert "a seed 1: step 50 of 100, NDCG@10 0.0712 on validation; 0 of 4 runs over, about 90 s left" in lines
    assert "a seed 1 done after 60 s; 1 of 4 runs over" in lines
    assert "b seed 1 FAILED after 60 s: out of luck" in lines


def test_a_run_that_continues_from_a_checkpoint_counts_what_it_took_before():
    now = [1000.0]
    progress = Progress([planned("a")], [], n_workers=1, clock=lambda: now[0])
    progress.note(Event(0, "started"))
    now[0] = 1010.0
    progress.note(Event(0, "report", {"step": 75, "seconds": 90.0}))
    # 75 steps took 90 s, most of them before this study was started again.
    assert progress.seconds_left() == pytest.approx(30.0)


def job_of_test(job, report):
    """What the processes of the next test do."""
    if job == "error":
        raise ValueError("what the user can mend")
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    report({"step": job})
    return 2 * job


def test_a_run_that_fails_or_is_killed_costs_no_other_run():
    with closing(work_off(job_of_test, [1, "error", "killed", 4], n_workers=1)) as events:
        found = [(event.index, event.kind, event.content) for event in events]
    assert found == [
        (0, "started", None),
        (0, "report", {"step": 1}),
        (0, "done", 2),
        (1, "started", None),
        (1, "failed", "what the user can mend"),
        (2, "started", None),
        (2, "failed", "its process ended with exit code -9"),
        (3, "started", None),
        (3, "report", {"step": 4}),
        (3, "done", 8),
    ]


def test_without_a_worker_nothing_is_left_undone_silently():
    with pytest.raises(ValueError, match="0 workers cannot do anything; give at least 1"):
        next(work_off(job_of_test, [1], n_workers=0))


ENDLESS = """
study = "endless"
seeds = [1, 2]

[split]
n_test = 1
n_validation = 1

[train]
steps = 100000000
users = 4
n_uniform = 4
check_every = 1

[contents.none]
encoder = "unused"

[models.sasrec]
kind = "sasrec"
label = "SASRec"
content = "none"
sizes = { width = 8, max_history = 6 }
"""


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of a program, in parentheses, may contain spaces.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_process_of_a_study_outlives_it(tmp_path, number):
    """After SIGTERM, the processes of the runs went on, and then hung with their data in memory."""
    ratings = [(user + 1, (user + at) % 9 + 1, 4.0, at) for user in range(6) for at in range(7)]
    write_movielens(tmp_path / "ml", ratings, [(item + 1, f"Film {item}", "Drama") for item in range(9)])
    (tmp_path / "study.toml").write_text(ENDLESS)
    command = [sys.executable, "-m", "learn", "study", "--config", tmp_path / "study.toml", "--data", tmp_path / "ml"]
    command += ["--run", tmp_path / "run", "--out", tmp_path / "results", "--workers", "2"]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=MODELS,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell starts background jobs, such as these tests, with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as study:
        waiting = {"sasrec seed 1: step", "sasrec seed 2: step"}
        for line in study.stdout:
            waiting -= {text for text in waiting if text in line}
            if not waiting:
                break
        workers = children(study.pid)
        assert len(workers) >= 2
        handles = [os.pidfd_open(pid) for pid in workers]
        study.send_signal(number)
        study.stdout.read()
        assert study.wait(60) != 0
        for handle in handles:
            # Readable once the process has ended.
            assert select.select([handle], [], [], 60)[0]
            os.close(handle)


def test_data_are_prepared_again_only_if_something_changed(tmp_path, capsys):
    ratings = [(user + 1, (user + at) % 9 + 1, 4.0, at) for user in range(6) for at in range(7)]
    movies = [(item + 1, f"Film {item}", "Drama") for item in range(9)]
    write_movielens(tmp_path / "ml", ratings, movies)
    config, folder = data.PrepareConfig(), tmp_path / "data"

    def is_prepared(config=config):
        prepare_once(tmp_path / "ml", folder, config)
        return "is up to date" not in capsys.readouterr().out

    assert is_prepared()
    assert not is_prepared()
    assert not is_prepared(data.PrepareConfig(memory_mb=512))
    assert is_prepared(data.PrepareConfig(min_user_events=2))
    assert is_prepared()
    write_movielens(tmp_path / "ml", ratings[:-1], movies)
    assert is_prepared()
    (folder / "meta.json").unlink()
    assert is_prepared()
    assert len(data.read_prepared(folder).sequences) == 6
