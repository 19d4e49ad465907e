"""The recommenders: what the trainer relies on in each of them, and their formulas against plain loops."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import small_pch

from learn.models.recommender import ContentMean, IdTowers, Learn, Windows
from learn.serving import fixture_bundles
from research.baselines.hstu import BUCKET_WIDTH, Hstu, HstuConfig, time_buckets
from research.baselines.lora import LoraEncoder, LoraSizes
from research.baselines.sasrec import SasRec, SasRecConfig
from research.baselines.sasrec_text import SasRecTextConfig, sasrec_text
from research.baselines.unisrec import UniSRecConfig, unisrec

N_ITEMS = 30
EXACT = {"rtol": 0, "atol": 3e-6}


def content():
    return F.normalize(torch.randn(N_ITEMS, 12, generator=torch.Generator().manual_seed(5)) + 1.0, dim=-1)


def lora():
    with tempfile.TemporaryDirectory() as folder:
        encoder = fixture_bundles.build(Path(folder) / "tokenizer.json").encoder
    prompts = [f"{'very ' * (number % 4)}item number {number}" for number in range(N_ITEMS)]
    return LoraEncoder(LoraSizes(rank=2, dropout=0.0, out_dim=6, max_history=9), encoder, prompts)


def build_model(kind):
    torch.manual_seed(0)
    model = {
        "learn": lambda: Learn(small_pch(), content()),
        "learn-id": lambda: Learn(small_pch(), content(), ids="separate"),
        "learn-adapted": lambda: Learn(small_pch(item_tower="adapted", out_dim=16), content(), ids="separate"),
        "learn-id-tied": lambda: Learn(small_pch(out_dim=16), content(), ids="tied"),
        "id-towers": lambda: IdTowers(small_pch(out_dim=16), N_ITEMS),
        "sasrec": lambda: SasRec(SasRecConfig(width=8, layers=2, heads=2, max_history=9), N_ITEMS),
        "hstu": lambda: Hstu(HstuConfig(width=8, layers=2, heads=2, max_history=9), N_ITEMS),
        "hstu-time": lambda: Hstu(HstuConfig(width=8, layers=2, heads=2, max_history=9, time_bias=True), N_ITEMS),
        "sasrec-text": lambda: sasrec_text(
            SasRecTextConfig(width=8, heads=2, max_history=9, adaptor_hidden=10), content(), "scale"
        ),
        "unisrec": lambda: unisrec(UniSRecConfig(width=8, max_history=9, experts=3), content(), "scale"),
        "content-mean": lambda: ContentMean(content(), 9),
        "lora": lora,
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


KINDS = [
    "learn",
    "learn-adapted",
    "learn-id",
    "learn-id-tied",
    "id-towers",
    "sasrec",
    "hstu",
    "hstu-time",
    "content-mean",
    "lora",
]
KINDS += ["sasrec-text", "unisrec", "learn-adapted"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_batch():
    items = torch.randint(N_ITEMS, (3, 7), generator=torch.Generator().manual_seed(1))
    times = torch.cumsum(torch.randint(1, 10**6, (3, 8), generator=torch.Generator().manual_seed(2)), dim=1)
    return items, times


@every_kind
def test_later_events_do_not_change_earlier_states(kind):
    model, (items, times) = build_model(kind), random_batch()
    changed = items.clone()
    changed[:, 4] = (changed[:, 4] + 1) % N_ITEMS
    later = times.clone()
    later[:, 6:] += 10**7
    before, after = model.states(items, times), model.states(changed, later)
    assert before.shape == (3, 8, before.shape[-1])
    torch.testing.assert_close(before[:, :5], after[:, :5], **EXACT)
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-4)


@every_kind
def test_last_is_the_state_after_the_last_real_event(kind):
    model, (items, times) = build_model(kind), random_batch()
    length = torch.tensor([7, 3, 1])
    naive = model.states(items, times)[torch.arange(3), length]
    torch.testing.assert_close(model.last(items, times, length), naive, **EXACT)


@every_kind
def test_embeddings_and_states_have_norm_one(kind):
    model, (items, times) = build_model(kind), random_batch()
    torch.testing.assert_close(model.item_embeddings(torch.arange(N_ITEMS)).norm(dim=1), torch.ones(N_ITEMS))
    torch.testing.assert_close(model.states(items, times)[:, 1:].norm(dim=-1), torch.ones(3, 7))


@every_kind
def test_has_start_is_true_only_if_the_first_state_is_not_zero(kind):
    model, (items, times) = build_model(kind), random_batch()
    start = model.states(items, times)[:, 0]
    assert model.has_start == bool(start.abs().sum() > 0)


def test_each_variant_of_the_item_tower_gives_the_keys_it_defines():
    items, times = random_batch()
    for variant in ("sequence", "alone", "content"):
        torch.manual_seed(0)
        model = Learn(small_pch(item_tower=variant, out_dim=12), content()).eval()
        keys, alone = (
            model.target_keys(items, times[:, :8]),
            model.item_embeddings(items.flatten()).unflatten(0, (3, 7)),
        )
        if variant == "sequence":
            torch.testing.assert_close(keys, model.states(items, times)[:, 1:], **EXACT)
            # The first key depends on its own item alone; the second also depends on the first item.
            torch.testing.assert_close(keys[:, 0], alone[:, 0], **EXACT)
            assert not torch.allclose(keys[:, 1], alone[:, 1], atol=1e-4)
        else:
            torch.testing.assert_close(keys, alone, **EXACT)
    torch.testing.assert_close(alone[0, 0], F.normalize(model.content[items[0, 0]], dim=0), **EXACT)


def test_an_adapted_item_is_the_direction_of_its_adapted_content():
    model = Learn(small_pch(item_tower="adapted", out_dim=16), content()).eval()
    items, times = random_batch()
    adapted = model.pch.adapt(model.content[items])
    want = F.normalize(adapted - adapted.mean(dim=-1, keepdim=True), dim=-1)
    torch.testing.assert_close(model.item_embeddings(items.flatten()).unflatten(0, (3, 7)), want, **EXACT)
    torch.testing.assert_close(model.target_keys(items, times[:, :8]), want, **EXACT)
    states, shared = model.states_and_items([Windows(items, times)], items[0])
    torch.testing.assert_close(shared, want[0], **EXACT)
    torch.testing.assert_close(states[0], model.states(items, times), **EXACT)
    with pytest.raises(ValueError, match='out_dim is 6 and width is 16, but with item_tower = "adapted"'):
        small_pch(item_tower="adapted")


@pytest.mark.parametrize("mode", ["tied", "separate"])
def test_zero_id_embeddings_leave_the_text_embeddings_unchanged(mode):
    plain, with_ids = (Learn(small_pch(out_dim=16), content(), ids=ids) for ids in ("none", mode))
    with_ids.pch.load_state_dict(plain.pch.state_dict())
    (items, times), all_items = random_batch(), torch.arange(N_ITEMS)
    assert not torch.allclose(plain.item_embeddings(all_items), with_ids.item_embeddings(all_items), atol=1e-4)
    with torch.no_grad():
        for table in with_ids.ids.parameters():
            table.zero_()
    torch.testing.assert_close(plain.item_embeddings(all_items), with_ids.item_embeddings(all_items), **EXACT)
    torch.testing.assert_close(plain.states(items, times), with_ids.states(items, times), **EXACT)


def test_tied_ids_need_an_output_as_wide_as_the_towers():
    with pytest.raises(ValueError, match="width 16, out_dim 6"):
        Learn(small_pch(), content(), ids="tied")


def test_finished_towers_take_content_that_is_not_standardised():
    model = Learn(small_pch(), content(), "whiten").eval()
    want = model.item_embeddings(torch.arange(N_ITEMS)).detach()
    model.finish()
    torch.testing.assert_close(model.pch.alone(content()).detach(), want, rtol=0, atol=2e-5)


def test_the_content_mean_matches_a_hand_computed_value():
    model = build_model("content-mean")
    centred = F.normalize(content() - content().mean(dim=0), dim=-1)
    got = model.states(torch.tensor([[3, 4]]), torch.zeros(1, 3, dtype=torch.int64))[0]
    torch.testing.assert_close(got[2], F.normalize(centred[3] + centred[4], dim=0), **EXACT)


def test_time_buckets_match_hand_computed_values():
    times = torch.tensor([[0, 0, 100, 10**9]])
    # Query i predicts the event after it, so its time is that of event i + 1.
    want = [[0, 0, math.log(100) // BUCKET_WIDTH], [math.log(100) // BUCKET_WIDTH] * 2 + [0], None]
    got = time_buckets(times)[0]
    assert got[0].tolist() == [0, 0, want[0][2]] and got[1].tolist() == want[1]
    assert got[2].tolist() == [math.log(10**9) // BUCKET_WIDTH] * 2 + [math.log(10**9 - 100) // BUCKET_WIDTH]


def test_hstu_depends_on_the_time_of_the_request_only_with_its_time_bias():
    items, times = random_batch()
    later = times.clone()
    later[:, -1] += 10**8
    for kind, differs in (("hstu", False), ("hstu-time", True)):
        model = build_model(kind)
        changed = (model.states(items, times)[:, -1] - model.states(items, later)[:, -1]).abs().max()
        assert (changed > 1e-4) == differs


def test_an_hstu_layer_matches_plain_sums():
    """Computes one layer with one head for two events: no softmax, and a division by the longest sequence length."""
    model = Hstu(HstuConfig(width=4, layers=1, heads=1, max_history=5, dropout=0.0), N_ITEMS).eval()
    items = torch.tensor([[3, 8]])
    x = model.table[items[0]] * 2.0 + model.positions[:2]
    block = model.blocks[0]
    u, v, q, k = F.silu(F.layer_norm(x, (4,), eps=1e-6) @ block.uvqk.weight.T).split(4, dim=-1)
    mixed = torch.zeros(2, 4)
    for i in range(2):
        for j in range(i + 1):
            mixed[i] = mixed[i] + F.silu(q[i] @ k[j] + block.by_distance[i - j]) / 5 * v[j]
    y = F.layer_norm(mixed, (4,), eps=1e-6) * u
    want = F.normalize(x + y @ block.out.weight.T + block.out.bias, dim=-1)
    got = model.states(items, torch.zeros(1, 3, dtype=torch.int64))[0, 1:]
    torch.testing.assert_close(got, want, **EXACT)


def test_a_sasrec_block_matches_plain_products():
    config = SasRecConfig(width=4, layers=1, heads=1, max_history=5, dropout=0.0)
    model = SasRec(config, N_ITEMS).eval()
    x = model.table[torch.tensor([3, 8])] * 2.0 + model.encoder.positions[:2]
    block, attention = model.encoder.blocks[0], model.encoder.blocks[0].attention
    query = block.norm_query(x)
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    q, k, v = query @ wq.T + bq, x @ wk.T + bk, x @ wv.T + bv
    scores = (q @ k.T / 2.0).masked_fill(torch.tensor([[False, True], [False, False]]), -math.inf)
    h = query + attention.out_proj(scores.softmax(dim=-1) @ v)
    y = block.norm_ffn(h)
    h = y + block.down(F.relu(block.up(y)))
    want = F.normalize(model.encoder.norm_out(h), dim=-1)
    got = model.states(torch.tensor([[3, 8]]), torch.zeros(1, 3, dtype=torch.int64))[0, 1:]
    torch.testing.assert_close(got, want, **EXACT)


def test_standardisation_also_folds_into_a_linear_adaptor():
    model = Learn(small_pch(adaptor="linear"), content(), "scale").eval()
    want = model.item_embeddings(torch.arange(4)).detach()
    model.finish()
    torch.testing.assert_close(model.pch.alone(content()[:4]).detach(), want, rtol=0, atol=2e-5)


def test_a_tuned_encoder_gives_the_same_embeddings_in_training_and_evaluation():
    model, (items, times) = build_model("lora"), random_batch()
    all_items = torch.arange(N_ITEMS)
    states, keys = model.states(items, times), model.item_embeddings(all_items)
    model.train()
    torch.testing.assert_close(model.states(items, times), states, **EXACT)
    # Some of these items have just been encoded for the states, and others have not.
    torch.testing.assert_close(model.item_embeddings(all_items), keys, **EXACT)
    mean = F.normalize(keys[items[0, :3]].mean(dim=0), dim=0)
    torch.testing.assert_close(states[0, 3], mean, **EXACT)


def test_only_low_rank_updates_and_the_projection_of_a_tuned_encoder_are_trained():
    model, (items, times) = lora().train(), random_batch()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # The first step changes only the low-rank factor that starts at zero, because the other factor has no gradient yet.
    for _ in range(2):
        optimizer.zero_grad()
        (model.states(items, times)[:, 1:, 0].sum() + model.item_embeddings(items.unique())[:, 1].sum()).backward()
        optimizer.step()
    changed_names = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    expected = {name for name in before if "lora_" in name or name.startswith("projection")}
    assert changed_names == expected and len(expected) > 10
    n_learned = sum(before[name].numel() for name in expected)
    assert n_learned == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_loaded_weights_take_effect_at_once():
    model, (items, times) = build_model("lora"), random_batch()
    states, weights = model.states(items, times), {name: value.clone() for name, value in model.state_dict().items()}
    weights["projection.weight"] = -weights["projection.weight"]
    model.load_state_dict(weights)
    assert not torch.allclose(model.states(items, times), states, atol=1e-4)
