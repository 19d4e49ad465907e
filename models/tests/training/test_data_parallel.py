"""Training in two real processes under torchrun against training in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from child_process import run_interpreter, torchrun

HERE = Path(__file__)
LOSSES = {"next": {}, "align": {"next_weight": 0.0, "align_weight": 1.0}}


def train_and_save(out: Path, loss: str) -> None:
    """Runs in each process: trains a few steps without dropout; the first process writes the weights and the curve."""
    import numpy as np
    from conftest import small_pch

    from learn import data
    from learn.models.recommender import Learn
    from learn.training import data_parallel
    from learn.training.train_config import TrainConfig
    from learn.training.train_recommender import train

    torch.set_num_threads(1)
    data_parallel.start()
    rng = np.random.default_rng(0)
    n_events = [9, 4, 12, 7, 3, 15, 6]
    runs = [rng.permutation(20)[:n] for n in n_events]
    sequences = [data.Sequence(str(u), r, np.ones(len(r)), np.arange(len(r))) for u, r in enumerate(runs)]
    dataset = data.Dataset([str(i) for i in range(20)], [], sequences)
    torch.manual_seed(0)
    model = Learn(small_pch(), torch.randn(20, 12), ids="separate")
    config = TrainConfig(steps=6, users=5, warmup=1, n_uniform=6, check_every=3, **LOSSES[loss])
    curve = train(config, model, dataset, data.split(sequences, data.SplitConfig()), out)
    if data_parallel.is_first():
        torch.save(model.state_dict(), out / "weights.pt")
        (out / "curve.json").write_text(json.dumps(curve))
    data_parallel.stop()


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_train_the_same_weights_as_one(tmp_path, loss):
    for name, run in (("one", run_interpreter), ("two", torchrun)):
        completed = run(HERE, tmp_path / name, loss)
        assert completed.returncode == 0, completed.stderr
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-5)
    curves = [json.loads((tmp_path / name / "curve.json").read_text()) for name in ("one", "two")]
    assert [r[f"loss_{loss}"] for r in curves[0]] == pytest.approx([r[f"loss_{loss}"] for r in curves[1]], rel=1e-4)


if __name__ == "__main__":
    train_and_save(Path(sys.argv[1]), sys.argv[2])
