"""Graphs written node by node match their PyTorch modules, with random weights and histories of every length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DEFAULT, FIXTURE, small_pch

from learn.data.actions import ACTIONS
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch, PchConfig
from learn.models.served_graphs import CvrGraph, ItemTowerGraph, UserTowerGraph
from learn.serving import tower_export

CLOSE = {"rtol": 0, "atol": 2e-5}
GRAPHS = ("user_tower.onnx", "item_tower.onnx", "cvr.onnx")
# Every configuration that the export treats differently. With one layer, no layer precedes the last.
ADAPTED = {"item_tower": "adapted", "out_dim": 16}
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "learned"},
        {"output": "raw"},
        {"layers": 1},
        {"heads": 4},
        {"heads": 1},
        {"adaptor": "linear"},
        {"actions": ACTIONS},
        {"actions": ("like",), "positions": "learned", "layers": 1},
        {"skip_dim": 4},
        {"skip_dim": 1, "output": "raw", "actions": ACTIONS, "adaptor": "linear"},
        ADAPTED,
        ADAPTED | {"skip_dim": 4, "actions": ACTIONS, "layers": 1, "positions": "learned"},
        ADAPTED | {"output": "raw", "adaptor": "linear"},
    ],
    ids=[
        *("plain", "positions", "raw", "one-layer", "four-heads", "one-head", "linear", "actions", "actions-positions"),
        *("skip", "skip-raw-actions-linear", "adapted", "adapted-skip-actions-positions", "adapted-raw-linear"),
    ],
)


def run(model, *arrays):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return session.run(None, {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)})


def histories(pch, lengths, width):
    """Returns content [b,l,C], and the inputs of the user tower: adapted [b,l,D], mask [b,l], perhaps action [b,l]."""
    content = torch.randn(len(lengths), width, 12)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    _item, adapted = ItemTowerGraph(pch)(content.flatten(0, 1))
    inputs = [adapted.detach().unflatten(0, mask.shape), mask]
    if pch.config.actions:
        inputs.append(torch.randint(0, 1 + len(pch.config.actions), mask.shape) * mask)
    return content, inputs


def op_types(model):
    return [node.op_type for node in model.graph.node]


@VARIANTS
def test_the_user_tower_graph_matches_pytorch(changes):
    pch = small_pch(**changes)
    model = tower_export.user_tower_model(pch)
    # Histories that are empty, short or of the maximum length, alone or in a batch, and padded more than needed.
    for lengths, width in (([1], 1), ([0], 1), ([9], 9), ([4, 0, 9, 1], 9), ([2, 2], 6), ([0, 0], 3)):
        content, inputs = histories(pch, lengths, width)
        (got,) = run(model, *inputs)
        np.testing.assert_allclose(got, UserTowerGraph(pch)(*inputs).detach(), **CLOSE)
        naive = pch.states(content, *inputs[2:])[torch.arange(len(lengths)), torch.tensor(lengths)]
        np.testing.assert_allclose(got, naive.detach(), **CLOSE)


def test_the_user_tower_graph_ignores_padding_and_other_users():
    pch = small_pch(actions=("like", "skip"))
    model = tower_export.user_tower_model(pch)
    _content, (adapted, mask, action) = histories(pch, [3, 6, 0], 9)
    (together,) = run(model, adapted, mask, action)
    noisy = torch.where(mask[..., None] == 1, adapted, torch.randn_like(adapted))
    np.testing.assert_allclose(run(model, noisy, mask, action + 2 * (1 - mask))[0], together, **CLOSE)
    for row, length in enumerate((3, 6)):
        (alone,) = run(model, *(part[row : row + 1, :length] for part in (adapted, mask, action)))
        np.testing.assert_allclose(alone[0], together[row], **CLOSE)


def test_an_unknown_action_adds_nothing_to_an_item_of_the_user_tower():
    pch = small_pch(actions=("like", "skip"))
    _content, (adapted, mask, action) = histories(pch, [3, 6, 0, 9], 9)
    with_actions = tower_export.user_tower_model(pch)
    (table,) = (t for t in with_actions.graph.initializer if list(t.dims) == [3, 16])
    table = onnx.numpy_helper.to_array(table)
    assert not table[0].any() and np.abs(table.mean(axis=1)).max() < 1e-6 < np.abs(table[1:]).max()
    pch.config, pch.actions = replace(pch.config, actions=()), None
    (want,) = run(tower_export.user_tower_model(pch), adapted, mask)
    np.testing.assert_array_equal(run(with_actions, adapted, mask, torch.zeros_like(mask))[0], want)
    assert np.abs(run(with_actions, adapted, mask, action)[0] - want)[[0, 1, 3]].max(axis=1).min() > 1e-3


@VARIANTS
def test_the_item_tower_graph_matches_pytorch(changes):
    pch = small_pch(**changes)
    model, unit = tower_export.item_tower_model(pch), pch.config.output == "unit"
    for n_items in (1, 2, 7):
        content = torch.randn(n_items, 12)
        item, adapted = run(model, content)
        want_item, want_adapted = ItemTowerGraph(pch)(content)
        np.testing.assert_allclose(item, want_item.detach(), **CLOSE)
        np.testing.assert_allclose(adapted, want_adapted.detach(), **CLOSE)
        if pch.config.item_tower == "adapted":
            # The direction of what the server caches for the user tower.
            direction = adapted[:, :16] / (np.linalg.norm(adapted[:, :16], axis=1, keepdims=True) if unit else 1)
            np.testing.assert_allclose(item[:, :16], direction, **CLOSE)
        else:
            np.testing.assert_allclose(item, pch.states(content[:, None])[:, 1].detach(), **CLOSE)


@pytest.mark.parametrize(
    "parts",
    [{}, {"product": True}, {"dot": True}, {"product": True, "dot": True, "dropout": 0.5}],
    ids=["sum", "product", "dot", "all"],
)
def test_the_cvr_graph_matches_pytorch(parts):
    head = CvrHead(CvrConfig(in_dim=6, fuse_dim=10, mid_dim=4, **parts)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model = tower_export.cvr_model(head)
    for n_users, row in ((1, [0]), (1, [0, 0, 0]), (3, [2, 0, 2, 1]), (3, [1]), (2, [0, 1, 1, 0])):
        user, item = torch.randn(n_users, 6), torch.randn(len(row), 6)
        mid_emb, cvr = run(model, user, item, torch.tensor(row))
        want_mid_emb, want_cvr = CvrGraph(head)(user, item, torch.tensor(row))
        np.testing.assert_allclose(mid_emb, want_mid_emb.detach(), **CLOSE)
        np.testing.assert_allclose(cvr, want_cvr.detach(), **CLOSE)


def test_the_export_leaves_the_module_as_it_is():
    pch = small_pch(actions=("like",))
    tower_export.user_tower_model(pch)
    tower_export.item_tower_model(pch)
    assert pch.start.dtype == pch.actions.weight.dtype == torch.float32
    assert pch.start.requires_grad and pch.actions.weight.requires_grad


def test_an_item_tower_that_is_the_content_itself_has_no_graph():
    with pytest.raises(ValueError, match="variant"):
        tower_export.item_tower_model(small_pch(item_tower="content"))


def test_the_last_layer_of_the_user_tower_computes_no_keys_or_values():
    pch = small_pch(layers=3)
    found = op_types(tower_export.user_tower_model(pch))
    assert found.count("Attention") == 2
    # Six products of each earlier layer, four of the last layer, and the projection.
    assert found.count("Gemm") == 6 * 2 + 4 + 1
    assert "LayerNormalization" not in found and "Erf" not in found


@pytest.mark.parametrize("folder", [FIXTURE, DEFAULT], ids=["fixture", "default"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_use_only_operators_that_onnx_defines(folder, name):
    # Contrib operators differ from one execution provider to the next, and FusedGemm is for CPUs alone.
    model = onnx.load(folder / name)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}


def test_the_shipped_graphs_are_what_the_code_writes_now():
    pch, head = Pch(PchConfig(actions=("click", "like", "dislike"))), CvrHead(CvrConfig())
    for name, model in (
        ("user_tower.onnx", tower_export.user_tower_model(pch)),
        ("item_tower.onnx", tower_export.item_tower_model(pch)),
        ("cvr.onnx", tower_export.cvr_model(head)),
    ):
        shipped = onnx.load(DEFAULT / name)
        assert op_types(shipped) == op_types(model)
        assert shipped.graph.input == model.graph.input and shipped.graph.output == model.graph.output
