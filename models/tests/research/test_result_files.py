"""Runs are read back as they were written, and an invalid file is refused with its name and field."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from conftest import MODELS
from synthetic_results import COUNTS, synthetic_run, synthetic_study, write_synthetic_study

from learn import data
from learn.data import DataError, Dataset, Sequence
from learn.data.item_text import ItemText
from learn.evaluation.metrics import Ranking
from research import provenance, record_files
from research.cvr.result_files import CvrRun
from research.ranking.result_files import RankingRun
from research.record_files import HEADER
from research.retrieval import result_files


def test_studies_and_runs_are_read_back_as_written(tmp_path):
    study = write_synthetic_study(
        tmp_path, {"sasrec": 2.0, "learn-text": 2.5, "learn-text/variant-2": 2.2}, seeds=(2, 1)
    )
    found = result_files.read(tmp_path).retrieval["ml-small"]
    assert found.study.equals(study)
    assert list(found.runs) == ["learn-text", "learn-text/variant-2", "sasrec"]
    assert list(found.runs["sasrec"]) == [1, 2]
    assert found.runs["sasrec"][2].equals(synthetic_run(study, "sasrec", 2, 2.0))
    assert found.any_run("learn-text/variant-2").reference == "learn-text"
    names = {path.name for path in (tmp_path / "ml-small").iterdir()}
    assert "learn-text--variant-2-seed1.npz" in names
    assert not [name for name in names if "partial" in name]


def test_a_study_describes_its_test_events():
    runs = [[0, 1, 2, 3], [0, 1, 0, 3], [2]]
    sequences = [Sequence(str(u), np.array(r), np.ones(len(r))) for u, r in enumerate(runs)]
    dataset = Dataset([str(i) for i in range(5)], [ItemText(title=str(i)) for i in range(5)], sequences)
    split = data.split(dataset.sequences, data.SplitConfig(n_test=1, n_validation=1))
    protocol = result_files.Protocol(n_test=1, n_validation=1, notes=["one note"])
    study = result_files.describe("tiny", dataset, split, protocol)
    assert (study.data.n_users, study.data.n_items, study.data.n_events) == (3, 5, 9)
    assert study.user.tolist() == [0, 1]
    assert (study.item_count.tolist(), study.user_count.tolist()) == ([0, 0], [2, 2])
    assert int(study.groups()["item 0"].sum()) == 2
    longer = data.split(dataset.sequences, data.SplitConfig(n_test=2, n_validation=1))
    assert result_files.data_digest(dataset, longer) != study.data.digest == result_files.data_digest(dataset, split)
    fields = result_files.measured(
        study, Ranking(np.array([1, 4]), np.array([[3, 4], [3, 2]])), np.array([2, 2, 1, 0, 0])
    )
    assert fields["rank"].tolist() == [1, 4]
    assert fields["top"]["coverage_at_2"] == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="holds out no test events"):
        result_files.describe("tiny", dataset, data.Split([4, 4, 1], [], []), protocol)
    with pytest.raises(ValueError, match="1 ranks for the 2 test events"):
        result_files.measured(study, Ranking(np.array([1]), np.array([[3, 4]])), COUNTS)


def test_a_study_is_not_overwritten_by_another(tmp_path):
    study = synthetic_study()
    assert result_files.write_study(tmp_path, study) == result_files.write_study(tmp_path, study)
    other = study.model_copy(update={"data": study.data.model_copy(update={"digest": "cd"})})
    with pytest.raises(ValueError, match="describes other data"):
        result_files.write_study(tmp_path, other)


def test_a_run_needs_its_study(tmp_path):
    with pytest.raises(DataError, match=r"study\.npz: missing"):
        result_files.write_run(tmp_path, synthetic_run(synthetic_study(), "sasrec", 1, 2.0))


def test_equal_records_give_equal_files_with_the_smallest_dtypes(tmp_path):
    for name in ("a", "b"):
        result_files.write_study(tmp_path / name, synthetic_study())
    first, second = ((tmp_path / name / "ml-small" / "study.npz").read_bytes() for name in ("a", "b"))
    assert first == second
    with np.load(tmp_path / "a" / "ml-small" / "study.npz") as archive:
        assert archive["user"].dtype == np.uint8 and "item" not in archive


def rewrite_record(path, change_header, change_columns) -> None:
    """Changes the file of a record without the checks that `record_files` makes when it writes one."""
    with np.load(path) as archive:
        header = json.loads(archive[HEADER])
        columns = {name: archive[name].astype(np.int64) for name in archive.files if name != HEADER}
    change_header(header)
    change_columns(columns)
    np.savez(path, **columns)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(HEADER, json.dumps(header))


def unchanged(_):
    pass


def column(name: str, index: int, value: int):
    return lambda columns: columns[name].__setitem__(index, value)


def shortened(name: str):
    return lambda columns: columns.update({name: columns[name][:-1]})


RUN, STUDY = "sasrec-seed2.npz", "study.npz"


@pytest.mark.parametrize(
    ("name", "header", "columns", "expected"),
    [
        (RUN, lambda r: r.pop("machine"), unchanged, "column machine: Field required"),
        (RUN, lambda r: r.update(refrence="x"), unchanged, "column refrence: Extra inputs"),
        (RUN, lambda r: r.update(format=1), unchanged, "column format: is 1; this program reads the formats 2 and 3"),
        (RUN, lambda r: r.pop("format"), unchanged, "column format: is None; this program reads the formats 2 and 3"),
        (RUN, lambda r: r.update(kind="ranking run"), unchanged, "column kind: Input should be 'retrieval run'"),
        (RUN, lambda r: r["seconds"].update(train=-1), unchanged, "column seconds.train: Input should be greater"),
        (RUN, unchanged, shortened("rank"), "column rank: has 119 entries for 120 test events"),
        (RUN, unchanged, column("rank", 0, 0), "rank holds 0; ranks begin at 1"),
        (RUN, unchanged, column("rank", 0, -1), "column rank: Value error, holds -1; expected 0 or more"),
        (RUN, unchanged, column("rank", 0, 501), "column rank: holds 501, but there are 500 items"),
        (RUN, unchanged, lambda columns: columns.pop("rank"), "column rank: Field required"),
        (RUN, lambda r: r.update(study="other"), unchanged, "column study: is 'other'"),
        (
            RUN,
            lambda r: r.update(seed=3),
            unchanged,
            "column model: is 'sasrec' with seed 3, but the file name differs",
        ),
        (RUN, lambda r: r.pop("commit"), unchanged, "a run of format 3 needs the field commit"),
        (RUN, lambda r: r.pop("data"), unchanged, "a run of format 3 needs the field data"),
        (
            RUN,
            lambda r: r.update(data="cd" * 32),
            unchanged,
            "column data: is of other data or another split than its study; run `learn study --only sasrec` again",
        ),
        (RUN, lambda r: r.update(label="Other"), unchanged, "column label: is 'Other', but 'SASREC' with seed 1"),
        (RUN, lambda r: r["config"].update(width=32), unchanged, "column config.width: is 32, but 64 with seed 1"),
        (RUN, lambda r: r.update(family="ablation"), unchanged, "an ablation needs the fields reference and question"),
        (STUDY, unchanged, shortened("item_count"), "item_count has 119 entries for 120 in user"),
        (STUDY, unchanged, column("user", 0, 40), "user holds 40; expected less than 40"),
        (STUDY, lambda r: r.update(study="other"), unchanged, "column study: is 'other' in the folder 'ml-small'"),
    ],
)
def test_an_invalid_record_is_reported_with_file_and_field(tmp_path, name, header, columns, expected):
    write_synthetic_study(tmp_path, {"sasrec": 2.0}, seeds=(1, 2))
    rewrite_record(tmp_path / "ml-small" / name, header, columns)
    with pytest.raises(DataError) as caught:
        result_files.read(tmp_path)
    assert name in str(caught.value) and expected in str(caught.value)


def test_truncated_files_and_stray_folders_are_errors(tmp_path):
    write_synthetic_study(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    path = tmp_path / "ml-small" / "sasrec-seed1.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"sasrec-seed1\.npz: not a file of results"):
        result_files.read(tmp_path)
    path.unlink()
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "a.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"neither study\.npz nor ranking\.npz"):
        result_files.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        result_files.read(tmp_path / "absent")


def as_format_2(record: dict) -> None:
    record.update(format=2)
    if record["kind"] == "retrieval run":
        del record["commit"], record["data"]


def test_files_of_format_2_are_read_without_commit_and_digest(tmp_path):
    study = write_synthetic_study(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    for name in ("study.npz", "sasrec-seed1.npz"):
        rewrite_record(tmp_path / "ml-small" / name, as_format_2, unchanged)
    found = result_files.read(tmp_path).retrieval["ml-small"]
    run = found.any_run("sasrec")
    # The commit of the program that reads must not be taken for that of the program that wrote.
    assert (run.format, run.commit, run.data) == (2, None, None)
    assert run.rank.tolist() == synthetic_run(study, "sasrec", 1, 2.0).rank.tolist()
    # A study that was described in format 2 can be continued.
    assert result_files.write_study(tmp_path, study).exists()


def test_a_new_run_has_a_commit_without_being_given_one():
    study = synthetic_study()
    fields = synthetic_run(study, "sasrec", 1, 2.0).model_dump(exclude={"commit", "format"})
    run = result_files.Run.model_validate(fields)
    assert (run.commit, run.data, run.format) == (provenance.commit(), study.data.digest, 3)


def test_a_run_of_other_data_is_not_written(tmp_path):
    study = synthetic_study()
    result_files.write_study(tmp_path, study)
    with pytest.raises(DataError, match="is of other data or another split"):
        result_files.write_run(tmp_path, synthetic_run(study, "sasrec", 1, 2.0, data="cd" * 32))


@pytest.mark.parametrize(
    ("kind", "pattern"), [(CvrRun, "cvr-*/*-seed1.npz"), (RankingRun, "ranking-*/*-seed1.npz")], ids=["cvr", "ranking"]
)
def test_the_committed_runs_of_other_studies_can_be_read(kind, pattern):
    paths = sorted((MODELS / "results").glob(pattern))
    assert paths
    for path in paths:
        run = record_files.read(path, kind)
        assert run.data and (run.format == 2) == (run.commit is None)
