"""Writes the user tower, item tower and CVR head as ONNX graphs, node by node, with less work than PyTorch does.

An exporter would reproduce every step of the training code. Here the steps that serving does not need are folded into
the weights, once, in fp64. Every step is exact except for rounding, and tests compare the graphs with the modules:

- LayerNorm subtracts a mean and then scales. Here every term of the residual stream is centred instead, so that only
  RMSNormalization remains, and the norm's shift moves into the product after it.
- A key's bias adds the same value to all scores of a query, which softmax ignores. A value's bias passes through
  attention unchanged, as the weights sum to 1, and moves into the bias of the output.
- The user tower's last layer has one query, q = Wq h. Its scores q . (Wk x) equal (Wk^T Wq h) . x, and its mixture of
  values equals Wv (sum of p x). So that layer computes neither keys nor values of the history.
- Both towers begin with the same adaptor. The item tower has it and returns its output, centred, for the server to
  cache; the user tower reads that, and so starts at the history's adapted items.
- The content skip of both towers, if they have one, is a product and a division by the length.
- An item tower with a transformer attends to two positions, and a softmax over two is a sigmoid of the difference of
  their scores. The start token is a constant, so the difference is q . (k - k_start), and the mixture is v_start +
  p (v - v_start).

Products take two-dimensional operands, biases are inputs of Gemm, and Attention (opset 23) reads the heads in place, so
nothing is transposed. All operators are standard ONNX, as ONNX Runtime's contrib operators differ by provider.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from learn.models.cvr import CvrHead, GatedProduct
from learn.models.pch import Block, Pch, centred, query_scale
from learn.serving.bundle_format import CVR, ITEM_TOWER, Signature, user_tower

# The first opset with Attention and RMSNormalization, and the IR version that came with it.
OPSET = 23
IR_VERSION = 11
# The eps of torch.nn.functional.normalize.
SHORTEST = 1e-12

M = TypeVar("M", bound=nn.Module)
Shapes = Iterable[Iterable[int | str]]
# A product's weight [out,in] and bias [out], as in nn.Linear; None for no bias.
Product = tuple[Tensor, Tensor | None]


@torch.no_grad()
def user_tower_model(pch: Pch) -> ModelProto:
    """Returns the graph of `Pch.last_from_adapted`: adapted [b,l,D], mask [b,l], perhaps action [b,l] -> user [b,E]."""
    pch = _in_fp64(pch)
    config, g = pch.config, _Graph()
    n_users = g("Shape", "adapted", start=0, end=1)
    length = g("Add", g("Shape", "adapted", start=1, end=2), g.integers(1))  # of the sequence [start, items]
    sequences = g("Concat", n_users, g.integers(-1, config.width), axis=0)

    def by_user(rows: str) -> str:
        return g("Reshape", rows, sequences)  # [b,l+1,D]

    def flat(values: str, width: int = config.width) -> str:
        return g("Reshape", values, g.integers(-1, width))

    items = "adapted" if pch.skip is None else g.columns("adapted", 0, config.width)
    if pch.actions is not None:
        items = g("Add", items, g("Gather", g.constant(centred(pch.actions.weight)), "action", axis=0))
    start = centred(pch.start)
    if pch.positions is not None:
        positions = centred(pch.positions)
        start = start + positions[0]
        items = g("Add", items, g("Slice", g.constant(positions[1:]), g.integers(0), g("Sub", length, g.integers(1))))
    starts = g("Expand", g.constant(start[None, None]), g("Concat", n_users, g.integers(1, 1), axis=0))
    x = flat(g("Concat", starts, items, axis=1))  # [b(l+1),D], also in all layers before the last
    if pch.norm_in is not None:
        ones = g.constant(torch.ones(config.width))
        x = g("RMSNormalization", x, ones, axis=-1, epsilon=pch.norm_in.eps)

    *earlier, last = pch.blocks
    for block in earlier:
        h = g.norm(x, block.norm_attention)
        heads = {"q_num_heads": block.heads, "kv_num_heads": block.heads}
        triple = [by_user(g.product(h, product)) for product in _query_key_value(block)]
        x = g("Add", x, g.product(flat(g("Attention", *triple, is_causal=1, **heads)), _out(block)))
        x = _feed_forward(g, block, x)

    x, h = by_user(x), by_user(g.norm(x, last.norm_attention))
    at = g("ReduceSum", "mask", g.integers(1), keepdims=1)  # [b,1]; the start token is at position 0
    query = g.product(g("GatherND", h, at, batch_dims=1), _absorbed_query(last))
    query = g("Reshape", query, g.integers(-1, last.heads, config.width))
    scores = g("MatMul", query, g("Transpose", h, perm=[0, 2, 1]))  # [b,heads,l+1]
    scores = g("Add", scores, _visible(g, length, g("Unsqueeze", at, g.integers(2))))
    mixed = flat(g("MatMul", g("Softmax", scores, axis=-1), h), last.heads * config.width)
    x = g("Add", g("GatherND", x, at, batch_dims=1), g.product(mixed, _absorbed_out(last)))
    directions = None
    if pch.skip is not None:
        read = g("Unsqueeze", g("Cast", "mask", to=TensorProto.FLOAT), g.integers(1))  # [b,1,l]
        total = g("MatMul", read, g.columns("adapted", config.width, config.adapted_dim))
        directions = g.unit(g("Squeeze", total, g.integers(1)))
    _finish(g, pch, _feed_forward(g, last, x), Output("user", directions))
    signature = user_tower(config.actions)
    adapted, *others = signature.axes
    return g.model(signature, [[*adapted, config.adapted_dim], *others], [["b", config.embedding_dim]])


@torch.no_grad()
def item_tower_model(pch: Pch) -> ModelProto:
    """Returns the graph of `Pch.alone` and of the adaptor: content [n,C] -> item [n,E], adapted [n,D]."""
    if pch.config.item_tower == "content":
        raise ValueError(
            "item tower variant (3), content itself, is for comparison only and has no graph, so it cannot be exported"
        )
    pch = _in_fp64(pch)
    g = _Graph()
    x, directions = _adapt(g, pch), None
    if pch.skip is not None:
        directions = g.unit(g.product("content", _linear(pch.skip.linear)))
        g("Concat", x, directions, axis=-1, into="adapted")
    outputs = [["n", pch.config.embedding_dim], ["n", pch.config.adapted_dim]]
    if pch.config.item_tower == "adapted":
        _end(g, pch, x, Output("item", directions))
        return g.model(ITEM_TOWER, [["n", pch.config.content_dim]], outputs)
    if pch.positions is not None:
        x = g("Add", x, g.constant(centred(pch.positions[1])))
    # One column per head, with a 1 for each of the head's dimensions.
    member = torch.eye(pch.config.heads, dtype=torch.float64).repeat_interleave(pch.config.width // pch.config.heads, 0)
    for block, start in zip(pch.blocks, pch.start_keys_values(), strict=True):
        start_key, start_value = (part.flatten() for part in start)
        query, (key, _), (value, _) = _query_key_value(block)
        scale = query_scale(pch.config.width, block.heads)
        _, key_bias, value_bias = _attention_biases(block)
        h = g.norm(x, block.norm_attention)
        difference = g.product(h, (key, key_bias - start_key))
        score = g("MatMul", g("Mul", g.product(h, query), difference), g.constant(member * scale))  # [n,heads]
        weight = g("MatMul", g("Sigmoid", score), g.constant(member.T))  # [n,D]
        mixed = g("Mul", weight, g.product(h, (value, value_bias - start_value)))
        out_weight, out_bias = block.out.weight, block.out.bias
        x = g("Add", x, g.product(mixed, _centred_product(out_weight, out_bias + out_weight @ start_value)))
        x = _feed_forward(g, block, x)
    _finish(g, pch, x, Output("item", directions))
    return g.model(ITEM_TOWER, [["n", pch.config.content_dim]], outputs)


@torch.no_grad()
def cvr_model(head: CvrHead) -> ModelProto:
    """Returns the graph of the head and a sigmoid: user [b,E], item [n,E], row [n] -> mid_emb [n,M], cvr [n]."""
    head = _in_fp64(head)
    config, g = head.config, _Graph()
    of_user = g("Gather", g.product("user", _linear(head.fuse_user)), "row", axis=0)
    # The user's part is the addend of Gemm.
    fused = g("Gemm", "item", g.constant(head.fuse_item.weight), of_user, transB=1)
    if head.product is not None:
        fused = g("Add", fused, _gated_product(g, head.product))
    if head.dot is not None:
        both = g("Mul", g("Gather", "user", "row", axis=0), "item")
        score = g("ReduceSum", both, g.integers(-1), keepdims=1)  # [n,1]
        fused = g("Gemm", score, g.constant(head.dot[None]), fused)
    g.gelu(g.product(g.gelu(fused), _linear(head.mid)), into="mid_emb")
    # The product is [1,M] times [M,n], because ONNX Runtime takes longer for one column than for one row.
    logit = g("Gemm", g.constant(head.out.weight), "mid_emb", g.constant(head.out.bias), transB=1)
    g("Sigmoid", g("Squeeze", logit, g.integers(0)), into="cvr")
    dims = config.in_dim
    return g.model(CVR, [["b", dims], ["n", dims], ["n"]], [["n", config.mid_dim], ["n"]])


def _gated_product(g: _Graph, product: GatedProduct) -> str:
    """Returns the products [n,F] of the head; the gate and the user's factor are computed once a user."""
    gated = g("Mul", g("Sigmoid", g.product("user", _linear(product.gate))), g.product("user", _linear(product.user)))
    return g("Mul", g("Gather", gated, "row", axis=0), g.product("item", _linear(product.item)))


def _in_fp64(module: M) -> M:
    return copy.deepcopy(module).double().eval().requires_grad_(False)


def _linear(linear: nn.Linear) -> Product:
    return linear.weight, linear.bias


def _centred_product(weight: Tensor, bias: Tensor) -> Product:
    return weight - weight.mean(dim=0), centred(bias)


def _shifted(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Product:
    """Converts a product on the output of `norm` to one on its output without the shift."""
    return weight, bias + weight @ norm.bias


def _attention_biases(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the biases of queries, keys and values, each [D], including the norm's shift."""
    weight = torch.cat([block.query.weight, block.key_value.weight])
    bias = torch.cat([block.query.bias, block.key_value.bias])
    return _shifted(block.norm_attention, weight, bias)[1].chunk(3)


def _query_key_value(block: Block) -> tuple[Product, Product, Product]:
    """Returns three products [D,D], of which only the query has a bias."""
    key, value = block.key_value.weight.chunk(2)
    return (block.query.weight, _attention_biases(block)[0]), (key, None), (value, None)


def _out(block: Block) -> Product:
    weight = block.out.weight
    return _centred_product(weight, block.out.bias + weight @ _attention_biases(block)[2])


def _absorbed_query(block: Block) -> Product:
    """Maps h [b,D] to one vector per head, [b,heads*D], whose products with the normed positions are the scores."""
    (query, bias), (key, _), _ = _query_key_value(block)
    scale = query_scale(len(bias), block.heads)
    heads = [part.chunk(block.heads) for part in (query, bias, key)]
    weights, biases = zip(*((k.T @ q * scale, k.T @ b * scale) for q, b, k in zip(*heads, strict=True)), strict=True)
    return torch.cat(weights), torch.cat(biases)


def _absorbed_out(block: Block) -> Product:
    """Maps each head's mixture of normed positions, [b,heads*D], to the attention output [b,D]."""
    value = block.key_value.weight.chunk(2)[1].chunk(block.heads)
    weight, bias = _out(block)
    return torch.cat([o @ v for o, v in zip(weight.chunk(block.heads, dim=1), value, strict=True)], dim=1), bias


def _adapt(g: _Graph, pch: Pch) -> str:
    """Applies the adaptor, content [r,C] -> [r,D]; the mean of each row is 0. Without a skip, this is "adapted"."""
    into = "adapted" if pch.skip is None else None
    if pch.config.adaptor == "linear":
        return g.product("content", _centred_product(*_linear(pch.adaptor[0])), into=into)
    first, _, second = pch.adaptor
    return g.product(g.gelu(g.product("content", _linear(first))), _centred_product(*_linear(second)), into=into)


def _feed_forward(g: _Graph, block: Block, x: str) -> str:
    """Adds the feed-forward layer to the residual stream, [r,D] -> [r,D]."""
    up = _shifted(block.norm_ffn, *_linear(block.up))
    hidden = g.gelu(g.product(g.norm(x, block.norm_ffn), up))
    return g("Add", x, g.product(hidden, _centred_product(*_linear(block.down))))


def _visible(g: _Graph, length: str, at: str) -> str:
    """Returns a mask [b,1,l+1]: 0 for the positions up to `at` [b,1,1], -inf for later ones."""
    index = g("Range", g.constant(np.int64(0)), g("Squeeze", length), g.constant(np.int64(1)))
    seen = g("LessOrEqual", index, at)
    return g("Where", seen, g.constant(np.float32(0)), g.constant(np.float32("-inf")))


@dataclass(frozen=True)
class Output:
    """The name of a tower's output and, with a skip, the directions [r,S] that it ends with."""

    name: str
    directions: str | None


def _finish(g: _Graph, pch: Pch, x: str, output: Output) -> None:
    """Adds the final norm, the projection and the skip, [r,D] -> the output [r,E]."""
    normed = g.norm(x, pch.norm_out)
    if isinstance(pch.projection, nn.Identity):
        tower = g("Add", normed, g.constant(pch.norm_out.bias))
    else:
        tower = g.product(normed, _shifted(pch.norm_out, *_linear(pch.projection)))
    _end(g, pch, tower, output)


def _end(g: _Graph, pch: Pch, tower: str, output: Output) -> None:
    """Adds the length of 1 and the skip, [r,D] -> the output [r,E]."""
    into = output.name if output.directions is None else None
    if pch.config.output == "unit":
        tower = g.unit(tower, into=into)
    elif into:
        g("Identity", tower, into=into)
    if output.directions is not None:
        scaled = g("Mul", output.directions, g.constant(pch.skip.weight.sqrt()))
        g("Concat", tower, scaled, axis=-1, into=output.name)


class _Graph:
    """Nodes and constants of a model under construction. Values are identified by name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[tuple[int, ...], str, bytes], TensorProto] = {}

    def __call__(self, operator: str, *inputs: str, into: str | None = None, **attributes: object) -> str:
        """Adds a node with one output, named `into` or after its operator."""
        output = into or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def constant(self, value: Tensor | np.ndarray | np.generic) -> str:
        """Returns the name of the constant, shared by equal values. Floats are rounded to fp32."""
        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = np.ascontiguousarray(array, np.float32).reshape(array.shape) if array.dtype.kind == "f" else array
        key = (array.shape, array.dtype.str, array.tobytes())
        name = f"constant_{len(self._constants)}"
        return self._constants.setdefault(key, numpy_helper.from_array(array, name)).name

    def integers(self, *values: int) -> str:
        """Returns the name of an int64 constant [len(values)]."""
        return self.constant(np.array(values, np.int64))

    def product(self, x: str, product: Product, into: str | None = None) -> str:
        """Adds a linear layer, [r,in] -> [r,out]."""
        return self("Gemm", x, *(self.constant(part) for part in product if part is not None), into=into, transB=1)

    def gelu(self, x: str, into: str | None = None) -> str:
        """Adds a Gelu that uses the error function, as in training."""
        return self("Gelu", x, into=into, approximate="none")

    def unit(self, x: str, into: str | None = None) -> str:
        """Scales rows [r,n] to length 1; a row of zeros stays one."""
        length = self("ReduceL2", x, self.integers(-1), keepdims=1)
        return self("Div", x, self("Clip", length, self.constant(np.float32(SHORTEST))), into=into)

    def columns(self, x: str, begin: int, end: int) -> str:
        """Returns the entries `begin` to `end` of the last axis."""
        return self("Slice", x, self.integers(begin), self.integers(end), self.integers(-1))

    def norm(self, x: str, norm: nn.LayerNorm) -> str:
        """Adds `norm` without its shift, for rows [r,D] whose mean is 0."""
        return self("RMSNormalization", x, self.constant(norm.weight), axis=-1, epsilon=norm.eps)

    def model(self, signature: Signature, inputs: Shapes, outputs: Shapes) -> ModelProto:
        """Returns the checked model; `inputs` and `outputs` are the shapes of the signature's inputs and outputs."""
        ports = [
            [_port(name, shape) for name, shape in zip(names, shapes, strict=True)]
            for names, shapes in ((signature.inputs, inputs), (signature.outputs, outputs))
        ]
        graph = helper.make_graph(self._nodes, "midemb", *ports, list(self._constants.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="midemb"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def _port(name: str, shape: Iterable[int | str]) -> onnx.ValueInfoProto:
    kind = TensorProto.INT64 if name in {"mask", "action", "row"} else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, list(shape))
