"""A small study in which content predicts taste: LEARN's features must help, and no arm may know the test labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learn.data import Dataset, Sequence
from learn.data.item_text import ItemText
from research import record_files
from research.bootstrap import BootstrapConfig
from research.ranking import study as ranking_study
from research.ranking import summary
from research.ranking.boosted_ranker import Boosted, BoostedTrial
from research.ranking.event_parts import RANKER_PART, TEST, VALIDATION, cut
from research.ranking.ranker import Dcn, RankerConfig, Trial
from research.ranking.result_files import RankingRun, RankingStudy
from research.ranking.study import RankConfig, rank
from research.ranking.summary import summarise
from research.ranking.tower_runs import Features, Learned
from research.record_files import score_ranks

N_ITEMS, N_USERS, LENGTH = 400, 120, 40
CONFIG = RankConfig(
    study="small", seeds=(1, 2, 3), arms=("base", "mid_emb", "categories"),
    ranker=Dcn(RankerConfig(id_dim=4, deep=(16,), epochs=8), (Trial(3e-3, 1e-2), Trial(3e-3, 1.0))),
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    """Each user mostly likes films of one of two kinds, which neither the category nor any other feature tells."""
    rng = np.random.default_rng(3)
    kind = np.arange(N_ITEMS) % 2
    sequences = []
    for user in range(N_USERS):
        items = rng.permutation(N_ITEMS)[:LENGTH]
        liked = (kind[items] == user % 2) ^ (rng.random(LENGTH) < 0.1)
        when = np.sort(rng.integers(0, 10**8, LENGTH))
        sequences.append(Sequence(str(user), items, np.where(liked, 5.0, 2.0).astype(np.float32), when))
    texts = [ItemText(title=f"Film {i}", category="Drama" if i % 3 else "War") for i in range(N_ITEMS)]
    return Dataset([f"i{i}" for i in range(N_ITEMS)], texts, sequences)


def features_of(dataset, config=CONFIG):
    """A source of features whose mid-emb tells whether the film is of the user's kind, among noise."""
    events = cut(dataset, config.split)
    rows = events.rows(RANKER_PART, VALIDATION, TEST)
    is_match = torch.from_numpy(events.user[rows] % 2 == events.item[rows] % 2).float()

    def source(seed):
        noise = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(seed))
        mid_emb = torch.cat([is_match[:, None], noise[:, :4]], dim=1)
        features = Features(mid_emb, noise[:, :2], noise[:, 2:4], is_match[:, None])
        return Learned(features, {"cvr_validation_uauc": 0.9}, {"towers": 1.0, "export": 1.0, "features": 1.0})

    return source


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("study")
    return rank(CONFIG, world, features_of(world), out), out


def test_taste_that_only_content_predicts_improves_the_ranker(study):
    rows, _ = study
    by_key = {(row.arm, row.group, row.metric): row for row in rows}
    mid, plain = by_key["mid_emb", "all", "uauc"], by_key["base", "all", "uauc"]
    assert mid.mean > plain.mean + 0.1
    assert mid.gain.value == pytest.approx(mid.mean - plain.mean, abs=1e-5) and mid.gain.low > 0 and mid.gain.p < 0.05
    assert (mid.gain.n_users, mid.gain.n_seeds) == (mid.n_users, 3)
    assert plain.gain is None
    # The categories carry no information here, so they must not improve the ranker.
    control = by_key["categories", "all", "uauc"]
    assert control.gain.low < 0.05 and control.mean < mid.mean
    groups = {row.group for row in rows}
    assert groups >= {"all", "cold-start users", "long-tail users", "cold-start items", "other items"}


def run_of(folder, arm: str, seed: int) -> RankingRun:
    return record_files.read(folder / f"{arm}-seed{seed}.npz", RankingRun)


def test_lightgbm_is_a_second_ranking_model_under_the_same_protocol(world, tmp_path, capsys):
    trees = Boosted((BoostedTrial(4, 1.0), BoostedTrial(8, 30.0)), min_data_in_leaf=20)
    config = replace(CONFIG, study="small-lightgbm", seeds=(1, 2), ranker=trees)
    rows = rank(config, world, features_of(world), tmp_path)
    by_key = {(row.arm, row.group, row.metric): row for row in rows}
    assert by_key["mid_emb", "all", "uauc"].gain.low > 0.1
    assert abs(by_key["categories", "all", "uauc"].gain.value) < 0.05
    # The output says what the trials chose, so that a grid which ends too early is seen.
    assert "num_leaves chosen by 6 runs: 4 in " in capsys.readouterr().out
    run = run_of(tmp_path, "mid_emb", 1)
    assert run.config["ranker"]["name"] == "lightgbm" and run.chosen["trees"] > 0


def test_p_is_corrected_within_a_metric_over_arms_and_groups_of_popularity(study):
    rows, _ = study
    family = [row for row in rows if row.metric == "uauc" and row.p_holm is not None]
    assert {(row.arm, row.group) for row in family} <= {
        (arm, group) for arm in ("mid_emb", "categories") for group in summary.FAMILY
    }
    ordered = sorted(family, key=lambda row: row.gain.p)
    assert ordered[0].p_holm == pytest.approx(min(1.0, ordered[0].gain.p * len(family)))
    assert all(row.p_holm >= row.gain.p for row in family)
    assert all(row.p_holm is None for row in rows if "users" in row.group or row.gain is None)


def test_holm_matches_a_hand_computed_example():
    # .01 x 4, .02 x 3 = .06, .03 x 2 = .06, and .5 x 1; in the order given.
    assert summary.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    # No corrected p is below that of a smaller p before it, nor above 1.
    assert summary.holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert summary.holm([0.7, 0.8]) == [1.0, 1.0]


def test_files_hold_what_the_report_needs(study, world):
    _, out = study
    dataset = world
    shared = record_files.read(out / "ranking.npz", RankingStudy)
    events = cut(dataset, CONFIG.split)
    rows = events.rows(TEST)
    assert shared.study == "small" and "proxy" in shared.label_meaning
    # Users are numbered in the order of their ids as texts: 0, 1, 10, 100, ..
    names = sorted({str(user) for user in events.user[rows]})
    assert [names[user] for user in shared.user] == [str(user) for user in events.user[rows]]
    assert shared.label.tolist() == events.label[rows].tolist()
    training = events.item[events.part <= 1]
    assert shared.item_train_count.tolist() == [int((training == i).sum()) for i in events.item[rows]]
    assert sum(shared.n_events.values()) == N_USERS * LENGTH
    for arm in CONFIG.arms:
        run = run_of(out, arm, 2)
        assert (run.arm, run.seed, len(run.score_rank)) == (arm, 2, len(rows))
        assert set(run.seconds) == {"towers", "export", "features", "starting_point", "ranker"}
        assert run.learned == {"cvr_validation_uauc": 0.9}


def test_score_ranks_keep_order_and_ties():
    assert score_ranks(np.array([0.5, -1.0, 0.5, 2.25])).tolist() == [1, 0, 1, 2]


def test_a_finished_study_is_read_and_not_run_again(study, world):
    rows, out = study
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-seed*")}
    assert rank(CONFIG, world, features_of(world), out) == rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-seed*")} == before
    assert summarise(out) == rows


def test_equal_seeds_give_equal_scores(study, world, tmp_path):
    _, out = study
    rank(replace(CONFIG, seeds=(2,), arms=("base", "mid_emb")), world, features_of(world), tmp_path)
    for arm in ("base", "mid_emb"):
        first, again = (run_of(folder, arm, 2) for folder in (out, tmp_path))
        assert first.score_rank.tolist() == again.score_rank.tolist()


def test_runs_of_different_data_are_not_combined(study, world, tmp_path):
    _, out = study
    for path in out.glob("*.npz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = run_of(out, "mid_emb", 3).model_copy(update={"data": "other"})
    record_files.write(tmp_path / "mid_emb-seed3.npz", changed)
    with pytest.raises(ValueError, match=r"mid_emb-seed3\.npz: is of other data or another config"):
        summarise(tmp_path, BootstrapConfig(n_resamples=10))


def test_labels_of_the_test_part_do_not_change_scores(study, world, tmp_path):
    """Flips the label of every user's last event; no event comes after it, so no score of any arm may change."""
    _, out = study
    flipped = []
    for sequence in world.sequences:
        values = sequence.values.copy()
        values[-1] = 7 - values[-1]
        flipped.append(replace(sequence, values=values))
    config = replace(CONFIG, seeds=(1,))
    rank(config, replace(world, sequences=flipped), features_of(world), tmp_path)
    uauc = {}
    for folder in (out, tmp_path):
        rows = summarise(folder, BootstrapConfig(n_resamples=10))
        uauc[folder] = [row.mean for row in rows if (row.group, row.metric) == ("all", "uauc")]
    assert all(first != again for first, again in zip(uauc[out], uauc[tmp_path], strict=True))
    for arm in CONFIG.arms:
        first, again = (run_of(folder, arm, 1) for folder in (out, tmp_path))
        assert first.score_rank.tolist() == again.score_rank.tolist()


def test_invalid_configs_and_data_are_refused_with_the_reason(world, tmp_path):
    with pytest.raises(ValueError, match="unknown arm 'mid'"):
        RankConfig(arms=("base", "mid"))
    with pytest.raises(ValueError, match="all others are compared with it"):
        RankConfig(arms=("mid_emb",))
    liked = [replace(s, values=np.full(LENGTH, 5.0, dtype=np.float32)) for s in world.sequences]
    with pytest.raises(ValueError, match=r"2,280 of the 2,280 events of the part .* have a value"):
        rank(CONFIG, replace(world, sequences=liked), features_of(world), tmp_path)


def test_extra_columns_are_standardised_over_the_rankers_part_and_in_the_order_of_events(world):
    table = ranking_study.tabulate(CONFIG, world, cut(world, CONFIG.split))
    extra = ranking_study.extra_features(table, no_features(table), ("categories",))
    later = table.events.rows(1, 2, 3)
    in_ranker_part = table.events.part[later] == 1
    np.testing.assert_allclose(extra[torch.from_numpy(in_ranker_part)].mean(dim=0), 0, atol=1e-5)
    drama = torch.from_numpy(table.events.item[later] % 3 != 0)
    assert (extra[drama, 0] > 0).all() and (extra[~drama, 0] < 0).all()
    test = table.inputs(extra, TEST)
    assert torch.equal(test.extra, extra[torch.from_numpy(table.events.part[later] == TEST)])


def no_features(table):
    none = torch.zeros(len(table.events.rows(1, 2, 3)), 0)
    return Features(none, none, none, none)
