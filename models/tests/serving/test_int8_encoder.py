"""An int8 encoder: its graph, its place in runs and bundles, and dynamic graphs that depend on their batch."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tomli_w
import torch
from conftest import FIXTURE, write_movielens
from onnx import helper, numpy_helper

from learn.cli import main
from learn.content import embedding_store, graph_encoder
from learn.content.ceg import EncoderFolder, LoadConfig
from learn.data.item_text import ItemText, render
from learn.padding import pad
from learn.serving import (
    bundle,
    bundle_check,
    bundle_format,
    bundle_inference,
    digests,
    fixture_bundles,
    int8_encoder,
    quantise,
    tolerances,
)

TEXTS = [ItemText(title=f"{name} number {n}") for n in range(6) for name in ("Lamp", "Kettle", "A long jacket")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fixtures' encoder as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(fixture_bundles.FIRST.seed)
    fixture_bundles.byte_tokenizer().save(str(folder / "tokenizer.json"))
    fixture_bundles.encoder_model().save_pretrained(folder)
    return EncoderFolder(folder, fixture_bundles.MAX_TOKENS, LoadConfig(device="cpu"))


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory):
    return int8_encoder.of_run(folder, TEXTS, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def written(encoder, tmp_path_factory):
    """A bundle with the int8 encoder."""
    out = tmp_path_factory.mktemp("int8")
    first = fixture_bundles.build(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    bundle.write(replace(first, encoder=encoder), out)
    return out


def int8_constants(graph):
    model = onnx.load(graph)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}


def test_vectors_are_close_to_those_of_the_model_alone_and_in_company(folder, encoder):
    prompts = [render(text) for text in TEXTS]
    got, want = encoder.encode(prompts), folder.loaded().encode(prompts)
    error, cosine = bundle_check.distance(got, want)
    assert 1e-4 < error < 0.05 and cosine > 0.99
    alone = np.concatenate([encoder.encode([prompt]) for prompt in prompts])
    np.testing.assert_allclose(got, alone, atol=1e-6)


def test_every_layer_is_quantised_to_weights_that_cannot_saturate_on_any_cpu(encoder):
    model = onnx.load(encoder.folder / "encoder.onnx")
    operators = [node.op_type for node in model.graph.node]
    # Two layers of Llama: queries, keys, values, output, gate, up and down.
    assert operators.count("MatMulIntegerToFloat") == 14 and "Gemm" not in operators
    assert operators.count("Softmax") == 2 and "IsNaN" not in operators
    # Queries, keys and values read one quantised value, and so do gate and up.
    assert operators.count("QuantizeLinear") == 8
    weights = int8_constants(encoder.folder / "encoder.onnx")
    assert len(weights) == 14
    largest = max(int(np.abs(weight.astype(int)).max()) for weight in weights.values())
    # CPUs without VNNI add two products of a uint8 and an int8 value in a saturating int16.
    assert largest == 63 and 2 * 255 * largest < 2**15 < 2 * 255 * 127


def test_smoothing_changes_no_product_and_evens_out_the_channels():
    low, high = np.array([-3.0, 0.0, -0.1]), np.array([40.0, 0.5, 0.0])
    weight = np.array([[0.1, -0.2], [3.0, 0.4], [-5.0, 0.0]], np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", 1, None)])
    layer = quantise.Layer(graph.node[0], "x", weight, "")
    ranges = {"x": quantise.Range(low, high)}
    rewriter = quantise._Rewriter(graph, {"w": weight}, [layer], ranges)
    rewriter.rewrite()
    found = rewriter.constants
    step = found["y.scale"] * found["x.divisor"][:, None].astype(np.float64)
    assert (np.abs(found["y.weight"] * step - weight) <= 0.5001 * step).all()
    # The channels' sizes differ by a factor of 400 before, and by less after.
    sizes = np.maximum(-low, high)
    even = sizes * found["x.divisor"]
    assert even.max() / even.min() < 0.2 * sizes.max() / sizes.min()
    assert (rewriter._graph.node[-1].op_type, list(found)) == (
        "MatMulIntegerToFloat",
        ["x.divisor", "x.scale", "x.zero", "y.weight", "y.scale"],
    )


def test_a_large_table_is_rows_of_int8_with_a_scale_each(encoder, tmp_path, monkeypatch):
    source = shutil.copy(FIXTURE / "encoder.onnx", tmp_path / "source.onnx")
    ids = encoder.tokenize([render(text) for text in TEXTS])
    vectors = []
    for least, n_tables in ((1 << 20, 0), (1024, 1)):
        monkeypatch.setattr(quantise, "LEAST_TABLE_BYTES", least)
        quantise.quantise(source, tmp_path, ids)
        constants = int8_constants(tmp_path / "encoder.onnx")
        tables = [table for name, table in constants.items() if name.endswith(".rows")]
        assert len(tables) == n_tables and len(constants) == 14 + n_tables
        graph, inputs = bundle_check.session(tmp_path / "encoder.onnx"), pad(ids)
        vectors.append(graph.run(None, {"input_ids": inputs[0], "attention_mask": inputs[1]})[0])
    # The row of the padding token is zero.
    assert tables[0].shape == (fixture_bundles.VOCABULARY, 32)
    assert (np.abs(tables[0][1:].astype(int)).max(axis=1) == 127).all()
    error, cosine = bundle_check.distance(*vectors)
    assert 1e-6 < error < 0.05 and cosine > 0.99


def test_the_graph_is_made_once_and_identifies_what_was_encoded_with_it(folder, encoder, monkeypatch, tmp_path):
    again = int8_encoder.of_run(folder, TEXTS, encoder.folder.parent)
    assert again.folder == encoder.folder and again.identity.digest() == encoder.identity.digest()
    prompts = [render(text) for text in TEXTS]
    other = int8_encoder.of_run(folder, TEXTS[:5], encoder.folder.parent)
    keys = {embedding_store.cache_key(e, prompts) for e in (folder, encoder, other)}
    assert len(keys) == 3
    stored = embedding_store.encode_cached(encoder, prompts, tmp_path)
    np.testing.assert_allclose(stored, encoder.encode(prompts), atol=1e-6)
    monkeypatch.setattr(quantise, "quantise", None)
    assert int8_encoder.of_run(folder, TEXTS, encoder.folder.parent).folder == encoder.folder


def test_weights_in_fp16_are_refused(folder, tmp_path):
    half = replace(folder, config=LoadConfig(device="cpu", dtype="float16"))
    with pytest.raises(ValueError, match=r"encoder\.dtype is torch\.float16"):
        int8_encoder.of_run(half, TEXTS, tmp_path)


def test_a_bundle_holds_the_very_graph_and_says_so(encoder, written):
    manifest = digests.read_manifest(written)
    spec = manifest["encoder"]
    assert (spec["precision"], spec["batching"], spec["tolerance"]) == ("int8", "together", tolerances.INT8.table())
    assert tolerances.of_content(manifest) == tolerances.INT8
    assert tolerances.of_content(digests.read_manifest(FIXTURE)) == tolerances.SINGLE_PRECISION
    assert {entry["path"] for entry in manifest["files"] if entry["part"] == "encoder"} == {
        "encoder.onnx",
        "encoder.weights",
        "tokenizer.json",
    }
    for path in encoder.files:
        assert (written / path.name).read_bytes() == path.read_bytes()
    golden = json.loads((written / "golden.json").read_text())["items"]
    alone = np.concatenate([encoder.embed(*pad([item["token_ids"]], encoder.pad_id)) for item in golden])
    assert np.array_equal(alone, np.array([item["content"] for item in golden], np.float32))
    bundle_check.verify(written)


def test_content_beyond_the_tolerance_is_refused_with_a_word_about_cpus(written, tmp_path):
    copy = shutil.copytree(written, tmp_path / "copy")
    golden = json.loads((copy / "golden.json").read_text())
    golden["items"][2]["content"][3] += 0.015
    (copy / "golden.json").write_text(json.dumps(golden))
    bundle_check.verify_encoder(copy)
    golden["items"][2]["content"][3] += 0.015
    (copy / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(
        ValueError, match=r"^encoder: differs from golden vectors of the same int8 graph \(on a CPU with"
    ):
        bundle_check.verify_encoder(copy)


def test_the_graph_of_a_bundle_can_be_used_again(folder, encoder, written, tmp_path):
    reused = int8_encoder.reused(written, folder, tmp_path)
    assert reused.identity.digest() == encoder.identity.digest()
    prompts = [render(text) for text in TEXTS]
    assert np.array_equal(reused.encode(prompts), encoder.encode(prompts))
    with pytest.raises(ValueError, match="has an encoder in fp32, expected int8"):
        int8_encoder.reused(FIXTURE, folder, tmp_path)
    with pytest.raises(ValueError, match="has another tokenizer or max_tokens"):
        int8_encoder.reused(written, replace(folder, max_tokens=9), tmp_path)


# --- dynamic graphs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(written, tmp_path_factory):
    """A bundle whose encoder is quantised dynamically, with golden content of each text alone; nothing is declared."""
    out = shutil.copytree(written, tmp_path_factory.mktemp("dynamic") / "bundle")
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


def declare(folder, tmp_path, **changes):
    """Returns a copy of the bundle with other entries in `encoder`, with None for one that is left out."""
    copy = shutil.copytree(folder, tmp_path / "declared")
    manifest = digests.read_manifest(copy)
    spec = manifest["encoder"] | changes
    manifest["encoder"] = {name: value for name, value in spec.items() if value is not None}
    (copy / "manifest.toml").write_text(tomli_w.dumps(manifest))
    return copy


@pytest.mark.parametrize("batching", ["together", None])
def test_a_dynamic_graph_that_is_not_declared_is_refused_with_what_to_do(dynamic, tmp_path, batching):
    with pytest.raises(ValueError, match="vectors depend on what else is in their batch") as caught:
        bundle_check.verify_encoder(declare(dynamic, tmp_path, batching=batching))
    assert 'encoder.batching = "alone"' in str(caught.value) and "dynamic quantisation" in str(caught.value)


def test_a_dynamic_graph_that_is_declared_gets_one_text_per_run(dynamic, tmp_path):
    declared = declare(dynamic, tmp_path, batching="alone")
    bundle_check.verify_encoder(declared)
    golden = json.loads((declared / "golden.json").read_text())["items"]
    graphs = bundle_inference.BundleGraphs(declared, bundle_inference.GraphsConfig(provider="cpu"))
    content, faults, _n_tokens = graphs.content([ItemText.from_json(item["text"]) for item in golden])
    assert not faults
    assert np.array_equal(content, np.array([item["content"] for item in golden], np.float32))


def test_the_encoder_digest_covers_whether_texts_share_runs(written):
    manifest = digests.read_manifest(written)
    for_company = manifest | {"encoder": {k: v for k, v in manifest["encoder"].items() if k != "batching"}}
    alone = manifest | {"encoder": manifest["encoder"] | {"batching": "alone"}}
    assert digests.encoder_digest(manifest) == digests.encoder_digest(for_company) != digests.encoder_digest(alone)
    assert digests.tower_digest(manifest) != digests.tower_digest(alone)

    def strings(*values):
        return b"".join(struct.pack("<Q", len(value.encode())) + value.encode() for value in values)

    files = sorted((e["path"], e["sha256"]) for e in manifest["files"] if e["part"] == "encoder")
    raw = strings(*(part for file in files for part in file), manifest["item_text"]["template"])
    raw += struct.pack("<Qq", manifest["item_text"]["max_tokens"], manifest["encoder"]["pad_id"])
    raw += strings("input_ids", "attention_mask", "content", "alone")
    assert digests.encoder_digest(alone) == hashlib.sha256(raw).hexdigest()[:32]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_towers_are_trained_on_the_content_of_the_exported_graph(folder, tmp_path, capsys):
    films = [(i, f"Film number {i}", "Drama|War" if i % 2 else "Comedy") for i in range(1, 21)]
    ratings = [(u, (u * 3 + i) % 20 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 13) for i in range(8)]
    write_movielens(tmp_path / "ml", ratings, films)
    run = ["--run", str(tmp_path / "run"), "--encoder", str(folder.folder), "--threads", "1"]
    whole = [*run, "--data", str(tmp_path / "ml"), "--steps", "3", "--out", str(tmp_path / "out")]
    assert main(["all", *whole, "--encoder-precision", "int8"]) == 0
    bundle_check.verify(tmp_path / "out")
    manifest = digests.read_manifest(tmp_path / "out")
    assert manifest["encoder"]["precision"] == "int8" and manifest["provenance"]["quantisation"]["n_texts"] == 20
    (made,) = (tmp_path / "run" / "cache").glob("encoder-int8-*")
    assert (tmp_path / "out" / "encoder.onnx").read_bytes() == (made / graph_encoder.GRAPH).read_bytes()
    # Without the setting, these towers would get content that they were not trained on.
    assert main(["export", *run, "--out", str(tmp_path / "out")]) == 1
    assert "its towers were trained with" in capsys.readouterr().err

    (tmp_path / "next.toml").write_text(f"[encoder]\nprecision = 'int8'\nint8_from = '{tmp_path / 'out'}'\n")
    again = ["--run", str(tmp_path / "next"), *run[2:], "--config", str(tmp_path / "next.toml")]
    assert main(["prepare", *again, "--data", str(tmp_path / "ml")]) == 0
    assert main(["train", *again, "--steps", "2", "--from", str(tmp_path / "run")]) == 0
