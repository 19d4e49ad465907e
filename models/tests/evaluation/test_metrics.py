"""Ranking metrics against hand-computed values and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from learn.evaluation import metrics

RANK = np.array([1, 3, 11, 60, 150, 500])
USER = np.array([0, 0, 0, 1, 1, 2])


def figure(metric: str) -> float:
    return metrics.figures(RANK, USER)[metric]


def test_hit_rate_ndcg_and_mrr_match_hand_computed_values():
    assert [figure(f"hr_at_{k}") for k in (10, 50, 100, 200)] == pytest.approx([2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert figure("ndcg_at_10") == pytest.approx((1 + 1 / math.log2(4)) / 6)
    assert figure("ndcg_at_50") == pytest.approx((1 + 0.5 + 1 / math.log2(12)) / 6)
    assert figure("mrr_at_10") == pytest.approx((1 + 1 / 3) / 6)
    assert figure("mrr") == pytest.approx(sum(1 / r for r in RANK) / 6)


def test_recall_is_a_mean_over_users():
    # User 0 has 2 of 3 targets in the top ten; users 1 and 2 have none.
    assert figure("recall_at_10") == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert figure("recall_at_200") == pytest.approx((1 + 1 + 0) / 3)
    assert (figure("n_events"), figure("n_users")) == (6, 3)


def test_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(80, 300)), rng.integers(0, 300, 80)
    relevant = np.eye(300)[target]
    ranking = metrics.rank_scores(scores, target, [np.array([], dtype=int)] * 80)
    ours = metrics.figures(ranking.rank, np.arange(80))
    for k in (10, 50, 100, 200):
        assert ours[f"ndcg_at_{k}"] == pytest.approx(ndcg_score(relevant, scores, k=k, ignore_ties=True))
        assert ours[f"hr_at_{k}"] == pytest.approx(top_k_accuracy_score(target, scores, k=k, labels=np.arange(300)))
    # With one relevant item, average precision is the reciprocal rank.
    assert ours["mrr"] == pytest.approx(label_ranking_average_precision_score(relevant, scores))


@pytest.mark.parametrize("name", ["hr", "ndcg_at_0", "hits_at_10", "mrr_at_"])
def test_an_unknown_metric_is_an_error(name):
    with pytest.raises(ValueError, match=f"unknown metric '{name}'"):
        metrics.event_values(RANK, name)


def test_item_and_user_buckets_cover_all_events():
    counts = np.array([0, 1, 4, 5, 19, 20, 99, 100, 10_000])
    found = metrics.groups(counts, counts)
    sizes = {name: int(mask.sum()) for name, mask in found.items()}
    assert sizes == {
        "all": 9,
        "item 0": 1,
        "item 1-4": 2,
        "item 5-19": 2,
        "item 20-99": 2,
        "item 100+": 2,
        "item 0-4": 3,
        "user 0-19": 5,
        "user 20-49": 1,
        "user 50-199": 2,
        "user 200+": 1,
    }


def test_a_group_without_events_has_no_figures():
    found = metrics.grouped(RANK, USER, {"none": np.zeros(6, dtype=bool), "first": np.arange(6) < 1})
    assert list(found) == ["first"]
    assert found["first"]["hr_at_10"] == 1.0
    assert metrics.figures(RANK[:0], USER[:0]) == {}


def test_the_top_items_leave_out_those_the_user_has_seen():
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    seen = [np.array([0]), np.array([1, 2, 3, 4])]
    found = metrics.rank_scores(scores, np.array([3, 0]), seen, k=2)
    assert [set(row) for row in found.top.tolist()] == [{1, 2}, {0, -1}]
    assert found.rank.tolist() == [3, 1]


def test_head_share_and_coverage_match_hand_computed_values():
    # Of the 200 items, the head of 1 % has two and the head of 5 % ten. Equally popular items are ordered by index.
    counts = np.zeros(200)
    counts[[7, 8]] = 50, 40
    top = np.array([[7, 8, 0, 199], [7, 100, 1, -1]])
    found = metrics.top_figures(top, counts)
    assert found["head_share_at_4"] == pytest.approx(3 / 7)
    assert found["head_5_percent_share_at_4"] == pytest.approx(5 / 7)
    assert found["coverage_at_4"] == pytest.approx(6 / 200)
    with pytest.raises(ValueError, match="no item is recommended"):
        metrics.top_figures(np.full((2, 3), -1), counts)


def test_a_nan_score_of_another_item_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        metrics.rank_scores(np.array([[1.0, np.nan]]), np.array([0]), [np.array([], dtype=int)])
