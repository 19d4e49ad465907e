"""Rewrites linear layers of an exported graph to Gemm on weights as PyTorch stores them, [out,in].

The input is a graph from `encoder_export.link`: a weight has the layout of the safetensors file, and a Transpose
precedes the MatMul, which an Add may follow. ONNX Runtime folds that Transpose at load time into a tensor per session.
A weight that a product reads directly stays the file's initializer, so that sessions can share it and its repacked
form. The products are the same; a bias becomes an input of Gemm.

Gemm takes rows only, [r,in], where r combines all leading axes. So a value is reshaped to rows before its first
product, and results computed from it stay rows while each operation works per element or along the last axis. The axes
are restored where any other node reads the value. Leading axes are never compared: two values have the same leading
axes only if they come from the same value, because the graph gives no other proof.

Inline weights, [in,out], are not rewritten, because MatMul reads them as they are and nothing is folded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

# Operators that work per element with any axes. LayerNormalization over the last axis works per row.
POINTWISE = frozenset({"Add", "Mul", "Gelu", "Sigmoid"})


def read_weights_as_stored(model: ModelProto) -> int:
    """Replaces every product with a transposed initializer by Gemm; returns the number of replaced products.

    A Transpose that another kind of node also reads is left as it is, with its products, as it will be folded anyway.
    """
    graph = model.graph
    rewriter = _Rewriter(graph)
    for node in graph.node:
        rewriter.visit(node)
    for port in graph.output:
        rewriter.restore(port.name)
    del graph.node[:]
    graph.node.extend(rewriter.nodes)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in rewriter.constants.items())
    return rewriter.n_products


@dataclass(frozen=True)
class _Rows:
    """A value [...,width] as rows [r,width]; its leading axes are those of the value `origin` [...,origin_width]."""

    name: str
    width: int
    origin: str
    origin_width: int

    def alike(self, other: _Rows) -> bool:
        """Whether both certainly have the same shape."""
        return (self.width, self.origin) == (other.width, other.origin)


class _Rewriter:
    """Visits the nodes in order and collects the nodes that replace them."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.n_products = 0
        self._sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._outputs = {port.name for port in graph.output}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in _reads(node):
                self._readers[name].append(node)
        # Transposed name -> stored name.
        self._stored = {node.output[0]: node.input[0] for node in graph.node if self._is_for_products_alone(node)}
        self._rows: dict[str, _Rows] = {}
        # Names of the values created on demand that are already in the new graph.
        self._made: set[str] = set()
        self._biased: set[str] = set()

    def visit(self, node: NodeProto) -> None:
        """Adds the replacement of `node` to the new graph."""
        if node.output[0] in self._stored or node.output[0] in self._biased:
            return
        if node.op_type == "MatMul" and node.input[1] in self._stored:
            self._product(node)
        elif rows := self._result_as_rows(node):
            self._read_rows(node, [self._rows[name].name if name in self._rows else name for name in node.input])
            self._rows[node.output[0]] = rows
            node.output[0] = rows.name
        elif _is_view(node) and node.input[0] in self._rows:
            self._read_rows(node, [self._rows[node.input[0]].name, node.input[1]])
        else:
            for name in _reads(node):
                self.restore(name)
            self.nodes.append(node)

    def restore(self, name: str) -> None:
        """Restores the axes of a value that exists only as rows."""
        rows = self._rows.get(name)
        if rows is None or rows.origin == name:
            return
        if rows.width == rows.origin_width:
            shape = self._once(f"{rows.origin}.shape", "Shape", rows.origin)
        else:
            leading = self._once(f"{rows.origin}.leading", "Shape", rows.origin, end=-1)
            width = self._integers(rows.width)
            shape = self._once(f"{rows.origin}.shape_{rows.width}", "Concat", leading, width, axis=0)
        # There may be no rows at all, so a 0 must mean the size 0 and not "copy the input's size".
        self._once(name, "Reshape", rows.name, shape, allowzero=1)

    def _is_for_products_alone(self, node: NodeProto) -> bool:
        if node.op_type != "Transpose" or len(self._sizes.get(node.input[0], ())) != 2:
            return False
        name = node.output[0]
        readers = self._readers[name]
        return (
            _attribute(node, "perm", [1, 0]) == [1, 0]
            and name not in self._outputs
            and all(reader.op_type == "MatMul" and reader.input[0] != name for reader in readers)
        )

    def _product(self, node: NodeProto) -> None:
        x, weight = node.input[0], self._stored[node.input[1]]
        n_out, n_in = self._sizes[weight]
        if x not in self._rows:
            name = self._once(f"{x}.rows", "Reshape", x, self._integers(-1, n_in))
            self._rows[x] = _Rows(name, n_in, x, n_in)
        source = self._rows[x]
        result, bias = self._bias(node.output[0], n_out)
        rows = _Rows(f"{result}.rows", n_out, source.origin, source.origin_width)
        self._rows[result] = rows
        self._once(rows.name, "Gemm", source.name, weight, *bias, transB=1)
        self.n_products += 1

    def _bias(self, product: str, n_out: int) -> tuple[str, list[str]]:
        """Returns the name of the layer's result, and its bias if an Add of [out] is the only reader of the product."""
        if product not in self._outputs and len(readers := self._readers[product]) == 1:
            (add,) = readers
            bias = [name for name in add.input if name != product]
            if add.op_type == "Add" and [self._sizes.get(name) for name in bias] == [(n_out,)]:
                self._biased.add(add.output[0])
                return add.output[0], bias
        return product, []

    def _result_as_rows(self, node: NodeProto) -> _Rows | None:
        """Returns the result of `node` as rows, or None if `node` cannot work on rows."""
        is_norm = node.op_type == "LayerNormalization" and _attribute(node, "axis", -1) == -1 and len(node.output) == 1
        known = [self._rows[name] for name in node.input if name in self._rows]
        if not known or not (is_norm or node.op_type in POINTWISE):
            return None
        first = known[0]
        vectors = [name for name in node.input if name not in self._rows]
        if all(rows.alike(first) for rows in known) and all(self._sizes.get(v) == (first.width,) for v in vectors):
            return _Rows(f"{node.output[0]}.rows", first.width, first.origin, first.origin_width)
        return None

    def _read_rows(self, node: NodeProto, names: list[str]) -> None:
        del node.input[:]
        node.input.extend(names)
        self.nodes.append(node)

    def _once(self, output: str, operator: str, *inputs: str, **attributes: object) -> str:
        if output not in self._made:
            self._made.add(output)
            name = f"{output}.{operator.lower()}"
            self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def _integers(self, *values: int) -> str:
        name = "_".join(["integers", *map(str, values)])
        self.constants[name] = np.array(values, np.int64)
        return name


def _reads(node: NodeProto) -> Iterator[str]:
    """Yields the names of all inputs, including those that a branch or loop body takes from the enclosing graph."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from _reads(inner)
            yield from (port.name for port in body.output)


def _attribute(node: NodeProto, name: str, default: object) -> object:
    values = [helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name]
    return values[0] if values else default


def _is_view(node: NodeProto) -> bool:
    """Whether `node` is a Reshape that depends only on the order of elements; without `allowzero`, 0 copies a size."""
    return node.op_type == "Reshape" and _attribute(node, "allowzero", 0) == 1
