"""How long training is: steps from epochs, what ends a run early, and what its curve says against its length."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from child_process import run_python

from learn import data
from learn.training import run_length, train_recommender
from learn.training.listeners import check_tensorboard
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer
from research.baselines.sasrec import SasRec, SasRecConfig

N_ITEMS = 25
QUICK = TrainConfig(steps=20, users=4, warmup=1, n_uniform=8, check_every=2)
# With this learning rate, no check is better than the first one.
STANDING_STILL = replace(QUICK, learning_rate=0.0)


@pytest.fixture
def log():
    rng = np.random.default_rng(0)
    runs = [rng.permutation(N_ITEMS)[: 6 + user] for user in range(8)]
    sequences = [data.Sequence(str(u), run, np.ones(len(run)), np.arange(len(run))) for u, run in enumerate(runs)]
    return data.Dataset([str(item) for item in range(N_ITEMS)], [], sequences)


def fit(config, log, folder, listener=None):
    torch.manual_seed(0)
    model = SasRec(SasRecConfig(width=8, max_history=6), N_ITEMS)
    split = data.split(log.sequences, data.SplitConfig())
    return model, train_recommender.train(config, model, log, split, folder, listener=listener)


def steps_of(curve):
    return [record["step"] for record in curve]


def curve_of(*figures, every=100):
    return [{"step": (place + 1) * every, "seconds": 1.0, "ndcg_at_10": figure} for place, figure in enumerate(figures)]


def test_an_epoch_has_the_steps_in_which_windows_hold_as_many_events_as_training_has():
    # Users of 4 and 9 events are drawn with weights 2 and 3 and give 4 and 6 events: 26 / 5 a draw. They have 13.
    config = TrainConfig(users=1, epochs=4.0)
    assert run_length.steps_per_epoch(config, [1, 4, 9], max_history=5) == pytest.approx(2.5)
    found = run_length.planned(config, [1, 4, 9], max_history=5)
    assert (found.steps, found.warmup, found.check_every, found.patience, found.epochs) == (10, 1, 1, 5, 4.0)
    # A step has at most all users that can be drawn.
    assert run_length.steps_per_epoch(replace(config, users=32), [1, 4, 9], max_history=5) == pytest.approx(1.25)
    assert run_length.planned(found, [1, 4, 9], max_history=5) == found
    with pytest.raises(ValueError, match="no user has two events"):
        run_length.planned(config, [1, 1], max_history=5)


def test_steps_that_are_set_are_the_length_and_only_patience_that_is_set_ends_it_early():
    config = TrainConfig(steps=600, epochs=1.0)
    found = run_length.planned(config, [4, 9], max_history=5)
    assert (found.steps, found.warmup, found.check_every, found.patience) == (600, 40, 50, 0)
    assert run_length.planned(replace(config, patience=3), [4, 9], max_history=5).patience == 3


def test_a_length_in_steps_is_recorded_as_earlier_versions_did_and_one_in_epochs_as_it_is():
    new = {"epochs", "patience", "max_minutes", "target", "tensorboard"}
    fixed = TrainConfig(steps=600, warmup=40, check_every=100, tensorboard="logs").recorded()
    assert not new & set(fixed)
    assert (fixed["steps"], fixed["warmup"], fixed["check_every"]) == (600, 40, 100)
    assert TrainConfig(steps=600).recorded()["warmup"] == 40
    limited = TrainConfig(steps=600, max_minutes=5.0, target=0.1, patience=3).recorded()
    assert (limited["max_minutes"], limited["target"], limited["patience"]) == (5.0, 0.1, 3)
    by_epochs = TrainConfig(patience=0).recorded()
    assert (by_epochs["epochs"], by_epochs["patience"]) == (14.0, 0)
    assert not {"steps", "warmup", "check_every", "tensorboard"} & set(by_epochs)
    planned = run_length.planned(TrainConfig(), [4, 9] * 50, max_history=5)
    # What a record of the run has gives the same run again.
    again = TrainConfig(**planned.recorded())
    assert again.recorded() == planned.recorded() and again.with_steps(again.steps) == replace(planned, epochs=14.0)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": -1}, {"check_every": -1}, {"epochs": 0.0}, {"max_minutes": -1.0}),
        *({"users": 0}, {"temperature": 0.0}, {"n_uniform": -1}, {"n_states": 0}, {"next_weight": 0.0}),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_training_ends_after_checks_that_were_no_better(log, tmp_path):
    _, curve = fit(replace(STANDING_STILL, patience=3), log, tmp_path)
    assert steps_of(curve) == [2, 4, 6, 8]
    last = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[-1])
    assert last["ended"] == "patience"
    assert steps_of(fit(replace(STANDING_STILL, patience=0), log, tmp_path / "whole")[1])[-1] == 20


def test_training_ends_once_the_target_is_reached(log, tmp_path):
    assert steps_of(fit(replace(QUICK, target=0.0), log, tmp_path)[1]) == [2]
    assert steps_of(fit(replace(QUICK, target=1.1), log, tmp_path / "never")[1])[-1] == 20


class Rates:
    """Keeps the learning rate of each step."""

    def __init__(self):
        self.rates = []

    def step(self, number, losses, learning_rate):
        self.rates.append(learning_rate)

    def check(self, record):
        pass

    def end(self, warnings):
        pass


def test_training_ends_in_time_with_the_learning_rate_at_its_end(log, tmp_path, monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr(train_recommender, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    listener = Rates()
    config = replace(QUICK, steps=1000, check_every=10, max_minutes=1.0)
    _, curve = fit(config, log, tmp_path, listener)
    # A step and a check take one second each.
    assert 50 <= steps_of(curve)[-1] <= 60 and len(listener.rates) == steps_of(curve)[-1]
    assert max(listener.rates) > 0.9 * config.learning_rate
    assert listener.rates[-1] < 0.02 * config.learning_rate
    assert json.loads((tmp_path / "train.jsonl").read_text().splitlines()[-1])["ended"] == "max_minutes"


def test_the_steps_that_time_allows():
    config = TrainConfig(steps=100, max_minutes=1.0)
    assert run_length.affordable_steps(config, 0, 0.0) == 100
    assert run_length.affordable_steps(config, 10, 12.0) == 50
    assert run_length.affordable_steps(config, 10, 1.0) == 100
    assert run_length.affordable_steps(config, 10, 61.0) == 10
    assert run_length.affordable_steps(replace(config, max_minutes=None), 10, 1e9) == 100


def test_a_resumed_run_that_ends_early_equals_the_whole_one(log, tmp_path, monkeypatch):
    config = replace(QUICK, steps=80, patience=2, learning_rate=1e-2)
    whole, curve = fit(config, log, tmp_path / "whole")
    last = steps_of(curve)[-1]
    assert 6 <= last < 80
    step = Trainer.step

    def interrupted_step(self, number):
        if number == last - 1:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        fit(config, log, tmp_path / "cut")
    done = []
    monkeypatch.setattr(Trainer, "step", lambda self, number: done.append(number) or step(self, number))
    for expected in ([last - 2, last - 1], []):  # The third call finds a run that has ended.
        done.clear()
        resumed, curve_again = fit(config, log, tmp_path / "cut")
        assert done == expected
        assert [{**r, "seconds": 0} for r in curve_again] == [{**r, "seconds": 0} for r in curve]
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("figures", "changes", "expected"),
    [
        # Still rising at the end, by more than the noise between two checks.
        ((0.05, 0.06, 0.07, 0.08), {}, ["still improving at the last check (step 400)"]),
        ((0.05, 0.06, 0.07, 0.071), {}, []),
        ((0.05, 0.06, 0.08, 0.07), {}, []),
        # The best check is in the first half of what was planned.
        ((0.08, 0.07, 0.07, 0.07), {}, ["best check was step 100 of 400, far back: its learning rate", "200 steps"]),
        ((0.08, 0.07, 0.07, 0.07), {"warmup": 50}, ["far back: its warm-up of 50 steps was just over"]),
        ((0.07, 0.08, 0.07), {"steps": 1000, "patience": 1}, ["step 200 of 1000", "train.epochs times 0.4"]),
        # A run that reached its target was long enough.
        ((0.05, 0.08), {"target": 0.08}, []),
        # Time ended the run before its 1,000 steps.
        ((0.05, 0.06, 0.07, 0.08), {"steps": 1000}, ["still improving", "raise train.max_minutes"]),
        ((0.05, 0.06, 0.08, 0.07), {"steps": 1000}, []),
        ((0.05,), {}, []),
        ((None, None), {}, []),
    ],
)
def test_what_a_curve_says_against_the_length_of_its_run(figures, changes, expected):
    config = replace(TrainConfig(steps=400, warmup=1, patience=0), **changes)
    found = run_length.warnings(config, curve_of(*figures))
    assert len(found) == bool(expected)
    for part in expected:
        assert part in found[0]


def test_a_run_prints_its_warning_and_keeps_it(log, tmp_path, capsys):
    fit(replace(STANDING_STILL, steps=8), log, tmp_path / "bad")
    assert capsys.readouterr().out.count("warning: the best check was step 2 of 8, far back") == 1
    last = json.loads((tmp_path / "bad" / "train.jsonl").read_text().splitlines()[-1])
    assert last["ended"] == "steps" and "far back" in last["warnings"][0]
    fit(replace(QUICK, steps=2), log, tmp_path / "good")
    assert "warning" not in capsys.readouterr().out
    lines = (tmp_path / "good" / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"ended": "steps", "warnings": []}
    assert json.loads(lines[0])["config"]["steps"] == 2


def test_tensorboard_gets_losses_rate_and_figures(log, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(replace(QUICK, tensorboard=str(tmp_path / "logs")), log, tmp_path / "run")
    found = accumulators.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert {"loss/next", "learning_rate", "check/loss_next", "validation/ndcg_at_10"} <= set(found.Tags()["scalars"])
    assert [point.step for point in found.Scalars("loss/next")] == [10, 20]
    assert [point.step for point in found.Scalars("validation/ndcg_at_10")] == list(range(2, 21, 2))


def test_a_missing_tensorboard_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        check_tensorboard()


def test_freed_memory_is_kept_where_the_c_library_can():
    # In a process of its own, because it holds for all of a process.
    completed = run_python("from learn.allocator import keep_freed_memory; print(keep_freed_memory())")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip() == str(platform.libc_ver()[0] == "glibc")
