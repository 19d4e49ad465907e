"""The towers: the three ways to compute a state agree, and no state depends on later items."""

from __future__ import annotations

import pytest
import torch
from conftest import small_pch

EXACT = {"rtol": 0, "atol": 2e-6}
both_positions = pytest.mark.parametrize("positions", ["none", "learned"])


def random_case(pch, lengths):
    content = torch.randn(len(lengths), max(max(lengths), 1), pch.config.content_dim)
    mask = (torch.arange(content.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return content, mask


@both_positions
def test_later_items_do_not_change_earlier_states(positions):
    pch = small_pch(positions=positions)
    content, _ = random_case(pch, [7, 7])
    changed = content.clone()
    changed[:, 4] += 1.0
    before, after = pch.states(content), pch.states(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], **EXACT)
    # State j is computed after j items, so state 5 is the first that depends on item 4.
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-4)


@both_positions
def test_last_equals_the_naive_state_at_the_last_item(positions):
    pch = small_pch(positions=positions)
    lengths = [5, 0, 9, 1]
    content, mask = random_case(pch, lengths)
    naive = pch.states(content)[torch.arange(4), torch.tensor(lengths)]
    torch.testing.assert_close(pch.last(content, mask), naive, **EXACT)


def test_padding_never_changes_a_state():
    pch = small_pch()
    content, mask = random_case(pch, [3, 6])
    noisy = content.clone()
    noisy[mask == 0] = 7.0
    torch.testing.assert_close(pch.last(noisy, mask), pch.last(content, mask), **EXACT)
    by_itself = pch.last(content[:1, :3], mask[:1, :3])
    torch.testing.assert_close(pch.last(noisy, mask)[:1], by_itself, **EXACT)


@both_positions
def test_alone_equals_the_state_of_a_sequence_of_one_item(positions):
    pch = small_pch(positions=positions)
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
