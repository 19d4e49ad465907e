from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from synthetic_results import synthetic_run, synthetic_study, write_synthetic_study

from learn.data import TimeSplitConfig
from learn.evaluation.metrics import event_values
from learn.run_settings import Settings
from learn.training.train_config import TrainConfig
from research.retrieval import result_files
from research.retrieval.manifest_figures import Subject, figures_of

CONTENT = "c" * 32


def subject(settings=None, **changes):
    """Returns a run with the data and content of the synthetic study."""
    return replace(Subject(settings or Settings(), "ab" * 32, CONTENT + "d" * 32), **changes)


def run_config(**more):
    return {"config": {"width": 64, "content": f"content-{CONTENT}", "seed": 1} | more}


def test_the_manifest_gets_means_over_seeds_with_intervals(tmp_path):
    study = write_synthetic_study(tmp_path, {"sasrec": 2.0})
    for seed in (1, 2, 3):
        result_files.write_run(tmp_path, synthetic_run(study, "learn-text", seed, 4.0, **run_config(seed=seed)))
    facts = figures_of(tmp_path / "ml-small", "learn-text", subject())
    runs = result_files.read_study(tmp_path / "ml-small").runs["learn-text"]
    mean = np.mean([event_values(run.rank, "ndcg_at_10").mean() for run in runs.values()])
    value, low, high = facts["mean_low_high"]["ndcg_at_10"]
    assert value == pytest.approx(mean, abs=1e-5) and low < value < high
    assert facts["seeds"] == [1, 2, 3] and facts["model"] == "learn-text"
    with pytest.raises(ValueError, match="no runs of 'bert', only of learn-text, sasrec"):
        figures_of(tmp_path / "ml-small", "bert", subject())


def test_a_bundle_cannot_carry_the_figures_of_another_model(tmp_path):
    settings = Settings(train=TrainConfig().with_steps(600))
    training = {name: value for name, value in asdict(settings.train).items() if name != "seed"}
    sizes = asdict(settings.pch) | {"content_dim": 576}
    config = run_config(arm={"standardise": "scale", "ids": "none", "sizes": sizes}, train=training)
    config["config"]["split"] = {"fractions": [0.6, 0.8], "timestamps": None}
    settings = replace(settings, time_split=TimeSplitConfig(fractions=(0.6, 0.8)))
    study = synthetic_study()
    result_files.write_study(tmp_path, study)
    result_files.write_run(tmp_path, synthetic_run(study, "learn-text", 1, 3.0, **config))
    assert figures_of(tmp_path / "ml-small", "learn-text", subject(settings))["seeds"] == [1]
    for other, message in (
        (subject(replace(settings, pch=replace(settings.pch, width=32))), "arm.sizes.width = "),
        (subject(replace(settings, train=replace(settings.train, steps=7))), "train.steps = "),
        (subject(replace(settings, standardise="whiten")), "arm.standardise = 'scale', this run with 'whiten'"),
        (subject(data="ba" * 32), "other data or another split"),
        (subject(content="e" * 64), "another encoder or other texts"),
        (subject(started_from=("pretrained",)), "this run's were started from pretrained's"),
        (
            subject(replace(settings, cvr=replace(settings.cvr, tune_towers=True))),
            "this run's were tuned with the head",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            figures_of(tmp_path / "ml-small", "learn-text", other)
