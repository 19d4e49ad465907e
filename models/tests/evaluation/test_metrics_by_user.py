"""A metric by user is the mean over users of each user's own mean."""

from __future__ import annotations

import numpy as np
import pytest

from learn.evaluation import metrics

RANK, USER = np.array([1, 1, 1, 20]), np.array([7, 7, 7, 9])


def test_values_are_those_of_the_metric_and_only_the_mean_differs():
    for name in ("ndcg_at_10", "mrr", "hr_at_50"):
        by_user = f"{name}{metrics.BY_USER}"
        assert metrics.event_values(RANK, by_user).tolist() == metrics.event_values(RANK, name).tolist()
        assert metrics.is_over_users(by_user) and not metrics.is_over_users(name)
    with pytest.raises(ValueError, match="unknown metric 'hits_by_user'"):
        metrics.event_values(RANK, "hits_by_user")


def test_recall_is_the_hit_rate_by_user():
    figures = metrics.figures(RANK, USER)
    assert figures["hr_at_10"] == 3 / 4
    assert figures["recall_at_10"] == (1 + 0) / 2
    assert metrics.is_over_users("recall_at_10")
