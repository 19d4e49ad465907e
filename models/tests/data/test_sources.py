"""The neutral format in several files, in every format and in an object store, gives the same as in one file."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from object_store import serving_bucket

from learn import data
from learn.data import DataError, NeutralFiles, sources

EVENTS = [(f"u{n % 7}", f"i{n * 5 % 11}", 1000 + n * 37 % 50, float(n % 5), ("like", "view")[n % 2]) for n in range(40)]
COLUMNS = ("user", "item", "timestamp", "value", "action")
ITEMS = [{"id": f"i{n}", "title": f"Item {n}", "keywords": ["a", f"k{n}"]} for n in range(11)]


def write_table(path, rows, columns=COLUMNS):
    """Writes rows in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    if path.suffix == ".csv":
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        raw = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_items(path, items=ITEMS):
    columns = ("id", "title", "keywords")
    listed = [(i["id"], i["title"], "|".join(i["keywords"]) if path.suffix == ".csv" else i["keywords"]) for i in items]
    write_table(path, listed, columns)


def read(source):
    """Everything that a prepared folder holds."""
    dataset = data.read_neutral(source)
    events = [
        (s.user, dataset.item_ids[i], int(t), float(v), int(a))
        for s in dataset.sequences
        for i, t, v, a in zip(s.items, s.timestamps, s.values, s.actions, strict=True)
    ]
    return dataset.item_ids, dataset.texts, events


@pytest.fixture
def want(tmp_path):
    write_table(tmp_path / "one" / "interactions.csv", EVENTS)
    write_items(tmp_path / "one" / "items.jsonl")
    return read(tmp_path / "one")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".jsonl.gz", ".parquet"])
def test_a_file_or_a_folder_or_a_glob_of_any_format_gives_the_same(tmp_path, want, suffix):
    folder = tmp_path / "in"
    write_table(folder / f"interactions{suffix}", EVENTS)
    write_items(folder / f"items{suffix}")
    assert read(folder) == want
    for number, part in enumerate((EVENTS[:15], EVENTS[15:16], EVENTS[16:])):
        write_table(tmp_path / "parts" / "interactions" / f"sub{number}" / f"part{suffix}", part)
    for number, part in enumerate((ITEMS[:4], ITEMS[4:])):
        write_items(tmp_path / "parts" / "items" / f"part-{number}{suffix}", part)
    (tmp_path / "parts" / "interactions" / "_SUCCESS").touch()
    (tmp_path / "parts" / "interactions" / ".hidden.crc").write_text("x")
    assert read(tmp_path / "parts") == want
    assert read(str(tmp_path / "parts")) == want
    named = NeutralFiles(f"{tmp_path}/parts/interactions/*/p*{suffix}", f"{tmp_path}/parts/items/part-?{suffix}")
    assert read(named) == want
    (tmp_path / "parts" / "interactions" / "sub0" / "_SUCCESS").touch()
    assert read(NeutralFiles(f"{tmp_path}/parts/interactions/*/*", named.items)) == want
    assert read(NeutralFiles(f"{tmp_path}/parts/**/part{suffix}", str(folder / f"items{suffix}"))) == want


def test_partitions_of_hive_give_a_column_that_the_files_lack(tmp_path, want):
    columns = [column for column in COLUMNS if column != "action"]
    for action in ("like", "view"):
        for part in range(2):
            rows = [event[:4] for event in EVENTS if event[4] == action][part::2]
            write_table(tmp_path / "in" / "interactions" / f"action={action}" / f"{part}.parquet", rows, columns)
    write_items(tmp_path / "in" / "items.jsonl")
    assert read(tmp_path / "in") == want
    # The folders of other formats are not read, and an action must not be lost in silence.
    write_table(tmp_path / "csv" / "interactions" / "action=like" / "0.csv", [EVENTS[0][:4]], columns)
    write_items(tmp_path / "csv" / "items.jsonl")
    with pytest.raises(DataError, match="column action: a folder gives this column"):
        data.find_layout(tmp_path / "csv")


def test_a_column_of_both_file_and_folder_is_refused_if_folders_are_read(tmp_path):
    # DuckDB would replace the times of the file by that of the folder.
    folder = tmp_path / "interactions" / "timestamp=5"
    write_items(tmp_path / "items.jsonl")
    write_table(folder / "action=like" / "0.parquet", [event[:4] for event in EVENTS], COLUMNS[:4])
    with pytest.raises(DataError, match="column timestamp: a folder gives this column, but the file has it, too"):
        data.find_layout(tmp_path)
    # Where the files have all columns, folders are not read.
    (folder / "action=like" / "0.parquet").unlink()
    write_table(folder / "0.parquet", EVENTS)
    assert {event[2] for event in read(tmp_path)[2]} == {event[2] for event in EVENTS}


def test_a_damaged_file_of_json_is_named(tmp_path):
    write_items(tmp_path / "items.jsonl")
    for number in range(2):
        write_table(tmp_path / "interactions" / f"{number}.jsonl.gz", EVENTS)
    path = tmp_path / "interactions" / "1.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"1\.jsonl\.gz"):
        data.read_neutral(tmp_path)


def test_without_timestamps_the_order_of_files_and_rows_counts(tmp_path):
    for suffix in (".csv", ".jsonl", ".parquet"):
        folder = tmp_path / suffix[1:]
        for number in range(3):
            rows = [("u", f"i{number * 3 + at}") for at in (2, 0, 1)]
            write_table(folder / "interactions" / f"{number}{suffix}", rows, ("user", "item"))
        write_items(folder / "items.jsonl")
        assert [event[1] for event in read(folder)[2]] == ["i2", "i0", "i1", "i5", "i3", "i4", "i8", "i6", "i7"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_bad_record_is_reported_with_its_file_and_its_row_there(tmp_path, suffix):
    for number in range(3):
        write_table(tmp_path / "interactions" / f"{number}{suffix}", EVENTS[:5])
    bad = [*EVENTS[:3], ("u1", "nowhere", *EVENTS[0][2:])]
    write_table(tmp_path / "interactions" / f"2{suffix}", bad)
    write_items(tmp_path / "items" / "a.jsonl", ITEMS[:5])
    write_items(tmp_path / "items" / "b.jsonl", ITEMS[5:])
    row = 5 if suffix == ".csv" else 4
    with pytest.raises(DataError) as caught:
        data.read_neutral(tmp_path)
    assert str(caught.value) == f"{tmp_path}/interactions/2{suffix}, row {row}, column item: 'nowhere' is not in items"
    write_items(tmp_path / "items" / "b.jsonl", [*ITEMS[5:], ITEMS[2]])
    with pytest.raises(DataError, match=r"items/b\.jsonl, row 7, column id: 'i2' occurs a second time"):
        data.read_neutral(tmp_path)
    (tmp_path / "items" / "b.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(DataError, match=r"items/b\.jsonl, row 1, column text: 'x' has no text"):
        data.read_neutral(tmp_path)


def test_a_malformed_file_among_several_is_named(tmp_path):
    for number in range(3):
        write_table(tmp_path / "interactions" / f"{number}.csv", EVENTS[:5])
    write_items(tmp_path / "items.jsonl")
    path = tmp_path / "interactions" / "1.csv"
    for line, message in (
        ("u,i1,1,2,like,more\n", "row 7: expected 5 fields, found 6"),
        ('u,"i1,1,2,like\n', "row 7: a quote is not closed"),
    ):
        write_table(path, EVENTS[:5])
        with path.open("a") as file:
            file.write(line)
        with pytest.raises(DataError, match=rf"interactions/1\.csv, {message}"):
            data.read_neutral(tmp_path)
    write_table(path, [(e[1], e[0]) for e in EVENTS[:5]], ("item", "user"))
    with pytest.raises(DataError, match=r"1\.csv, row 1"):
        data.read_neutral(tmp_path)


def test_files_of_parquet_with_other_columns_or_types_are_refused_or_united(tmp_path):
    write_items(tmp_path / "items.jsonl", [{"id": str(n), "title": "t", "keywords": []} for n in range(3)])
    first, second = (tmp_path / "interactions" / name for name in ("a.parquet", "b.parquet"))
    write_table(first, [(1, 1, 5)], ("user", "item", "timestamp"))
    write_table(second, [("x", "2", 6)], ("user", "item", "timestamp"))
    assert read(tmp_path)[2] == [("1", "1", 5, 1.0, 0), ("x", "2", 6, 1.0, 0)]
    write_table(second, [(1, 1)], ("user", "item"))
    with pytest.raises(DataError, match=r"b\.parquet: it has the columns user, item, but .*a\.parquet has user"):
        data.read_neutral(tmp_path)
    times = pyarrow.array([5], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"user": [1], "item": [1], "timestamp": times}), second)
    with pytest.raises(DataError, match=r"b\.parquet, column timestamp: the type is timestamp\[us\]"):
        data.read_neutral(tmp_path)
    second.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"b\.parquet"):
        data.read_neutral(tmp_path)


def test_a_table_without_files_or_with_several_kinds_is_refused(tmp_path):
    write_items(tmp_path / "items.jsonl")
    (tmp_path / "interactions").mkdir()
    with pytest.raises(DataError, match=r"interactions: expected files that end in \.csv, \.jsonl"):
        data.find_layout(tmp_path)
    write_table(tmp_path / "interactions" / "a.csv", EVENTS)
    write_table(tmp_path / "interactions" / "b.parquet", EVENTS)
    with pytest.raises(DataError, match="several kinds, csv, parquet; name those of one kind by a glob"):
        data.find_layout(tmp_path)
    (tmp_path / "interactions" / "b.parquet").rename(tmp_path / "interactions" / "b.txt")
    with pytest.raises(DataError, match=r"b\.txt: expected files"):
        data.find_layout(tmp_path)
    with pytest.raises(DataError, match=r"nowhere/\*\.csv: expected files"):
        data.find_layout(NeutralFiles(f"{tmp_path}/nowhere/*.csv", str(tmp_path / "items.jsonl")))
    write_table(tmp_path / "interactions.csv", EVENTS)
    with pytest.raises(DataError, match=r"both interactions\.csv and interactions exist"):
        data.find_layout(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("id,title\n1,A,B\n", "row 2: expected 2 fields, as in the header"),
        ("id,title\n1\n", "row 2: expected 2 fields, as in the header"),
        ("id,title,colour\n1,A,red\n", "row 2, column text: unknown field of item text: colour"),
        ("title\nA\n", "row 1, column id: the header does not name this column"),
        ("id,title\n,A\n", "row 2, column id: expected a non-empty string"),
        ('id,title\n1,"A\n', "malformed"),
    ],
)
def test_a_bad_row_of_items_in_csv_is_reported(tmp_path, rows, message):
    write_table(tmp_path / "interactions.csv", EVENTS)
    (tmp_path / "items.csv").write_text(rows)
    with pytest.raises(DataError, match=message):
        data.read_neutral(tmp_path)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is served as the bucket `shop`, and the requests for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "store" / "shop").mkdir(parents=True)
    with serving_bucket(tmp_path / "store") as (endpoint, requests):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        sources._store.cache_clear()
        yield tmp_path / "store" / "shop", requests
    sources._store.cache_clear()


def test_an_object_store_gives_the_same_as_a_folder(bucket, want):
    folder, requests = bucket
    for number, part in enumerate((EVENTS[:15], EVENTS[15:])):
        write_table(folder / "log" / "interactions" / f"day={number}" / "part-0.parquet", part)
    (folder / "log" / "interactions" / "_SUCCESS").touch()
    write_items(folder / "log" / "items" / "a.jsonl", ITEMS[:6])
    write_items(folder / "log" / "items" / "b.jsonl", ITEMS[6:])
    assert read("s3://shop/log") == want
    write_items(folder / "catalogue" / "items.parquet")
    pattern = "s3://shop/log/*/day=*/*.parquet"
    assert read(NeutralFiles(pattern, "s3://shop/catalogue/items.parquet")) == want
    assert read(NeutralFiles("s3://shop/log/**/part-?.parquet", "s3://shop/catalogue")) == want
    assert any("bytes=" in request for request in requests)


def test_what_an_object_store_does_not_have_is_reported_by_its_url(bucket):
    folder, _requests = bucket
    write_table(folder / "interactions" / "a.csv", EVENTS)
    write_items(folder / "items" / "a.jsonl", [])
    write_items(folder / "items" / "b.jsonl")
    with pytest.raises(DataError, match=r"s3://shop/interactions/a\.csv: in an object store, .* has to be in Parquet"):
        data.find_layout("s3://shop")
    with pytest.raises(DataError, match="s3://shop/nowhere/interactions: expected files"):
        data.find_layout("s3://shop/nowhere")
    (folder / "interactions" / "a.csv").unlink()
    bad = [*EVENTS[:3], ("u1", "nowhere", *EVENTS[0][2:])]
    write_table(folder / "interactions" / "a.parquet", EVENTS)
    write_table(folder / "interactions" / "b.parquet", bad)
    with pytest.raises(DataError, match=r"s3://shop/interactions/b\.parquet, row 4, column item: 'nowhere' is not in"):
        data.read_neutral("s3://shop")
    # The first file is empty, so the second one begins at the same row.
    write_items(folder / "items" / "b.jsonl", [*ITEMS, ITEMS[0]])
    with pytest.raises(DataError, match=r"s3://shop/items/b\.jsonl, row 12, column id: 'i0' occurs a second time"):
        data.read_neutral("s3://shop")


@pytest.mark.parametrize(
    ("unit", "per_second"),
    [("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_whole_numbers_in_any_unit_become_seconds(tmp_path, capsys, unit, per_second, suffix):
    seconds = np.array([1_700_000_000, 1_700_000_001, 0, 400_000_000])
    rows = [("u", f"i{n}", int(at) * per_second + (per_second > 1 and at > 0)) for n, at in enumerate(seconds)]
    write_table(tmp_path / f"interactions{suffix}", rows, ("user", "item", "timestamp"))
    write_items(tmp_path / "items.jsonl")
    meta = data.prepare(tmp_path, tmp_path / "out")
    sequence = data.read_prepared(tmp_path / "out").sequences[0]
    assert sequence.timestamps.tolist() == sorted(seconds.tolist()) and meta.timestamp_unit == unit
    assert (f"timestamps were read as {unit}" in capsys.readouterr().out) == (unit != "seconds")
    assert data.read_meta(tmp_path / "out") == meta


def test_mixed_units_are_an_error_that_names_the_row(tmp_path):
    rows = [("u", "i1", 1_700_000_000_000), ("u", "i2", 0), ("u", "i3", 1_700_000_000), ("u", "i3", 5)]
    write_table(tmp_path / "interactions.csv", rows, ("user", "item", "timestamp"))
    write_items(tmp_path / "items.jsonl")
    message = (
        r"interactions\.csv, row 4, column timestamp: 1700000000 is in seconds, but an earlier record has "
        "1700000000000, in milliseconds; give all timestamps in one unit"
    )
    with pytest.raises(DataError, match=message):
        data.read_neutral(tmp_path)


def test_times_within_a_second_keep_their_order(tmp_path):
    rows = [("u", f"i{n}", 1_700_000_000_000 + at) for n, at in enumerate((900, 100, 500))]
    write_table(tmp_path / "interactions.csv", rows, ("user", "item", "timestamp"))
    write_items(tmp_path / "items.jsonl")
    assert [event[1] for event in read(tmp_path)[2]] == ["i1", "i2", "i0"]
