"""The CVR head: what its product terms compute, and that each of them starts as if it was not there."""

from __future__ import annotations

import pytest
import torch

from learn.models.cvr import CvrConfig, CvrHead

SIZES = {"in_dim": 6, "fuse_dim": 10, "mid_dim": 4}


def pairs():
    return torch.randn(2, 6), torch.randn(5, 6), torch.tensor([1, 0, 1, 1, 0])


def test_the_terms_of_the_head_match_their_formulas():
    head = CvrHead(CvrConfig(**SIZES, product=True, dot=True)).eval()
    torch.nn.init.normal_(head.dot)
    user, item, row = pairs()
    mid_emb, logit = head(user, item, row)
    gelu = torch.nn.functional.gelu
    for position, owner in enumerate(row.tolist()):
        u, i = user[owner], item[position]
        product = torch.sigmoid(head.product.gate(u)) * head.product.user(u) * head.product.item(i)
        fused = head.fuse_user(u) + head.fuse_item(i) + product + (u @ i) * head.dot
        want = gelu(head.mid(gelu(fused)))
        torch.testing.assert_close(mid_emb[position], want)
        torch.testing.assert_close(logit[position], head.out(want).squeeze())


def test_only_a_product_term_can_see_whether_user_and_item_match(monkeypatch):
    """Before the GELU, a sum has no interaction: f(u, i) - f(u, j) is the same for every user."""
    for parts, sees in (({}, False), ({"product": True}, True), ({"dot": True}, True)):
        head = CvrHead(CvrConfig(**SIZES, **parts)).double().eval()
        if head.dot is not None:
            torch.nn.init.normal_(head.dot)
        fused = []
        head.mid.register_forward_pre_hook(lambda _module, given, found=fused: found.append(given[0]))
        user, item = torch.randn(2, 6).double(), torch.randn(2, 6).double()
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "gelu", lambda x: x)
            head(user, item.repeat(2, 1), torch.tensor([0, 0, 1, 1]))
        first, second = fused[0][0] - fused[0][1], fused[0][2] - fused[0][3]
        assert torch.allclose(first, second) != sees


def test_a_head_with_a_dot_product_starts_as_one_without():
    torch.manual_seed(3)
    plain = CvrHead(CvrConfig(**SIZES)).eval()
    torch.manual_seed(3)
    dotted = CvrHead(CvrConfig(**SIZES, dot=True)).eval()
    user, item, row = pairs()
    assert torch.equal(plain(user, item, row)[1], dotted(user, item, row)[1])


def test_a_dropout_that_drops_everything_is_refused():
    with pytest.raises(ValueError, match="dropout is 1"):
        CvrConfig(dropout=1.0)


def test_the_outcome_of_a_head_that_knows_clicks_is_a_click_and_a_conversion():
    head = CvrHead(CvrConfig(**SIZES, click=True)).eval()
    user, item, row = pairs()
    both, click = head.outcome(user, item, row)
    mid_emb, logit = head(user, item, row)
    torch.testing.assert_close(click, head.click(mid_emb).squeeze(-1))
    torch.testing.assert_close(both.sigmoid(), click.sigmoid() * logit.sigmoid())
    # It stays finite where both are certain, or one is impossible.
    for bias in (60.0, -200.0):
        with torch.no_grad():
            head.click.bias.fill_(bias)
            head.out.bias.fill_(60.0)
        both, _click = head.outcome(user, item, row)
        both.sum().backward()
        assert both.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    plain = CvrHead(CvrConfig(**SIZES)).eval()
    assert torch.equal(plain.outcome(user, item, row)[0], plain(user, item, row)[1])
    assert plain.outcome(user, item, row)[1] is None
