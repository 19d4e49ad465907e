"""Runs are written whole, read back as they were, and refused with file and field when something is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_results import COUNTS, made_run, made_study, write_made

from learn import data
from learn.data import DataError, Dataset, Sequence
from learn.data.item_text import ItemText
from learn.evaluation.metrics import Ranking
from research.retrieval import result_files


def test_what_is_written_is_read_back(tmp_path):
    study = write_made(tmp_path, {"sasrec": 2.0, "learn-text": 2.5, "learn-text/variant-2": 2.2}, seeds=(2, 1))
    found = result_files.read(tmp_path).retrieval["ml-small"]
    assert found.study == study
    assert list(found.runs) == ["learn-text", "learn-text/variant-2", "sasrec"]
    assert list(found.runs["sasrec"]) == [1, 2]
    assert found.runs["sasrec"][2] == made_run(study, "sasrec", 2, 2.0)
    assert found.one("learn-text/variant-2").reference == "learn-text"
    names = {path.name for path in (tmp_path / "ml-small").iterdir()}
    assert "learn-text--variant-2-seed1.json" in names
    assert not [name for name in names if "partial" in name]


def test_a_study_describes_its_test_events():
    runs = [[0, 1, 2, 3], [0, 1, 0, 3], [2]]
    sequences = [Sequence(str(u), np.array(r), np.ones(len(r))) for u, r in enumerate(runs)]
    dataset = Dataset([str(i) for i in range(5)], [ItemText(title=str(i)) for i in range(5)], sequences)
    split = data.split(dataset.sequences, data.SplitConfig(n_test=1, n_validation=1))
    protocol = result_files.Protocol(n_test=1, n_validation=1, notes=["one note"])
    study = result_files.describe("tiny", dataset, split, protocol)
    assert (study.data.n_users, study.data.n_items, study.data.n_events) == (3, 5, 9)
    assert (study.user, study.item, study.position) == ([0, 1], [3, 3], [3, 3])
    assert (study.item_count, study.user_count) == ([0, 0], [2, 2])
    assert int(study.groups()["item 0"].sum()) == 2
    longer = data.split(dataset.sequences, data.SplitConfig(n_test=2, n_validation=1))
    assert result_files.digest(dataset, longer) != study.data.digest == result_files.digest(dataset, split)
    fields = result_files.measured(
        study, Ranking(np.array([1, 4]), np.array([[3, 4], [3, 2]])), np.array([2, 2, 1, 0, 0])
    )
    assert fields["metrics"]["item 0"]["hr_at_10"] == 1.0
    assert fields["top"]["coverage_at_2"] == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="holds out no test events"):
        result_files.describe("tiny", dataset, data.Split([4, 4, 1], [], []), protocol)
    with pytest.raises(ValueError, match="1 ranks for the 2 test events"):
        result_files.measured(study, Ranking(np.array([1]), np.array([[3, 4]])), COUNTS)


def test_a_study_is_not_overwritten_by_another(tmp_path):
    study = made_study()
    assert result_files.write_study(tmp_path, study) == result_files.write_study(tmp_path, study)
    other = study.model_copy(update={"data": study.data.model_copy(update={"digest": "cd"})})
    with pytest.raises(ValueError, match="describes other data"):
        result_files.write_study(tmp_path, other)


def test_a_run_needs_its_study(tmp_path):
    with pytest.raises(DataError, match=r"study\.json: missing"):
        result_files.write_run(tmp_path, made_run(made_study(), "sasrec", 1, 2.0))


def broken(tmp_path, name: str, change) -> DataError:
    """Changes one JSON of a good folder and returns the error of reading it."""
    write_made(tmp_path, {"sasrec": 2.0}, seeds=(1, 2))
    path = tmp_path / "ml-small" / name
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError) as caught:
        result_files.read(tmp_path)
    assert name in str(caught.value)
    return caught.value


RUN = "sasrec-seed2.json"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (RUN, lambda r: r.pop("machine"), "column machine: Field required"),
        (RUN, lambda r: r.update(refrence="x"), "column refrence: Extra inputs"),
        (RUN, lambda r: r.update(format=2), "column format"),
        (RUN, lambda r: r["seconds"].update(train=-1), "column seconds.train: Input should be greater"),
        (RUN, lambda r: r["rank"].pop(), "column rank: has 119 entries for 120 test events"),
        (RUN, lambda r: r["rank"].__setitem__(0, 0), "column rank.0: Input should be greater than 0, got 0"),
        (RUN, lambda r: r["rank"].__setitem__(0, 501), "column rank: holds 501, but there are 500 items"),
        (RUN, lambda r: r["metrics"]["all"].update(hr_at_10=0.9), "column metrics.all.hr_at_10: is 0.9, but the ranks"),
        (RUN, lambda r: r.update(study="other"), "column study: is 'other'"),
        (RUN, lambda r: r.update(seed=3), "column model: holds 'sasrec' with seed 3"),
        (RUN, lambda r: r.update(label="Other"), "column label: is 'Other', but 'SASREC' with seed 1"),
        (RUN, lambda r: r["config"].update(width=32), "column config.width: is 32, but 64 with seed 1"),
        (RUN, lambda r: r.update(family="ablation"), "an ablation needs the fields reference and question"),
        ("study.json", lambda r: r["item"].pop(), "item has 119 entries for 120 in user"),
        ("study.json", lambda r: r["user"].__setitem__(0, 40), "user holds 40; expected less than 40"),
        ("study.json", lambda r: r.update(study="other"), "column study: is 'other' in the folder 'ml-small'"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_field(tmp_path, name, change, expected):
    assert expected in str(broken(tmp_path, name, change))


def test_cut_off_files_and_stray_folders_are_errors(tmp_path):
    write_made(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    path = tmp_path / "ml-small" / "sasrec-seed1.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match=r"sasrec-seed1\.json: Invalid JSON"):
        result_files.read(tmp_path)
    path.unlink()
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"neither study\.json nor test_events\.json"):
        result_files.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        result_files.read(tmp_path / "absent")
