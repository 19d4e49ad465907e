"""Tuning: what is drawn, that every model gets equally many trials, what is recorded, and where it continues."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from learn import data
from research.retrieval import tuning
from research.retrieval.arms import Inputs
from research.retrieval.tuning import best_of, draw, read_budget, read_trials, run_command, summary, tune

STUDY = """
study = "tiny"
seeds = [1, 2]

[split]
n_test = 2
n_validation = 1

[train]
steps = 4
users = 4
warmup = 1
n_uniform = 8
check_every = 2

[contents.minilm]
encoder = "unused"

[models.ease]
kind = "ease"
label = "EASE"

[models.popularity]
kind = "popularity"
label = "Popularity"

[models.sasrec]
kind = "sasrec"
label = "SASRec"
sizes = { width = 8, max_history = 6 }

[models.sasrec-text]
kind = "sasrec-text"
label = "SASRec over text"
sizes = { width = 8, max_history = 6, adaptor_hidden = 8 }
"""

BUDGET = """
study = "study.toml"
n_trials = 2

[models.sasrec.sizes]
dropout = [0.1, 0.2, 0.5]

[models.sasrec.train]
learning_rate = [1e-3, 1e-2]

[models.sasrec-text.sizes]
adaptor = ["linear", "mlp"]
"""


def write_and_read(tmp_path, budget=BUDGET):
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "tuning.toml").write_text(budget)
    return read_budget(tmp_path / "tuning.toml")


def test_every_model_gets_equally_many_trials_and_a_stopped_tuning_continues(tmp_path, inputs, capsys):
    study, budget = write_and_read(tmp_path)
    assert sorted(study.models) == ["sasrec", "sasrec-text"]
    out = tmp_path / "results" / "tuning.jsonl"
    trials = tune(study, budget, inputs, out)
    assert [(trial.model, trial.number) for trial in trials] == [
        ("sasrec", 1),
        ("sasrec-text", 1),
        ("sasrec", 2),
        ("sasrec-text", 2),
    ]
    assert trials == read_trials(out) and len({trial.key for trial in trials}) == 4
    for trial in trials:
        assert trial.steps == 4 and trial.best_step in (2, 4) and 0 <= trial.ndcg_at_10 <= 1
        assert trial.settings == draw(budget, trial.model)[trial.number - 1]
    assert not out.with_suffix(".run").exists()

    # A trial is missing, another was cut off in the middle of its line.
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[1] + lines[3][:40])
    capsys.readouterr()
    again = tune(study, budget, inputs, out)
    printed = capsys.readouterr().out
    assert printed.count("on validation") == 2 and "sasrec, trial 2 of 2" in printed
    assert [trial.settings for trial in again] == [trial.settings for trial in trials]
    # One thread and one seed, so a repeated trial gives the same figures.
    assert [trial.ndcg_at_10 for trial in again] == [trial.ndcg_at_10 for trial in trials]
    assert len(read_trials(out)) == 4
    run_command(study, budget, inputs, out, 1)
    assert "sasrec-text: NDCG@10" in capsys.readouterr().out
    assert len(read_trials(out)) == 4


def test_a_larger_budget_keeps_the_trials_of_a_smaller_one(tmp_path):
    _, small = write_and_read(tmp_path)
    _, large = write_and_read(tmp_path, BUDGET.replace("n_trials = 2", "n_trials = 6").split("[models.sasrec-text")[0])
    drawn = draw(large, "sasrec")
    assert drawn[:2] == draw(small, "sasrec")
    described = {json.dumps([point.sizes, point.train], sort_keys=True) for point in drawn}
    assert len(described) == 6


def test_a_trial_sees_no_test_event(tmp_path, inputs, monkeypatch):
    """It is run in this process, so that what it gives to the training can be looked at."""
    study, budget = write_and_read(tmp_path)
    seen = []

    def train(config, model, dataset, split, folder, *, listener):
        seen.append(split)
        return [{"step": 4, "seconds": 0.1, "ndcg_at_10": 0.5}]

    monkeypatch.setattr(tuning, "train", train)
    job = next(tuning._jobs(study, budget, inputs))
    trial = tuning._run(tuning._Bench(study, inputs, tmp_path), job, lambda report: None)
    assert seen[0].test == [] and len(seen[0].validation) == 8 and trial.ndcg_at_10 == 0.5


def test_a_changed_study_or_other_data_has_other_trials(tmp_path, inputs):
    study, budget = write_and_read(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY.replace("users = 4", "users = 3"))
    changed, _ = read_budget(tmp_path / "tuning.toml")
    fewer = Inputs(
        data.Dataset(inputs.dataset.item_ids, [], list(inputs.dataset.sequences)[:7]), inputs.content, inputs.encoders
    )
    keys = [
        next(tuning._jobs(*given)).key
        for given in ((study, budget, inputs), (changed, budget, inputs), (study, budget, fewer))
    ]
    assert len(set(keys)) == 3
    # Factors of EASE come after training, so a trial has none, and those of a model that gets them stay.
    name = next(iter(budget.models))
    with_ease = replace(study.models[name], ease_dim=5)
    job = next(tuning._jobs(replace(study, models=study.models | {name: with_ease}), budget, inputs))
    assert job.key == keys[0] and job.arm.ease_dim == 0


def test_the_summary_names_the_best_trial_and_values_at_an_end_of_the_grid(tmp_path):
    _, budget = write_and_read(tmp_path)

    def trial(number, figure, dropout, rate, commit="abc"):
        settings = tuning.Settings({"dropout": dropout}, {"learning_rate": rate})
        return tuning.Trial("sasrec", number, settings, figure, 2, 4, 1.0, 100, 1, f"key{number}", commit)

    trials = [trial(1, 0.1, 0.2, 1e-3), trial(2, 0.3, 0.5, 1e-2), trial(3, 0.3, 0.1, 1e-3)]
    assert best_of(trials)["sasrec"].number == 2
    assert summary(budget, trials) == [
        "sasrec: NDCG@10 0.3000 on validation (trial 2 of 2, step 2 of 4): dropout 0.5, learning_rate 0.01; "
        "at an end of the grid: dropout"
    ]
    other = trial(3, 0.2, 0.1, 1e-3, commit="def")
    assert summary(budget, [*trials, other])[1] == "these trials ran different versions of the code: abc, def"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_trials = 2", "n_trials = 7", "models.sasrec has 6 points for 7 trials"),
        ("n_trials = 2", "n_trials = 0", "n_trials is 0"),
        ("[0.1, 0.2, 0.5]", "[0.1, 0.2, 0.1]", "models.sasrec.sizes.dropout is [0.1, 0.2, 0.1]; name each value once"),
        ("n_trials = 2", "n_trial = 2", "n_trial: Unexpected keyword argument"),
        ("dropout = [0.1, 0.2, 0.5]", "drop = [0.1, 0.2]", "models.sasrec.sizes.drop: Unexpected"),
        ("learning_rate = [1e-3, 1e-2]", 'learning_rate = [1e-3, "x"]', "models.sasrec.train.learning_rate: Input"),
        ("learning_rate = [1e-3, 1e-2]", "seed = [1, 2]", "seeds belong to the study"),
        ("[models.sasrec.sizes]", "[models.sasrek.sizes]", "models.sasrek: study tiny has ease, popularity, sasrec"),
        ("[models.sasrec.sizes]", "[models.ease.sizes]", "kind 'ease' tries its own grid in the study"),
        ("[models.sasrec.sizes]", "[models.popularity.sizes]", "kind 'popularity' is not trained"),
        ("n_trials = 2", "n_trials = 2,", "tuning.toml: "),
    ],
)
def test_a_mistake_in_a_tuning_file_is_reported_with_its_field(tmp_path, old, new, message):
    assert old in BUDGET
    text = BUDGET.replace(old, new)
    if "sasrec.sizes" in old:
        text = text.replace("[models.sasrec.train]\nlearning_rate = [1e-3, 1e-2]\n", "")
    with pytest.raises(ValueError, match=r"tuning\.toml") as error:
        write_and_read(tmp_path, text)
    assert message in str(error.value)


def test_a_broken_line_in_the_record_is_named(tmp_path):
    path = tmp_path / "tuning.jsonl"
    assert read_trials(path) == []
    path.write_text('{"model": "sasrec"}\n')
    with pytest.raises(ValueError, match=r"tuning\.jsonl, line 1: "):
        read_trials(path)
