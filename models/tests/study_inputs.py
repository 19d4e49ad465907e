"""What the runs of a tiny study read: eight users, 25 items and random content."""

from __future__ import annotations

import numpy as np
import pytest

from learn import data
from research.retrieval.arms import Inputs


@pytest.fixture
def inputs(tmp_path):
    rng = np.random.default_rng(0)
    sequences = []
    for user in range(8):
        items = rng.permutation(25)[: 6 + user]
        sequences.append(data.Sequence(str(user), items, np.ones(len(items)), np.arange(len(items))))
    np.save(tmp_path / "content.npy", rng.normal(size=(25, 12)).astype(np.float16))
    return Inputs(data.Dataset([str(i) for i in range(25)], [], sequences), {"minilm": tmp_path / "content.npy"}, {})
