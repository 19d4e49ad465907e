"""Large tables of content: what is fitted on a sample and gathered by row against the whole table in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small_pch

from learn.content import standardise
from learn.content.content_table import GatheredContent, standardised
from learn.content.standardise import fit
from learn.models.recommender import ContentMean, Learn

N_ITEMS, DIM = 700, 12


@pytest.fixture
def large(monkeypatch):
    """Makes every table one that does not fit in memory, and pieces small enough that there are several."""
    monkeypatch.setattr(standardise, "IN_MEMORY_BYTES", 0)
    for module in ("standardise", "content_table"):
        monkeypatch.setattr(f"learn.content.{module}.CHUNK", 64)


def table(dtype=torch.float32):
    drawn = torch.randn(N_ITEMS, DIM, generator=torch.Generator().manual_seed(3))
    return (drawn @ torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(4)) * 0.1 + 0.5).to(dtype)


def mapped_file(tmp_path, content):
    np.save(tmp_path / "content.npy", content.numpy())
    return torch.from_numpy(np.load(tmp_path / "content.npy", mmap_mode="c"))


@pytest.mark.parametrize("method", ["none", "scale", "whiten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gathered_rows_equal_those_of_the_table_in_memory(method, dtype, tmp_path, monkeypatch):
    content = table(dtype)
    want = standardised(content, fit(content, method))
    monkeypatch.setattr(standardise, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(standardise, "CHUNK", 64)
    stored = mapped_file(tmp_path, content)
    gathered = standardised(stored, fit(stored, method))
    assert isinstance(gathered, GatheredContent) and gathered.rows.dtype == dtype
    assert len(gathered) == N_ITEMS and gathered.shape == (N_ITEMS, DIM)
    items = torch.tensor([[3, 699, 3], [0, 64, 63]])
    assert gathered[items].shape == (2, 3, DIM) and gathered[items].dtype == torch.float32
    torch.testing.assert_close(gathered[items], want[items], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["scale", "whiten"])
def test_a_map_that_is_fitted_on_a_sample_is_near_that_of_all_rows(method, monkeypatch):
    content = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2, 3, 4]) + 7
    whole = fit(content, method)
    monkeypatch.setattr(standardise, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(standardise, "SAMPLE_ROWS", 10_000)
    sampled = fit(content, method)
    assert not torch.equal(sampled.mean, whole.mean)
    torch.testing.assert_close(sampled.mean, whole.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(sampled.matrix, whole.matrix, rtol=0, atol=0.02)
    torch.testing.assert_close(fit(content, method).matrix, sampled.matrix, rtol=0, atol=0)


def test_squares_keep_their_digits_far_from_zero(large):
    content = (torch.randn(5_000, 2, generator=torch.Generator().manual_seed(1)) * 1e-3 + 1.0).double().float()
    scale = fit(content, "scale").scale
    torch.testing.assert_close(scale, 1.0 / content.double().std(dim=0).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_large_catalogue_gives_the_model_the_same_outputs(dtype, tmp_path, monkeypatch):
    content, items = table(dtype), torch.tensor([[5, 9, 699], [1, 1, 64]])
    times = torch.zeros(2, 4, dtype=torch.long)

    def outputs(given):
        torch.manual_seed(0)
        models = [Learn(small_pch(), given, "whiten").eval(), ContentMean(given, 9)]
        states = [model.states(items, times) for model in models]
        return models, [*states, *(model.item_embeddings(torch.arange(N_ITEMS)) for model in models)]

    small, want = outputs(content)
    monkeypatch.setattr(standardise, "IN_MEMORY_BYTES", 0)
    large, found = outputs(mapped_file(tmp_path, content))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-4)
    assert "content" in dict(small[0].named_buffers()) and isinstance(large[0].content, GatheredContent)
    assert large[0].state_dict().keys() == small[0].state_dict().keys()
    assert not any(buffer.shape[0] == N_ITEMS for buffer in large[0].buffers())


def test_towers_over_a_large_catalogue_take_raw_content_once_they_are_finished(large):
    content = table(torch.float16)
    model = Learn(small_pch(), content, "scale").eval()
    before = model.item_embeddings(torch.arange(50))
    model.finish()
    torch.testing.assert_close(model.pch.alone(content[:50].float()), before, rtol=0, atol=2e-5)
    assert not hasattr(model, "content")


def test_the_settings_of_a_model_name_a_large_table_by_its_content(large):
    content = table()
    changed = content.clone()
    changed[650, 3] += 1e-3
    one, same, other = (Learn(small_pch(), given).settings() for given in (content, content.clone(), changed))
    assert one == same != other and len(one["content"]) == 64


def test_a_small_table_is_not_named_in_the_settings():
    assert "content" not in Learn(small_pch(), table()).settings()


def test_rows_stay_in_their_precision_until_they_are_gathered(large):
    gathered = standardised(table(torch.float16), fit(table(torch.float16), "scale"))
    fetched = gathered.fetch(torch.tensor([1, 2]))
    assert fetched.dtype == torch.float16
    torch.testing.assert_close(gathered.mapped(fetched), gathered[torch.tensor([1, 2])], rtol=0, atol=0)


def test_the_map_is_in_fp32_under_autocast(large):
    gathered, items = standardised(table(), fit(table(), "whiten")), torch.arange(40)
    want = gathered[items]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gathered[items], want, rtol=0, atol=0)
