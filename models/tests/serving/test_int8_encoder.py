"""An int8 encoder: its graph, how close it is to the model, and its place in runs and bundles."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import FIXTURE, write_movielens
from int8_bundle import TEXTS, encoder_folder, write_bundle
from onnx import helper, numpy_helper

from learn.cli import main
from learn.content import embedding_store, graph_encoder
from learn.content.ceg import LoadConfig
from learn.data.item_text import ItemText, render
from learn.padding import pad
from learn.run_settings import EncoderSettings, Settings
from learn.serving import bundle_check, digests, fixture_bundles, int8_encoder, quantise, tolerances
from learn.training_run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory):
    return int8_encoder.of_run(folder, TEXTS, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def written(encoder, tmp_path_factory):
    """A bundle with the int8 encoder."""
    return write_bundle(encoder, tmp_path_factory.mktemp("int8"))


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
    run = encoder.folder.parents[1]
    again = int8_encoder.of_run(folder, TEXTS, run)
    assert again.folder == encoder.folder and again.identity.digest() == encoder.identity.digest()
    prompts = [render(text) for text in TEXTS]
    other = int8_encoder.of_run(folder, TEXTS[:5], run)
    keys = {embedding_store.cache_key(e, prompts) for e in (folder, encoder, other)}
    assert len(keys) == 3
    stored = embedding_store.encode_cached(encoder, prompts, tmp_path)
    np.testing.assert_allclose(stored, encoder.encode(prompts), atol=1e-6)
    monkeypatch.setattr(quantise, "quantise", None)
    assert int8_encoder.of_run(folder, TEXTS, run).folder == encoder.folder


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
def test_a_catalogue_that_leaves_no_text_for_the_check_is_refused(folder, tmp_path, n_items, n_texts):
    with pytest.raises(ValueError, match=rf"needs at least 5 items with texts of their own, and got {n_items} items"):
        int8_encoder.of_run(folder, catalogue(n_items, n_texts), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_facts_say_how_close_the_graph_is_to_the_model(folder, encoder):
    _measured, checked = int8_encoder.sample(TEXTS)
    want, got = folder.loaded().encode(checked), encoder.encode(checked)
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(want, got, strict=True)]
    made = encoder.facts.made
    assert (made["n_texts"], made["n_checked"]) == (15, 3)
    assert made["cosine_min"] == pytest.approx(min(cosines), abs=1e-5)
    assert made["cosine_median"] == pytest.approx(sorted(cosines)[1], abs=1e-5)
    assert int8_encoder.MIN_COSINE < made["cosine_min"] < made["cosine_median"] < 1.0


def test_a_graph_that_is_too_far_from_the_model_is_refused_and_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "WEIGHT_TOP", 2)
    message = r"too far from the model: over 3 texts of the catalogue, .* but each must be at least 0\.98: use"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            int8_encoder.of_run(folder, TEXTS, tmp_path)
        assert not list((tmp_path / "cache").iterdir())


def test_vectors_that_are_not_finite_are_refused(folder, tmp_path, monkeypatch):
    def ruin(self, input_ids, mask):
        return np.full((len(input_ids), self.dim), np.nan, np.float32)

    monkeypatch.setattr(graph_encoder.GraphEncoder, "embed", ruin)
    with pytest.raises(ValueError, match="is not finite"):
        int8_encoder.of_run(folder, TEXTS, tmp_path)
    monkeypatch.setattr(graph_encoder.GraphEncoder, "encode", lambda self, prompts: ruin(self, prompts, None))
    with pytest.raises(ValueError, match="smallest cosine of their content embeddings is nan"):
        int8_encoder.of_run(folder, TEXTS, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


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
    assert manifest["encoder"]["precision"] == "int8" and manifest["provenance"]["quantisation"]["n_texts"] == 16
    provenance = manifest["provenance"]["quantisation"]
    assert provenance["n_checked"] == 4 and 0.98 < provenance["cosine_min"] <= provenance["cosine_median"] < 1
    (made,) = (tmp_path / "run" / "cache").glob("encoder-int8-*")
    assert (tmp_path / "out" / "encoder.onnx").read_bytes() == (made / "encoder.onnx").read_bytes()
    # Without the setting, these towers would get content that they were not trained on.
    assert main(["export", *run, "--out", str(tmp_path / "out")]) == 1
    assert "its towers were trained with" in capsys.readouterr().err

    (tmp_path / "next.toml").write_text(f"[encoder]\nprecision = 'int8'\nint8_from = '{tmp_path / 'out'}'\n")
    again = ["--run", str(tmp_path / "next"), *run[2:], "--config", str(tmp_path / "next.toml")]
    assert main(["prepare", *again, "--data", str(tmp_path / "ml")]) == 0
    assert main(["train", *again, "--steps", "2", "--from", str(tmp_path / "run")]) == 0
    _check_that_towers_keep_their_graph(tmp_path, run)


def _check_that_towers_keep_their_graph(tmp_path, run):
    """Anybody may delete cache/; the graph that towers are trained on lies beside them."""
    settings = Settings(encoder=EncoderSettings(precision="int8"))
    assert Run(tmp_path / "run", Path(run[3]), settings).content_tolerance() == tolerances.INT8
    assert Run(tmp_path / "run", Path(run[3]), Settings()).content_tolerance() == tolerances.SINGLE_PRECISION
    before = (tmp_path / "out" / "encoder.onnx").read_bytes()
    (kept,) = (tmp_path / "run").glob("encoder-int8-*")
    shutil.rmtree(tmp_path / "run" / "cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantise, "quantise", None)
        for step in (["evaluate"], ["export", "--out", str(tmp_path / "out")]):
            assert main([*step, *run, "--encoder-precision", "int8"]) == 0
    assert (tmp_path / "out" / "encoder.onnx").read_bytes() == before == (kept / "encoder.onnx").read_bytes()
    assert not list((tmp_path / "run" / "cache").glob("encoder-int8-*"))
    # Towers that are trained anew, on other content, do not need it.
    assert main(["train", *run, "--steps", "2"]) == 0
    assert not kept.exists()
