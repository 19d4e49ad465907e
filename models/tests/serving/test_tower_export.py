"""Graphs written node by node match their PyTorch modules, with random weights and histories of every length."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DEFAULT, FIXTURE, small_pch

from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch, PchConfig
from learn.models.served_graphs import CvrGraph, ItemTowerGraph, UserTowerGraph
from learn.serving import tower_export

CLOSE = {"rtol": 0, "atol": 2e-5}
GRAPHS = ("user_tower.onnx", "item_tower.onnx", "cvr.onnx")
# Every configuration that the export treats differently. With one layer, no layer precedes the last.
VARIANTS = pytest.mark.parametrize(
    "changes",
    [{}, {"positions": "learned"}, {"output": "raw"}, {"layers": 1}, {"heads": 4}, {"heads": 1}],
    ids=["plain", "positions", "raw", "one-layer", "four-heads", "one-head"],
)


def run(model, *arrays):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return session.run(None, {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)})


def histories(lengths, width):
    return torch.randn(len(lengths), width, 12), (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()


def op_types(model):
    return [node.op_type for node in model.graph.node]


@VARIANTS
def test_the_user_tower_graph_matches_pytorch(changes):
    pch = small_pch(**changes)
    model = tower_export.user_tower_model(pch)
    # Histories that are empty, short or of the maximum length, alone or in a batch, and padded more than needed.
    for lengths, width in (([1], 1), ([0], 1), ([9], 9), ([4, 0, 9, 1], 9), ([2, 2], 6), ([0, 0], 3)):
        content, mask = histories(lengths, width)
        (got,) = run(model, content, mask)
        np.testing.assert_allclose(got, UserTowerGraph(pch)(content, mask).detach(), **CLOSE)
        naive = pch.states(content)[torch.arange(len(lengths)), torch.tensor(lengths)]
        np.testing.assert_allclose(got, naive.detach(), **CLOSE)


def test_the_user_tower_graph_ignores_padding_and_other_users():
    model = tower_export.user_tower_model(small_pch())
    content, mask = histories([3, 6, 0], 9)
    (together,) = run(model, content, mask)
    noisy = torch.where(mask[..., None] == 1, content, torch.full_like(content, 7.0))
    np.testing.assert_allclose(run(model, noisy, mask)[0], together, **CLOSE)
    for row, length in enumerate((3, 6)):
        (alone,) = run(model, content[row : row + 1, :length], mask[row : row + 1, :length])
        np.testing.assert_allclose(alone[0], together[row], **CLOSE)


@VARIANTS
def test_the_item_tower_graph_matches_pytorch(changes):
    pch = small_pch(**changes)
    model = tower_export.item_tower_model(pch)
    for n_items in (1, 2, 7):
        content = torch.randn(n_items, 12)
        (got,) = run(model, content)
        np.testing.assert_allclose(got, ItemTowerGraph(pch)(content).detach(), **CLOSE)
        np.testing.assert_allclose(got, pch.states(content[:, None])[:, 1].detach(), **CLOSE)


def test_the_cvr_graph_matches_pytorch():
    head = CvrHead(CvrConfig(in_dim=6, fuse_dim=10, mid_dim=4)).eval()
    model = tower_export.cvr_model(head)
    for n_users, row in ((1, [0]), (1, [0, 0, 0]), (3, [2, 0, 2, 1]), (3, [1]), (2, [0, 1, 1, 0])):
        user, item = torch.randn(n_users, 6), torch.randn(len(row), 6)
        mid_emb, cvr = run(model, user, item, torch.tensor(row))
        want_mid_emb, want_cvr = CvrGraph(head)(user, item, torch.tensor(row))
        np.testing.assert_allclose(mid_emb, want_mid_emb.detach(), **CLOSE)
        np.testing.assert_allclose(cvr, want_cvr.detach(), **CLOSE)


def test_towers_with_a_linear_adaptor_match_pytorch():
    pch = small_pch(adaptor="linear")
    content, mask = histories([5, 2], 5)
    (got,) = run(tower_export.user_tower_model(pch), content, mask)
    np.testing.assert_allclose(got, pch.last(content, mask).detach(), **CLOSE)
    (got,) = run(tower_export.item_tower_model(pch), content[0])
    np.testing.assert_allclose(got, pch.alone(content[0]).detach(), **CLOSE)
    assert pch.start.dtype == torch.float32 and pch.start.requires_grad


def test_an_item_tower_that_is_the_content_itself_has_no_graph():
    with pytest.raises(ValueError, match="variant"):
        tower_export.item_tower_model(small_pch(item_tower="content"))


def test_the_last_layer_of_the_user_tower_computes_no_keys_or_values():
    pch = small_pch(layers=3)
    found = op_types(tower_export.user_tower_model(pch))
    assert found.count("Attention") == 2
    # Two products of the adaptor, six of each earlier layer, four of the last layer, and the projection.
    assert found.count("Gemm") == 2 + 6 * 2 + 4 + 1
    assert "LayerNormalization" not in found and "Erf" not in found


@pytest.mark.parametrize("folder", [FIXTURE, DEFAULT], ids=["fixture", "default"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_use_only_operators_that_onnx_defines(folder, name):
    # Contrib operators differ from one execution provider to the next, and FusedGemm is for CPUs alone.
    model = onnx.load(folder / name)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}


def test_the_shipped_graphs_are_what_the_code_writes_now():
    pch, head = Pch(PchConfig()), CvrHead(CvrConfig())
    for name, model in (
        ("user_tower.onnx", tower_export.user_tower_model(pch)),
        ("item_tower.onnx", tower_export.item_tower_model(pch)),
        ("cvr.onnx", tower_export.cvr_model(head)),
    ):
        shipped = onnx.load(DEFAULT / name)
        assert op_types(shipped) == op_types(model)
        assert shipped.graph.input == model.graph.input and shipped.graph.output == model.graph.output
