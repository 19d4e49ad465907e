"""Readers name what is wrong and where; splits leak nothing."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_movielens

from learn import data
from learn.data import DataError, SplitConfig

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


def test_titles_read_as_people_write_them():
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
    # User 1 rated 2 and 10 in the same second: the lower number comes first, as a number and not as text.
    assert dataset.sequences[0].items.tolist() == [0, 1, 2]
    assert dataset.sequences[0].values.tolist() == [1.0, 5.0, 3.5]
    assert dataset.sequences[1].items.tolist() == [1, 0]


def test_the_order_of_the_file_does_not_matter(neutral):
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
def test_a_bad_interaction_is_named(neutral, row, message):
    with (neutral / data.INTERACTIONS).open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError) as caught:
        data.read_neutral(neutral)
    assert str(caught.value) == f"{neutral / data.INTERACTIONS}, {message}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "row 4"),
        ('{"id": "7"}', "'text'"),
        ('{"id": "1", "text": {"title": "x"}}', "column id: '1' stands here a second time"),
        ('{"id": "7", "text": {"keywords": [""]}}', "column text: '7' has no text at all"),
        ('{"id": "7", "text": {"colour": "red"}}', "unknown field of item text: colour"),
        ('{"id": "7", "text": {"title": 3}}', "title: expected a string, got 3"),
    ],
)
def test_a_bad_item_is_named(neutral, line, reason):
    with (neutral / data.ITEMS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=reason):
        data.read_neutral(neutral)


def test_missing_files_and_columns_are_named(neutral, tmp_path):
    with pytest.raises(DataError, match="no MovieLens layout known here"):
        data.read_movielens(tmp_path)
    (neutral / data.INTERACTIONS).write_text("user,item,value\n")
    with pytest.raises(DataError, match="row 1, column timestamp: the header lacks it"):
        data.read_neutral(neutral)
    (neutral / data.ITEMS).write_bytes(b'{"id": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        data.read_neutral(neutral)


def sequences(*lengths):
    return [data.Sequence(str(user), np.arange(n), np.ones(n)) for user, n in enumerate(lengths)]


def test_split_by_hand():
    split = data.split(sequences(6, 3, 2), SplitConfig(n_test=1, n_validation=2))
    assert split.n_train == [3, 3, 2]
    assert [(e.user, e.position) for e in split.validation] == [(0, 3), (0, 4)]
    assert [(e.user, e.position) for e in split.test] == [(0, 5)]


@pytest.mark.parametrize("config", [SplitConfig(1, 1), SplitConfig(5, 1), SplitConfig(1, 0), SplitConfig(0, 0)])
def test_no_held_out_event_is_trained_on_and_none_is_lost(config):
    runs = sequences(*range(1, 30))
    split = data.split(runs, config)
    for user, run in enumerate(runs):
        validation = [e.position for e in split.validation if e.user == user]
        test = [e.position for e in split.test if e.user == user]
        assert [*range(split.n_train[user]), *validation, *test] == list(range(len(run.items)))
        assert split.n_train[user] >= 1
