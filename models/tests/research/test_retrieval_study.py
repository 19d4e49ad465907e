"""A small retrieval study: which files it writes, that it resumes, and how mistakes in its settings are reported."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest
from conftest import MODELS

from learn import data
from learn.run_settings import read_settings, read_toml
from research.cvr.study import CvrStudy
from research.retrieval import result_files
from research.retrieval.arms import Inputs
from research.retrieval.study import only, read_study, run_config, run_study

TOML = """
study = "tiny"
seeds = [1, 2]

[split]
n_test = 2
n_validation = 1

[train]
steps = 6
users = 4
warmup = 1
n_uniform = 8
check_every = 3

[contents.minilm]
encoder = "unused"

[models.popularity]
kind = "popularity"
label = "Popularity"

[models.content-mean]
kind = "content-mean"
label = "Content mean"

[models.sasrec]
kind = "sasrec"
label = "SASRec"
sizes = { width = 8, max_history = 6 }

[models.hstu-time]
kind = "hstu"
label = "HSTU with time"
sizes = { width = 8, max_history = 6, time_bias = true }
n_seeds = 1

[models.learn-id]
kind = "learn"
label = "LEARN+ID"
family = "learn"
ids = "tied"
sizes = { width = 8, layers = 1, heads = 2, ffn = 8, out_dim = 8, max_history = 6, adaptor_hidden = 8 }

[models."learn-text/variant-3"]
kind = "learn"
label = "content as item embedding"
family = "ablation"
reference = "learn-id"
question = "item tower"
sizes = { width = 8, layers = 1, heads = 2, ffn = 8, item_tower = "content", max_history = 6, adaptor_hidden = 8 }
train = { next_weight = 0.0, align_weight = 1.0 }
n_seeds = 1
"""


@pytest.fixture
def inputs(tmp_path):
    rng = np.random.default_rng(0)
    sequences = []
    for user in range(8):
        items = rng.permutation(25)[: 6 + user]
        sequences.append(data.Sequence(str(user), items, np.ones(len(items)), np.arange(len(items))))
    np.save(tmp_path / "content.npy", rng.normal(size=(25, 12)).astype(np.float16))
    return Inputs(data.Dataset([str(i) for i in range(25)], [], sequences), {"minilm": tmp_path / "content.npy"}, {})


def write_and_read_study(tmp_path, text=TOML):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_a_study_writes_one_file_per_run_and_repeats_only_changed_runs(tmp_path, inputs):
    root = tmp_path / "results"
    run_study(write_and_read_study(tmp_path), inputs, root, n_workers=1)
    found = result_files.read(root).retrieval["tiny"]
    assert {name: list(runs) for name, runs in found.runs.items()} == {
        "content-mean": [1],
        "hstu-time": [1],
        "learn-id": [1, 2],
        "learn-text/variant-3": [1],
        "popularity": [1],
        "sasrec": [1, 2],
    }
    last = inputs.dataset.sequences[3].items[-2:].tolist()
    assert len(found.study.item) == 16
    assert found.study.item[6:8].tolist() == last and found.study.user[6:8].tolist() == [3, 3]
    counts = [sum(item in sequence.items[:-3] for sequence in inputs.dataset.sequences) for item in last]
    assert found.study.item_count[6:8].tolist() == counts
    for runs in found.runs.values():
        for run in runs.values():
            assert len(run.rank) == 16 and 1 <= run.rank.min() <= run.rank.max() <= 25
    variant = found.any_run("learn-text/variant-3")
    assert variant.reference == "learn-id" and [check.step for check in variant.curve] == [3, 6]
    # The seeds train the same model from different random numbers.
    assert found.runs["sasrec"][1].rank.tolist() != found.runs["sasrec"][2].rank.tolist()
    assert not list(root.glob("tiny/*.run"))

    before = {path: path.stat().st_mtime_ns for path in root.glob("tiny/*-seed*.npz")}
    changed = TOML.replace("sizes = { width = 8, max_history = 6 }", "sizes = { width = 16, max_history = 6 }")
    run_study(write_and_read_study(tmp_path, changed), inputs, root, n_workers=1)
    again = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert again == {"sasrec-seed1.npz", "sasrec-seed2.npz"}


def test_a_finished_study_that_is_split_by_time_is_not_run_again(tmp_path, inputs):
    text = TOML.replace("[split]\nn_test = 2\nn_validation = 1", "[time_split]\nfractions = [0.6, 0.8]")
    study = only(write_and_read_study(tmp_path, text), ["popularity", "sasrec"])
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "tiny").glob("*-seed*.npz")}
    assert len(before) == 3
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("name", ["learn-text", "learn-id", "sasrec"])
def test_the_committed_results_count_as_results_of_the_committed_config(name):
    """Otherwise a study that is continued would train all of its models again."""
    study = read_study(MODELS / "configs" / "ml-latest-small.toml")
    record = result_files.read_run(result_files.run_path(MODELS / "results", study.study, name, 1))
    now = run_config(study, study.models[name])
    assert {key: record.config[key] for key in now} == now


def test_an_ablation_runs_without_its_reference(tmp_path, inputs):
    study = only(write_and_read_study(tmp_path), ["learn-text/variant-3"])
    run_study(study, inputs, tmp_path / "results", n_workers=1)
    assert list(result_files.read(tmp_path / "results").retrieval["tiny"].runs) == ["learn-text/variant-3"]
    with pytest.raises(ValueError, match="--only learn-txt: this study has popularity, content-mean, sasrec"):
        only(write_and_read_study(tmp_path), ["sasrec", "learn-txt"])


@pytest.mark.parametrize("path", sorted((MODELS / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configs_can_be_read(path):
    tables = tomllib.loads(path.read_text())
    if "arms" in tables:
        read_toml(CvrStudy, path)
    else:
        (read_study if "models" in tables else read_settings)(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_test = 2", "n_tests = 2", "split.n_tests: Unexpected keyword argument"),
        ("steps = 6", 'steps = "six"', "train.steps: Input should be a valid integer"),
        ('kind = "sasrec"', 'kind = "sasrek"', "models.sasrec.kind: Input should be 'popularity'"),
        ("sizes = { width = 8, max_history = 6 }", "sizes = { wide = 8 }", "models.sasrec.sizes.wide: Unexpected"),
        ("train = { next_weight = 0.0", "train = { next = 0.0", "models.learn-text/variant-3.train.next: Unexpected"),
        ('reference = "learn-id"', 'reference = "learn"', "reference: 'learn' is not a model of this study"),
        ('ids = "tied"', 'ids = "tied"\ncontent = "bert"', "models.learn-id.content: 'bert' is none of"),
        ("seeds = [1, 2]", "seeds = 1, 2", "study.toml: "),
    ],
)
def test_a_mistake_in_the_settings_is_reported_with_its_field(tmp_path, old, new, message):
    assert old in TOML
    with pytest.raises(ValueError, match=r"study\.toml") as error:
        write_and_read_study(tmp_path, TOML.replace(old, new))
    assert message in str(error.value)
