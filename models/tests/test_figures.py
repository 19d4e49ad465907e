from __future__ import annotations

import numpy as np
import pytest
from made_results import write_made

from learn import results
from learn.figures import figures_of


def test_the_manifest_gets_means_over_seeds_with_intervals(tmp_path):
    write_made(tmp_path, {"learn-text": 4.0, "sasrec": 2.0})
    facts = figures_of(tmp_path / "ml-small", "learn-text")
    runs = results.read_study(tmp_path / "ml-small").runs["learn-text"]
    mean = np.mean([run.metrics["all"]["ndcg_at_10"] for run in runs.values()])
    value, low, high = facts["mean_low_high"]["ndcg_at_10"]
    assert value == pytest.approx(mean, abs=1e-5) and low < value < high
    assert facts["seeds"] == [1, 2, 3] and facts["model"] == "learn-text"
    with pytest.raises(ValueError, match="no runs of 'bert', only of learn-text, sasrec"):
        figures_of(tmp_path / "ml-small", "bert")
