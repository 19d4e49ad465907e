from __future__ import annotations

import numpy as np
import torch
from conftest import small_pch

from learn.data import Dataset, Event, Sequence, Split
from learn.data.item_text import ItemText
from learn.models.cvr import CvrConfig, CvrHead
from learn.training.train_cvr_head import CvrTrainConfig, is_history
from research.ranking import event_parts, learn_features
from research.ranking.learn_features import Learned, MidEmbeddingConfig

N_ITEMS = 50


def log():
    rng = np.random.default_rng(2)
    sequences = []
    for user, n in enumerate((40, 25, 9, 3)):
        values = rng.integers(1, 6, n).astype(np.float32)
        sequences.append(Sequence(str(user), rng.permutation(N_ITEMS)[:n], values, np.sort(rng.integers(0, 10**6, n))))
    return Dataset([str(i) for i in range(N_ITEMS)], [ItemText(title=str(i)) for i in range(N_ITEMS)], sequences)


def test_towers_get_only_the_liked_events_of_their_part():
    dataset = log()
    events = event_parts.cut(dataset, event_parts.RankSplitConfig())
    split = event_parts.tower_split(dataset, events)
    config = MidEmbeddingConfig(cvr=CvrTrainConfig(history="liked"))
    shown, shown_split = learn_features.histories(dataset, split, config)
    for user, sequence in enumerate(shown.sequences):
        in_tower_part = (events.user == user) & (events.part == event_parts.TOWER_PART)
        liked = in_tower_part & (events.value >= 4)
        assert sequence.items.tolist() == events.item[liked].tolist()
        known = liked & (events.position < split.n_train[user])
        assert shown_split.n_train[user] == known.sum()
    held_out = [(e.user, int(shown.sequences[e.user].items[e.position])) for e in shown_split.validation]
    original = [(e.user, e.position) for e in split.validation]
    expected = [(u, int(dataset.sequences[u].items[p])) for u, p in original if dataset.sequences[u].values[p] >= 4]
    assert held_out == expected and shown_split.test == []
    everything, _ = learn_features.histories(dataset, Split([2, 1, 1, 0], [Event(0, 2)], []), MidEmbeddingConfig())
    assert [len(sequence.items) for sequence in everything.sequences] == [3, 1, 1, 0]


def test_features_are_those_of_the_served_models_before_each_event():
    dataset = log()
    content = torch.nn.functional.normalize(torch.randn(N_ITEMS, 12), dim=-1)
    events = event_parts.cut(dataset, event_parts.RankSplitConfig())
    # A sliding window contains the whole history if that is at most half a window long.
    pch, head = small_pch(max_history=80), CvrHead(CvrConfig(6, 8, 5)).eval()
    config = MidEmbeddingConfig(cvr=CvrTrainConfig(history="liked"))
    features = learn_features.features(Learned(pch, head, {}, {}), config, content, dataset, events)
    rows = events.rows(event_parts.RANKER_PART, event_parts.VALIDATION, event_parts.TEST)
    assert features.mid_emb.shape == (len(rows), 5) and features.user.shape == features.item.shape == (len(rows), 6)
    for index in range(0, len(rows), 7):
        user, position = events.user[rows[index]], events.position[rows[index]]
        sequence = dataset.sequences[user]
        past = sequence.items[:position][is_history(sequence.values[:position], "liked")]
        with torch.no_grad():
            state = pch.last(content[torch.from_numpy(past)][None], torch.ones(1, len(past), dtype=torch.int64))
            item = pch.alone(content[[sequence.items[position]]])
            mid_emb, logit = head(state, item, torch.tensor([0]))
        for actual, expected in ((features.user, state), (features.item, item), (features.mid_emb, mid_emb)):
            np.testing.assert_allclose(actual[index], expected[0], atol=1e-5)
        np.testing.assert_allclose(features.logit[index], logit[0], atol=1e-5)
