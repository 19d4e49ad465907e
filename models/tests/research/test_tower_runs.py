"""`learn rank` on made data: towers see the past alone, and their bundle gives the features of `learn features`."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from learn.cli import main
from learn.data import Dataset, read_prepared
from learn.serving import features, fixture_bundles
from learn.serving.digests import bundle_digest
from research import record_files
from research.ranking import event_parts, tower_runs
from research.ranking.event_parts import RANKER_PART, TEST, TOWER_PART, VALIDATION, RankSplitConfig, by_time
from research.ranking.result_files import RankingRun

SETTINGS = """
[cvr]
liked_from = 1
epochs = 1
[time_split]
fractions = [0.6, 0.8]
[pch]
width = 8
layers = 1
heads = 2
ffn = 8
out_dim = 8
adaptor_hidden = 8
max_history = 6
[train]
steps = 2
warmup = 1
n_uniform = 8
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A prepared run of 40 users with 14 events each, of which some are at the same time, and its options."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(4)
    with (folder / "interactions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp", "value"])
        for user in range(40):
            for item, when in zip(rng.permutation(30)[:14], np.sort(rng.integers(0, 500, 14)), strict=True):
                writer.writerow([f"u{user}", f"i{item}", when, rng.integers(0, 2)])
    items = [{"id": f"i{number}", "title": f"Thing number {number}"} for number in range(30)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "settings.toml").write_text(SETTINGS)
    torch.manual_seed(1)
    fixture_bundles.encoder_model().save_pretrained(folder / "encoder")
    fixture_bundles.byte_tokenizer().save(str(folder / "encoder" / "tokenizer.json"))
    options = ["--run", folder / "run", "--encoder", folder / "encoder", "--config", folder / "settings.toml"]
    options = [*map(str, options), "--threads", "1"]
    assert main(["prepare", "--data", str(folder), *options]) == 0
    return folder, options


def test_learn_rank_trains_two_ranking_models_on_the_features_of_learn_features(shop, capsys):
    folder, options = shop
    assert main(["rank", *options, "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "weight_decay chosen by 6 runs" in printed and "num_leaves chosen by 6 runs" in printed
    run, seed = folder / "run", folder / "run" / "ranking-towers" / "seed1"
    dataset = read_prepared(run / "data")
    events = event_parts.cut(dataset, by_time(dataset.sequences, _time_split(folder)))
    _check_that_towers_saw_the_past_alone(seed, dataset, events)
    _check_features(seed, dataset, events)
    for results in ("ranking", "ranking-lightgbm"):
        found = record_files.read(run / results / "mid_emb-seed1.npz", RankingRun)
        assert found.study == f"run{results.removeprefix('ranking')}"
        assert {"towers", "export", "features", "ranker"} <= found.seconds.keys()
        assert "hr_at_10" in found.learned and any("auc" in name for name in found.learned)
    # A study that is complete is only read, and one that lacks a file continues without training towers again.
    towers = (seed / "run" / "towers.safetensors").stat().st_mtime_ns
    before = (run / "ranking" / "mid_emb-seed1.npz").read_bytes()
    (run / "ranking" / "mid_emb-seed1.npz").unlink()
    assert main(["rank", *options, "--seed", "1"]) == 0
    assert (seed / "run" / "towers.safetensors").stat().st_mtime_ns == towers
    again = record_files.read(run / "ranking" / "mid_emb-seed1.npz", RankingRun)
    (folder / "first.npz").write_bytes(before)
    first = record_files.read(folder / "first.npz", RankingRun)
    assert again.score_rank.tolist() == first.score_rank.tolist()
    # Other settings of the towers make their folder anew.
    (folder / "settings.toml").write_text(SETTINGS.replace("steps = 2", "steps = 3"))
    shutil.rmtree(run / "ranking")
    shutil.rmtree(run / "ranking-lightgbm")
    assert main(["rank", *options, "--seed", "1"]) == 0
    assert (seed / "run" / "towers.safetensors").stat().st_mtime_ns != towers


def _time_split(folder):
    from learn.run_settings import read_settings

    return read_settings(folder / "settings.toml").time_split


def _check_that_towers_saw_the_past_alone(seed, dataset, events):
    past = pq.read_table(seed / "past" / "interactions.parquet").to_pylist()
    cut = events.clock[events.part == RANKER_PART].min()
    assert past and all(event["timestamp"] < cut for event in past)
    assert len(past) == (events.part == TOWER_PART).sum()
    trained_on = read_prepared(seed / "run" / "data")
    assert sum(len(sequence.items) for sequence in trained_on.sequences) == len(past)


def _check_features(seed, dataset, events):
    """Every event after the towers' part has a row, whose history is what that user did strictly before it."""
    rows = events.rows(RANKER_PART, VALIDATION, TEST)
    table = pq.read_table(sorted((seed / "features").glob("part-*.parquet"))[0])
    assert sorted(table["event"].to_pylist()) == rows.tolist()
    assert set(table["bundle_digest"].to_pylist()) == {bundle_digest(seed / "bundle")}
    assert Counter(table["status"].to_pylist()) == {"OK": len(rows)}
    for row in table.to_pylist():
        same_user = events.user == events.user[row["event"]]
        n_before = int((same_user & (events.clock < events.clock[row["event"]])).sum())
        assert row["history_length"] == min(6, n_before)
    found = tower_runs.read_features(seed / "features", events)
    assert found.mid_emb.shape[0] == found.user.shape[0] == found.item.shape[0] == len(rows) == len(found.logit)
    place = {event: index for index, event in enumerate(rows.tolist())}
    for row in table.slice(0, 20).to_pylist():
        np.testing.assert_array_equal(found.mid_emb[place[row["event"]]], np.float32(row["mid_emb"]))
        assert torch.sigmoid(found.logit[place[row["event"]], 0]).item() == pytest.approx(row["cvr"], abs=1e-5)


def test_samples_hold_nothing_that_is_known_only_after_them(shop):
    folder, _ = shop
    dataset = read_prepared(folder / "run" / "data")
    events = event_parts.cut(dataset, RankSplitConfig(liked_from=1))
    rows = events.rows(TEST)
    samples = tower_runs.sample_table(tower_runs.log_table(dataset, events, rows), rows)
    assert samples.column_names == ["user", "item", "timestamp", "event"]


def test_rows_without_vectors_are_zeros_and_a_missing_sample_is_an_error(shop, tmp_path):
    folder, _ = shop
    dataset = read_prepared(folder / "run" / "data")
    events = event_parts.cut(dataset, by_time(dataset.sequences, _time_split(folder)))
    source = folder / "run" / "ranking-towers" / "seed1" / "features" / "part-000000.parquet"
    table = pq.read_table(source)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns[features.STATUS][0] = "INVALID_ITEM"
    for name in features.VECTORS:
        columns[name][0] = None
    types = {name: table.schema.field(name).type for name in table.column_names}
    changed = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    pq.write_table(changed, tmp_path / "part-000000.parquet")
    found = tower_runs.read_features(tmp_path, events)
    place = events.rows(RANKER_PART, VALIDATION, TEST).tolist().index(columns["event"][0])
    assert not found.mid_emb[place].any() and found.logit[place] == 0 and found.mid_emb[place + 1].any()
    pq.write_table(changed.slice(1), tmp_path / "part-000000.parquet")
    with pytest.raises(ValueError, match="its samples are not the events after the towers' part"):
        tower_runs.read_features(tmp_path, events)


def test_the_log_of_learn_features_has_actions_if_the_data_set_has_any(shop):
    folder, _ = shop
    dataset = read_prepared(folder / "run" / "data")
    events = event_parts.cut(dataset, RankSplitConfig(liked_from=1))
    rows = np.array([0, 1, 14])
    assert "action" not in tower_runs.log_table(dataset, events, rows).column_names
    sequences = [replace(s, actions=np.full(len(s.items), 3 * (s.user == "u0"), np.uint8)) for s in dataset.sequences]
    table = tower_runs.log_table(Dataset(dataset.item_ids, dataset.texts, sequences), events, rows)
    expected = ["like" if user == "u0" else "" for user in table["user"].to_pylist()]
    assert table["action"].to_pylist() == expected and set(expected) == {"like", ""}
