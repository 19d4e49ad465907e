"""A study of the CVR head on made data: what it trains, what it keeps, and what its summary says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MODELS
from scipy.stats import ttest_1samp

from learn import data
from learn.data.actions import ActionThresholds
from learn.data.item_text import ItemText
from learn.evaluation.auc import auc
from learn.models.pch import PchConfig
from learn.run_settings import read_toml
from learn.training.train_config import TrainConfig
from research.cvr import result_files, study, summary
from research.cvr.result_files import CvrResults, CvrRun, CvrStudyRecord
from research.cvr.study import CvrArm, CvrStudy

N_ITEMS = 30
THRESHOLDS = ActionThresholds(4.0, 2.0)


def made_data():
    rng = np.random.default_rng(2)
    runs = []
    for user in range(20):
        items = rng.permutation(N_ITEMS)[:16]
        values = rng.integers(1, 6, 16).astype(np.float32)
        runs.append(data.Sequence(str(user), items, values, np.arange(16) * 10 + user, THRESHOLDS.numbers(values)))
    ids = [str(item) for item in range(N_ITEMS)]
    return data.Dataset(ids, [ItemText(title=name) for name in ids], runs), torch.randn(N_ITEMS, 12)


def made_study():
    pch = PchConfig(adaptor_hidden=10, width=8, layers=2, heads=2, ffn=8, out_dim=6, max_history=9)
    arms = {
        "plain": CvrArm("no actions", actions=False, cvr={"epochs": 1}),
        "tuned": CvrArm(
            "all parts",
            head={"product": True, "dot": True},
            cvr={"epochs": 1, "tune_towers": True, "tune_layers": "last", "tune_epochs": 1, "tune_next_weight": 0.3},
        ),
    }
    train = TrainConfig(steps=2, users=4, n_uniform=4, check_every=2)
    return CvrStudy("cvr-made", [1, 2], arms, ["like", "dislike"], THRESHOLDS, data.SplitConfig(4, 2), None, pch, train)


def test_a_study_trains_every_arm_once_and_continues_with_what_is_missing(tmp_path, monkeypatch, capsys):
    (dataset, content), made = made_data(), made_study()
    rows = study.run_study(made, dataset, content, tmp_path / "work", tmp_path / "out")
    assert [(row.arm, row.n_seeds) for row in rows] == [("item means", 1), ("plain", 2), ("tuned", 2)]
    assert "| tuned | 2 | 0." in capsys.readouterr().out
    results = result_files.read_cvr(tmp_path / "out")
    plain, tuned = (results.runs[arm][1] for arm in ("plain", "tuned"))
    assert plain.config["pch"].get("actions") is None and tuned.config["pch"]["actions"] == ["like", "dislike"]
    assert plain.figures["ndcg_at_10"] == plain.figures["ndcg_at_10_before_cvr"]
    assert len(plain.score_rank) == 20 * 4 == len(results.study.label)
    # A second call trains nothing; another config of one arm trains that arm only.
    trained = []
    train = study.fit_head
    monkeypatch.setattr(study, "fit_head", lambda config, *given: trained.append(config) or train(config, *given))
    study.run_study(made, dataset, content, tmp_path / "work", tmp_path / "out")
    assert trained == []
    made = replace(made, arms=made.arms | {"plain": CvrArm("no actions", actions=False, cvr={"epochs": 2})})
    study.run_study(made, dataset, content, tmp_path / "work", tmp_path / "out")
    assert [config.epochs for config in trained] == [2, 2]


def test_the_gain_is_paired_over_users_and_seeds_are_averaged_first(monkeypatch):
    rng = np.random.default_rng(0)
    user, label = np.repeat(np.arange(12), 6), np.tile([0, 1, 0, 1, 1, 0], 12)
    label[:6] = 1  # A user without one of the labels does not count.
    scores = [rng.permutation(72) for _ in range(3)]
    record = CvrStudyRecord(
        study="s", label_meaning="", data="d", split={}, user=user, label=label, item_mean_rank=scores[0]
    )
    runs = {
        seed: CvrRun(
            study="s", arm="a", seed=seed, data="d", config={}, figures={}, seconds=1.0, score_rank=scores[seed]
        )
        for seed in (1, 2)
    }
    monkeypatch.setattr(summary, "read_cvr", lambda _folder: CvrResults(record, {"a": runs}))
    baseline, row = summary.summarise("")

    def aucs(score):
        return np.array([auc(score[user == one], label[user == one]) for one in range(1, 12)])

    gains = (aucs(scores[1]) + aucs(scores[2])) / 2 - aucs(scores[0])
    assert baseline.uauc == pytest.approx(aucs(scores[0]).mean()) and row.n_users == 11
    assert row.gain == pytest.approx(gains.mean())
    assert row.error == pytest.approx(gains.std(ddof=1) / np.sqrt(11))
    assert row.p == pytest.approx(ttest_1samp(gains, 0).pvalue)


def test_the_configs_of_the_studies_are_valid_and_a_wrong_arm_is_named():
    for name in ("cvr-ml-latest-small", "cvr-ml-latest-small-by-time"):
        assert read_toml(CvrStudy, MODELS / "configs" / f"{name}.toml").study == name
    with pytest.raises(ValueError, match=r"arms\.a\.head\.products"):
        replace(made_study(), arms={"a": CvrArm("", head={"products": True})})
    with pytest.raises(ValueError, match=r"arms\.a\.cvr: seeds belong to the study"):
        replace(made_study(), arms={"a": CvrArm("", cvr={"seed": 3})})
