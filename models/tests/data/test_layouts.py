"""Every data set is read from the files that its publishers provide, and other folders are refused."""

from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest
import raw

from learn import data
from learn.data import DataError, PrepareConfig
from learn.data.item_text import ItemText


def events(dataset):
    """Maps each user to the list of events in order: (item id, value, timestamp)."""
    return {
        s.user: [(dataset.item_ids[i], v, t) for i, v, t in zip(s.items, s.values, s.timestamps, strict=True)]
        for s in dataset.sequences
    }


def test_movielens_100k_is_read(tmp_path):
    dataset = data.read_neutral(raw.movielens_100k(tmp_path))
    assert [text.title for text in dataset.texts] == ["La Cité des enfants perdus (1995)", "unknown", "Heat (1995)"]
    assert [text.category for text in dataset.texts] == ["Action, Sci-Fi", "", "Drama"]
    assert events(dataset) == {
        "22": [("10", 1.0, 878887116)],
        "196": [("1", 5.0, 881250949), ("2", 3.0, 881250949)],
    }


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_1m_and_10m_are_read_in_either_encoding(tmp_path, encoding):
    dataset = data.read_neutral(raw.movielens_1m(tmp_path, encoding=encoding))
    assert [text.title for text in dataset.texts] == ["Les Misérables (1995)", "Face::Off (1997)", "Up (2009)"]
    assert [text.category for text in dataset.texts] == ["Drama, Musical", "Action", "Comedy"]
    assert events(dataset) == {
        "1": [("2", 4.0, 978300760), ("10", 5.0, 978300760)],
        "2": [("1", 3.0, 978298413)],
    }


def test_ratings_without_timestamps_keep_the_order_of_the_file(tmp_path):
    dataset = data.read_neutral(raw.movielens_1m(tmp_path, with_timestamps=False))
    assert events(dataset) == {"1": [("10", 5.0, 0), ("2", 4.0, 1)], "2": [("1", 3.0, 0)]}


@pytest.mark.parametrize("line_ending", ["\n", "\r\n"])
def test_movielens_csv_is_read_with_quotes_commas_and_either_line_ending(tmp_path, line_ending):
    rows = ["movieId,title,genres", '1,"Sex, ""Lies"" (1989)",Drama', "3,Naïve (2000),(no genres listed)", ""]
    raw.write(tmp_path, "movies.csv", line_ending.join(rows))
    raw.write(
        tmp_path, "ratings.csv", line_ending.join(["userId,movieId,rating,timestamp", "7,3,0.5,5", "7,1,4.5,5", ""])
    )
    dataset = data.read_neutral(tmp_path)
    assert [text.title for text in dataset.texts] == ['Sex, "Lies" (1989)', "Naïve (2000)"]
    assert events(dataset) == {"7": [("1", 4.5, 5), ("3", 0.5, 5)]}


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl.gz"])
def test_amazon_2018_items_without_text_are_dropped_and_counted(tmp_path, suffix):
    meta = data.prepare(raw.amazon_2018(tmp_path / "in", suffix), tmp_path / "out")
    dataset = data.read_prepared(tmp_path / "out")
    assert dataset.item_ids == ["B01", "B02"]
    assert dataset.texts[0] == ItemText(title="Envy Earrings", category="Jewelry, Earrings", brand="Envy")
    assert events(dataset) == {"A1": [("B01", 4.0, 1300), ("B02", 2.0, 1400)], "A2": [("B01", 5.0, 1500)]}
    assert meta.dropped == {
        "items without text": 1,
        "items that stand there a second time": 1,
        "events of items without text": 1,
        "items with too few events": 1,
    }


def test_amazon_price_and_features_are_read_on_request(tmp_path):
    config = PrepareConfig(text_fields=("title", "price", "attributes"), min_item_events=0)
    dataset = data.read_neutral(raw.amazon_2018(tmp_path / "2018"), config)
    assert dataset.item_ids == ["B01", "B02", "B03"]
    assert dataset.texts[0] == ItemText(title="Envy Earrings", price="$9.90", attributes=("Returns", "Gift box"))
    # The price of B02 in the file is part of a style sheet, so it is left out.
    assert dataset.texts[1] == ItemText(title="Plain ring")
    dataset = data.read_neutral(raw.amazon_2023(tmp_path / "2023"), config)
    assert dataset.texts[0] == ItemText(title="Lamp", price="$12.5", attributes=("Warm light",))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_amazon_2023_events_are_ordered_by_milliseconds_and_kept_in_seconds(tmp_path, suffix):
    dataset = data.read_neutral(raw.amazon_2023(tmp_path, suffix))
    assert dataset.texts[0] == ItemText(title="Lamp", category="Home", brand="Lux")
    assert dataset.texts[1] == ItemText(title="Cup", category="Kitchen, Cups")
    assert events(dataset) == {"U1": [("P1", 3.0, 1588687728), ("P2", 5.0, 1588687728)]}


def write_parquet(folder, name, columns):
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)


@pytest.mark.parametrize("as_struct", [False, True])
def test_neutral_parquet_is_read_with_flat_or_nested_text(tmp_path, as_struct):
    timestamps = pyarrow.array([5_000_001, 5_000_000, 7_000_000], pyarrow.timestamp("us"))
    log = {
        "user": [10, 10, 9],
        "item": ["b", "a", "b"],
        "timestamp": timestamps,
        "value": [1, 0, 1],
        "device": ["x"] * 3,
    }
    write_parquet(tmp_path, "interactions.parquet", log)
    nested = [{"title": "A", "keywords": ["k", "l"]}, {"title": None, "keywords": ["m"]}]
    flat = {"title": ["A", None], "keywords": [["k", "l"], ["m"]]}
    write_parquet(tmp_path, "items.parquet", {"id": ["a", "b"]} | ({"text": nested} if as_struct else flat))
    dataset = data.read_neutral(tmp_path)
    assert dataset.texts == [ItemText(title="A", keywords=("k", "l")), ItemText(keywords=("m",))]
    assert events(dataset) == {"9": [("b", 1.0, 7)], "10": [("a", 0.0, 5), ("b", 1.0, 5)]}


def test_neutral_csv_is_read_with_flat_items_and_without_timestamps_or_values(tmp_path):
    raw.write(tmp_path, "interactions.csv", "item,shop,user\nb,1,u\na,1,u\nb,1,u\n")
    raw.write(tmp_path, "items.jsonl", '{"id": "a", "title": "A", "brand": null}\n\n{"id": 7, "title": "B"}\n')
    with pytest.raises(DataError, match=r"row 2, column item: 'b' is not in items\.jsonl"):
        data.read_neutral(tmp_path)
    raw.write(tmp_path, "items.jsonl", '{"id": "a", "title": "A", "brand": null}\n\n{"id": "b", "title": "B"}\n')
    assert events(data.read_neutral(tmp_path)) == {"u": [("b", 1.0, 0), ("a", 1.0, 1), ("b", 1.0, 2)]}


def test_a_folder_with_no_or_several_data_sets_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        data.find_layout(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no known data set: expected interactions\.csv"):
        data.find_layout(tmp_path / "empty")
    with pytest.raises(DataError, match="more than one data set: movielens-dat, movielens-100k"):
        data.find_layout(raw.movielens_1m(raw.movielens_100k(tmp_path / "two")))
    folder = raw.write(tmp_path / "half", "interactions.csv", "user,item\n")
    with pytest.raises(DataError, match=r"has no items\.jsonl or items\.parquet beside it"):
        data.find_layout(folder)
    raw.write(folder, "items.jsonl", "")
    raw.write(folder, "items.parquet", "")
    with pytest.raises(DataError, match=r"both items\.jsonl and items\.parquet exist; remove one"):
        data.find_layout(folder)
    folder = raw.write(raw.amazon_2018(tmp_path / "three"), "Books.json", "{}")
    with pytest.raises(DataError, match=r"exactly one file of reviews .* found \['Books.json', 'Jewelry_5"):
        data.find_layout(folder)
    folder = raw.write(raw.write(tmp_path / "else", "meta_x.json", "{}"), "x.json", '{"a": 1}\n')
    with pytest.raises(DataError, match=r"x\.json, row 1: expected reviewerID"):
        data.find_layout(folder)


@pytest.mark.parametrize(
    ("make", "name", "content", "message"),
    [
        (raw.movielens_100k, "u.data", "1\t2\t3\n", "u.data, row 1, column timestamp: empty"),
        (raw.movielens_100k, "u.data", "1\t1\t3\t5\t6\n", "u.data, row 1: expected 4 fields, found 5"),
        (raw.movielens_100k, "u.item", "1|Heat|x\n", "u.item, row 1: expected 24 fields, found 3"),
        (raw.movielens_100k, "u.item", raw.u_item_line(1, " ", [3]), "u.item, row 1, column title: empty"),
        (
            raw.movielens_100k,
            "u.item",
            raw.u_item_line(1, "A", []).replace("0\n", "2\n"),
            "column genres: expected flags",
        ),
        (raw.movielens_1m, "ratings.dat", "1::2\n", "ratings.dat, row 1: expected user::item::rating"),
        (
            raw.movielens_1m,
            "ratings.dat",
            "1::2::3::4\n1::2::3::4::5\n",
            "ratings.dat, row 2: expected 4 fields, found 5",
        ),
        (
            raw.movielens_1m,
            "ratings.dat",
            "1::2::3::4\n1::2::x::4\n",
            "row 2, column rating: expected a number, got 'x'",
        ),
        (raw.movielens_1m, "ratings.dat", "1::2::3::4\n1::3::3::4\n", "row 2, column item: '3' is not in movies.dat"),
        (raw.movielens_1m, "movies.dat", "1::Heat\n", "movies.dat, row 1: expected id::title::genres, got '1::Heat'"),
        (
            raw.movielens_1m,
            "movies.dat",
            "1::A::B\n1::C::D\n",
            "movies.dat, row 2, column id: '1' occurs a second time",
        ),
        (raw.amazon_2023, "Home.jsonl", '{"user_id": "a"}\n\n{oops\n', "Home.jsonl, row 1, column parent_asin: empty"),
        (raw.amazon_2018, "meta_Jewelry.json.gz", '{"title": "A"}\n', "row 1, column asin: expected a non-empty"),
        (raw.amazon_2018, "meta_Jewelry.json.gz", "[1]\n", "row 1: expected a JSON object"),
    ],
)
def test_a_bad_line_is_reported_with_file_row_and_column(tmp_path, make, name, content, message):
    make(tmp_path)
    raw.write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        data.read_neutral(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "row 4: not JSON"),
        (b'{"user_id": "a\xff"}', "row 4: not UTF-8"),
        (b'"text"', "row 4: expected a JSON object"),
        (b'{"reviewer": "a"}', "row 4: not an object with these fields"),
        (
            b'{"user_id": "a", "parent_asin": "P1", "rating": 1, "timestamp": 1.5}',
            "row 4, column timestamp: expected a wh",
        ),
    ],
)
def test_row_numbers_of_json_lines_count_empty_lines(tmp_path, line, message):
    folder = raw.amazon_2023(tmp_path)
    with (folder / "Home.jsonl").open("ab") as file:
        file.write(b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        data.read_neutral(folder)
    assert f"{folder / 'Home.jsonl'}, {message}" in str(caught.value)


def test_a_truncated_gzip_file_is_reported_by_name(tmp_path):
    path = raw.amazon_2018(tmp_path) / "meta_Jewelry.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"meta_Jewelry.json.gz, row \d+: "):
        data.read_neutral(tmp_path)
    path = raw.amazon_2018(tmp_path) / "Jewelry_5.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"Jewelry_5\.json\.gz"):
        data.read_neutral(tmp_path)


def test_parquet_columns_that_are_missing_or_of_a_wrong_type_are_reported(tmp_path):
    raw.write(tmp_path, "items.jsonl", '{"id": "1", "title": "A"}\n')
    for columns, message in (
        ({"user": [1.5], "item": [1]}, "column user: the type double is not allowed"),
        ({"user": [1], "item": [1], "timestamp": [1.0]}, "column timestamp: the type double is not allowed"),
        ({"user": [1], "item": [1], "value": ["x"]}, "column value: the type string is not allowed"),
        ({"user": [1]}, "column item: the schema does not name this column"),
        ({"user": [1, None], "item": [1, 1]}, "row 2, column user: empty"),
        ({"user": [1], "item": [1], "value": [float("nan")]}, "row 1, column value: expected a finite number"),
    ):
        write_parquet(tmp_path, "interactions.parquet", columns)
        with pytest.raises(DataError, match=message):
            data.read_neutral(tmp_path)
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"interactions\.parquet"):
        data.read_neutral(tmp_path)
