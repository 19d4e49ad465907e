"""An int8 encoder: its graph, how close it is to the model, and its place in runs and bundles."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import FIXTURE
from int8_bundle import TEXTS
from onnx import helper, numpy_helper

from learn.content import embedding_store, graph_encoder
from learn.content.ceg import LoadConfig
from learn.data.item_text import ItemText, render
from learn.padding import pad
from learn.serving import bundle_check, digests, fixture_bundles, int8_encoder, quantise, tolerances


def int8_constants(graph):
    model = onnx.load(graph)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}


def test_vectors_are_close_to_those_of_the_model_alone_and_in_company(tiny_folder, tiny_int8):
    prompts = [render(text) for text in TEXTS]
    got, want = tiny_int8.encode(prompts), tiny_folder.loaded().encode(prompts)
    error, cosine = bundle_check.distance(got, want)
    assert 1e-4 < error < 0.05 and cosine > 0.99
    alone = np.concatenate([tiny_int8.encode([prompt]) for prompt in prompts])
    np.testing.assert_allclose(got, alone, atol=1e-6)


def test_every_layer_is_quantised_to_weights_that_cannot_saturate_on_any_cpu(tiny_int8):
    model = onnx.load(tiny_int8.folder / "encoder.onnx")
    operators = [node.op_type for node in model.graph.node]
    # Two layers of Llama: queries, keys, values, output, gate, up and down.
    assert operators.count("MatMulIntegerToFloat") == 14 and "Gemm" not in operators
    assert operators.count("Softmax") == 2 and "IsNaN" not in operators
    # Queries, keys and values read one quantised value, and so do gate and up.
    assert operators.count("QuantizeLinear") == 8
    weights = int8_constants(tiny_int8.folder / "encoder.onnx")
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
    divisor = found["x.activation.divisor"]
    step = found["y.layer.scale"] * divisor[:, None].astype(np.float64)
    assert (np.abs(found["y.layer.weight"] * step - weight) <= 0.5001 * step).all()
    # The channels' sizes differ by a factor of 400 before, and by less after.
    sizes = np.maximum(-low, high)
    even = sizes * divisor
    assert even.max() / even.min() < 0.2 * sizes.max() / sizes.min()
    assert (rewriter._graph.node[-1].op_type, list(found)) == (
        "MatMulIntegerToFloat",
        [*(f"x.activation.{name}" for name in ("divisor", "scale", "zero")), "y.layer.weight", "y.layer.scale"],
    )


def test_a_large_table_is_rows_of_int8_with_a_scale_each(tiny_int8, tmp_path, monkeypatch):
    source = shutil.copy(FIXTURE / "encoder.onnx", tmp_path / "source.onnx")
    ids = tiny_int8.tokenize([render(text) for text in TEXTS])
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


def test_the_graph_is_made_once_and_identifies_what_was_encoded_with_it(tiny_folder, tiny_int8, monkeypatch, tmp_path):
    run = tiny_int8.folder.parents[1]
    again = int8_encoder.of_run(tiny_folder, TEXTS, run)
    assert again.folder == tiny_int8.folder and again.identity.digest() == tiny_int8.identity.digest()
    prompts = [render(text) for text in TEXTS]
    other = int8_encoder.of_run(tiny_folder, TEXTS[:5], run)
    keys = {embedding_store.cache_key(e, prompts) for e in (tiny_folder, tiny_int8, other)}
    assert len(keys) == 3
    stored = embedding_store.encode_cached(tiny_int8, prompts, tmp_path)
    np.testing.assert_allclose(stored, tiny_int8.encode(prompts), atol=1e-6)
    monkeypatch.setattr(quantise, "quantise", None)
    assert int8_encoder.of_run(tiny_folder, TEXTS, run).folder == tiny_int8.folder


# --- how close it is to the model ------------------------------------------------------------------------------------


def catalogue(n_items, n_texts=None):
    return [ItemText(title=f"Item {number % (n_texts or n_items)}") for number in range(n_items)]


@pytest.mark.parametrize(
    ("n_items", "n_measured", "n_checked"),
    [(5, 4, 1), (18, 15, 3), (600, 480, 120), (640, 512, 128), (768, 512, 153), (9742, 512, 256), (100_000, 512, 256)],
)
def test_the_graph_is_checked_on_texts_that_its_ranges_were_not_measured_on(n_items, n_measured, n_checked):
    texts = catalogue(n_items)
    measured, checked = int8_encoder.sample(texts)
    assert (len(measured), len(checked)) == (n_measured, n_checked)
    assert len({*measured, *checked}) == n_measured + n_checked
    # Both come from the whole catalogue.
    place = {render(text): number for number, text in enumerate(texts)}
    for prompts in (measured, checked):
        places = [place[prompt] for prompt in prompts]
        assert n_items < 100 or (min(places) < 0.02 * n_items and max(places) > 0.97 * n_items)


def test_a_text_that_occurs_twice_is_not_checked_if_ranges_were_measured_on_it():
    measured, checked = int8_encoder.sample([*catalogue(40), *catalogue(40)])
    assert checked and not {*measured} & {*checked}


@pytest.mark.parametrize(("n_items", "n_texts"), [(0, 1), (1, 1), (4, 4), (50, 3)])
def test_a_catalogue_that_leaves_no_text_for_the_check_is_refused(tiny_folder, tmp_path, n_items, n_texts):
    with pytest.raises(ValueError, match=rf"needs at least 5 items with texts of their own, and got {n_items} items"):
        int8_encoder.of_run(tiny_folder, catalogue(n_items, n_texts), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_facts_say_how_close_the_graph_is_to_the_model(tiny_folder, tiny_int8):
    _measured, checked = int8_encoder.sample(TEXTS)
    want, got = tiny_folder.loaded().encode(checked), tiny_int8.encode(checked)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(want, got, strict=True)]
    made = tiny_int8.facts.made
    assert (made["n_texts"], made["n_checked"]) == (15, 3)
    assert made["cosine_min"] == pytest.approx(min(cosines), abs=1e-5)
    assert made["cosine_median"] == pytest.approx(sorted(cosines)[1], abs=1e-5)
    assert int8_encoder.MIN_COSINE < made["cosine_min"] < made["cosine_median"] < 1.0


def test_a_graph_that_is_too_far_from_the_model_is_refused_and_not_kept(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "WEIGHT_TOP", 2)
    message = r"too far from the model: over 3 texts of the catalogue, .* but each must be at least 0\.98: use"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            int8_encoder.of_run(tiny_folder, TEXTS, tmp_path)
        assert not list((tmp_path / "cache").iterdir())


def test_vectors_that_are_not_finite_are_refused(tiny_folder, tmp_path, monkeypatch):
    def ruin(self, input_ids, mask):
        return np.full((len(input_ids), self.dim), np.nan, np.float32)

    monkeypatch.setattr(graph_encoder.GraphEncoder, "embed", ruin)
    with pytest.raises(ValueError, match="is not finite"):
        int8_encoder.of_run(tiny_folder, TEXTS, tmp_path)
    monkeypatch.setattr(graph_encoder.GraphEncoder, "encode", lambda self, prompts: ruin(self, prompts, None))
    with pytest.raises(ValueError, match="smallest cosine of their content embeddings is nan"):
        int8_encoder.of_run(tiny_folder, TEXTS, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_weights_in_fp16_are_refused(tiny_folder, tmp_path):
    half = replace(tiny_folder, config=LoadConfig(device="cpu", dtype="float16"))
    with pytest.raises(ValueError, match=r"encoder\.dtype is torch\.float16"):
        int8_encoder.of_run(half, TEXTS, tmp_path)


def test_a_bundle_holds_the_very_graph_and_says_so(tiny_int8, tiny_bundle):
    manifest = digests.read_manifest(tiny_bundle)
    spec = manifest["encoder"]
    assert (spec["precision"], spec["batching"], spec["tolerance"]) == ("int8", "together", tolerances.INT8.table())
    assert tolerances.of_content(manifest) == tolerances.INT8
    assert tolerances.of_content(digests.read_manifest(FIXTURE)) == tolerances.SINGLE_PRECISION
    assert {entry["path"] for entry in manifest["files"] if entry["part"] == "encoder"} == {
        "encoder.onnx",
        "encoder.weights",
        "tokenizer.json",
    }
    for path in tiny_int8.files:
        assert (tiny_bundle / path.name).read_bytes() == path.read_bytes()
    golden = json.loads((tiny_bundle / "golden.json").read_text())["items"]
    alone = np.concatenate([tiny_int8.embed(*pad([item["token_ids"]], tiny_int8.pad_id)) for item in golden])
    assert np.array_equal(alone, np.array([item["content"] for item in golden], np.float32))
    bundle_check.verify(tiny_bundle)


def test_content_beyond_the_tolerance_is_refused_with_a_word_about_cpus(tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    golden = json.loads((copy / "golden.json").read_text())
    golden["items"][2]["content"][3] += 0.015
    (copy / "golden.json").write_text(json.dumps(golden))
    bundle_check.verify_encoder(copy)
    golden["items"][2]["content"][3] += 0.015
    (copy / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ValueError, match=r"^encoder: differs from its golden vectors by 0\.03 .* another CPU"):
        bundle_check.verify_encoder(copy)


def test_the_encoder_digest_covers_whether_texts_share_runs(tiny_bundle):
    manifest = digests.read_manifest(tiny_bundle)
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
