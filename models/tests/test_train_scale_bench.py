"""The benchmark of training at scale, on data that take a second."""

from __future__ import annotations

from benches.train_scale import Sizes, measure_prepare, measure_training, measure_validation, write_data

TINY = Sizes(events=3000, items=400, users=60, dim=16, steps=2, batch_users=8, validation=10, memory_mb=128)


def test_every_phase_measures_what_it_is_for(tmp_path, monkeypatch):
    # The table is gathered by row, as that of a large catalogue is.
    monkeypatch.setattr("learn.content.standardise.IN_MEMORY_BYTES", 0)
    write_data(tmp_path, TINY)
    written = (tmp_path / "content.npy").stat().st_mtime_ns
    write_data(tmp_path, TINY)
    assert (tmp_path / "content.npy").stat().st_mtime_ns == written
    prepared = measure_prepare(tmp_path, TINY)
    assert prepared["events"] == 3000 and prepared["peak_mb"] > 0
    trained = measure_training(tmp_path, TINY)
    assert trained["users_per_second"] == 8 * trained["steps_per_second"] > 0
    assert measure_validation(tmp_path, TINY)["events"] == 10
