"""Preparation orders events, leaks no held-out tags, uses bounded memory and never leaves a partial folder."""

from __future__ import annotations

import json
import subprocess
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import raw
from conftest import MODELS, write_movielens

from learn import data
from learn.data import DataError, Interaction, PrepareConfig, SplitConfig, TimeSplitConfig
from learn.data.actions import ACTIONS
from learn.data.item_text import ItemText
from learn.data.preparation import build
from learn.data.prepared_folder import read_prepared, verify_prepared
from research.ranking import event_parts

MOVIES = [(1, "A (1990)", "Drama"), (2, "B (1991)", "Drama"), (10, "C (1992)", "War")]


def write_neutral_log(folder, events, n_items=12):
    items = [(str(i), ItemText(title=f"Item {i}")) for i in range(n_items)]
    data.write_neutral([Interaction(*event) for event in events], items, folder)
    return folder


def test_ties_are_ordered_by_numeric_item_id_and_not_by_the_file(tmp_path):
    events = [("u", "10", 5, 1.0), ("u", "9", 5, 1.0), ("u", "2", 5, 3.0), ("u", "2", 5, 2.0), ("u", "11", 4, 1.0)]
    for name, order in (("a", events), ("b", events[::-1])):
        data.prepare(write_neutral_log(tmp_path / name, order), tmp_path / f"{name}-out")
    (sequence,) = data.read_prepared(tmp_path / "a-out").sequences
    assert sequence.items.tolist() == [11, 2, 2, 9, 10]
    assert sequence.values.tolist() == [1.0, 2.0, 3.0, 1.0, 1.0]
    assert sequence.timestamps.tolist() == [4, 5, 5, 5, 5]
    first, second = (data.read_meta(tmp_path / f"{name}-out") for name in "ab")
    assert first.digest == second.digest
    data.prepare(write_neutral_log(tmp_path / "c", events[:-1]), tmp_path / "c-out")
    assert data.read_meta(tmp_path / "c-out").digest != first.digest


def test_sequences_are_a_lazy_view_with_fixed_dtypes(tmp_path):
    data.prepare(write_neutral_log(tmp_path / "in", [("a", "1", 5), ("b", "2", 6), ("b", "3", 7)]), tmp_path / "out")
    sequences = data.read_prepared(tmp_path / "out").sequences
    assert len(sequences) == 2 and sequences.lengths.tolist() == [1, 2]
    assert isinstance(sequences.arrays["items"], np.memmap)
    types = {name: getattr(sequences[1], name).dtype for name in ("items", "values", "timestamps")}
    assert types == {"items": np.int64, "values": np.float32, "timestamps": np.int64}
    assert sequences[-1].user == sequences[np.int64(1)].user == "b"
    assert [s.user for s in sequences] == [s.user for s in sequences[:]] == ["a", "b"]
    sequences[1].items[0] = 99  # changes a copy, not the folder
    assert sequences[1].items.tolist() == [2, 3]
    with pytest.raises(IndexError):
        sequences[2]


def test_the_k_core_filter_repeats_until_nothing_changes(tmp_path):
    # Item 3 has one event. Without it, user b has one event, and without user b, item 2 has one event. Users a and c
    # remain, with items 0 and 1.
    events = [("a", "0", 1), ("a", "1", 2), ("b", "2", 1), ("b", "3", 2), ("c", "0", 1), ("c", "1", 2), ("c", "2", 3)]
    config = PrepareConfig(min_user_events=2, min_item_events=2)
    meta = data.prepare(write_neutral_log(tmp_path / "in", events), tmp_path / "out", config)
    dataset = data.read_prepared(tmp_path / "out")
    assert dataset.item_ids == ["0", "1"]
    assert {s.user: s.items.tolist() for s in dataset.sequences} == {"a": [0, 1], "c": [0, 1]}
    assert meta.dropped == {"events of users or items with too few events": 3, "items with too few events": 10}
    with pytest.raises(DataError, match="no events are left"):
        data.prepare(tmp_path / "in", tmp_path / "out", PrepareConfig(min_user_events=9))


# --- keywords --------------------------------------------------------------------------------------------------------


def write_tagged_movielens(folder, tags):
    """Writes MovieLens files with these tags. User 1 rates at times 10 to 50, user 2 at 10 and 20, user 3 at 60."""
    ratings = [(1, 1, 3, 10), (1, 2, 3, 20), (1, 10, 3, 30), (1, 1, 4, 40), (1, 2, 4, 50)]
    write_movielens(folder, [*ratings, (2, 1, 3, 10), (2, 2, 3, 20), (3, 1, 3, 60)], MOVIES)
    lines = ["userId,movieId,tag,timestamp", *(",".join(map(str, row)) for row in tags)]
    return raw.write(folder, "tags.csv", "\n".join(lines) + "\n")


def keywords(folder, out, config):
    data.prepare(folder, out, config)
    dataset = data.read_prepared(out)
    return {i: list(text.keywords) for i, text in zip(dataset.item_ids, dataset.texts, strict=True) if text.keywords}


def test_keywords_are_the_most_frequent_tags_with_ties_ordered_by_name(tmp_path):
    tags = [(u, 1, tag, 5) for u, tag in ((1, " Noir "), (2, "noir"), (3, "zeta"), (1, "alpha"), (2, "BETA"), (3, " "))]
    # A tag counts once per user and item, however often the user gives it.
    tags += [(1, 1, "zeta", 6), (1, 1, "alpha", 7), (1, 1, "alpha", 8)]
    folder = write_tagged_movielens(tmp_path / "in", tags)
    assert keywords(folder, tmp_path / "out", PrepareConfig(max_keywords=3)) == {"1": ["noir", "zeta", "alpha"]}
    assert keywords(folder, tmp_path / "out", PrepareConfig(max_keywords=9)) == {"1": ["noir", "zeta", "alpha", "beta"]}
    assert keywords(folder, tmp_path / "out", PrepareConfig()) == {}


def test_tags_from_the_first_held_out_event_on_do_not_count(tmp_path):
    rows = [
        *((1, 1, "in time", 39), (1, 1, "at the event", 40), (1, 1, "late", 45)),  # user 1: held out from 40 on
        *((2, 2, "before the second", 19), (2, 2, "at the second", 20)),  # user 2: too few events for this split
        *((3, 10, "old", 59), (3, 10, "at the last rating", 60)),  # user 3: one event
        *((4, 10, "no ratings", 59), (4, 10, "no ratings but late", 61)),  # user 4: no events
    ]
    folder = write_tagged_movielens(tmp_path / "in", rows)
    expected = {"1": ["in time"], "2": ["before the second"], "10": ["no ratings", "old"]}
    assert keywords(folder, tmp_path / "out", PrepareConfig(max_keywords=9)) == expected
    config = PrepareConfig(SplitConfig(1, 0), max_keywords=9)
    assert keywords(folder, tmp_path / "out", config)["1"] == ["at the event", "in time", "late"]
    config = PrepareConfig(SplitConfig(0, 0), max_keywords=9)
    assert keywords(folder, tmp_path / "out", config)["2"] == ["at the second", "before the second"]
    # A split by time has one cut for all users: of the 8 events, the one with index floor(0.5 * 8) = 4 is at time 30.
    config = PrepareConfig(TimeSplitConfig(fractions=(0.5, 0.9)), max_keywords=9)
    assert keywords(folder, tmp_path / "out", config) == {"2": ["at the second", "before the second"]}


def test_a_split_that_holds_out_events_older_than_the_keywords_is_refused(tmp_path):
    folder = write_tagged_movielens(tmp_path / "in", [(1, 1, "x", 5)])
    data.prepare(folder, tmp_path / "by_position", PrepareConfig(SplitConfig(1, 1), max_keywords=8))
    data.prepare(folder, tmp_path / "by_time", PrepareConfig(TimeSplitConfig(timestamps=(30, 40)), max_keywords=8))
    data.prepare(folder, tmp_path / "none", PrepareConfig())
    by_position, by_time, without_keywords = (
        data.read_prepared(tmp_path / name).sequences for name in ("by_position", "by_time", "none")
    )
    assert data.split(by_position, SplitConfig(1, 1)).n_train == [3, 2, 1]
    assert data.split(by_position, SplitConfig(2, 0)).n_train == [3, 2, 1]
    assert data.split(by_time, TimeSplitConfig(timestamps=(31, 32))).n_train == [3, 2, 0]
    assert data.split(without_keywords, SplitConfig(2, 2)).n_train == [1, 2, 1]
    message = "counted before each user's last 2 events, but this split holds out each user's last 3 events"
    with pytest.raises(ValueError, match=message):
        data.split(by_position, SplitConfig(2, 1))
    with pytest.raises(ValueError, match="events from 30 on, but this split holds out events from 29 on"):
        data.split(by_time, TimeSplitConfig(timestamps=(29, 40)))
    for sequences, config in ((by_position, TimeSplitConfig(timestamps=(90, 99))), (by_time, SplitConfig(0, 1))):
        with pytest.raises(ValueError, match="they would leak what it tests; prepare again"):
            data.split(sequences, config)
    # The towers of the ranking study are trained on fewer of a user's events than either split leaves.
    for sequences, kind in ((by_position, "per_user"), (by_time, "global_time")):
        dataset = data.Dataset(["1", "2", "3"], [], sequences)
        with pytest.raises(ValueError, match="they would leak what it tests; prepare again"):
            event_parts.cut(dataset, event_parts.RankSplitConfig(kind=kind, towers=0.2))
    assert (
        len(event_parts.cut(data.Dataset(["1", "2", "3"], [], without_keywords), event_parts.RankSplitConfig()).part)
        == 8
    )


def test_movielens_10m_tags_may_contain_colons(tmp_path):
    folder = raw.movielens_1m(tmp_path / "in", encoding="utf-8")
    raw.write(folder, "tags.dat", "3::1::sci::fi é::978298000\n3::1::late::978300760\n3::2::b::978298000\n")
    config = PrepareConfig(max_keywords=8)
    assert keywords(folder, tmp_path / "out", config) == {"1": ["sci::fi é"], "2": ["b"]}
    raw.write(folder, "tags.dat", "3::1::a::978298000\n3::1::978298000\n")
    with pytest.raises(DataError, match=r"tags\.dat, row 2, column user: empty"):
        data.prepare(folder, tmp_path / "out", config)


def test_keywords_are_refused_without_tags_or_timestamps(tmp_path):
    config = PrepareConfig(max_keywords=8)
    with pytest.raises(DataError, match="max_keywords is 8, but this movielens-100k data set has no tags"):
        data.prepare(raw.movielens_100k(tmp_path / "a"), tmp_path / "out", config)
    folder = raw.write(raw.movielens_1m(tmp_path / "b", with_timestamps=False), "tags.dat", "1::1::x::5\n")
    with pytest.raises(DataError, match="no tag is known to predate the split"):
        data.prepare(folder, tmp_path / "out", config)
    with pytest.raises(DataError, match=r"tags\.csv, row 2, column movieId: '99' is not in movies\.csv"):
        data.prepare(write_tagged_movielens(tmp_path / "c", [(1, 99, "x", 5)]), tmp_path / "out", config)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_failed_preparation_leaves_the_old_folder(tmp_path):
    folder, out = write_neutral_log(tmp_path / "in", [("a", "1", 5), ("b", "2", 6)]), tmp_path / "out"
    before = data.prepare(folder, out)
    (folder / data.INTERACTIONS).write_text("user,item\na,99\n")
    with pytest.raises(DataError, match="'99' is not in"):
        data.prepare(folder, out)
    assert data.verify_prepared(out) == before
    assert sorted(path.name for path in out.iterdir()) == sorted([*before.files, "meta.json"])


def test_a_folder_that_is_incomplete_or_changed_is_refused(tmp_path):
    out = tmp_path / "out"
    data.prepare(write_neutral_log(tmp_path / "in", [("a", "1", 5), ("b", "2", 6)]), out)
    with pytest.raises(DataError, match="not a prepared folder, or its preparation was interrupted"):
        data.read_prepared(tmp_path / "in")
    raw_bytes = (out / "values.npy").read_bytes()
    (out / "values.npy").write_bytes(raw_bytes[:-1] + b"\x00")
    with pytest.raises(DataError, match=r"values\.npy: its SHA-256 is not the one in meta\.json"):
        data.verify_prepared(out)
    np.save(out / "values.npy", np.ones(3, np.float32))
    with pytest.raises(DataError, match=r"values\.npy: shape \(3,\), but meta\.json says \(2,\)"):
        data.read_prepared(out)
    np.save(out / "values.npy", np.ones(2))
    with pytest.raises(DataError, match=r"values\.npy: expected float32, got float64"):
        data.read_prepared(out)
    (out / "values.npy").write_bytes(raw_bytes)
    (out / "catalogue.jsonl").write_text("")
    with pytest.raises(DataError, match=r"catalogue\.jsonl: 0 items, but meta\.json says 12"):
        data.read_prepared(out)
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | {"format": "other"}))
    with pytest.raises(DataError, match="column format: expected 'midemb-prepared-1'"):
        data.read_prepared(out)


def test_a_log_without_timestamps_cannot_be_split_by_time(tmp_path):
    data.prepare(raw.movielens_1m(tmp_path / "in", with_timestamps=False), tmp_path / "out")
    with pytest.raises(ValueError, match="has no timestamps, so it cannot be split in time"):
        data.split(data.read_prepared(tmp_path / "out").sequences, TimeSplitConfig(timestamps=(1, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_mb": 8}, "memory_mb is 8; expected 64 or more"),
        ({"min_item_events": -1}, "min_item_events is -1"),
        ({"text_fields": ("title", "colour")}, "text_fields has 'colour'"),
    ],
)
def test_an_invalid_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**changes)


def test_raw_files_are_never_overwritten(tmp_path):
    folder = write_neutral_log(tmp_path, [("a", "1", 5)])
    with pytest.raises(ValueError, match="is the folder of the raw files"):
        data.prepare(folder, tmp_path / "." / "")


# Runs in a process of its own, because the peak memory of a process never goes down.
_MEASURE_PEAK_MEMORY = """
import resource, sys
from pathlib import Path
from learn import data
from learn.data.preparation import build
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
meta = build(Path(sys.argv[1]), Path(sys.argv[2]), data.PrepareConfig(memory_mb=64, threads=1))
print(meta.n_events, (peak() - before) // 1024)
"""


def test_memory_is_bounded_whatever_the_length_of_the_log(tmp_path):
    """Prepares 1.5 million events with ids of 25 characters, which take 75 MB unsorted and more to be sorted."""
    n_events = 1_500_000
    user = "'a user of the test ' || lpad((hash(range) % 20000)::VARCHAR, 6, '0')"
    query = f"""SELECT {user} AS "user", hash(range + 1) % 500 AS item, (hash(range + 2) % 1000000)::INT AS timestamp"""
    folder = write_neutral_log(tmp_path / "in", [("u", "0", 5)], n_items=500)
    (folder / data.INTERACTIONS).unlink()
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute(f"COPY ({query} FROM range({n_events})) TO '{folder}/interactions.parquet' (FORMAT parquet)")
    command = [sys.executable, "-c", _MEASURE_PEAK_MEMORY, folder, tmp_path / "out"]
    completed = subprocess.run(command, cwd=MODELS, capture_output=True, text=True, check=True)
    n_counted, growth_mb = map(int, completed.stdout.split())
    assert n_counted == n_events
    assert growth_mb < 230


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_actions_of_the_log_are_kept_in_its_order(tmp_path, suffix):
    """Ties are broken by item, then value, then action; a log without actions has no file of them."""
    rows = [("u", "b", 5, 1.0, "like"), ("u", "a", 5, 2.0, "skip"), ("u", "a", 5, 2.0, "view"), ("v", "a", 1, 1.0, "")]
    names = ("user", "item", "timestamp", "value", "action")
    (tmp_path / "raw").mkdir()
    log = tmp_path / "raw" / f"interactions.{suffix}"
    if suffix == "csv":
        log.write_text("\n".join(",".join(map(str, row)) for row in (names, *rows)) + "\n")
    else:
        pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), log)
    (tmp_path / "raw" / "items.jsonl").write_text('{"id": "a", "title": "A"}\n{"id": "b", "title": "B"}\n')
    build(tmp_path / "raw", tmp_path / "out", PrepareConfig())
    sequences = read_prepared(tmp_path / "out").sequences
    assert [[ACTIONS[number - 1] if number else "" for number in sequence.actions] for sequence in sequences] == [
        ["view", "skip", "like"],
        [""],
    ]
    assert verify_prepared(tmp_path / "out").has_actions


def test_a_log_without_actions_has_no_file_of_them(tmp_path):
    write_movielens(tmp_path / "raw", [(1, 1, 5.0, 1)], [(1, "A (1990)", "Drama")])
    build(tmp_path / "raw", tmp_path / "out", PrepareConfig())
    assert not (tmp_path / "out" / "actions.npy").exists()
    assert read_prepared(tmp_path / "out").sequences[0].actions.tolist() == [0]


def test_the_neutral_format_holds_actions(tmp_path):
    events = [Interaction("u", "0", 1, 1.0, "like"), Interaction("u", "1", 2, 1.0)]
    data.write_neutral(events, [(str(n), ItemText(title=f"Item {n}")) for n in range(2)], tmp_path / "raw")
    build(tmp_path / "raw", tmp_path / "out", PrepareConfig())
    found = read_prepared(tmp_path / "out").sequences[0].actions
    assert [ACTIONS[number - 1] if number else "" for number in found] == ["like", ""]


def test_an_unknown_action_names_its_row(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "interactions.csv").write_text("user,item,action\nu,a,like\nu,a,hate\n")
    (tmp_path / "raw" / "items.jsonl").write_text('{"id": "a", "title": "A"}\n')
    with pytest.raises(DataError, match=r"interactions.csv, row 3, column action: 'hate' is none of view, click"):
        build(tmp_path / "raw", tmp_path / "out", PrepareConfig())
