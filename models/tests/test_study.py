"""A whole study, small: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from learn import data
from learn.study import Inputs, read_study, run_file, run_study

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
ids = true
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
    return Inputs(data.Dataset([str(i) for i in range(25)], [], sequences), {"minilm": tmp_path / "content.npy"})


def written(tmp_path, text=TOML):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_a_study_writes_a_json_a_run_and_does_not_repeat_itself(tmp_path, inputs):
    out, study = tmp_path / "out", written(tmp_path)
    run_study(study, inputs, out, n_workers=1)
    names = {path.name for path in out.glob("*.json")}
    runs = [("popularity", 1), ("content-mean", 1), ("sasrec", 1), ("sasrec", 2), ("hstu-time", 1), ("learn-id", 1)]
    runs += [("learn-id", 2), ("learn-text/variant-3", 1)]
    assert names == {"study.json", *(run_file(*run) for run in runs)}
    shared = json.loads((out / "study.json").read_text())
    assert len(shared["events"]["item"]) == 16 and shared["data"] == {"n_users": 8, "n_items": 25, "n_events": 76}
    last = inputs.dataset.sequences[3].items[-2:].tolist()
    assert shared["events"]["item"][6:8] == last and shared["events"]["user"][6:8] == [3, 3]
    counts = [sum(item in s.items[:-3] for s in inputs.dataset.sequences) for item in last]
    assert shared["events"]["item_count"][6:8] == counts
    for name, seed in runs:
        record = json.loads((out / run_file(name, seed)).read_text())
        assert len(record["rank"]) == 16 and record["seed"] == seed and record["model"] == name
        assert record["metrics"]["hr_at_10"] == pytest.approx(np.mean(np.array(record["rank"]) <= 10))
    variant = json.loads((out / run_file("learn-text/variant-3", 1)).read_text())
    assert variant["reference"] == "learn-id" and [r["step"] for r in variant["curve"]] == [3, 6]

    before = {path: path.stat().st_mtime_ns for path in out.glob("*-*.json")}
    changed = TOML.replace("width = 8, max_history = 6 }", "width = 16, max_history = 6 }")
    run_study(written(tmp_path, changed), inputs, out, n_workers=1)
    again = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert again == {"sasrec-1.json", "sasrec-2.json"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_test = 2", "n_tests = 2", "split.n_tests: Unexpected keyword argument"),
        ("steps = 6", 'steps = "six"', "train.steps: Input should be a valid integer"),
        ('kind = "sasrec"', 'kind = "sasrek"', "models.sasrec.kind: Input should be 'popularity'"),
        ("sizes = { width = 8, max_history = 6 }", "sizes = { wide = 8 }", "models.sasrec.sizes.wide: Unexpected"),
        ("train = { next_weight = 0.0", "train = { next = 0.0", "models.learn-text/variant-3.train.next: Unexpected"),
        ('reference = "learn-id"', 'reference = "learn"', "reference: 'learn' is no model of this study"),
        ("ids = true", 'ids = true\ncontent = "bert"', "models.learn-id.content: 'bert' is none of"),
        ("seeds = [1, 2]", "seeds = 1, 2", "study.toml: "),
    ],
)
def test_a_mistake_in_the_toml_is_named(tmp_path, old, new, message):
    assert old in TOML
    with pytest.raises(ValueError, match=r"study\.toml") as error:
        written(tmp_path, TOML.replace(old, new))
    assert message in str(error.value)
