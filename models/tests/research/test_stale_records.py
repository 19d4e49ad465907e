"""A report is refused if the configs of today do not describe its runs, with file, reason and remedy."""

from __future__ import annotations

import re

import pytest
from synthetic_results import FAST, synthetic_run, synthetic_study

from research.report import document, stale_records
from research.report.stale_records import StaleRecordsError
from research.retrieval import result_files
from research.retrieval.study import read_study, run_config

TOML = """
study = "ml-small"
seeds = [1, 2]

[split]
n_test = 3
n_validation = 1

[train]
steps = 6

[contents.minilm]
encoder = "unused"

[models.popularity]
kind = "popularity"
label = "Popularity"

[models.sasrec]
kind = "sasrec"
label = "SASRec"
sizes = { width = 8 }
"""


@pytest.fixture
def configs(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "ml-small.toml").write_text(TOML)
    return folder


@pytest.fixture
def results(tmp_path, configs):
    """Runs that have the config of `TOML`, with the content and seed that a run adds to it."""
    config, shared = read_study(configs / "ml-small.toml"), synthetic_study()
    result_files.write_study(tmp_path / "results", shared)
    for model, arm in config.models.items():
        for seed in config.seeds_of(arm):
            recorded = run_config(config, config.models[model]) | {"content": None, "seed": seed}
            run = synthetic_run(shared, model, seed, 2.0, config=recorded, **arm.shown())
            result_files.write_run(tmp_path / "results", run)
    return tmp_path / "results"


def refusal(results, configs) -> str:
    with pytest.raises(StaleRecordsError) as caught:
        stale_records.check(results, result_files.read(results), configs)
    return str(caught.value)


def test_runs_of_the_config_of_today_are_reported(results, configs, tmp_path):
    stale_records.check(results, result_files.read(results), configs)
    document.build(results, tmp_path / "REPORT.md", FAST, configs=configs)
    text = (tmp_path / "REPORT.md").read_text()
    assert "Code: `c0ffeec0ffee` (3 runs)." in text.split("## 2.")[1].split("## 3.")[0]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("width = 8", "width = 16", "arm.sizes.width is 8 and in ml-small.toml 16; run `learn study --config"),
        ("steps = 6", "steps = 7", "train.steps is 6 and in ml-small.toml 7; run `learn study --config"),
        ("n_test = 3", "n_test = 2", "split.n_test is 3 and in ml-small.toml 2; run `learn study --config"),
        (
            'label = "SASRec"',
            'label = "SASRec, wide"',
            "label is 'SASRec' and in ml-small.toml 'SASRec, wide'; run `learn study --config",
        ),
        ("seeds = [1, 2]", "seeds = [2]", "ml-small.toml gives this model the seeds [2]; give it 1 as well, or remove"),
        (
            "[models.sasrec]",
            "[models.sasrec-wide]",
            "ml-small.toml has no model 'sasrec'; put it back, or remove the file",
        ),
    ],
)
def test_a_run_of_another_config_is_refused_with_its_file_and_the_remedy(results, configs, tmp_path, old, new, reason):
    (configs / "ml-small.toml").write_text(TOML.replace(old, new))
    message = refusal(results, configs)
    assert re.search(rf"sasrec-seed1\.npz: {re.escape(reason)}", message)
    if "run `learn" in reason:
        assert "`learn study --config configs/ml-small.toml --only sasrec` again" in message
    with pytest.raises(StaleRecordsError):
        document.build(results, tmp_path / "REPORT.md", FAST, configs=configs)
    assert not (tmp_path / "REPORT.md").exists()


def test_of_a_length_in_epochs_the_epochs_are_compared_and_not_the_steps(results, configs):
    for path in results.glob("*/*-seed*.npz"):
        run = result_files.read_run(path)
        result_files.write_run(results, run.model_copy(update={"config": run.config | {"epochs": 2.0}}))
    text = TOML.replace("steps = 6", "epochs = 2.0")
    (configs / "ml-small.toml").write_text(text)
    stale_records.check(results, result_files.read(results), configs)
    (configs / "ml-small.toml").write_text(text.replace("epochs = 2.0", "epochs = 3.0"))
    assert "epochs is 2.0 and in ml-small.toml 3.0" in refusal(results, configs)
    (configs / "ml-small.toml").write_text(text.replace("epochs = 2.0", "epochs = 2.0\nusers = 4"))
    assert "train.users is 32 and in ml-small.toml 4" in refusal(results, configs)


def test_only_models_whose_settings_changed_are_stale(results, configs):
    (configs / "ml-small.toml").write_text(TOML.replace("width = 8", "width = 16"))
    assert "popularity" not in refusal(results, configs)


def test_a_message_names_the_first_files_and_counts_the_others(results, configs, monkeypatch):
    monkeypatch.setattr(stale_records, "N_NAMED", 2)
    (configs / "ml-small.toml").write_text(TOML.replace("n_test = 3", "n_test = 2"))
    assert refusal(results, configs).endswith("\nand 1 more")


def test_a_study_without_a_config_of_its_name_is_not_checked(results, configs):
    (configs / "ml-small.toml").rename(configs / "other.toml")
    stale_records.check(results, result_files.read(results), configs)
    # A config of that name that is none of a retrieval study.
    (configs / "ml-small.toml").write_text('encoder = "default"\n')
    stale_records.check(results, result_files.read(results), configs)
