"""Features of past samples equal what a live server answers, and follow the log's order strictly before each sample."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURE, FIXTURES, MODELS
from live_server import serving

from learn.data import DataError
from learn.serving import feature_check, feature_inputs, features
from learn.serving.bulk_embedding import RayConfig
from learn.serving.bundle_inference import GraphsConfig
from learn.serving.feature_check import CheckConfig
from learn.serving.feature_inputs import SortConfig
from learn.serving.features import VECTORS, FeaturesConfig, compute_features

ITEMS = [f"item {number} of the shop" for number in range(30)]
ACTION_NAMES = ["view", "click", "like", "dislike", "purchase", "skip", ""]


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header, *rows])
    return path


@pytest.fixture
def shop(tmp_path):
    """40 users with up to 30 events, many of them at the same time, and 300 samples, a few of them of unknown items."""
    rng = np.random.default_rng(5)
    with (tmp_path / "items.jsonl").open("w") as file:
        for number, title in enumerate(ITEMS):
            file.write(json.dumps({"id": str(number), "title": title}) + "\n")
    events = [
        (f"u{user}", rng.integers(0, 33), rng.integers(100, 120), rng.choice(ACTION_NAMES))
        for user in range(40)
        for _ in range(rng.integers(0, 30))
    ]
    rng.shuffle(events)
    write_csv(tmp_path / "log.csv", ["user", "item", "timestamp", "action"], events)
    samples = [
        (f"r{number}", f"u{rng.integers(0, 42)}", rng.integers(0, 31), rng.integers(98, 122), number % 2)
        for number in range(300)
    ]
    write_csv(tmp_path / "samples.csv", ["request_id", "user", "item", "timestamp", "clicked"], samples)
    return tmp_path


def config_of(shop, **changes) -> FeaturesConfig:
    plain = FeaturesConfig(
        FIXTURE,
        str(shop / "log.csv"),
        str(shop / "samples.csv"),
        shop / "items.jsonl",
        shop / "out",
        outputs=VECTORS,
        sort=SortConfig(part_samples=100, memory_mb=256),
        graphs=GraphsConfig("cpu"),
        title=None,
    )
    return replace(plain, **changes)


def table_of(config) -> pa.Table:
    """All rows in the order of the samples."""
    table = pa.concat_tables(
        pq.read_table(path).cast(_plain(pq.read_schema(path))) for path in sorted(config.out.glob("part-*.parquet"))
    )
    number = np.array([int(name[1:]) for name in table["request_id"].to_pylist()])
    return table.take(np.argsort(number))


def _plain(schema):
    return pa.schema(
        [field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in schema]
    )


def test_features_equal_the_answers_of_a_live_server(shop):
    config = config_of(shop)
    summary = compute_features(config)
    assert 0 < summary.n_without_history < 100
    assert summary.n_parts >= 3 and summary.n_by_status.keys() == {"OK", "UNKNOWN_ITEM"}
    with serving(FIXTURE, shop) as server:
        report = feature_check.check_features(config, CheckConfig(server.grpc, n_samples=300))
        assert report.faults == [] and report.is_good
        assert set(report.largest) == set(VECTORS)
        # A table of another history is found out.
        path = config.out / "part-000000.parquet"
        table = pq.read_table(path)
        shifted = table["history_length"].to_numpy() + 1
        pq.write_table(table.set_column(table.column_names.index("history_length"), "history_length", [shifted]), path)
        assert feature_check.check_and_print(config, CheckConfig(server.grpc, n_samples=300)) == 1


def test_a_row_has_the_newest_items_strictly_before_its_time(shop):
    """The expected history is found in plain Python, and run through the graphs one sample at a time."""
    config = config_of(shop)
    compute_features(config)
    table = table_of(config)
    records = np.load(features.work_folder(config.out) / "records.npy")
    worker = features.PartWorker(config)
    log = list(csv.DictReader((shop / "log.csv").open()))
    longest = worker.manifest["user_tower"]["max_history"]
    tower = onnxruntime.InferenceSession(FIXTURE / "user_tower.onnx")
    known = worker.manifest["history"]["actions"]
    assert known, "the fixture bundle reads actions"
    for row in table.to_pylist():
        before = [event for event in log if event["user"] == row["user"] and int(event["timestamp"]) < row["timestamp"]]
        order = ["", *features.ACTIONS]
        before.sort(key=lambda event: (int(event["timestamp"]), int(event["item"]), order.index(event["action"])))
        read = [event for event in before[-longest:] if int(event["item"]) < len(ITEMS)]
        assert row["history_length"] == len(read)
        if row["status"] != "OK":
            assert int(row["item"]) >= len(ITEMS) and row["mid_emb"] is None and row["cvr"] is None
            continue
        adapted = np.zeros((1, max(1, len(read)), records.shape[1] - worker.item_dim), np.float32)
        mask, action = np.zeros((2, 1, adapted.shape[1]), np.int64)
        for place, event in enumerate(read):
            adapted[0, place] = records[int(event["item"]), worker.item_dim :]
            mask[0, place] = 1
            action[0, place] = 1 + known.index(event["action"]) if event["action"] in known else 0
        (user,) = tower.run(["user"], {"adapted": adapted, "mask": mask, "action": action})
        np.testing.assert_allclose(row["user_emb"], user[0], atol=1e-6)
        np.testing.assert_array_equal(row["item_emb"], records[int(row["item"]), : worker.item_dim])


def test_samples_keep_their_columns_and_types(shop):
    config = config_of(shop, outputs=("cvr",))
    compute_features(config)
    table = table_of(config)
    assert table.column_names == [
        "request_id", "user", "item", "timestamp", "clicked", "cvr", "status", "history_length", "bundle_digest",
    ]  # fmt: skip
    given = list(csv.DictReader((shop / "samples.csv").open()))
    for name, kind in (("request_id", str), ("user", str), ("item", str), ("timestamp", int), ("clicked", int)):
        assert table[name].to_pylist() == [kind(sample[name]) for sample in given], name


def test_order_of_files_workers_and_parquet_change_nothing(shop):
    compute_features(config_of(shop))
    expected = table_of(config_of(shop))
    log = list(csv.DictReader((shop / "log.csv").open()))
    folder = shop / "log"
    folder.mkdir()
    for number, part in enumerate((log[::-2], log[-2::-2])):
        columns = {name: [event[name] for event in part] for name in ("user", "item", "action")}
        columns["timestamp"] = pa.array([int(event["timestamp"]) * 10**6 for event in part], pa.timestamp("us"))
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    other = config_of(
        shop, log=str(folder), out=shop / "other", workers=2, sort=SortConfig(part_samples=60, memory_mb=256)
    )
    assert compute_features(other).n_parts > 3
    found = table_of(other)
    for name in expected.column_names:
        if name in VECTORS:
            assert found[name].is_valid().equals(expected[name].is_valid())
            got, want = (np.array(table.drop_null()[name].to_pylist()) for table in (found, expected))
            np.testing.assert_allclose(got, want, atol=1e-6)
        else:
            assert found[name].equals(expected[name]), name


def test_a_killed_job_continues_with_the_missing_parts(shop, capsys):
    config = config_of(shop)
    n_parts = compute_features(config).n_parts
    expected = {path.name: pq.read_table(path) for path in config.out.glob("part-*.parquet")}
    (config.out / "part-000001.parquet").unlink()
    assert compute_features(config).n_parts_kept == n_parts - 1
    assert {path.name: pq.read_table(path) for path in config.out.glob("part-*.parquet")} == expected
    # While the log was divided: it is divided again.
    (features.work_folder(config.out) / "parts.json").unlink()
    assert compute_features(config).n_parts_kept == n_parts
    with pytest.raises(DataError, match="the folder holds another job"):
        compute_features(config_of(shop, outputs=("cvr",)))


def test_ray_computes_the_same_table(shop):
    compute_features(config_of(shop))
    on_ray = config_of(shop, out=shop / "ray", ray=RayConfig(workers=2))
    compute_features(on_ray)
    assert table_of(on_ray).equals(table_of(config_of(shop)))


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("log.csv", "u1,3,soon,click", "log.csv, row {n}, column timestamp: expected a number, got 'soon'"),
        ("log.csv", "u1,3,5,hate", "log.csv, row {n}, column action: 'hate' is none of view, click"),
        ("log.csv", ",3,5,click", "log.csv, row {n}, column user: empty"),
        ("log.csv", "u1,3", "log.csv, row {n}, column timestamp: empty"),
        ("samples.csv", "r,u1,,5,1", "samples.csv, row {n}, column item: empty"),
        ("samples.csv", "r,u1,3,5.5,1", "samples.csv, row {n}, column timestamp: expected a whole number, got '5.5'"),
    ],
)
def test_a_bad_row_is_one_line_with_file_row_and_reason(shop, name, row, expected):
    path = shop / name
    path.write_text(path.read_text() + row + "\n")
    n_rows = len(path.read_text().splitlines())
    arguments = ["--bundle", FIXTURE, "--log", shop / "log.csv", "--samples", shop / "samples.csv"]
    arguments += ["--items", shop / "items.jsonl", "--out", shop / "out"]
    command = [sys.executable, "-m", "learn", "features", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=MODELS)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and expected.format(n=n_rows) in last, run.stderr
    assert last.startswith("learn: ") and "Traceback" not in run.stderr


def test_ids_of_floats_are_refused(shop):
    """pandas makes a column of ids with a gap floats, and no user 7.0 would have a history."""
    columns = {"user": [7.0], "item": ["1"], "timestamp": [5]}
    pq.write_table(pa.table(columns), shop / "log.parquet")
    with pytest.raises(DataError, match=r"log.parquet, column user: the type double is not allowed"):
        compute_features(config_of(shop, log=str(shop / "log.parquet")))


def test_only_events_of_users_with_samples_are_kept(shop):
    log = (shop / "log.csv").read_text()
    compute_features(config_of(shop))
    users = {sample["user"] for sample in csv.DictReader((shop / "samples.csv").open())}
    n_events = sum(event["user"] in users for event in csv.DictReader((shop / "log.csv").open()))
    (shop / "log.csv").write_text(log + "stranger,1,100,click\n" * 50)
    other = config_of(shop, out=shop / "other")
    compute_features(other)
    parts = feature_inputs.read_parts(features.work_folder(other.out))
    assert sum(part.n_events for part in parts) == n_events
    assert table_of(other).equals(table_of(config_of(shop)))


def test_values_become_actions_by_the_thresholds(shop):
    log = list(csv.DictReader((shop / "log.csv").open()))
    worth = {"like": 5, "click": 3, "dislike": 1}
    named = [event for event in log if event["action"] in worth]
    write_csv(shop / "log.csv", ["user", "item", "timestamp", "action"], [list(event.values()) for event in named])
    compute_features(config_of(shop))
    valued = [[event["user"], event["item"], event["timestamp"], worth[event["action"]]] for event in named]
    write_csv(shop / "values.csv", ["user", "item", "timestamp", "value"], valued)
    by_value = config_of(shop, log=str(shop / "values.csv"), out=shop / "values")
    with pytest.raises(DataError, match="say from which value on a user likes an item"):
        compute_features(by_value)
    # The mended job may use the same folder, since nothing was computed there.
    by_value = replace(by_value, liked_from=4.0, disliked_to=2.0)
    compute_features(by_value)
    assert table_of(by_value).equals(table_of(config_of(shop)))


def test_the_manifest_says_how_values_become_actions(shop):
    log = list(csv.DictReader((shop / "log.csv").open()))
    worth = {"like": 5, "click": 3, "dislike": 2}
    valued = [[e["user"], e["item"], e["timestamp"], worth.get(e["action"], 3)] for e in log]
    write_csv(shop / "values.csv", ["user", "item", "timestamp", "value"], valued)
    job = config_of(shop, bundle=FIXTURES / "retrained", log=str(shop / "values.csv"))
    compute_features(job)
    told = replace(job, out=shop / "told", liked_from=4.0, disliked_to=2.0)
    compute_features(told)
    assert table_of(told).equals(table_of(job))
    with pytest.raises(
        ValueError, match=r"trained with liked_from = 4\.0 and disliked_to = 2\.0, but the job has 3\.0"
    ):
        compute_features(replace(job, out=shop / "other", liked_from=3.0))


def test_a_log_without_what_the_bundle_reads_is_refused(shop):
    log = list(csv.DictReader((shop / "log.csv").open()))
    write_csv(shop / "log.csv", ["user", "item", "timestamp"], [list(event.values())[:3] for event in log])
    with pytest.raises(DataError, match="the log needs a column `action`"):
        compute_features(config_of(shop))
    samples = list(csv.DictReader((shop / "samples.csv").open()))
    write_csv(shop / "samples.csv", ["user", "item", "timestamp", "cvr"], [["u1", "1", "5", "0"] for _ in samples])
    with pytest.raises(DataError, match=r"column cvr: the features have a column of this name"):
        compute_features(config_of(shop, out=shop / "again"))
