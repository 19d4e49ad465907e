"""Exported encoders match PyTorch at sizes unknown to the exporter; graphs have the right ports and no local paths."""

from __future__ import annotations

import copy
import functools
import re

import numpy as np
import onnx
import pytest
import torch
from baichuan_checkpoint import CONFIG as BAICHUAN
from baichuan_checkpoint import random_checkpoint
from conftest import DEFAULT, FIXTURE
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from learn.content import baichuan
from learn.content.encoder_graph import EncoderGraph, cast_weights
from learn.serving import bundle_check, bundle_format, digests, encoder_export

GRAPHS = ("encoder.onnx", "user_tower.onnx", "item_tower.onnx", "cvr.onnx")
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
DECODER = COMMON | {"num_key_value_heads": 2, "max_position_embeddings": 64}
# How far ONNX Runtime may be from PyTorch with the same weights. fp16 weights are compared with PyTorch in fp16 and in
# fp32, in which golden vectors are computed. On a CPU, ONNX Runtime computes in fp32 and rounds to fp16 between nodes;
# the largest error seen was 3.4e-4. Entries of an embedding are about 32**-0.5 here and about C**-0.5 in a real model
# of width C, and the error scales with them.
TOLERANCE = {torch.float16: 1e-3, torch.float32: 2e-5}


def llama():
    return LlamaModel(LlamaConfig(**DECODER, num_hidden_layers=2))


def qwen2():
    return Qwen2Model(Qwen2Config(**DECODER, num_hidden_layers=1))


def qwen3():
    return Qwen3Model(Qwen3Config(**DECODER, num_hidden_layers=1, head_dim=16))


def bert():
    return BertModel(BertConfig(**COMMON, num_hidden_layers=2, max_position_embeddings=64), add_pooling_layer=False)


def baichuan_7b():
    model = LlamaModel(baichuan.llama_config(BAICHUAN))
    model.load_state_dict(baichuan.llama_state(random_checkpoint()))
    return model


ENCODERS = [
    (llama, torch.float32),
    (qwen2, torch.float32),
    (qwen3, torch.float32),
    (bert, torch.float32),
    (baichuan_7b, torch.float16),
    (qwen3, torch.float16),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function (build, dtype) -> (module, folder of its exported graph and weights) that exports each pair once."""

    @functools.cache
    def export(build, dtype):
        torch.manual_seed(1)
        graph = EncoderGraph(perturbed(build())).eval()
        cast_weights(graph, dtype)
        folder = tmp_path_factory.mktemp("exported")
        encoder_export.export_encoder(graph, folder)
        return graph, folder

    return export


def ragged_batch(lengths, side):
    ids = torch.randint(1, 60, (len(lengths), max(lengths)))
    index = torch.arange(max(lengths))[None]
    n = torch.tensor(lengths)[:, None]
    mask = (index < n if side == "right" else index >= max(lengths) - n).long()
    return ids * mask, mask


def run(path, *arrays):
    session = bundle_check.session(path)
    names = [port.name for port in session.get_inputs()]
    return session.run(None, {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)})


def perturbed(module):
    """Adds noise to the weights, so that attention is not uniform and errors are not small."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


@pytest.mark.parametrize(("build", "dtype"), ENCODERS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_exported_encoders_match_pytorch_on_batches_of_any_shape(exported, build, dtype):
    graph, folder = exported(build, dtype)
    # BERT counts positions from the left whatever the mask says: padding there changes its output in PyTorch too. The
    # decoders' positions are rotary, so only distances count, and padding on the left shifts all tokens equally.
    sides = ("right",) if build is bert else ("right", "left")
    for side in sides:
        for lengths in ([1], [5], [3, 9, 1], [2] * 5):
            ids, mask = ragged_batch(lengths, side)
            with torch.no_grad():
                same_dtype = graph(ids, mask).numpy()
                cast_weights(graph, torch.float32)
                exact = graph(ids, mask).numpy()
                singles = [
                    graph(i[m == 1][None], torch.ones(1, int(m.sum()), dtype=torch.int64))
                    for i, m in zip(ids, mask, strict=True)
                ]
                cast_weights(graph, dtype)
            (got,) = run(folder / "encoder.onnx", ids, mask)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, same_dtype, atol=TOLERANCE[dtype])
            np.testing.assert_allclose(got, exact, atol=TOLERANCE[dtype])
            # Neither padding nor the other rows of the batch change a row.
            np.testing.assert_allclose(got, torch.cat(singles).numpy(), atol=TOLERANCE[dtype])
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)


def test_fp16_weights_take_about_half_the_bytes(exported):
    sizes = [(exported(qwen3, dtype)[1] / "encoder.weights").stat().st_size for dtype in (torch.float32, torch.float16)]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_bfloat16_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the encoder is in torch\.bfloat16; load it in float32 or float16"):
        encoder_export.export_encoder(EncoderGraph(qwen3().bfloat16()), tmp_path)


def save_shards(graph, folder, n_shards):
    """Saves the model's own tensors as safetensors files that are named as Hugging Face names them."""
    state = {name: tensor.contiguous() for name, tensor in graph.model.state_dict().items()}
    names = sorted(state)
    paths = []
    for number in range(n_shards):
        paths.append(folder / f"model-{number + 1:05}-of-{n_shards:05}.safetensors")
        save_file({name: state[name] for name in names[number::n_shards]}, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("build", "dtype", "n_shards"),
    [(llama, torch.float32, 1), (llama, torch.float32, 3), (bert, torch.float32, 1), (qwen3, torch.float16, 2)],
    ids=["llama", "llama in shards", "bert", "qwen3 in fp16"],
)
def test_linked_weights_give_the_same_output_and_are_not_inline(exported, tmp_path, build, dtype, n_shards):
    graph, folder = exported(build, dtype)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "out").mkdir()
    weights = save_shards(graph, tmp_path / "checkpoint", n_shards)
    encoder_export.place_weights(folder, tmp_path / "out", weights)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"encoder.onnx", *(path.name for path in weights)}
    linked = onnx.load(tmp_path / "out" / "encoder.onnx", load_external_data=False)
    n_matrices = {llama: 14, bert: 12, qwen3: 7}[build]
    # Six or seven matrices per layer and at least one embedding table; every matrix is large enough to be linked.
    assert sum(bool(tensor.external_data) for tensor in linked.graph.initializer) >= n_matrices + 1
    # Graphs use the matrices as stored, so that sessions can share them: no Transpose reads one, and every Gemm does.
    names = {tensor.name for tensor in linked.graph.initializer if tensor.external_data}
    assert not names & {name for node in linked.graph.node if node.op_type == "Transpose" for name in node.input}
    weights_of_products = [node.input[1] for node in linked.graph.node if node.op_type == "Gemm"]
    assert len(weights_of_products) == n_matrices and names.issuperset(weights_of_products)
    for lengths in ([4, 8], [1], [9, 2, 5]):
        ids, mask = ragged_batch(lengths, "right")
        (got,) = run(tmp_path / "out" / "encoder.onnx", ids, mask)
        with torch.no_grad():
            want = graph(ids, mask).numpy()
        np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype])
    broken = tmp_path / "out" / weights[-1].name
    raw = bytearray(broken.read_bytes())
    raw[-1500:] = bytes(1500)
    broken.write_bytes(raw)
    (broken,) = run(tmp_path / "out" / "encoder.onnx", ids, mask)
    assert np.abs(broken - got).max() > 1e-3


@pytest.mark.parametrize("in_own_file", [False, True], ids=["inline", "in its own file"])
def test_weights_of_another_dtype_than_the_checkpoint_are_written_to_the_bundle(
    exported, tmp_path, monkeypatch, in_own_file
):
    graph, folder = exported(qwen3, torch.float16)
    (tmp_path / "out").mkdir()
    bfloat16 = copy.deepcopy(graph).bfloat16()
    if in_own_file:
        monkeypatch.setattr(encoder_export, "INLINE_UP_TO_BYTES", 0)
    encoder_export.place_weights(folder, tmp_path / "out", save_shards(bfloat16, tmp_path, 1))
    expected = {"encoder.onnx", "encoder.weights"} if in_own_file else {"encoder.onnx"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    ids, mask = ragged_batch([3, 7], "right")
    (want,) = run(folder / "encoder.onnx", ids, mask)
    np.testing.assert_allclose(run(tmp_path / "out" / "encoder.onnx", ids, mask)[0], want, atol=1e-7)


def test_equal_weights_are_stored_once_and_a_scalar_never_replaces_a_vector(tmp_path):
    scalar = onnx.numpy_helper.from_array(np.array(1.0, np.float32), "scalar")
    vector = onnx.numpy_helper.from_array(np.array([1.0], np.float32), "vector")
    again = onnx.numpy_helper.from_array(np.array([1.0], np.float32), "again")
    node = onnx.helper.make_node("Sum", ["scalar", "vector", "again"], ["out"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], [scalar, vector, again]))
    encoder_export.share_equal_weights(model, tmp_path)
    assert [tensor.name for tensor in model.graph.initializer] == ["scalar", "vector"]
    assert list(model.graph.node[0].input) == ["scalar", "vector", "vector"]


@pytest.mark.parametrize("folder", [FIXTURE, DEFAULT], ids=["fixture", "default"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_have_no_trace_of_the_machine_that_exported_them(folder, name):
    raw = (folder / name).read_bytes()
    words = re.findall(rb"[ -~]{4,}", raw)
    traces = [w for w in words if re.search(rb"/root|/work|/home|/tmp|site-packages|\.py\b", w)]
    assert not traces
    model = onnx.load(folder / name, load_external_data=False)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("folder", [FIXTURE, DEFAULT], ids=["fixture", "default"])
def test_axes_are_dynamic_and_ports_are_named_as_the_format_specifies(folder):
    actions = digests.read_manifest(folder)["history"]["actions"]
    user_tower = bundle_format.user_tower(actions)
    signatures = (bundle_format.ENCODER, user_tower, bundle_format.ITEM_TOWER, bundle_format.CVR)
    for name, signature in zip(GRAPHS, signatures, strict=True):
        graph = onnx.load(folder / name, load_external_data=False).graph
        assert tuple(port.name for port in graph.input) == signature.inputs
        assert tuple(port.name for port in graph.output) == signature.outputs
        for port, axes in zip(graph.input, signature.axes, strict=True):
            assert tuple(d.dim_param for d in port.type.tensor_type.shape.dim)[: len(axes)] == axes


def test_gelu_and_layer_norm_stay_single_nodes():
    graph = onnx.load(DEFAULT / "encoder.onnx", load_external_data=False).graph
    op_types = [node.op_type for node in graph.node]
    assert "Gelu" in op_types and "LayerNormalization" in op_types
    assert "Erf" not in op_types and "ReduceMean" not in op_types
