"""The encoder against PyTorch, at sizes that the exporter did not see; of every graph, its ports and its privacy."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from conftest import DEFAULT, FIXTURE
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from learn import bundle, export
from learn.graphs import EncoderGraph

GRAPHS = ("encoder.onnx", "user_tower.onnx", "item_tower.onnx", "cvr.onnx")
COMMON = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = COMMON | {"num_key_value_heads": 2, "max_position_embeddings": 64}


def llama():
    return LlamaModel(LlamaConfig(**DECODER))


def qwen3():
    return Qwen3Model(Qwen3Config(**DECODER, head_dim=8))


def bert():
    return BertModel(BertConfig(**COMMON, max_position_embeddings=64), add_pooling_layer=False)


def ragged_batch(lengths, side):
    ids = torch.randint(1, 64, (len(lengths), max(lengths)))
    index = torch.arange(max(lengths))[None]
    n = torch.tensor(lengths)[:, None]
    mask = (index < n if side == "right" else index >= max(lengths) - n).long()
    return ids * mask, mask


def run(path, *arrays):
    session = bundle.session(path)
    names = [port.name for port in session.get_inputs()]
    return session.run(None, {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)})


def wide(module):
    """Larger weights than a fresh model has, so that attention is not uniform and mistakes are not small."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


@pytest.mark.parametrize("build", [llama, qwen3, bert])
def test_encoders_of_any_shape(build, tmp_path):
    graph = EncoderGraph(wide(build())).eval()
    onnx.save(export.encoder_model(graph), tmp_path / "encoder.onnx")
    # BERT counts positions from the left whatever the mask says: padding there changes its answer in PyTorch too.
    sides = ("right",) if build is bert else ("right", "left")
    for side in sides:
        for lengths in ([1], [5], [3, 9, 1], [2] * 5):
            ids, mask = ragged_batch(lengths, side)
            with torch.no_grad():
                want = graph(ids, mask).numpy()
                singles = [
                    graph(i[m == 1][None], torch.ones(1, int(m.sum()), dtype=torch.int64))
                    for i, m in zip(ids, mask, strict=True)
                ]
            (got,) = run(tmp_path / "encoder.onnx", ids, mask)
            np.testing.assert_allclose(got, want, atol=2e-5)
            # Padding and neighbours leave no trace in a row.
            np.testing.assert_allclose(got, torch.cat(singles).numpy(), atol=2e-5)
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("build", [llama, bert])
def test_linked_weights_give_the_same_answers_and_are_not_inline(build, tmp_path):
    graph = EncoderGraph(wide(build())).eval()
    weights = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in graph.model.state_dict().items()}, weights)
    inline = export.encoder_model(graph)
    linked = onnx.ModelProto.FromString(inline.SerializeToString())
    n_linked = export.link(linked, weights)
    # Every matrix of the model is at least 24 x 24 x 4 bytes; six a layer, and two tables of embeddings.
    assert n_linked >= 14
    assert linked.ByteSize() < inline.ByteSize() / 2
    # As stored, so that sessions can share them: all that is computed from them is products.
    names = {tensor.name for tensor in linked.graph.initializer if tensor.external_data}
    assert not names & {name for node in linked.graph.node if node.op_type == "Transpose" for name in node.input}
    weights_of_products = [node.input[1] for node in linked.graph.node if node.op_type == "Gemm"]
    assert len(weights_of_products) == (12 if build is bert else 14) and names.issuperset(weights_of_products)
    onnx.save(linked, tmp_path / "encoder.onnx")
    for lengths in ([4, 8], [1], [9, 2, 5]):
        ids, mask = ragged_batch(lengths, "right")
        (got,) = run(tmp_path / "encoder.onnx", ids, mask)
        np.testing.assert_allclose(got, graph(ids, mask).detach().numpy(), atol=2e-5)
    flipped = bytearray(weights.read_bytes())
    flipped[-4000:] = bytes(4000)
    weights.write_bytes(flipped)
    (broken,) = run(tmp_path / "encoder.onnx", ids, mask)
    assert np.abs(broken - got).max() > 1e-3


def test_equal_weights_are_stored_once_and_a_scalar_is_no_vector():
    scalar = onnx.numpy_helper.from_array(np.array(1.0, np.float32), "scalar")
    vector = onnx.numpy_helper.from_array(np.array([1.0], np.float32), "vector")
    again = onnx.numpy_helper.from_array(np.array([1.0], np.float32), "again")
    node = onnx.helper.make_node("Sum", ["scalar", "vector", "again"], ["out"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], [scalar, vector, again]))
    export.share_equal_weights(model)
    assert [tensor.name for tensor in model.graph.initializer] == ["scalar", "vector"]
    assert list(model.graph.node[0].input) == ["scalar", "vector", "vector"]


@pytest.mark.parametrize("folder", [FIXTURE, DEFAULT], ids=["fixture", "default"])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_trace_of_the_machine_that_exported(folder, name):
    raw = (folder / name).read_bytes()
    words = re.findall(rb"[ -~]{4,}", raw)
    traces = [w for w in words if re.search(rb"/root|/work|/home|/tmp|site-packages|\.py\b", w)]
    assert not traces
    model = onnx.load(folder / name, load_external_data=False)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("folder", [FIXTURE, DEFAULT], ids=["fixture", "default"])
def test_axes_are_dynamic_and_ports_are_named_as_the_format_says(folder):
    signatures = (export.ENCODER, export.USER_TOWER, export.ITEM_TOWER, export.CVR)
    for name, signature in zip(GRAPHS, signatures, strict=True):
        graph = onnx.load(folder / name, load_external_data=False).graph
        assert tuple(port.name for port in graph.input) == signature.inputs
        assert tuple(port.name for port in graph.output) == signature.outputs
        for port, axes in zip(graph.input, signature.axes, strict=True):
            assert tuple(d.dim_param for d in port.type.tensor_type.shape.dim)[: len(axes)] == axes


def test_gelu_and_layer_norm_stay_single_nodes():
    graph = onnx.load(DEFAULT / "encoder.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert "Gelu" in kinds and "LayerNormalization" in kinds
    assert "Erf" not in kinds and "ReduceMean" not in kinds
