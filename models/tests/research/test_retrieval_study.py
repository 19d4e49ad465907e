"""A small retrieval study: which files it writes, that it resumes, and how mistakes in its settings are reported."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest
from conftest import MODELS

from learn import data
from learn.evaluation.metrics import event_values
from learn.run_settings import read_settings, read_toml
from research.baselines import ease_skip
from research.cvr.study import CvrStudy
from research.report import stale_records
from research.retrieval import result_files
from research.retrieval.study import (
    dry_run,
    only,
    planned_runs,
    read_study,
    run_config,
    run_study,
)
from research.retrieval.study_parts import with_seeds, with_steps

TOML = """
study = "tiny"
seeds = [1, 2]

[split]
n_test = 2
n_validation = 1

[train]
steps = 6
users = 4
warmup = 1
n_uniform = 8
check_every = 3

[contents.minilm]
encoder = "unused"

[models.popularity]
kind = "popularity"
label = "Popularity"

[models.content-mean]
kind = "content-mean"
label = "Content mean"

[models.sasrec]
kind = "sasrec"
label = "SASRec"
sizes = { width = 8, max_history = 6 }

[models.hstu-time]
kind = "hstu"
label = "HSTU with time"
sizes = { width = 8, max_history = 6, time_bias = true }
n_seeds = 1

[models.learn-id]
kind = "learn"
label = "LEARN+ID"
family = "learn"
ids = "tied"
sizes = { width = 8, layers = 1, heads = 2, ffn = 8, out_dim = 8, max_history = 6, adaptor_hidden = 8 }

[models."learn-text/variant-3"]
kind = "learn"
label = "content as item embedding"
family = "ablation"
reference = "learn-id"
question = "item tower"
sizes = { width = 8, layers = 1, heads = 2, ffn = 8, item_tower = "content", max_history = 6, adaptor_hidden = 8 }
train = { next_weight = 0.0, align_weight = 1.0 }
n_seeds = 1
"""


def write_and_read_study(tmp_path, text=TOML):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_a_study_writes_one_file_per_run_and_repeats_only_changed_runs(tmp_path, inputs, capsys):
    root = tmp_path / "results"
    assert run_study(write_and_read_study(tmp_path), inputs, root, n_workers=1) == []
    output = capsys.readouterr().out
    assert "learn-id seed 2: step 3 of 6, NDCG@10" in output and "8 of 8 runs over, about 0 s left" in output
    rows = {line.split("  ")[0]: line.split() for line in output[output.index("\nmodel") + 1 :].splitlines()}
    assert set(rows) >= {"popularity", "content-mean", "sasrec", "hstu-time", "learn-id", "learn-text/variant-3"}
    assert rows["sasrec"][1:3] == ["1", "2"] and rows["popularity"][1:4] == ["1", "-", "-"]
    found = result_files.read(root).retrieval["tiny"]
    assert {name: list(runs) for name, runs in found.runs.items()} == {
        "content-mean": [1],
        "hstu-time": [1],
        "learn-id": [1, 2],
        "learn-text/variant-3": [1],
        "popularity": [1],
        "sasrec": [1, 2],
    }
    last = inputs.dataset.sequences[3].items[-2:].tolist()
    assert len(found.study.user) == 16 and found.study.user[6:8].tolist() == [3, 3]
    counts = [sum(item in sequence.items[:-3] for sequence in inputs.dataset.sequences) for item in last]
    assert found.study.item_count[6:8].tolist() == counts
    test = [event_values(run.rank, "ndcg_at_10").mean() for run in found.runs["learn-id"].values()]
    assert f"{np.mean(test):.4f}" in rows["learn-id"]
    for runs in found.runs.values():
        for run in runs.values():
            assert len(run.rank) == 16 and 1 <= run.rank.min() <= run.rank.max() <= 25
    variant = found.any_run("learn-text/variant-3")
    assert variant.reference == "learn-id" and [check.step for check in variant.curve] == [3, 6]
    # The seeds train the same model from different random numbers.
    assert found.runs["sasrec"][1].rank.tolist() != found.runs["sasrec"][2].rank.tolist()
    assert not list(root.glob("tiny/*.run"))

    before = {path: path.stat().st_mtime_ns for path in root.glob("tiny/*-seed*.npz")}
    changed = TOML.replace("sizes = { width = 8, max_history = 6 }", "sizes = { width = 16, max_history = 6 }")
    run_study(write_and_read_study(tmp_path, changed), inputs, root, n_workers=1)
    again = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert again == {"sasrec-seed1.npz", "sasrec-seed2.npz"}


def test_a_new_label_reaches_the_files_of_finished_runs_without_training(tmp_path, inputs, capsys):
    study = only(write_and_read_study(tmp_path), ["popularity"])
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    before = result_files.read(tmp_path / "results").retrieval["tiny"].any_run("popularity")
    renamed = write_and_read_study(tmp_path, TOML.replace('label = "Popularity"', 'label = "Most popular"'))
    capsys.readouterr()
    run_study(only(renamed, ["popularity"]), inputs, tmp_path / "results", n_workers=1)
    after = result_files.read(tmp_path / "results").retrieval["tiny"].any_run("popularity")
    assert "starts" not in capsys.readouterr().out
    assert after.label == "Most popular" and after.equals(before.model_copy(update={"label": "Most popular"}))


def test_a_finished_study_that_is_split_by_time_is_not_run_again(tmp_path, inputs):
    text = TOML.replace("[split]\nn_test = 2\nn_validation = 1", "[time_split]\nfractions = [0.6, 0.8]")
    study = only(write_and_read_study(tmp_path, text), ["popularity", "sasrec"])
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "tiny").glob("*-seed*.npz")}
    assert len(before) == 3
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_chosen_seeds_are_those_of_the_study_and_no_model_gets_seeds_that_it_does_not_have(tmp_path):
    study = write_and_read_study(tmp_path)
    assert with_seeds(study, [2]).runs() == [("sasrec", 2), ("learn-id", 2)]
    assert with_seeds(study, [2, 1]).runs() == study.runs()
    with pytest.raises(ValueError, match="--seeds 3: the seeds of this study are 1, 2"):
        with_seeds(study, [1, 3])


def test_steps_of_the_command_line_hold_for_every_model_of_a_study_with_a_name_of_its_own(tmp_path, inputs):
    text = TOML.replace('label = "SASRec"', 'label = "SASRec"\ntrain = { steps = 60, warmup = 30 }')
    study = with_steps(write_and_read_study(tmp_path, text), 24)
    assert study.study == "tiny-24-steps"
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    for run in planned_runs(study, inputs, split):
        training = run.config["train"]
        assert (training["steps"], training["warmup"], training["check_every"]) == (24, 3, 2)


def test_a_study_in_epochs_records_steps_and_a_dry_run_shows_them(tmp_path, inputs, capsys):
    study = only(write_and_read_study(tmp_path, TOML.replace("steps = 6", "epochs = 2.0")), ["popularity", "sasrec"])
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    # 8 users with 3 to 10 events for training, of which a window holds up to 7: 8.77 steps of 4 users an epoch.
    n_events = np.arange(3, 11)
    draws = n_events**0.5 / (n_events**0.5).sum()
    steps = int(np.ceil(2 * n_events.sum() / (4 * (draws * np.minimum(n_events, 7)).sum())))
    runs = {run.model: run for run in planned_runs(study, inputs, split)}
    assert runs["sasrec"].steps == runs["sasrec"].config["train"]["steps"] == steps
    assert "epochs" not in runs["sasrec"].config["train"]
    dry_run(study, inputs, tmp_path / "results", 1)
    output = capsys.readouterr().out
    assert f"sasrec seed 2: {steps} steps of 4 users\n" in output and "popularity seed 1: nothing to train\n" in output
    assert "3 of 3 runs to do, time left not known yet" in output
    assert not (tmp_path / "results").exists()


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, inputs, capsys):
    inputs.content["minilm"].unlink()
    study = only(write_and_read_study(tmp_path), ["content-mean", "popularity"])
    failed = run_study(study, inputs, tmp_path / "results", n_workers=1)
    assert [str(run) for run in failed] == ["content-mean seed 1"]
    output = capsys.readouterr().out
    assert "content-mean seed 1 FAILED" in output and "No such file" in output
    assert list(result_files.read(tmp_path / "results").retrieval["tiny"].runs) == ["popularity"]


def test_the_committed_results_count_as_results_of_the_committed_configs():
    """Otherwise a study that is continued would train all of its models again, and a report would refuse them."""
    results = result_files.read(MODELS / "results")
    stale_records.check(MODELS / "results", results)
    n_compared = 0
    for name, found in results.retrieval.items():
        study = read_study(MODELS / "configs" / f"{name}.toml")
        for model, runs in found.runs.items():
            now = run_config(study, study.models[model])
            for run in runs.values():
                assert run.config["arm"] == now["arm"] and run.config["split"] == now["split"]
                assert run.data == found.study.data.digest
                n_compared += 1
    assert n_compared


def test_an_ablation_runs_without_its_reference(tmp_path, inputs):
    study = only(write_and_read_study(tmp_path), ["learn-text/variant-3"])
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    assert list(result_files.read(tmp_path / "results").retrieval["tiny"].runs) == ["learn-text/variant-3"]
    with pytest.raises(ValueError, match="--only learn-txt: this study has popularity, content-mean, sasrec"):
        only(write_and_read_study(tmp_path), ["sasrec", "learn-txt"])


def test_factors_of_ease_are_recorded_with_the_weights_that_were_tried(tmp_path, inputs):
    text = TOML.replace('ids = "tied"', 'ids = "tied"\nease_dim = 5')
    study = only(write_and_read_study(tmp_path, text), ["learn-id"])
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    arm = study.models["learn-id"]
    config = run_config(study, arm, split)
    assert config["arm"].pop("ease_dim") == 5
    # Runs without them are recorded as before there were any.
    assert config == run_config(study, replace(arm, ease_dim=0), split)
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    run = result_files.read(tmp_path / "results").retrieval["tiny"].runs["learn-id"][1]
    assert [choice.settings for choice in run.choices] == [{"ease_weight": weight} for weight in ease_skip.WEIGHTS]
    assert sum(choice.taken for choice in run.choices) == 1


@pytest.mark.parametrize("path", sorted((MODELS / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configs_can_be_read(path):
    tables = tomllib.loads(path.read_text())
    if "arms" in tables:
        read_toml(CvrStudy, path)
    else:
        (read_study if "models" in tables else read_settings)(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_test = 2", "n_tests = 2", "split.n_tests: Unexpected keyword argument"),
        ("steps = 6", 'steps = "six"', "train.steps: Input should be a valid integer"),
        ('kind = "sasrec"', 'kind = "sasrek"', "models.sasrec.kind: Input should be 'popularity'"),
        ("sizes = { width = 8, max_history = 6 }", "sizes = { wide = 8 }", "models.sasrec.sizes.wide: Unexpected"),
        ("train = { next_weight = 0.0", "train = { next = 0.0", "models.learn-text/variant-3.train.next: Unexpected"),
        ('reference = "learn-id"', 'reference = "learn"', "reference: 'learn' is not a model of this study"),
        ('ids = "tied"', 'ids = "tied"\ncontent = "bert"', "models.learn-id.content: 'bert' is none of"),
        ('ids = "tied"', 'ids = "tied"\nease_dim = -1', "models.learn-id.ease_dim is -1; expected 0"),
        ('label = "Popularity"', 'label = "Popularity"\nease_dim = 4', "models.popularity.ease_dim: only sasrec, hstu"),
        ("seeds = [1, 2]", "seeds = 1, 2", "study.toml: "),
    ],
)
def test_a_mistake_in_the_settings_is_reported_with_its_field(tmp_path, old, new, message):
    assert old in TOML
    with pytest.raises(ValueError, match=r"study\.toml") as error:
        write_and_read_study(tmp_path, TOML.replace(old, new))
    assert message in str(error.value)
