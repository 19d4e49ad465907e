"""Linear layers that are rewritten to read weights as stored give the same output, and no Transpose is left to fold."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DEFAULT
from onnx import numpy_helper, parser

from learn.serving import bundle_check, gemm_rewrite

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LEADING_SIZES = ((1, 1), (1, 6), (3, 5), (4, 1), (0, 3), (2, 0))
WEIGHTS = {
    "w": (6, 4),
    "w2": (4, 6),
    "w3": (6, 4),
    "b": (6,),
    "b2": (4,),
    "scale": (4,),
    "one": (1,),
    "by_position": (2, 6),
}
TRANSPOSE_BOTH = "w_t = Transpose <perm = [1, 0]> (w)  w2_t = Transpose <perm = [1, 0]> (w2)"


def graph_of(body, result="float[b,s,k] y"):
    """Builds a graph with the inputs x [b,s,4] and z [c,s,4]; the WEIGHTS that it names are random initializers."""
    head = '<ir_version: 10, opset_import: ["" : 20]>'
    model = parser.parse_model(f"{head} g (float[b,s,4] x, float[c,s,4] z) => ({result}) {{ {body} }}")
    named = {name for node in model.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in named:
            model.graph.initializer.append(numpy_helper.from_array(torch.randn(shape).numpy(), name))
    return model


def rewrite(model):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    n_products = gemm_rewrite.read_weights_as_stored(model)
    onnx.checker.check_model(model, full_check=True)
    assert n_products == op_types(model).count("Gemm")
    return model


def op_types(model):
    return [node.op_type for node in model.graph.node]


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_same_output(model, rewritten, leading=LEADING_SIZES):
    left, right = session(model), session(rewritten)
    for n_rows, length in leading:
        for n_others in {1, n_rows}:
            feeds = {"x": torch.randn(n_rows, length, 4).numpy(), "z": torch.randn(n_others, length, 4).numpy()}
            feeds = {port.name: feeds[port.name] for port in left.get_inputs()}
            for want, got in zip(left.run(None, feeds), right.run(None, feeds), strict=True):
                np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("bias", ["y = Add(p, b)", "y = Add(b, p)", "y = Identity(p)"])
def test_a_linear_layer_reads_the_initializer_itself(bias):
    model = graph_of(f"w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  {bias}")
    rewritten = rewrite(model)
    gemm = rewritten.graph.node[1]
    assert op_types(rewritten)[:5] == ["Reshape", "Gemm", "Shape", "Concat", "Reshape"] and gemm.input[1] == "w"
    assert list(gemm.input[2:]) == (["b"] if "Add" in bias else [])
    assert rewritten.graph.initializer[: len(model.graph.initializer)] == list(model.graph.initializer)
    assert_same_output(model, rewritten)


def test_values_stay_reshaped_to_rows_from_one_layer_to_the_next():
    model = graph_of(f"""{TRANSPOSE_BOTH}  w3_t = Transpose(w3)
        p = MatMul(x, w_t)  up = Add(p, b)  active = Gelu(up)  down = MatMul(active, w2_t)  added = Add(down, x)
        normed = LayerNormalization <axis = -1> (added, scale, b2)
        gate = MatMul(normed, w_t)  open = Sigmoid(gate)  swish = Mul(gate, open)  other = MatMul(normed, w3_t)
        y = Mul(swish, other)""")
    rewritten = rewrite(model)
    assert op_types(rewritten).count("Reshape") == 2 and "Transpose" not in op_types(rewritten)
    # A weight that two layers share is still stored once.
    assert [node.input[1] for node in rewritten.graph.node if node.op_type == "Gemm"] == ["w", "w2", "w", "w3"]
    assert_same_output(model, rewritten)


def test_an_output_as_wide_as_the_input_reuses_the_shape_of_the_input():
    model = graph_of(f"{TRANSPOSE_BOTH}  up = MatMul(x, w_t)  down = MatMul(up, w2_t)  y = Identity(down)")
    rewritten = rewrite(model)
    assert op_types(rewritten) == ["Reshape", "Gemm", "Gemm", "Shape", "Reshape", "Identity"]
    assert_same_output(model, rewritten)


@pytest.mark.parametrize(
    ("reader", "result"),
    [
        # The other operand has different or fewer leading axes.
        ("q = MatMul(z, w_t)  y = Add(p, q)", "float[b,s,6] y"),
        ("y = Add(p, by_position)", "float[b,s,6] y"),
        ("y = Add(p, one)", "float[b,s,6] y"),
        # The node works along an axis that rows do not have.
        ("n = Constant <value_ints = [1]> ()  y = ReduceSum(p, n)", "float[b,k,6] y"),
        ("y = LayerNormalization <axis = 1> (p, by_position)", "float[b,s,6] y"),
        ("y = LayerNormalization <axis = 2> (p, b)", "float[b,s,6] y"),
        ("y = Softmax <axis = 1> (p)", "float[b,s,6] y"),
        # A Reshape copies sizes from axes that rows do not have, or copies none.
        ("n = Constant <value_ints = [0, 0, 3, 2]> ()  y = Reshape(p, n)", "float[b,s,3,2] y"),
        ("n = Constant <value_ints = [-1, 2]> ()  y = Reshape <allowzero = 1> (p, n)", "float[k,2] y"),
        # The product is read by another node than the Add of its bias, or by an Add of something else.
        ("y = Add(p, b)  extra = Mul(p, b)", "float[b,s,6] y, float[b,s,6] extra"),
        ("q = Add(p, b)  y = Add(q, p)", "float[b,s,6] y"),
        ("y = Add(p, p)", "float[b,s,6] y"),
        ("y = Add(p, b)", "float[b,s,6] y, float[b,s,6] p"),
        # One of the two outputs does not have the shape of the rows.
        ("y, mean = LayerNormalization <axis = -1> (p, b)", "float[b,s,6] y, float[b,s,1] mean"),
    ],
)
def test_every_reader_of_a_layer_gives_the_same_output(reader, result):
    model = graph_of(f"w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  {reader}", result)
    rewritten = rewrite(model)
    assert "Transpose" not in op_types(rewritten)
    assert_same_output(model, rewritten, [(1, 2), (3, 2)] if "by_position" in reader else [(1, 1), (1, 6), (3, 5)])


def test_a_branch_can_read_values_of_the_outer_graph():
    model = graph_of("""w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  n = Size(x)
        limit = Constant <value_int = 20> ()  big = Greater(n, limit)
        y = If (big) <then_branch = t () => (float[b,s,6] u) { u = Add(p, b) },
                      else_branch = e () => (float[b,s,6] v) { v = Neg(p) }>""")
    # `graph_of` does not find names that only a branch uses.
    model.graph.initializer.append(numpy_helper.from_array(torch.randn(6).numpy(), "b"))
    rewritten = rewrite(model)
    assert op_types(rewritten).count("Gemm") == 1
    assert_same_output(model, rewritten)


@pytest.mark.parametrize(
    "body",
    [
        "w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  q = ReduceMax(w_t)  y = Add(p, q)",
        "w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(w_t, w)  y = MatMul(x, p)",
        "w2_t = Transpose <perm = [0, 1]> (w2)  y = MatMul(x, w2_t)",
        "y = MatMul(x, w2)",
    ],
    ids=["transpose has another reader", "transpose is on the left", "transpose changes nothing", "no transpose"],
)
def test_other_graphs_are_left_unchanged(body):
    model = graph_of(body)
    assert rewrite(model) == model


def test_a_transposed_weight_that_is_an_output_is_kept():
    model = graph_of("w_t = Transpose <perm = [1, 0]> (w)  y = MatMul(x, w_t)", "float[b,s,6] y, float[4,6] w_t")
    assert rewrite(model) == model


def test_the_shipped_encoder_transposes_no_linked_weight():
    graph = onnx.load(DEFAULT / "encoder.onnx", load_external_data=False).graph
    linked = {tensor.name for tensor in graph.initializer if tensor.external_data}
    gemms = [node for node in graph.node if node.op_type == "Gemm"]
    # Six layers, each with the projections query, key, value, output, up and down.
    assert len(gemms) == 6 * 6 and {name for node in gemms for name in node.input[1:]} <= linked
    assert not linked & {name for node in graph.node if node.op_type == "Transpose" for name in node.input}


def test_sessions_share_the_weights_of_the_shipped_encoder():
    path = DEFAULT / "encoder.onnx"
    if not (DEFAULT / "model.safetensors").exists():
        pytest.skip("the encoder's weights are missing; `make setup` fetches them")
    model = onnx.load(path)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    shared = {
        tensor.name: onnxruntime.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.name in weights
    }
    ids = torch.randint(1000, 20000, (3, 9)).numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (want,) = bundle_check.session(path).run(None, feeds)
    for _ in range(2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        for name, value in shared.items():
            options.add_initializer(name, value)
        (got,) = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
        np.testing.assert_array_equal(got, want)
