from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from made_results import made_run, made_study, write_made

from learn import results
from learn.figures import figures_of
from learn.settings import Settings


def test_the_manifest_gets_means_over_seeds_with_intervals(tmp_path):
    write_made(tmp_path, {"learn-text": 4.0, "sasrec": 2.0})
    facts = figures_of(tmp_path / "ml-small", "learn-text", Settings())
    runs = results.read_study(tmp_path / "ml-small").runs["learn-text"]
    mean = np.mean([run.metrics["all"]["ndcg_at_10"] for run in runs.values()])
    value, low, high = facts["mean_low_high"]["ndcg_at_10"]
    assert value == pytest.approx(mean, abs=1e-5) and low < value < high
    assert facts["seeds"] == [1, 2, 3] and facts["model"] == "learn-text"
    with pytest.raises(ValueError, match="no runs of 'bert', only of learn-text, sasrec"):
        figures_of(tmp_path / "ml-small", "bert", Settings())


def test_a_bundle_cannot_carry_the_figures_of_another_model(tmp_path):
    settings = Settings()
    training = {name: value for name, value in asdict(settings.train).items() if name != "seed"}
    sizes = asdict(settings.pch) | {"content_dim": 576}
    config = {"arm": {"standardise": "scale", "ids": "none", "sizes": sizes}, "train": training, "seed": 1}
    study = made_study()
    results.write_study(tmp_path, study)
    results.write_run(tmp_path, made_run(study, "learn-text", 1, 3.0, config=config))
    assert figures_of(tmp_path / "ml-small", "learn-text", settings)["seeds"] == [1]
    for other, message in (
        (replace(settings, pch=replace(settings.pch, width=32)), "arm.sizes.width = "),
        (replace(settings, train=replace(settings.train, steps=7)), "train.steps = "),
        (replace(settings, standardise="whiten"), "arm.standardise = 'scale', this run with 'whiten'"),
    ):
        with pytest.raises(ValueError, match=message):
            figures_of(tmp_path / "ml-small", "learn-text", other)
