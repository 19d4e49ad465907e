"""The towers: the three ways to compute a state agree, and no state depends on later items."""

from __future__ import annotations

import pytest
import torch
from conftest import small_pch

from learn.data.actions import ACTIONS
from learn.models.pch import Pch, PchConfig
from learn.models.served_graphs import ItemTowerGraph, UserTowerGraph
from learn.toml_config import strict

EXACT = {"rtol": 0, "atol": 2e-6}
both_positions = pytest.mark.parametrize("positions", ["none", "learned"])
with_and_without_skip = pytest.mark.parametrize("skip_dim", [0, 5])


def random_case(pch, lengths):
    content = torch.randn(len(lengths), max(max(lengths), 1), pch.config.content_dim)
    mask = (torch.arange(content.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return content, mask


@with_and_without_skip
@both_positions
def test_later_items_do_not_change_earlier_states(positions, skip_dim):
    pch = small_pch(positions=positions, skip_dim=skip_dim)
    content, _ = random_case(pch, [7, 7])
    changed = content.clone()
    changed[:, 4] += 1.0
    before, after = pch.states(content), pch.states(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], **EXACT)
    # State j is computed after j items, so state 5 is the first that depends on item 4.
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-4)


@with_and_without_skip
@both_positions
def test_last_equals_the_naive_state_at_the_last_item(positions, skip_dim):
    pch = small_pch(positions=positions, skip_dim=skip_dim)
    lengths = [5, 0, 9, 1]
    content, mask = random_case(pch, lengths)
    naive = pch.states(content)[torch.arange(4), torch.tensor(lengths)]
    torch.testing.assert_close(pch.last(content, mask), naive, **EXACT)


@with_and_without_skip
def test_padding_never_changes_a_state(skip_dim):
    pch = small_pch(skip_dim=skip_dim)
    content, mask = random_case(pch, [3, 6])
    noisy = content.clone()
    noisy[mask == 0] = 7.0
    torch.testing.assert_close(pch.last(noisy, mask), pch.last(content, mask), **EXACT)
    by_itself = pch.last(content[:1, :3], mask[:1, :3])
    torch.testing.assert_close(pch.last(noisy, mask)[:1], by_itself, **EXACT)


@with_and_without_skip
@both_positions
def test_alone_equals_the_state_of_a_sequence_of_one_item(positions, skip_dim):
    pch = small_pch(positions=positions, skip_dim=skip_dim)
    content = torch.randn(5, 12)
    torch.testing.assert_close(pch.alone(content), pch.states(content[:, None])[:, 1], **EXACT)


def test_alone_does_not_depend_on_other_items_in_the_batch():
    pch = small_pch()
    content = torch.randn(5, 12)
    torch.testing.assert_close(pch.alone(content)[3:4], pch.alone(content[3:4]), **EXACT)


def test_an_empty_history_gives_the_start_token_state():
    pch = small_pch()
    empty = torch.zeros(1, 1, dtype=torch.int64)
    got = pch.last(torch.full((1, 1, 12), 3.0), empty)
    torch.testing.assert_close(got, pch.states(torch.zeros(1, 0, 12))[:, 0], **EXACT)
    with torch.no_grad():
        # Only one entry is changed, because the first norm would cancel a constant added to all entries.
        pch.start[0] += 1.0
    assert not torch.allclose(got, pch.last(torch.zeros(1, 1, 12), empty), atol=1e-4)


def test_without_positions_one_layer_ignores_the_order_of_earlier_items():
    pch = small_pch(layers=1, positions="none")
    content, mask = random_case(pch, [4])
    swapped = content[:, [1, 0, 2, 3]]
    torch.testing.assert_close(pch.last(content, mask), pch.last(swapped, mask), **EXACT)
    learned = small_pch(layers=1, positions="learned")
    assert not torch.allclose(learned.last(content, mask), learned.last(swapped, mask), atol=1e-4)


def test_unit_output_has_norm_one_and_raw_output_does_not():
    content = torch.randn(4, 12)
    torch.testing.assert_close(small_pch(output="unit").alone(content).norm(dim=1), torch.ones(4))
    assert (small_pch(output="raw").alone(content).norm(dim=1) - 1).abs().max() > 1e-2


def test_a_linear_adaptor_is_a_single_linear_map():
    pch = small_pch(adaptor="linear")
    assert [tuple(p.shape) for p in pch.adaptor.parameters()] == [(16, 12), (16,)]
    content, mask = random_case(pch, [4, 2])
    torch.testing.assert_close(pch.last(content, mask)[0], pch.states(content)[0, 4], **EXACT)


# --- actions ---------------------------------------------------------------------------------------------------------


def with_actions(**changes):
    return small_pch(actions=("like", "skip", "view"), **changes)


@both_positions
def test_the_action_of_an_item_changes_the_states_from_that_item_on(positions):
    pch = with_actions(positions=positions)
    content, mask = random_case(pch, [7])
    actions = torch.tensor([[1, 0, 3, 2, 0, 1, 2]])
    changed = actions.clone()
    changed[0, 3] = 1
    before, after = pch.states(content, actions), pch.states(content, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], **EXACT)
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=-1).min() > 1e-3
    torch.testing.assert_close(pch.last(content, mask, actions), before[:, 7], **EXACT)


def test_an_unknown_action_adds_nothing():
    pch = with_actions()
    without = Pch(PchConfig(**{**vars(pch.config), "actions": ()})).eval()
    without.load_state_dict({name: value for name, value in pch.state_dict().items() if name != "actions.weight"})
    content, mask = random_case(pch, [5, 2, 0])
    unknown = torch.zeros_like(mask)
    for got in (pch.last(content, mask), pch.last(content, mask, unknown)):
        assert torch.equal(got, without.last(content, mask))
    assert torch.equal(pch.states(content, unknown), without.states(content))
    assert torch.equal(pch.alone(content[0]), without.alone(content[0]))


def test_training_moves_the_vectors_of_actions_but_not_that_of_the_unknown_one():
    pch = Pch(PchConfig(content_dim=12, adaptor_hidden=10, width=16, heads=2, ffn=20, out_dim=6, actions=ACTIONS))
    assert pch.actions.weight.shape == (1 + 8, 16) and not pch.actions.weight[0].any()
    assert 0.015 < pch.actions.weight[1:].std() < 0.025
    optimizer = torch.optim.AdamW(pch.parameters(), lr=0.1)
    before = pch.actions.weight.detach().clone()
    pch.states(torch.randn(2, 3, 12), torch.tensor([[0, 1, 2], [8, 0, 1]])).sum().backward()
    optimizer.step()
    is_moved = (pch.actions.weight - before).abs().amax(dim=1) > 0.01
    assert is_moved.tolist() == [number in (1, 2, 8) for number in range(9)]
    assert not pch.actions.weight[0].any()


def test_towers_without_actions_refuse_them():
    content, mask = random_case(small_pch(), [3])
    with pytest.raises(ValueError, match="these towers read no actions"):
        small_pch().last(content, mask, torch.zeros_like(mask))


def test_actions_are_known_names_each_named_once():
    for actions, message in (
        (("like", "love", "Like"), "actions has 'love', 'Like', but must be some of view, click, like"),
        (("unspecified",), "actions has 'unspecified', but must be some of view"),
        (("like", "view", "like"), r"actions is \['like', 'view', 'like'\], but each action may be named only once"),
    ):
        with pytest.raises(ValueError, match=message):
            PchConfig(actions=actions)
        with pytest.raises(ValueError, match=message):
            strict(PchConfig, {"actions": list(actions)}, "pch")
    # Lists come from TOML files.
    assert strict(PchConfig, {"actions": ["like", "view"]}, "pch") == PchConfig(actions=("like", "view"))
    config = PchConfig(actions=["purchase", "like"])
    assert config.actions == ("purchase", "like")
    assert [config.action_number(name) for name in ("like", "purchase", "view", "unspecified")] == [2, 1, 0, 0]


# --- as served -------------------------------------------------------------------------------------------------------


@both_positions
@pytest.mark.parametrize("adaptor", ["mlp", "linear"])
def test_the_user_tower_reads_the_item_towers_second_output(positions, adaptor):
    pch = with_actions(positions=positions, adaptor=adaptor)
    content, mask = random_case(pch, [5, 0, 9, 1])
    item, adapted = ItemTowerGraph(pch)(content.flatten(0, 1))
    torch.testing.assert_close(item, pch.alone(content.flatten(0, 1)), rtol=0, atol=1e-6)
    assert adapted.shape == (4 * 9, 16) and adapted.mean(dim=1).abs().max() < 1e-6
    # The mean is not zero by chance.
    assert pch.adapt(content).mean(dim=-1).abs().max() > 1e-2
    histories = adapted.unflatten(0, (4, 9))
    torch.testing.assert_close(UserTowerGraph(pch)(histories, mask), pch.last(content, mask), rtol=0, atol=1e-6)
    actions = torch.randint(0, 4, (4, 9)) * mask
    torch.testing.assert_close(
        UserTowerGraph(pch)(histories, mask, actions), pch.last(content, mask, actions), rtol=0, atol=1e-6
    )
