"""The neutral format: what is read, in which order, and how a malformed file is reported."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest
from conftest import write_movielens

from learn import data
from learn.data import DataError
from learn.data.actions import ActionThresholds
from learn.data.item_text import ItemText

MOVIES = [
    (1, "Matrix, The (1999)", "Action|Sci-Fi"),
    (2, "Heat (1995)", "(no genres listed)"),
    (10, "Up (2009)", "Drama"),
]


@pytest.fixture
def neutral(tmp_path):
    ratings = [(2, 1, 4.0, 50), (1, 10, 3.5, 100), (1, 2, 5.0, 100), (1, 1, 1.0, 99), (2, 2, 4.0, 40)]
    data.write_neutral(*data.read_movielens(write_movielens(tmp_path / "ml", ratings, MOVIES)), tmp_path / "n")
    return tmp_path / "n"


def test_plain_titles_put_the_article_first():
    cases = {
        "Matrix, The (1999)": "The Matrix (1999)",
        "City of Lost Children, The (Cité des enfants perdus, La) (1995)": (
            "The City of Lost Children (La Cité des enfants perdus) (1995)"
        ),
        "Avventura, L' (1960)": "L'Avventura (1960)",
        "Sex, Lies, and Videotape (1989)": "Sex, Lies, and Videotape (1989)",
        "Cool, Dry Place, A (1998)": "A Cool, Dry Place (1998)",
        "Them!": "Them!",
    }
    assert {raw: data.plain_title(raw) for raw in cases} == cases


def test_movielens_becomes_text_and_ordered_sequences(neutral):
    dataset = data.read_neutral(neutral)
    assert dataset.item_ids == ["1", "2", "10"]
    assert dataset.texts[0].title == "The Matrix (1999)" and dataset.texts[0].category == "Action, Sci-Fi"
    assert dataset.texts[1].category == ""
    assert [sequence.user for sequence in dataset.sequences] == ["1", "2"]
    # User 1 rated items 2 and 10 in the same second. Ties go by item id, compared as a number and not as text.
    assert dataset.sequences[0].items.tolist() == [0, 1, 2]
    assert dataset.sequences[0].values.tolist() == [1.0, 5.0, 3.5]
    assert dataset.sequences[1].items.tolist() == [1, 0]


def test_the_order_of_rows_in_the_file_does_not_matter(neutral):
    before = data.read_neutral(neutral)
    path = neutral / data.INTERACTIONS
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    after = data.read_neutral(neutral)
    for left, right in zip(before.sequences, after.sequences, strict=True):
        assert left.items.tolist() == right.items.tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,99,5,4.0", "row 7, column item: '99' is not in items.jsonl"),
        ("1,1,soon,4.0", "row 7, column timestamp: expected a number, got 'soon'"),
        ("1,1,5,nan", "row 7, column value: expected a finite number, got 'nan'"),
        ("1,1,5", "row 7, column value: empty"),
        (",1,5,4.0", "row 7, column user: empty"),
    ],
)
def test_a_bad_interaction_is_reported_with_row_and_column(neutral, row, message):
    with (neutral / data.INTERACTIONS).open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError) as caught:
        data.read_neutral(neutral)
    assert str(caught.value) == f"{neutral / data.INTERACTIONS}, {message}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "row 4"),
        ('{"id": "7"}', "column text: '7' has no text to encode"),
        ('{"id": "7", "text": "x"}', "column text: expected an object with item text, got 'x'"),
        ('{"id": ["7"], "title": "x"}', r"column id: expected a non-empty string, got \['7'\]"),
        ('{"id": "1", "text": {"title": "x"}}', "column id: '1' occurs a second time"),
        ('{"id": "7", "text": {"keywords": [""]}}', "column text: '7' has no text to encode"),
        ('{"id": "7", "text": {"colour": "red"}}', "unknown field of item text: colour"),
        ('{"id": "7", "text": {"title": 3}}', "title: expected a string, got 3"),
    ],
)
def test_a_bad_item_is_reported_with_the_reason(neutral, line, reason):
    with (neutral / data.ITEMS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=reason):
        data.read_neutral(neutral)


def test_missing_files_and_bad_headers_are_reported(neutral, tmp_path):
    (neutral / data.INTERACTIONS).write_text("user,thing,value\n")
    with pytest.raises(DataError, match="row 1, column item: the header does not name this column"):
        data.read_neutral(neutral)
    (neutral / data.INTERACTIONS).write_text("user,item,value,value\n")
    with pytest.raises(DataError, match="row 1, column value: the header names this column twice"):
        data.read_neutral(neutral)
    (neutral / data.INTERACTIONS).write_text("user,item\n1,1\n")
    (neutral / data.ITEMS).write_bytes(b'{"id": "\xff"}')
    with pytest.raises(DataError, match="row 1: not UTF-8"):
        data.read_neutral(neutral)
    (neutral / data.ITEMS).unlink()
    with pytest.raises(DataError, match=r"has no items\.jsonl"):
        data.read_neutral(neutral)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'1,"1,5,4.0\n1,1,5,4.0\n', "row 7: a quote is not closed"),
        (b'1,1,5,"4.0\n1,1,5,4.0\n', "row 7: a quote is not closed"),
        (b"1,1,5,4.0\r\n1,1,5,4.0\n", "row 7: the line ending differs from that of the lines before it"),
        (b'1,"1"x,5,4.0\n', "row 7: a quote is not closed, or text follows it"),
        (b"1,1,5,4.0,9\n", "row 7: expected 4 fields, found 5"),
        (b"1,\xff,5,4.0\n", "row 7: not UTF-8"),
        (b"1,1,3.5,4.0\n", "row 7, column timestamp: expected a whole number, got '3.5'"),
        (b"1,1,inf,4.0\n", "row 7, column timestamp: expected a finite number, got 'inf'"),
        (b"1,1,9223372036854775807,4.0\n", "row 7, column timestamp: expected a whole number, got"),
        (b"1,1,5,1e39\n", "row 7, column value: expected a finite number, got '1e39'"),
        (b"1,'1,5,4.0\n", "row 7, column item: ''1' is not in items.jsonl"),
        (b"1,1,5,4.0\n2,2,soon,1\n3,9,5,1\n", "row 8, column timestamp"),
    ],
)
def test_a_malformed_line_is_reported_with_its_row(neutral, row, message):
    with (neutral / data.INTERACTIONS).open("ab") as file:
        file.write(row)
    with pytest.raises(DataError) as caught:
        data.read_neutral(neutral)
    assert str(caught.value).startswith(f"{neutral / data.INTERACTIONS}, {message}")


def test_ids_and_texts_with_any_characters_survive_a_round_trip(tmp_path):
    users = ["007", "7", "10", "a", 'é\n"x"', " 7", "1" * 400, "\u2028,"]
    items = [('i,"1"', ItemText(title='A "quoted" title, Ünïcode \u2028 😀')), ("i2", ItemText(attributes=("", "b")))]
    data.write_neutral([data.Interaction(user, items[0][0], 5) for user in users], items, tmp_path)
    dataset = data.read_neutral(tmp_path)
    assert list(zip(dataset.item_ids, dataset.texts, strict=True)) == items
    # Numeric ids come first, by value and however long; the others follow by code point.
    assert [s.user for s in dataset.sequences] == ["007", "7", "10", "1" * 400, " 7", "a", 'é\n"x"', "\u2028,"]


def test_values_become_actions_by_thresholds_unless_the_log_has_actions(tmp_path):
    items = [("a", ItemText(title="A"))]
    thresholds = ActionThresholds(liked_from=4.1, disliked_to=2.5)
    for action, want in (("", [4, 4, 2, 2, 3, 3]), ("purchase", [7] * 6)):
        values = [1.0, 2.5, 2.6, 4.0, 4.1, 5.0]
        events = [data.Interaction("u", "a", when, value, action) for when, value in enumerate(values)]
        data.write_neutral(events, items, tmp_path)
        data.prepare(tmp_path, tmp_path / "prepared")
        sequences = data.read_prepared(tmp_path / "prepared", thresholds).sequences
        assert sequences[0].actions.tolist() == want and sequences[0].actions.dtype == np.uint8
        assert sequences.actions_that_occur() == set(want)
        # What `learn features` reads from the same values, as decimals and not in fp32.
        by_sql = duckdb.sql(f"SELECT {thresholds.sql('v')} FROM unnest([1.0, 2.5, 2.6, 4.0, 4.1, 5.0]::DOUBLE[]) t(v)")
        assert action or [row[0] for row in by_sql.fetchall()] == want
    assert data.read_prepared(tmp_path / "prepared").sequences.actions_that_occur() == {7}


def test_a_log_without_values_says_so_and_has_no_actions(tmp_path):
    data.write_neutral([data.Interaction("u", "a", 1)], [("a", ItemText(title="A"))], tmp_path)
    (tmp_path / data.INTERACTIONS).write_text("user,item,timestamp\nu,a,1\n")
    meta = data.prepare(tmp_path, tmp_path / "prepared")
    assert not meta.has_values and not meta.has_actions
    sequences = data.read_prepared(tmp_path / "prepared", ActionThresholds(liked_from=1)).sequences
    assert sequences[0].actions.tolist() == [0]
