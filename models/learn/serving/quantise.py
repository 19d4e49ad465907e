"""Quantises an encoder's graph to int8: weights by output channel, activations by ranges measured on a catalogue.

Every product with a constant weight [in,out] becomes

    Mul by 1/c [in]  ->  QuantizeLinear (uint8)  ->  MatMulIntegerToFloat with int8 weights, scales [out] and the bias

and a large table of embeddings becomes int8 rows with one scale per row. All else stays in fp32; what only guards
against texts without tokens is removed.

- The ranges of activations are constants of the graph ("static"). Scales taken from the input instead ("dynamic") cover
  the whole batch in ONNX Runtime, so a text's vector would depend on its neighbours.
- A few channels of activations are 40 times larger than the rest. They are divided by c, and the weights multiplied by
  it, which changes no product and makes all channels about equally large (SmoothQuant, Xiao et al. 2023).
- Weights have 7 bits, -63 to 63. CPUs without VNNI add two products uint8 x int8 in a saturating int16, which 8 bits
  exceed (2 * 255 * 127) and 7 bits do not (2 * 255 * 63). So all CPUs compute the same sums.

Nothing here needs PyTorch. MatMulIntegerToFloat is in every ONNX Runtime for CPUs, but not in the ONNX standard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

WEIGHTS = "encoder.weights"
CONTRIB = "com.microsoft"
WEIGHT_TOP, ROW_TOP, ACTIVATION_TOP = 63, 127, 255
# How much of a channel's size moves from the activations to the weights. Of .3 to 1 on MiniLM, .7 was best with 7 bits.
SMOOTHING = 0.7
# Smaller weights and tables are not worth it.
LEAST_SIDE = 16
LEAST_TABLE_BYTES = 1 << 20
# A smaller tensor takes less space inline than as a link.
LINK_FROM_BYTES = 1024
_TINY = 1e-5


@dataclass(frozen=True)
class Layer:
    """A product of activations `x` [...,in] with a constant weight [in,out], and a bias if Gemm has one."""

    node: NodeProto
    x: str
    weight: np.ndarray
    bias: str


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of each channel [in]."""

    low: np.ndarray
    high: np.ndarray

    def joined(self, other: Range) -> Range:
        """The range of both."""
        return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


def quantise(source: Path, out: Path, token_ids: Sequence[Sequence[int]]) -> None:
    """Writes `source`, an encoder's graph in fp32, to the folder `out` as encoder.onnx and encoder.weights.

    Ranges are measured on `token_ids`, one text at a time. Raises ValueError if the graph has no product to quantise.
    """
    model = onnx.load(source, load_external_data=False)
    constants = {tensor.name: _array(tensor, source.parent) for tensor in model.graph.initializer}
    if any(array.dtype == np.float16 for array in constants.values()):
        raise ValueError("the encoder's weights are in fp16; load it in float32 to quantise it")
    remove_nan_guards(model.graph, constants)
    layers = list(_layers(model.graph, constants))
    if not layers:
        raise ValueError("the encoder has no product with a constant weight, so there is nothing to quantise")
    ranges = measure(source, model, [layer.x for layer in layers], token_ids)
    rewriter = _Rewriter(model.graph, constants, layers, ranges)
    rewriter.rewrite()
    if all(entry.domain != CONTRIB for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    _write(model, rewriter.constants, out)


def measure(
    source: Path, model: ModelProto, names: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> dict[str, Range]:
    """Returns the range of each named value over all texts. The graph's weights are beside `source`.

    Raises ValueError for no text, a text without tokens, and values that are not finite.
    """
    if not token_ids:
        raise ValueError("there is no text to measure activations on; give at least one")
    for number, row in enumerate(token_ids):
        if not row:
            raise ValueError(f"text {number} has no tokens, so activations cannot be measured on it; give it some text")
    names = sorted(set(names))
    probe = ModelProto()
    probe.CopyFrom(model)
    for name in names:
        probe.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    path = source.with_name(f".probe-{source.name}")
    path.write_bytes(probe.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()
    found: dict[str, Range] = {}
    for number, row in enumerate(token_ids):
        ids = np.array([row], np.int64)
        values = session.run(names, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        for name, value in zip(names, values, strict=True):
            if not np.isfinite(value).all():
                raise ValueError(
                    f"the activation {name!r} is not finite for text {number}, so it has no range; check the weights"
                )
            rows = value.reshape(-1, value.shape[-1])
            seen = Range(rows.min(axis=0), rows.max(axis=0))
            found[name] = found[name].joined(seen) if name in found else seen
    return found


def remove_nan_guards(graph: GraphProto, constants: dict[str, np.ndarray]) -> None:
    """Removes what PyTorch's exporter puts after each softmax: zeros in the place of rows that are not a number.

    A row is that if its token may attend to no token at all. Texts are padded on the right and have a token, so there
    is none. The guards cost 4 % of an int8 graph's time.
    """
    made = {node.output[0]: node for node in graph.node}
    guards = {}
    for node in graph.node:
        if node.op_type != "Where":
            continue
        test, value = made.get(node.input[0]), made.get(node.input[2])
        is_of_value = test is not None and test.op_type == "IsNaN" and test.input[0] == node.input[2]
        is_softmax = value is not None and value.op_type == "Softmax"
        zero = constants.get(node.input[1])
        if is_of_value and is_softmax and zero is not None and not zero.any():
            guards[node.output[0]] = node
    if guards.keys() & {port.name for port in graph.output}:
        return
    removed = [*guards.values(), *(made[node.input[0]] for node in guards.values())]
    kept = [node for node in graph.node if node not in removed]
    for node in kept:
        names = [guards[name].input[2] if name in guards else name for name in node.input]
        del node.input[:]
        node.input.extend(names)
    del graph.node[:]
    graph.node.extend(kept)


def _layers(graph: GraphProto, constants: dict[str, np.ndarray]) -> Iterator[Layer]:
    transposed = {
        node.output[0]: constants[node.input[0]].T
        for node in graph.node
        if node.op_type == "Transpose"
        and constants.get(node.input[0], np.empty(0)).ndim == 2
        and all(list(attribute.ints) == [1, 0] for attribute in node.attribute)
    }
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        x, name, *bias = node.input
        weight = transposed.get(name, constants.get(name))
        if weight is None or weight.ndim != 2 or x in constants or min(weight.shape) < LEAST_SIDE:
            continue
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if options.pop("transB", 0):
            weight = weight.T
        if any(value != (1.0 if name in ("alpha", "beta") else 0) for name, value in options.items()):
            continue
        if bias and constants.get(bias[0], np.empty(0)).shape != (weight.shape[1],):
            continue
        yield Layer(node, x, weight, bias[0] if bias else "")


class _Rewriter:
    """Replaces the nodes of the layers and of the large tables; `constants` has all constants of the new graph.

    What is added to a value is named after the value's role, since one value may be the result of a layer and the input
    of the next: `NAME.activation.*` belongs to a value that layers read, `NAME.layer.*` to a layer's result,
    `NAME.table.*` to a table, and `NAME.lookup.*` to what is read from a table. A name that is taken is an error.
    """

    def __init__(
        self, graph: GraphProto, constants: dict[str, np.ndarray], layers: Sequence[Layer], ranges: dict[str, Range]
    ) -> None:
        self.constants = dict(constants)
        self._graph, self._ranges = graph, ranges
        self._layers = {layer.node.output[0]: layer for layer in layers}
        self._nodes: list[NodeProto] = []
        # Layers that read the same value share its scales.
        self._readers: dict[str, list[Layer]] = defaultdict(list)
        for layer in layers:
            self._readers[layer.x].append(layer)
        self._smoothing: dict[str, np.ndarray] = {}
        self._tables: set[str] = set()
        self._taken = {port.name for port in graph.input} | constants.keys()
        self._taken |= {name for node in graph.node for name in node.output}

    def rewrite(self) -> None:
        """Changes the graph; constants that nothing reads any more are removed from `constants`."""
        for node in self._graph.node:
            if layer := self._layers.get(node.output[0]):
                self._product(layer)
            elif self._is_table(node):
                self._table(node)
            else:
                self._nodes.append(node)
        read = {name for node in self._nodes for name in node.input}
        kept = [n for n in self._nodes if n.op_type != "Transpose" or n.output[0] in read or self._is_output(n)]
        del self._graph.node[:]
        self._graph.node.extend(kept)
        read = {name for node in kept for name in node.input}
        self.constants = {name: array for name, array in self.constants.items() if name in read}

    def _is_output(self, node: NodeProto) -> bool:
        return node.output[0] in {port.name for port in self._graph.output}

    def _product(self, layer: Layer) -> None:
        x, result = layer.x, layer.node.output[0]
        if x not in self._smoothing:
            self._quantise_activations(x)
        weight = layer.weight.astype(np.float64) * self._smoothing[x][:, None]
        quantised, scale = _rounded(weight, 0, WEIGHT_TOP)
        weights = self._constant(f"{result}.layer.weight", quantised)
        scales = self._constant(f"{result}.layer.scale", scale)
        read = f"{x}.activation"
        inputs = [f"{read}.int8", weights, f"{read}.scale", scales, f"{read}.zero", "", layer.bias]
        # An input that is not given must not be the last one.
        self._node("MatMulIntegerToFloat", inputs if layer.bias else inputs[:-2], result, domain=CONTRIB)

    def _quantise_activations(self, x: str) -> None:
        found = self._ranges[x]
        of_values = np.maximum(np.maximum(-found.low, found.high).astype(np.float64), _TINY)
        of_weights = np.max([np.abs(layer.weight).max(axis=1) for layer in self._readers[x]], axis=0)
        smoothing = of_values**SMOOTHING / np.maximum(of_weights.astype(np.float64), _TINY) ** (1 - SMOOTHING)
        smoothing /= np.exp(np.log(smoothing).mean())
        divisor = (1.0 / smoothing).astype(np.float32)
        self._smoothing[x] = 1.0 / divisor.astype(np.float64)
        # Zero must be a value of the quantised range.
        low, high = min(0.0, float((found.low * divisor).min())), max(0.0, float((found.high * divisor).max()))
        scale = np.float32(max(high - low, _TINY) / ACTIVATION_TOP)
        name = f"{x}.activation"
        divisors = self._constant(f"{name}.divisor", divisor)
        parameters = [
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero", np.uint8(np.rint(-low / scale))),
        ]
        even = self._node("Mul", [x, divisors], self._new(f"{name}.even"))
        self._node("QuantizeLinear", [even, *parameters], self._new(f"{name}.int8"))

    def _is_table(self, node: NodeProto) -> bool:
        if node.op_type != "Gather" or any(a.name == "axis" and a.i != 0 for a in node.attribute):
            return False
        table = self.constants.get(node.input[0])
        return table is not None and table.ndim == 2 and _is_float(table) and table.nbytes >= LEAST_TABLE_BYTES

    def _table(self, node: NodeProto) -> None:
        (table, indices), result = node.input, node.output[0]
        rows, scales = f"{table}.table.rows", f"{table}.table.scales"
        if table not in self._tables:
            self._tables.add(table)
            quantised, scale = _rounded(self.constants[table].astype(np.float64), 1, ROW_TOP)
            self._constant(rows, quantised)
            self._constant(scales, scale[:, None])
        name = f"{result}.lookup"
        row = self._node("Gather", [rows, indices], self._new(f"{name}.int8"))
        scale_of_row = self._node("Gather", [scales, indices], self._new(f"{name}.scale"))
        as_float = self._node("Cast", [row], self._new(f"{name}.float"), to=TensorProto.FLOAT)
        self._node("Mul", [as_float, scale_of_row], result)

    def _new(self, name: str) -> str:
        """Claims the name of an added value."""
        if name in self._taken:
            raise ValueError(f"the graph already has a value {name!r}, which quantising it adds; rename it")
        self._taken.add(name)
        return name

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[self._new(name)] = np.asarray(value)
        return name

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        name = f"{output}.{operator.lower()}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output


def _rounded(weight: np.ndarray, axis: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 values of a matrix, and the scale of each vector along `axis`."""
    largest = np.abs(weight).max(axis=axis, keepdims=True)
    scale = (np.maximum(largest, 1e-30) / top).astype(np.float32)
    quantised = np.clip(np.rint(weight / scale.astype(np.float64)), -top, top).astype(np.int8)
    return np.ascontiguousarray(quantised), scale.reshape(-1)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype == np.float32


def _array(tensor: TensorProto, folder: Path) -> np.ndarray:
    """Returns a constant. onnx refuses to read files with several hard links, which a bundle's may be."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    return np.memmap(folder / place["location"], dtype, "r", int(place.get("offset", 0)), shape)


def _write(model: ModelProto, constants: dict[str, np.ndarray], out: Path) -> None:
    """Writes the graph; all but its smallest constants go to a file of their own, which sessions can share."""
    del model.graph.initializer[:]
    with (out / WEIGHTS).open("wb") as file:
        for name, array in constants.items():
            tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            if array.nbytes >= LINK_FROM_BYTES:
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", WEIGHTS), ("offset", file.tell()), ("length", array.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(np.ascontiguousarray(array).data)
            model.graph.initializer.append(tensor)
    (out / "encoder.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(out / "encoder.onnx")
