from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small_pch

from learn import data
from learn.evaluation import full_ranking
from learn.evaluation.retrieval import histories, retrieve
from learn.models.recommender import Learn


def small_dataset():
    rng = np.random.default_rng(1)
    sequences = []
    for user, n in enumerate((5, 14, 3, 20)):
        items = rng.integers(0, 40, n)
        sequences.append(data.Sequence(str(user), items, np.ones(n), 100 * user + np.arange(n)))
    return data.Dataset([str(i) for i in range(40)], [], sequences)


def test_ranks_are_those_of_the_towers_as_served():
    dataset, content = small_dataset(), torch.randn(40, 12)
    pch = small_pch()
    events = [data.Event(u, p) for u, s in enumerate(dataset.sequences) for p in range(1, len(s.items))]
    found = retrieve(Learn(pch, content, "none"), dataset, events)
    assert found.rank.tolist() == full_ranking.tower_ranks(pch, content, dataset, events).tolist()
    assert found.top.shape == (len(events), 10)
    for event, top, rank in zip(events, found.top, found.rank, strict=True):
        sequence = dataset.sequences[event.user]
        target = sequence.items[event.position]
        met = set(sequence.items[: event.position].tolist()) - {int(target)}
        assert not met & set(top.tolist())
        assert (target in top) == (rank <= 10)


def test_histories_match_a_hand_worked_example():
    dataset = small_dataset()
    given = histories(dataset, [data.Event(1, 12), data.Event(0, 0), data.Event(2, 2)], longest=4)
    assert given.length.tolist() == [4, 0, 2]
    assert given.items[0].tolist() == dataset.sequences[1].items[8:12].tolist()
    # The last time is that of the event to predict; the item of that event is not in the history.
    assert given.times.tolist() == [[108, 109, 110, 111, 112], [0, 0, 0, 0, 0], [200, 201, 202, 0, 0]]
    assert given.items[1].tolist() == [0, 0, 0, 0]


def test_a_score_that_is_not_finite_is_refused():
    model = Learn(small_pch(), torch.randn(40, 12), "none")
    with torch.no_grad():
        model.pch.projection.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        retrieve(model, small_dataset(), [data.Event(0, 3)])
