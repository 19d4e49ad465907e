"""Committed bundles are complete and correct, and a wrong bundle is never written."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import tomllib
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import DEFAULT, FIXTURE, FIXTURES

from learn.content.encoder_graph import cast_weights
from learn.data.actions import ACTIONS, UNSPECIFIED, ActionThresholds
from learn.data.item_text import ItemText, render, template_source
from learn.serving import bundle, bundle_check, bundle_format, fixture_bundles, tolerances

NAMES = list(fixture_bundles.RECIPES)
FOLDERS = pytest.mark.parametrize("folder", [*(FIXTURES / name for name in NAMES), DEFAULT], ids=[*NAMES, "default"])
# Files beside those that a manifest lists, for readers and for the demo.
EXTRA = {"manifest.toml", "sample_items.jsonl", "README.md"}


def read_manifest(folder):
    return tomllib.loads((folder / "manifest.toml").read_text())


def absent_files(folder):
    """Returns the files that `make setup` has not fetched yet. No other file may be missing."""
    files = read_manifest(folder)["files"]
    return {entry["path"] for entry in files if "pypi" in entry and not (folder / entry["path"]).exists()}


@FOLDERS
def test_digests_match_and_every_file_is_listed(folder):
    files = read_manifest(folder)["files"]
    absent = absent_files(folder)
    for entry in files:
        if entry["path"] not in absent:
            assert bundle_format.sha256(folder / entry["path"]) == entry["sha256"], entry["path"]
            assert (folder / entry["path"]).stat().st_size == entry["bytes"]
    assert {path.name for path in folder.iterdir()} - EXTRA == {entry["path"] for entry in files} - absent
    assert {entry["part"] for entry in files} == {"encoder", "user_tower", "item_tower", "cvr", "golden"}


@FOLDERS
def test_the_manifest_agrees_with_the_files(folder):
    manifest = read_manifest(folder)
    golden = json.loads((folder / manifest["golden"]["file"]).read_text())
    assert manifest["format"] == 2
    assert manifest["encoder"]["precision"] == "fp32"
    assert manifest["item_text"]["template"] == template_source()
    for item in golden["items"]:
        assert len(item["content"]) == manifest["encoder"]["dim"]
        assert len(item["item"]) == manifest["item_tower"]["dim"] == manifest["user_tower"]["dim"]
        assert len(item["adapted"]) == manifest["item_tower"]["adapted_dim"]
        assert len(item["token_ids"]) <= manifest["item_text"]["max_tokens"]
        assert item["prompt"] == render(ItemText.from_json(item["text"]))
    assert all(len(pair["mid_emb"]) == manifest["cvr"]["dim"] for pair in golden["pairs"])
    lengths = {len(user["history"]) for user in golden["users"]}
    assert {0, 1, manifest["user_tower"]["max_history"]} <= lengths
    # At least one text is truncated.
    assert max(len(item["token_ids"]) for item in golden["items"]) == manifest["item_text"]["max_tokens"]
    assert {pair["user"] for pair in golden["pairs"]} == set(range(len(golden["users"])))


@FOLDERS
def test_the_ports_are_those_of_the_graphs(folder):
    manifest = read_manifest(folder)
    for part in ("encoder", "item_tower", "user_tower", "cvr"):
        graph = onnx.load(folder / manifest[part]["file"], load_external_data=False).graph
        assert [port.name for port in graph.input] == manifest[part]["inputs"]
        assert [port.name for port in graph.output] == manifest[part]["outputs"]
    assert manifest["item_tower"]["outputs"] == ["item", "adapted"]
    actions = manifest["history"]["actions"]
    assert manifest["user_tower"]["inputs"] == ["adapted", "mask", *(["action"] if actions else [])]


def test_only_reencoded_reads_no_actions():
    manifests = {name: read_manifest(FIXTURES / name) for name in NAMES}
    listed = ["click", "like", "dislike", "purchase"]
    assert {name: manifest["history"]["actions"] for name, manifest in manifests.items()} == {
        "bundle": listed,
        "retrained": listed,
        "reencoded": [],
    }
    assert {(m["history"]["keeps"], m["history"]["order"]) for m in manifests.values()} == {("all", "oldest_first")}


@pytest.mark.parametrize("name", ["bundle", "retrained"])
def test_golden_users_have_every_kind_of_action_and_none(name):
    users = json.loads((FIXTURES / name / "golden.json").read_text())["users"]
    listed = read_manifest(FIXTURES / name)["history"]["actions"]
    acting = [user for user in users if "actions" in user]
    assert all(len(user["actions"]) == len(user["history"]) for user in acting)
    sent = {action for user in acting for action in user["actions"]}
    assert {*listed, UNSPECIFIED} < sent <= {*ACTIONS, UNSPECIFIED}
    # A batch of them is padded, and one history occurs with two lists of actions and without any.
    assert len({len(user["history"]) for user in acting}) > 2
    by_history = {}
    for user in users:
        by_history.setdefault(tuple(user["history"]), []).append(np.array(user["user"]))
    assert len(by_history[1, 2, 3]) == 3
    for vectors in by_history.values():
        for a, b in itertools.combinations(vectors, 2):
            # So far beyond the tolerance that one cannot pass for another.
            assert np.abs(a - b).max() > 100 * tolerances.ABSOLUTE


def test_towers_that_tell_all_actions_apart_have_golden_users_for_that():
    users = bundle._histories(9, replace(fixture_bundles.SIZES, actions=ACTIONS))
    acting = [tuple(user["actions"]) for user in users if "actions" in user]
    assert len(set(acting)) == len(acting) and {action for actions in acting for action in actions} == {*ACTIONS}
    assert not any("actions" in user for user in bundle._histories(9, fixture_bundles.SIZES))


@FOLDERS
def test_the_committed_bundle_reproduces_its_golden_vectors(folder, tmp_path):
    if absent_files(folder):
        pytest.skip("the encoder's files are missing; `make setup` fetches them")
    bundle_check.verify(folder)


def test_the_default_item_tower_reproduces_its_golden_vectors_without_the_encoder():
    golden = json.loads((DEFAULT / "golden.json").read_text())
    content = np.array([item["content"] for item in golden["items"]], np.float32)
    item, adapted = bundle_check.session(DEFAULT / "item_tower.onnx").run(None, {"content": content})
    for got, key in ((item, "item"), (adapted, "adapted")):
        bundle_check.compare(key, got, np.array([item[key] for item in golden["items"]], np.float32))


def test_committed_bundles_stay_small():
    for name in NAMES:
        assert sum(path.stat().st_size for path in (FIXTURES / name).iterdir()) < 500_000
    assert (DEFAULT / "encoder.onnx").stat().st_size < 1_000_000
    for name in ("user_tower.onnx", "item_tower.onnx", "cvr.onnx"):
        assert (DEFAULT / name).stat().st_size < 5_000_000


def test_sample_items_are_distinct_and_have_text():
    lines = (DEFAULT / "sample_items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len({item["id"] for item in items}) == len(items) >= 50
    assert not any(ItemText.from_json(item["text"]).is_empty for item in items)


def leaves(value, path=""):
    """Returns every number and string of a JSON value with its path."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, child in pairs for leaf in leaves(child, f"{path}/{key}")]
    return [(path, value)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All fixtures as the code writes them now."""
    out = tmp_path_factory.mktemp("fixtures")
    fixture_bundles.write_fixtures(out)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_fixtures_are_what_the_code_writes_now(name, written):
    # Vectors and weights are compared with a tolerance, because torch may differ in the last digit between processors.
    current, committed = written / name, FIXTURES / name
    assert {path.name for path in current.iterdir()} == {path.name for path in committed.iterdir()}
    assert (current / "tokenizer.json").read_bytes() == (committed / "tokenizer.json").read_bytes()
    manifests = [read_manifest(folder) for folder in (current, committed)]
    assert [entry["path"] for entry in manifests[0].pop("files")] == [
        entry["path"] for entry in manifests[1].pop("files")
    ]
    assert manifests[0] == manifests[1]
    for left, right in zip(
        *(leaves(json.loads((f / "golden.json").read_text())) for f in (current, committed)), strict=True
    ):
        assert left == (right if isinstance(right[1], str) else (right[0], pytest.approx(right[1], abs=1e-5)))
    for graph in ("encoder.onnx", "user_tower.onnx", "item_tower.onnx", "cvr.onnx"):
        left, right = (onnx.load(folder / graph).graph for folder in (current, committed))
        assert [node.op_type for node in left.node] == [node.op_type for node in right.node]
        for a, b in zip(left.initializer, right.initializer, strict=True):
            np.testing.assert_allclose(*(onnx.numpy_helper.to_array(t) for t in (a, b)), atol=1e-6)


def test_the_written_and_the_committed_fixtures_are_the_same_set(written):
    # Only folders with a manifest are compared, because the folder of fixtures has files of other tests as well.
    assert {path.name for path in written.iterdir() if path.is_dir()} == {
        path.parent.name for path in FIXTURES.glob("*/manifest.toml")
    }


def encoder_part(folder):
    """Everything that content depends on: the part's files, the template and how texts become tokens."""
    manifest = read_manifest(folder)
    files = {entry["path"]: entry["sha256"] for entry in manifest["files"] if entry["part"] == "encoder"}
    return files, manifest["encoder"], manifest["item_text"]


def test_retraining_keeps_the_encoder_part_and_reencoding_does_not():
    first, retrained, reencoded = (encoder_part(FIXTURES / name) for name in NAMES)
    assert retrained == first
    assert reencoded[0]["encoder.onnx"] != first[0]["encoder.onnx"]
    # Names and widths, on which clients rely, are the same.
    assert reencoded[1:] == first[1:]


def golden_vectors(name, part, key):
    """Returns one kind of golden vectors [n,d] of a committed fixture."""
    rows = json.loads((FIXTURES / name / "golden.json").read_text())[part]
    return np.array([row[key] for row in rows], np.float32).reshape(len(rows), -1)


def golden_inputs(name):
    """Returns texts, histories without actions and their pairs, without the golden outputs."""
    golden = json.loads((FIXTURES / name / "golden.json").read_text())
    silent = [number for number, user in enumerate(golden["users"]) if "actions" not in user]
    return (
        [(item["text"], item["token_ids"]) for item in golden["items"]],
        [golden["users"][number]["history"] for number in silent],
        [(pair["user"], pair["item"]) for pair in golden["pairs"] if pair["user"] in silent],
    )


@pytest.mark.parametrize(("name", "other"), list(itertools.combinations(NAMES, 2)))
def test_the_golden_vectors_of_two_fixtures_differ_far_beyond_the_tolerance(name, other):
    assert golden_inputs(name) == golden_inputs(other)
    # At a hundred times the tolerance, no rounding error can make the output of one bundle pass for that of another.
    for part, key in (
        ("items", "item"),
        ("items", "adapted"),
        ("users", "user"),
        ("pairs", "mid_emb"),
        ("pairs", "cvr"),
    ):
        # Golden users without actions, and their pairs, come first.
        vectors = [golden_vectors(folder, part, key) for folder in (name, other)]
        n_rows = min(map(len, vectors))
        difference = np.abs(vectors[0][:n_rows] - vectors[1][:n_rows]).max(axis=1)
        assert difference.min() > 100 * tolerances.ABSOLUTE, key


def test_every_text_has_tokens_in_the_fixture_tokenizer(tmp_path):
    encoder = fixture_bundles.build(tmp_path / "tokenizer.json").encoder
    for case in fixture_bundles.PROMPT_CASES:
        (ids,) = encoder.tokenize([render(case)])
        assert 1 < len(ids) <= fixture_bundles.MAX_TOKENS and ids[0] == fixture_bundles.SPECIAL.index("<s>")


def test_a_bundle_that_differs_from_its_golden_vectors_is_refused(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "bundle")
    untouched = (folder / "golden.json").read_text()
    for part, key, stage in (
        ("items", "content", "encoder"),
        ("items", "item", "item tower"),
        ("items", "adapted", "adaptor"),
        ("users", "user", "user tower"),
        ("pairs", "mid_emb", "mid-emb"),
    ):
        golden = json.loads(untouched)
        golden[part][2][key][3] += 3e-4
        (folder / "golden.json").write_text(json.dumps(golden))
        with pytest.raises(ValueError, match=f"^{stage}: differs from PyTorch"):
            bundle_check.verify(folder)


def test_golden_actions_are_read_and_so_are_those_that_the_manifest_does_not_list(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "bundle")
    golden = json.loads((folder / "golden.json").read_text())
    number = next(n for n, user in enumerate(golden["users"]) if "view" in user.get("actions", ()))
    actions = golden["users"][number]["actions"]
    place = actions.index("view")
    for action, is_the_same in (("skip", True), (UNSPECIFIED, True), ("dislike", False)):
        actions[place] = action
        (folder / "golden.json").write_text(json.dumps(golden))
        if is_the_same:
            bundle_check.verify(folder)
        else:
            with pytest.raises(ValueError, match="user tower: differs from PyTorch"):
                bundle_check.verify(folder)


def test_a_user_tower_that_is_wrong_for_one_user_alone_is_found(tmp_path, monkeypatch):
    """Its graph cannot be, but ONNX Runtime may use another kernel for a single row."""

    class WrongAlone(bundle_check._Graph):
        def run(self, *inputs):
            outputs = super().run(*inputs)
            if self._table["outputs"] == ["user"] and len(inputs[0]) == 1:
                outputs[0] = outputs[0] + 1e-3
            return outputs

    monkeypatch.setattr(bundle_check, "_Graph", WrongAlone)
    with pytest.raises(ValueError, match="user tower, each user alone: differs from PyTorch"):
        bundle_check.verify(FIXTURE)


def test_a_failed_write_leaves_the_old_bundle_and_no_partial_files(tmp_path):
    broken = fixture_bundles.build(tmp_path / "tokenizer.json")
    with torch.no_grad():
        broken.pch.projection.weight.fill_(float("nan"))
    folder = shutil.copytree(FIXTURE, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="differs from PyTorch"):
        bundle.write(broken, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "tokenizer.json"}


def test_files_that_only_the_replaced_bundle_listed_are_removed(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "bundle")
    manifest = (folder / "manifest.toml").read_text()
    (folder / "manifest.toml").write_text(
        f'{manifest}\n[[files]]\npath = "encoder.weights"\npart = "encoder"\nsha256 = ""\n'
    )
    for name in ("encoder.weights", "notes.txt"):
        (folder / name).write_text("old")
    bundle.write(fixture_bundles.build(tmp_path / "tokenizer.json"), folder)
    # A file that no manifest lists belongs to somebody else, so it is kept.
    assert not (folder / "encoder.weights").exists() and (folder / "notes.txt").exists()
    bundle_check.verify(folder)


@pytest.mark.parametrize(
    ("got", "ok"), [([1.0, 2.0], True), ([1.00005, 2.0], True), ([1.0002, 2.0], False), ([float("nan"), 2.0], False)]
)
def test_compare_accepts_only_vectors_within_the_tolerances(got, ok):
    got, want = np.array([got], np.float32), np.array([[1.0, 2.0]], np.float32)
    if ok:
        bundle_check.compare("x", got, want)
    else:
        bounds = r"by \S+ \(at most 0\.0001\), cosine \S+ \(above 0\.99999\)$"
        with pytest.raises(ValueError, match=f"^x: differs from PyTorch {bounds}"):
            bundle_check.compare("x", got, want)


@pytest.mark.parametrize(
    ("got", "found", "is_like_rounding"),
    [
        ([1.03, 0.0], "by 0.03 (at most 0.02), cosine 1.0000000 (above 0.997)", True),
        ([-1.0, 0.0], "by 2 (at most 0.02), cosine -1.0000000 (above 0.997)", False),
        ([0.97, 0.2], "by 0.2 (at most 0.02), cosine 0.9793983 (above 0.997)", False),
        ([float("nan"), 0.0], "by nan (at most 0.02), cosine nan (above 0.997)", False),
    ],
)
def test_only_a_small_difference_of_int8_content_is_said_to_come_from_another_cpu(
    monkeypatch, got, found, is_like_rounding
):
    monkeypatch.setattr(bundle_check, "cpu_name", lambda: "a CPU")
    got, want = np.array([got], np.float32), np.array([[1.0, 0.0]], np.float32)
    with pytest.raises(ValueError) as caught:
        bundle_check.compare("encoder", got, want, tolerances.INT8, bundle_check.SAME_GRAPH)
    message, _semicolon, reason = str(caught.value).partition("; ")
    assert message.startswith(f"encoder: differs from its golden vectors {found}") and message.endswith(", on a CPU")
    assert reason == (
        "a small excess may come from rounding, if another CPU computed the golden vectors" if is_like_rounding else ""
    )


def test_no_cosine_in_a_message_is_below_minus_one():
    vectors = np.random.default_rng(1).standard_normal((100, 8), np.float32)
    assert bundle_check.distance(vectors, -vectors)[1] == pytest.approx(-1, abs=1e-12)


def test_numbers_read_back_from_json_as_the_same_fp32():
    values = torch.randn(100) * 10.0 ** torch.randint(-6, 6, (100,)).float()
    again = torch.tensor(json.loads(json.dumps(bundle_format.numbers(values))), dtype=torch.float32)
    assert torch.equal(again, values)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.float16, "fp16")])
def test_the_manifest_has_the_precision_of_the_weights_and_what_the_head_was_trained_on(tmp_path, dtype, precision):
    built = fixture_bundles.build(tmp_path / "tokenizer.json")
    cast_weights(built.encoder.graph, dtype)
    manifest = bundle.manifest(replace(built, keeps="liked", values=ActionThresholds(4.0)), tmp_path)
    assert manifest["encoder"]["precision"] == precision
    assert (manifest["history"]["keeps"], manifest["history"]["liked_from"]) == ("liked", 4.0)
    assert "disliked_to" not in manifest["history"]


def test_golden_content_of_fp16_weights_is_computed_in_fp32(tmp_path):
    encoder = fixture_bundles.build(tmp_path / "tokenizer.json").encoder
    cast_weights(encoder.graph, torch.float16)
    before = {name: tensor.clone() for name, tensor in encoder.graph.state_dict().items()}
    frequencies = [buffer.clone() for buffer in encoder.graph.buffers()]
    ids = encoder.tokenize(["a lamp and a cup of tea"])
    got = bundle.exact_content(encoder, ids)
    # The encoder is unchanged, and its rotary frequencies are still in fp32.
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.graph.state_dict().items())
    assert frequencies and all(
        torch.equal(a, b) and a.dtype == b.dtype == torch.float32
        for a, b in zip(frequencies, encoder.graph.buffers(), strict=True)
    )
    assert encoder.dtype == torch.float16 and got.dtype == torch.float32
    want = copy.deepcopy(encoder.graph)
    cast_weights(want, torch.float32)
    assert torch.equal(got, want(torch.tensor(ids), torch.ones(1, len(ids[0]), dtype=torch.int64)))
