"""Graphs of other bundles and of other tools: used again as they are, and dynamic ones that depend on their batch."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tomli_w
from conftest import FIXTURE
from int8_bundle import TEXTS, write_bundle
from onnx import helper, numpy_helper

from learn import atomic_file
from learn.data.item_text import ItemText, render
from learn.padding import pad
from learn.serving import (
    bundle_check,
    bundle_format,
    bundle_inference,
    digests,
    int8_encoder,
    quantise,
    tolerances,
)

PROMPTS = [render(text) for text in TEXTS]


def declare(folder, out, **changes):
    """Returns a copy of the bundle with other entries in `encoder`, with None for one that is left out.

    The files that are there are listed as they are.
    """
    copy = shutil.copytree(folder, out)
    manifest = digests.read_manifest(copy)
    spec = manifest["encoder"] | changes
    manifest["encoder"] = {name: value for name, value in spec.items() if value is not None}
    write_manifest(copy, manifest)
    return copy


def write_manifest(folder, manifest):
    entries = [entry for entry in manifest["files"] if (folder / entry["path"]).is_file()]
    files = [bundle_format.file_entry(folder / entry["path"], entry["part"]) for entry in entries]
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest | {"files": files}))


@pytest.fixture(scope="module")
def dynamic(tiny_bundle, tmp_path_factory):
    """A bundle whose encoder is quantised dynamically, with golden content of each text alone; nothing is declared."""
    out = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("dynamic") / "bundle")
    (out / "encoder.weights").unlink()
    model = onnx.load(FIXTURE / "encoder.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    layers = {layer.node.output[0]: layer for layer in quantise._layers(model.graph, constants)}
    for node in model.graph.node:
        if not (layer := layers.get(node.output[0])):
            nodes.append(node)
            continue
        result = node.output[0]
        quantised, scale = quantise._rounded(layer.weight.astype(np.float64), 0, 127)
        for name, value in (("weight", quantised), ("scale", scale)):
            model.graph.initializer.append(numpy_helper.from_array(value, f"{result}.{name}"))
        q = [f"{result}.{name}" for name in ("q", "q_scale", "q_zero", "sum", "float", "scaled")]
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [layer.x], q[:3]),
            helper.make_node("MatMulInteger", [q[0], f"{result}.weight", q[2]], [q[3]]),
            helper.make_node("Cast", [q[3]], [q[4]], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [q[4], q[1]], [q[5]]),
            helper.make_node("Mul", [q[5], f"{result}.scale"], [result]),
        ]
    assert len(layers) == 14
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out / "encoder.onnx")
    golden = json.loads((out / "golden.json").read_text())
    session = bundle_check.session(out / "encoder.onnx")
    for item in golden["items"]:
        ids, mask = pad([item["token_ids"]])
        content = session.run(None, {"input_ids": ids, "attention_mask": mask})[0][0]
        item["content"] = bundle_format.numbers(content)
    (out / "golden.json").write_text(json.dumps(golden))
    return out


# --- dynamic graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["together", None])
@pytest.mark.parametrize("tolerance", [None, {"absolute": 0.0999, "cosine": 0.98}], ids=["narrow", "wide"])
def test_a_dynamic_graph_that_is_not_declared_is_refused_with_what_to_do(dynamic, tmp_path, batching, tolerance):
    with pytest.raises(ValueError, match="vectors depend on what else is in their batch") as caught:
        bundle_check.verify_encoder(declare(dynamic, tmp_path / "declared", batching=batching, tolerance=tolerance))
    assert 'encoder.batching = "alone"' in str(caught.value) and "dynamic quantisation" in str(caught.value)
    assert f"on {bundle_check.cpu_name()}, one differs by" in str(caught.value)


def test_a_dynamic_graph_that_is_declared_gets_one_text_per_run(dynamic, tmp_path):
    declared = declare(dynamic, tmp_path / "declared", batching="alone")
    bundle_check.verify_encoder(declared)
    golden = json.loads((declared / "golden.json").read_text())["items"]
    graphs = bundle_inference.BundleGraphs(declared, bundle_inference.GraphsConfig(provider="cpu"))
    content, faults, _n_tokens = graphs.content([ItemText.from_json(item["text"]) for item in golden])
    assert not faults
    assert np.array_equal(content, np.array([item["content"] for item in golden], np.float32))


def test_a_word_for_batching_that_the_server_does_not_know_is_refused(dynamic, tmp_path):
    declared = declare(dynamic, tmp_path / "declared", batching="allone")
    message = "encoder.batching is 'allone', but it must be one of together, alone"
    with pytest.raises(ValueError, match=message):
        bundle_check.verify_encoder(declared)
    with pytest.raises(ValueError, match=message):
        bundle_inference.BundleGraphs(declared, bundle_inference.GraphsConfig(provider="cpu"))
    with pytest.raises(ValueError, match=message):
        digests.encoder_digest(digests.read_manifest(declared))


def test_vectors_may_differ_in_company_by_the_bound_of_the_server_and_no_more():
    assert tolerances.BATCH_TOLERANCE.table() == {"absolute": 1e-4, "cosine": 0.99999}
    alone = np.eye(3, 8, dtype=np.float32)
    for error, is_refused in ((0.0, False), (9.9e-5, False), (1.01e-4, True), (np.nan, True)):
        together = alone.copy()
        together[1, 4] += np.float32(error)
        if is_refused:
            with pytest.raises(ValueError, match="vectors depend on what else is in their batch"):
                bundle_check._check_company(together, alone)
        else:
            bundle_check._check_company(together, alone)
    # Small values may differ by less than the absolute bound and still point elsewhere.
    with pytest.raises(ValueError, match=r"cosine 0\.9950\d+ \(above 0\.99999\)"):
        bundle_check._check_company(1e-4 * (alone + 0.1 * np.roll(alone, 1, axis=1)), 1e-4 * alone)


def test_the_cpu_is_named_by_its_model_or_else_by_its_architecture(tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    monkeypatch.setattr(bundle_check, "CPU_FACTS", facts)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert bundle_check.cpu_name() == "aarch64"
    facts.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert bundle_check.cpu_name() == "aarch64"
    facts.write_text("processor\t: 0\nmodel name\t: A CPU: 2 GHz\nmodel name\t: Another\n")
    assert bundle_check.cpu_name() == "A CPU: 2 GHz"


# --- a bundle's graph, used again ------------------------------------------------------------------------------------


def renamed(folder, out):
    """Returns a copy of the bundle whose encoder has another file name and other ports."""
    copy = shutil.copytree(folder, out)
    model = onnx.load(copy / "encoder.onnx", load_external_data=False)
    new = {"input_ids": "ids", "attention_mask": "real", "content": "vector"}
    for port in (*model.graph.input, *model.graph.output):
        port.name = new[port.name]
    for node in model.graph.node:
        for names in (node.input, node.output):
            changed = [new.get(name, name) for name in names]
            del names[:]
            names.extend(changed)
    (copy / "encoder.onnx").unlink()
    (copy / "minilm.onnx").write_bytes(model.SerializeToString())
    manifest = digests.read_manifest(copy)
    manifest["encoder"] |= {"file": "minilm.onnx", "inputs": ["ids", "real"], "outputs": ["vector"], "pad_id": 3}
    manifest["encoder"]["tolerance"] = {"absolute": 0.03, "cosine": 0.995}
    for entry in manifest["files"]:
        entry["path"] = entry["path"].replace("encoder.onnx", "minilm.onnx")
    manifest["provenance"]["quantisation"]["on"] = datetime.date(2026, 5, 1)
    write_manifest(copy, manifest)
    return copy


def test_all_that_the_manifest_says_of_a_graph_goes_into_the_next_bundle(tiny_folder, tiny_int8, tiny_bundle, tmp_path):
    source = renamed(tiny_bundle, tmp_path / "renamed")
    reused = int8_encoder.reused(source, tiny_folder, TEXTS, tmp_path / "run")
    np.testing.assert_array_equal(reused.encode(PROMPTS), tiny_int8.encode(PROMPTS))
    assert reused.pad_id == 3 and reused.facts.made["on"] == "2026-05-01"
    (tmp_path / "next").mkdir()
    following = write_bundle(reused, tmp_path / "next")
    bundle_check.verify(following)
    before, after = (digests.read_manifest(path) for path in (source, following))
    assert after["encoder"] == before["encoder"]
    assert digests.encoder_digest(after) == digests.encoder_digest(before)
    assert (following / "minilm.onnx").read_bytes() == (source / "minilm.onnx").read_bytes()


def test_a_dynamic_graph_still_gets_one_text_per_run_when_it_is_used_again(tiny_folder, dynamic, tmp_path):
    declared = declare(dynamic, tmp_path / "declared", batching="alone", precision="int8")
    reused = int8_encoder.reused(declared, tiny_folder, TEXTS, tmp_path / "run")
    alone = np.concatenate([reused.encode([prompt]) for prompt in PROMPTS])
    assert np.array_equal(reused.encode(PROMPTS), alone)
    (tmp_path / "next").mkdir()
    following = write_bundle(reused, tmp_path / "next")
    bundle_check.verify(following)
    manifests = [digests.read_manifest(path) for path in (declared, following)]
    assert manifests[1]["encoder"] == manifests[0]["encoder"] and manifests[0]["encoder"]["batching"] == "alone"
    assert digests.encoder_digest(manifests[1]) == digests.encoder_digest(manifests[0])
    # Its vectors are others than those of the same graph in company, so it is another encoder.
    together = replace(reused, facts=replace(reused.facts, batching="together"))
    assert together.identity.digest() != reused.identity.digest()


def test_a_graph_is_copied_anew_if_anything_that_the_manifest_says_of_it_changes(tiny_folder, tiny_bundle, tmp_path):
    def kept(number, change):
        copy = shutil.copytree(tiny_bundle, tmp_path / str(number))
        manifest = digests.read_manifest(copy)
        change(manifest)
        write_manifest(copy, manifest)
        return int8_encoder.reused(copy, tiny_folder, TEXTS, tmp_path / "run")

    changes = (
        lambda manifest: None,
        lambda manifest: manifest["encoder"].update(pad_id=2),
        lambda manifest: manifest["encoder"].update(batching="alone"),
        lambda manifest: manifest["encoder"].update(tolerance={"absolute": 0.05, "cosine": 0.99}),
        lambda manifest: manifest["provenance"]["quantisation"].update(n_texts=7),
        lambda manifest: manifest["provenance"]["quantisation"].update(model="other"),
    )
    found = [kept(number, change) for number, change in enumerate(changes)]
    assert len({encoder.folder for encoder in found}) == len(changes)
    assert [encoder.pad_id for encoder in found[:3]] == [0, 2, 0]
    assert found[2].facts.batching == "alone" and found[3].facts.tolerance["absolute"] == 0.05
    assert found[4].facts.made["n_texts"] == 7 and found[5].name == "other"
    assert kept("again", changes[0]).folder == found[0].folder
    with pytest.raises(ValueError, match=r"has content embeddings of 31 numbers, and those of .* have 32$"):
        kept("narrow", lambda manifest: manifest["encoder"].update(dim=31))


def test_a_damaged_or_missing_file_is_refused_and_nothing_is_kept(tiny_folder, tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    raw = bytearray((copy / "encoder.weights").read_bytes())
    raw[100] ^= 1
    (copy / "encoder.weights").write_bytes(raw)
    with pytest.raises(ValueError, match=r"copy/encoder\.weights is not the file that the manifest lists"):
        int8_encoder.reused(copy, tiny_folder, TEXTS, tmp_path / "run")
    (copy / "encoder.weights").unlink()
    with pytest.raises(ValueError, match=r"copy/encoder\.weights is missing, but encoder\.int8_from needs it"):
        int8_encoder.reused(copy, tiny_folder, TEXTS, tmp_path / "run")
    assert not list((tmp_path / "run" / "cache").iterdir())
    with pytest.raises(ValueError, match=r"encoder\.int8_from is '.*/nowhere', but there is no bundle in that folder"):
        int8_encoder.reused(tmp_path / "nowhere", tiny_folder, TEXTS, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../encoder.weights", "the file '../encoder.weights' leaves the bundle's folder"),
        ("/etc/passwd", "the file '/etc/passwd' leaves the bundle's folder"),
        ("sub/encoder.weights", "the encoder's file 'sub/encoder.weights' has a name that"),
        ("facts.json", "the encoder's file 'facts.json' has a name that"),
    ],
)
def test_file_names_of_a_manifest_that_lead_elsewhere_are_refused(tiny_folder, tiny_bundle, tmp_path, name, message):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    manifest = digests.read_manifest(copy)
    for entry in manifest["files"]:
        entry["path"] = entry["path"].replace("encoder.weights", name)
    (copy / "manifest.toml").write_text(tomli_w.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        int8_encoder.reused(copy, tiny_folder, TEXTS, tmp_path / "run")
    assert not list(tmp_path.glob("run/cache/*"))


def test_a_graph_whose_file_has_the_name_of_another_file_of_the_bundle_is_refused(tiny_int8, tmp_path):
    copy = shutil.copytree(tiny_int8.folder, tmp_path / "copy")
    (copy / "encoder.onnx").rename(copy / "cvr.onnx")
    other = replace(tiny_int8, folder=copy, facts=replace(tiny_int8.facts, file="cvr.onnx"))
    with pytest.raises(ValueError, match=r"copy/cvr\.onnx has the name of another file of the bundle"):
        write_bundle(other, tmp_path)


def test_a_graph_is_on_disk_before_it_gets_its_name(tiny_folder, tiny_bundle, tmp_path, monkeypatch):
    synced, sync = [], atomic_file.sync
    monkeypatch.setattr(atomic_file, "sync", lambda path: (synced.append(path.name), sync(path)))
    reused = int8_encoder.reused(tiny_bundle, tiny_folder, TEXTS, tmp_path)
    assert {"encoder.onnx", "encoder.weights", "facts.json"} == set(synced[:3]) and synced[3:] == ["int8", "cache"]
    synced.clear()
    int8_encoder.keep(reused, tmp_path)
    assert len(synced) == 5 and (tmp_path / reused.folder.name / "encoder.weights").is_file()
    # From now on, this copy is the one in use.
    assert int8_encoder.reused(tiny_bundle, tiny_folder, TEXTS, tmp_path).folder == tmp_path / reused.folder.name


def test_the_graph_of_a_bundle_can_be_used_again(tiny_folder, tiny_int8, tiny_bundle, tmp_path):
    reused = int8_encoder.reused(tiny_bundle, tiny_folder, TEXTS, tmp_path)
    assert reused.identity.digest() == tiny_int8.identity.digest()
    prompts = [render(text) for text in TEXTS]
    assert np.array_equal(reused.encode(prompts), tiny_int8.encode(prompts))
    with pytest.raises(ValueError, match="has an encoder in fp32, expected int8"):
        int8_encoder.reused(FIXTURE, tiny_folder, TEXTS, tmp_path)
    with pytest.raises(ValueError, match="has another tokenizer or max_tokens"):
        int8_encoder.reused(tiny_bundle, replace(tiny_folder, max_tokens=9), TEXTS, tmp_path)
