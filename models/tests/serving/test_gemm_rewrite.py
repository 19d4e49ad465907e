"""Linear layers on weights as stored against the graphs that transpose them: equal, and nothing left to fold."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DEFAULT
from onnx import numpy_helper, parser

from learn.serving import bundle, gemm_rewrite

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LEADING = ((1, 1), (1, 6), (3, 5), (4, 1), (0, 3), (2, 0))
WEIGHTS = {
    "w": (6, 4),
    "w2": (4, 6),
    "w3": (6, 4),
    "b": (6,),
    "b2": (4,),
    "scale": (4,),
    "one": (1,),
    "by_place": (2, 6),
}
BOTH = "w_t = Transpose <perm = [1, 0]> (w)  w2_t = Transpose <perm = [1, 0]> (w2)"


def graph_of(body, result="float[b,s,k] y"):
    """x [b,s,4] and z [c,s,4] come in; WEIGHTS are initializers of random values where the body names them."""
    head = '<ir_version: 10, opset_import: ["" : 20]>'
    model = parser.parse_model(f"{head} g (float[b,s,4] x, float[c,s,4] z) => ({result}) {{ {body} }}")
    named = {name for node in model.graph.node for name in node.input}
    for name, shape in WEIGHTS.items():
        if name in named:
            model.graph.initializer.append(numpy_helper.from_array(torch.randn(shape).numpy(), name))
    return model


def rewritten(model):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    n_products = gemm_rewrite.read_weights_as_stored(model)
    onnx.checker.check_model(model, full_check=True)
    assert n_products == kinds(model).count("Gemm")
    return model


def kinds(model):
    return [node.op_type for node in model.graph.node]


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def same_answers(model, again, leading=LEADING):
    left, right = session(model), session(again)
    for n_rows, length in leading:
        for n_others in {1, n_rows}:
            feeds = {"x": torch.randn(n_rows, length, 4).numpy(), "z": torch.randn(n_others, length, 4).numpy()}
            feeds = {port.name: feeds[port.name] for port in left.get_inputs()}
            for want, got in zip(left.run(None, feeds), right.run(None, feeds), strict=True):
                np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("bias", ["y = Add(p, b)", "y = Add(b, p)", "y = Identity(p)"])
def test_a_layer_reads_the_initializer_itself(bias):
    model = graph_of(f"w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  {bias}")
    again = rewritten(model)
    gemm = again.graph.node[1]
    assert kinds(again)[:5] == ["Reshape", "Gemm", "Shape", "Concat", "Reshape"] and gemm.input[1] == "w"
    assert list(gemm.input[2:]) == (["b"] if "Add" in bias else [])
    assert again.graph.initializer[: len(model.graph.initializer)] == list(model.graph.initializer)
    same_answers(model, again)


def test_values_stay_rows_from_one_layer_to_the_next():
    model = graph_of(f"""{BOTH}  w3_t = Transpose(w3)
        p = MatMul(x, w_t)  up = Add(p, b)  active = Gelu(up)  down = MatMul(active, w2_t)  added = Add(down, x)
        normed = LayerNormalization <axis = -1> (added, scale, b2)
        gate = MatMul(normed, w_t)  open = Sigmoid(gate)  swish = Mul(gate, open)  other = MatMul(normed, w3_t)
        y = Mul(swish, other)""")
    again = rewritten(model)
    assert kinds(again).count("Reshape") == 2 and "Transpose" not in kinds(again)
    # The weight of two layers is still one.
    assert [node.input[1] for node in again.graph.node if node.op_type == "Gemm"] == ["w", "w2", "w", "w3"]
    same_answers(model, again)


def test_a_width_that_comes_back_needs_no_shape_of_its_own():
    model = graph_of(f"{BOTH}  up = MatMul(x, w_t)  down = MatMul(up, w2_t)  y = Identity(down)")
    again = rewritten(model)
    assert kinds(again) == ["Reshape", "Gemm", "Gemm", "Shape", "Reshape", "Identity"]
    same_answers(model, again)


@pytest.mark.parametrize(
    ("reader", "result"),
    [
        # Values of other, perhaps fewer, leading axes.
        ("q = MatMul(z, w_t)  y = Add(p, q)", "float[b,s,6] y"),
        ("y = Add(p, by_place)", "float[b,s,6] y"),
        ("y = Add(p, one)", "float[b,s,6] y"),
        # Along an axis that rows do not have.
        ("n = Constant <value_ints = [1]> ()  y = ReduceSum(p, n)", "float[b,k,6] y"),
        ("y = LayerNormalization <axis = 1> (p, by_place)", "float[b,s,6] y"),
        ("y = LayerNormalization <axis = 2> (p, b)", "float[b,s,6] y"),
        ("y = Softmax <axis = 1> (p)", "float[b,s,6] y"),
        # Sizes copied from axes that rows do not have, and a new shape that copies none.
        ("n = Constant <value_ints = [0, 0, 3, 2]> ()  y = Reshape(p, n)", "float[b,s,3,2] y"),
        ("n = Constant <value_ints = [-1, 2]> ()  y = Reshape <allowzero = 1> (p, n)", "float[k,2] y"),
        # Read beside its bias, and by what is no bias.
        ("y = Add(p, b)  extra = Mul(p, b)", "float[b,s,6] y, float[b,s,6] extra"),
        ("q = Add(p, b)  y = Add(q, p)", "float[b,s,6] y"),
        ("y = Add(p, p)", "float[b,s,6] y"),
        ("y = Add(p, b)", "float[b,s,6] y, float[b,s,6] p"),
        # Of two results one is not of rows' shape.
        ("y, mean = LayerNormalization <axis = -1> (p, b)", "float[b,s,6] y, float[b,s,1] mean"),
    ],
)
def test_what_reads_a_layer_reads_the_same_as_before(reader, result):
    model = graph_of(f"w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  {reader}", result)
    again = rewritten(model)
    assert "Transpose" not in kinds(again)
    same_answers(model, again, [(1, 2), (3, 2)] if "by_place" in reader else [(1, 1), (1, 6), (3, 5)])


def test_a_branch_reads_values_around_it():
    model = graph_of("""w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  n = Size(x)
        five = Constant <value_int = 20> ()  big = Greater(n, five)
        y = If (big) <then_branch = t () => (float[b,s,6] u) { u = Add(p, b) },
                      else_branch = e () => (float[b,s,6] v) { v = Neg(p) }>""")
    # Names in a branch are not in the list of the graph's own nodes.
    model.graph.initializer.append(numpy_helper.from_array(torch.randn(6).numpy(), "b"))
    again = rewritten(model)
    assert kinds(again).count("Gemm") == 1
    same_answers(model, again)


@pytest.mark.parametrize(
    "body",
    [
        "w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(x, w_t)  q = ReduceMax(w_t)  y = Add(p, q)",
        "w_t = Transpose <perm = [1, 0]> (w)  p = MatMul(w_t, w)  y = MatMul(x, p)",
        "w2_t = Transpose <perm = [0, 1]> (w2)  y = MatMul(x, w2_t)",
        "y = MatMul(x, w2)",
    ],
    ids=["read by others", "on the left", "not transposed", "inline"],
)
def test_anything_else_is_left_alone(body):
    model = graph_of(body)
    assert rewritten(model) == model


def test_a_transposed_weight_that_is_an_output_stays():
    model = graph_of("w_t = Transpose <perm = [1, 0]> (w)  y = MatMul(x, w_t)", "float[b,s,6] y, float[4,6] w_t")
    assert rewritten(model) == model


def test_the_shipped_encoder_has_nothing_to_fold():
    graph = onnx.load(DEFAULT / "encoder.onnx", load_external_data=False).graph
    linked = {tensor.name for tensor in graph.initializer if tensor.external_data}
    gemms = [node for node in graph.node if node.op_type == "Gemm"]
    # Query, key, value, output, up and down of six layers.
    assert len(gemms) == 6 * 6 and {name for node in gemms for name in node.input[1:]} <= linked
    assert not linked & {name for node in graph.node if node.op_type == "Transpose" for name in node.input}


def test_sessions_share_the_weights_of_the_shipped_encoder():
    path = DEFAULT / "encoder.onnx"
    if not (DEFAULT / "model.safetensors").exists():
        pytest.skip("the encoder's weights are not here; `make setup` fetches them")
    model = onnx.load(path)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    shared = {
        tensor.name: onnxruntime.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.name in weights
    }
    ids = torch.randint(1000, 20000, (3, 9)).numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (want,) = bundle.session(path).run(None, feeds)
    for _ in range(2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        for name, value in shared.items():
            options.add_initializer(name, value)
        (got,) = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
        np.testing.assert_array_equal(got, want)
