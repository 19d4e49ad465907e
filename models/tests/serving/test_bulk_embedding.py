"""Bulk embedding: every row is embedded or rejected, killed jobs resume, and a server imports the result."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import struct

import grpc
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.numpy
from conftest import FIXTURE, OLD_BUNDLE
from live_server import serving

from learn.data import DataError
from learn.data.item_text import ItemText
from learn.serving import (
    bulk_embedding,
    bundle_inference,
    cache_snapshot,
    digests,
    fixture_bundles,
    grpc_messages,
    item_shards,
)
from learn.serving.bulk_embedding import BulkConfig, RayConfig
from learn.serving.bundle_inference import BundleGraphs, GraphsConfig

ON_CPU = GraphsConfig(provider="cpu")
BAD_ROWS = [
    ('{"id": "broken', "not JSON: "),
    ('["id"]', "expected an object, got list"),
    ('{"text": {"title": "x"}}', "id: expected a non-empty string, got None"),
    ('{"id": "", "text": {"title": "x"}}', "id: expected a non-empty string, got ''"),
    ('{"id": "none", "text": {}}', "all text fields are empty"),
    ('{"id": "wrong", "text": {"title": 3}}', "title: expected a string, got 3"),
    ('{"id": "misspelt", "text": {"titel": "x"}}', "unknown field of item text: titel"),
    ('{"id": "half", "text": {"title": "\\ud800"}}', "a lone surrogate"),
    (json.dumps({"id": "long", "text": {"title": "x" * 8193}}), "the text has 8193 bytes, more than the limit of 8192"),
]


def write_jsonl(path, texts):
    """Writes one good row per text, with the bad rows between them."""
    lines = [json.dumps({"id": f"item-{n}", "text": text.to_json()}) for n, text in enumerate(texts)]
    for number, (line, _reason) in enumerate(BAD_ROWS):
        lines.insert(2 * number, line)
    path.write_text("\n".join(lines) + "\n")
    return path


def texts(n_items):
    return [ItemText(title=f"Lamp number {n % 15}", category="Lighting") for n in range(n_items)]


def job(tmp_path, **changes):
    path = tmp_path / "items.jsonl"
    if not path.is_file():
        write_jsonl(path, texts(20))
    config = BulkConfig(FIXTURE, path, tmp_path / "out", shard_rows=8, graphs=ON_CPU, title=None)
    return dataclasses.replace(config, **changes)


def read_parts(folder):
    """Reads all parts as one table."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def vectors(table, column):
    return np.array(table[column].to_pylist(), dtype=np.float32)


def test_every_row_is_embedded_or_rejected_with_its_reason(tmp_path, capsys):
    summary = bulk_embedding.embed_catalogue(job(tmp_path))
    assert summary == bulk_embedding.Summary(n_items=20, n_rejects=len(BAD_ROWS), n_parts=4, n_parts_kept=0)
    assert f"20 items embedded, {len(BAD_ROWS)} rejected, in 4 parts (0 from an earlier run)" in capsys.readouterr().out
    table = read_parts(tmp_path / "out")
    assert table["id"].to_pylist() == [f"item-{n}" for n in range(20)]
    assert table["text_digest"].to_pylist() == [digests.text_digest(text) for text in texts(20)]
    rejects = [json.loads(line) for path in sorted((tmp_path / "out").glob("rejects-*")) for line in path.open()]
    assert len(rejects) == len(BAD_ROWS)
    for number, (reject, (line, reason)) in enumerate(zip(rejects, BAD_ROWS, strict=True)):
        assert reason in reject["reason"] and reject["row"] == 2 * number + 1
        assert reject["file"] == str(tmp_path / "items.jsonl")
        known = json.loads(line) if line.endswith("}") else {}
        assert reject["id"] == (known.get("id") or None)
    assert not list((tmp_path / "out").glob(".*"))


def test_vectors_match_the_golden_vectors_of_the_bundle(tmp_path):
    """Embeds the golden items, whose expected vectors were computed by PyTorch."""
    lines = [json.dumps({"id": str(n), "text": text.to_json()}) for n, text in enumerate(fixture_bundles.ITEMS)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    bulk_embedding.embed_catalogue(job(tmp_path))
    table = read_parts(tmp_path / "out")
    golden = json.loads((FIXTURE / "golden.json").read_text())["items"]
    content, item, adapted = (np.array([e[key] for e in golden], np.float32) for key in ("content", "item", "adapted"))
    np.testing.assert_allclose(vectors(table, "content"), content, atol=1e-5)
    np.testing.assert_allclose(vectors(table, "record"), np.concatenate([item, adapted], axis=1), atol=1e-5)
    assert table.schema.names == ["id", "text_digest", "content", "record"]
    assert table.schema.field("content").type == pa.list_(pa.float32(), 32)
    assert table.schema.field("record").type == pa.list_(pa.float32(), 16 + 40)
    manifest = digests.read_manifest(FIXTURE)
    assert table.schema.metadata == {
        b"item_dim": b"16",
        b"adapted_dim": b"40",
        b"bundle_digest": digests.bundle_digest(FIXTURE).encode(),
        b"encoder_digest": digests.encoder_digest(manifest).encode(),
        b"tower_digest": digests.tower_digest(manifest).encode(),
    }


def test_records_do_not_depend_on_how_many_items_the_tower_reads_at_once(monkeypatch):
    graphs = BundleGraphs(FIXTURE, ON_CPU)
    content = np.random.default_rng(0).standard_normal((7, 32), dtype=np.float32)
    at_once = graphs.record(content)
    monkeypatch.setattr(bundle_inference, "TOWER_ITEMS", 3)
    np.testing.assert_allclose(graphs.record(content), at_once, atol=1e-6)
    assert at_once.shape == (7, 16 + 40) and graphs.record(content[:0]).shape == (0, 16 + 40)


def test_a_bundle_of_format_1_is_refused(tmp_path):
    folder = shutil.copytree(OLD_BUNDLE, tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"has format 1, but this program reads format 2: convert it with `learn upg"):
        bulk_embedding.embed_catalogue(job(tmp_path, bundle=folder))


def test_only_content_is_written_in_fp16(tmp_path):
    bulk_embedding.embed_catalogue(job(tmp_path, out=tmp_path / "exact"))
    bulk_embedding.embed_catalogue(job(tmp_path, content_dtype="float16"))
    half, exact = read_parts(tmp_path / "out"), read_parts(tmp_path / "exact")
    assert half.schema.field("content").type == pa.list_(pa.float16(), 32)
    np.testing.assert_allclose(vectors(half, "content"), vectors(exact, "content"), rtol=2**-11, atol=1e-7)
    np.testing.assert_array_equal(vectors(half, "record"), vectors(exact, "record"))


def write_parquet(path, n_items, row_group_size):
    columns = {
        "id": list(range(n_items)),
        "title": [f"Lamp number {n % 15}" for n in range(n_items)],
        "category": [None if n == 3 else "Lighting" for n in range(n_items)],
        "keywords": [["brass"] if n == 4 else None for n in range(n_items)],
        "rank": [1.0] * n_items,
    }
    columns["title"][5] = columns["category"][5] = None
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


@pytest.mark.parametrize("row_group_size", [3, 8, 100])
def test_parquet_is_read_with_row_groups_of_any_size(tmp_path, row_group_size):
    (tmp_path / "items").mkdir()
    write_parquet(tmp_path / "items" / "a.parquet", 20, row_group_size)
    write_jsonl(tmp_path / "items" / "b.jsonl", texts(20))
    summary = bulk_embedding.embed_catalogue(job(tmp_path, items=tmp_path / "items"))
    assert (summary.n_items, summary.n_rejects, summary.n_parts) == (19 + 20, 1 + len(BAD_ROWS), 3 + 4)
    table = read_parts(tmp_path / "out")
    assert table["id"].to_pylist()[:19] == [str(n) for n in range(20) if n != 5]
    found = dict(zip(table["id"].to_pylist(), table["text_digest"].to_pylist(), strict=True))
    assert found["3"] == digests.text_digest(ItemText(title="Lamp number 3"))
    assert found["4"] == digests.text_digest(ItemText(title="Lamp number 4", category="Lighting", keywords=("brass",)))
    (reject,) = (json.loads(line) for line in (tmp_path / "out" / "rejects-000000.jsonl").open())
    assert (reject["row"], reject["id"], reject["reason"]) == (6, "5", "all text fields are empty")


class KilledInSecondShard(bulk_embedding.ShardEmbedder):
    """Kills its process after the second shard is encoded and before the part of that shard is written."""

    def _table(self, items):
        table = super()._table(items)
        if items[0].row > self.config.shard_rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return table


def _embed_until_killed(config):
    bulk_embedding.ShardEmbedder = KilledInSecondShard
    bulk_embedding.embed_catalogue(config)


def test_a_killed_job_resumes_and_keeps_the_parts_that_it_wrote(tmp_path):
    config = job(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=_embed_until_killed, args=(config,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    first = tmp_path / "out" / "part-000000.parquet"
    assert sorted((tmp_path / "out").glob("part-*")) == [first]
    written_at = first.stat().st_mtime_ns
    summary = bulk_embedding.embed_catalogue(config)
    assert (summary.n_items, summary.n_rejects, summary.n_parts_kept) == (20, len(BAD_ROWS), 1)
    assert first.stat().st_mtime_ns == written_at
    bulk_embedding.embed_catalogue(job(tmp_path, out=tmp_path / "at once"))
    assert read_parts(tmp_path / "out").equals(read_parts(tmp_path / "at once"))


@pytest.mark.parametrize(
    ("changes", "name"), [({"content_dtype": "float16"}, "content_dtype"), ({"shard_rows": 9}, "shard_rows")]
)
def test_another_job_in_the_same_folder_is_refused(tmp_path, changes, name):
    bulk_embedding.embed_catalogue(job(tmp_path))
    with pytest.raises(DataError, match=f"column {name}: the folder holds another job"):
        bulk_embedding.embed_catalogue(job(tmp_path, **changes))


def test_a_changed_catalogue_counts_as_another_job(tmp_path):
    bulk_embedding.embed_catalogue(job(tmp_path))
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write('{"id": "new", "text": {"title": "x"}}\n')
    with pytest.raises(DataError, match="column files: the folder holds another job"):
        bulk_embedding.embed_catalogue(job(tmp_path))


def test_a_missing_empty_or_unreadable_catalogue_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "items.csv"):
        with pytest.raises(DataError, match=r"expected a \.jsonl or \.parquet file"):
            bulk_embedding.embed_catalogue(job(tmp_path, items=path))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="there are no rows to embed"):
        bulk_embedding.embed_catalogue(job(tmp_path, items=tmp_path / "empty.jsonl"))
    pq.write_table(pa.table({"name": ["x"]}), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match="column id: expected id and text fields, but the columns are"):
        bulk_embedding.embed_catalogue(job(tmp_path, items=tmp_path / "odd.parquet"))


def test_a_vector_that_is_not_finite_affects_only_its_row(tmp_path):
    """Makes the embedding of one token NaN: texts with that token are faulty, the others are not."""
    folder = shutil.copytree(FIXTURE, tmp_path / "bundle")
    model = onnx.load(folder / "encoder.onnx")
    graphs = BundleGraphs(FIXTURE, ON_CPU)
    token = graphs._tokenizer.encode("¶").ids[-1]
    (table,) = (t for t in model.graph.initializer if tuple(t.dims) == (fixture_bundles.VOCABULARY, 32))
    values = onnx.numpy_helper.to_array(table).copy()
    values[token] = np.nan
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, folder / "encoder.onnx")
    good, bad = ItemText(title="Lamp"), ItemText(title="Lamp ¶")
    content, faults, n_tokens = BundleGraphs(folder, ON_CPU).content([good, bad, good])
    assert faults == {1: "the encoder returned a vector that is not finite"}
    assert not content[1].any() and np.array_equal(content[0], content[2]) and n_tokens > 30


def test_a_job_on_ray_writes_the_same_rows(tmp_path):
    bulk_embedding.embed_catalogue(job(tmp_path, out=tmp_path / "here"))
    try:
        summary = bulk_embedding.embed_catalogue(job(tmp_path, ray=RayConfig(workers=2)))
    finally:
        ray.shutdown()
    assert (summary.n_items, summary.n_rejects, summary.n_parts) == (20, len(BAD_ROWS), 4)
    assert read_parts(tmp_path / "out").equals(read_parts(tmp_path / "here"))


# --- what a server imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "column", "dim", "n_bytes"), [("content", "content", 32, 2 * 32), ("item", "record", 56, 4 * 56)]
)
def test_snapshot_files_have_the_vectors_digests_and_header_for_the_import(
    tmp_path, monkeypatch, kind, column, dim, n_bytes
):
    bulk_embedding.embed_catalogue(job(tmp_path, content_dtype="float16"))
    # Limits a file to seven rows of content in fp16 or of item records in fp32.
    monkeypatch.setattr(cache_snapshot, "FILE_BYTES", 7 * (n_bytes + 16))
    last = sorted((tmp_path / "out").glob("part-*.parquet"))[-1]
    last.rename(tmp_path / "kept")
    with pytest.raises(DataError, match=r"of \d+ parts exist; run `learn embed` for the rest"):
        cache_snapshot.snapshot(tmp_path / "out", tmp_path / "snapshot", kind)
    (tmp_path / "kept").rename(last)
    files = cache_snapshot.snapshot(tmp_path / "out", tmp_path / "snapshot", kind)
    assert [path.name for path in files] == [f"{kind}-{n:06}.safetensors" for n in range(3)]
    found = [safetensors.numpy.load_file(path) for path in files]
    assert [len(tensors["vectors"]) for tensors in found] == [7, 7, 6]
    table = read_parts(tmp_path / "out")
    got = np.concatenate([tensors["vectors"] for tensors in found]).astype(np.float32)
    np.testing.assert_array_equal(got, vectors(table, column))
    got_digests = b"".join(tensors["text_digests"].tobytes() for tensors in found)
    assert got_digests == b"".join(table["text_digest"].to_pylist())
    raw = files[2].read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    manifest = digests.read_manifest(FIXTURE)
    digest = digests.encoder_digest(manifest) if kind == "content" else digests.tower_digest(manifest)
    assert header["__metadata__"] == {
        "format": "midemb-vectors",
        "format_version": "1",
        "kind": kind,
        "digest": digest,
        "dim": str(dim),
        "n": "6",
    }


def test_a_snapshot_never_mixes_parts_of_two_bundles(tmp_path):
    bulk_embedding.embed_catalogue(job(tmp_path))
    other = FIXTURE.parent / "reencoded"
    bulk_embedding.embed_catalogue(job(tmp_path, bundle=other, out=tmp_path / "other"))
    (tmp_path / "other" / "part-000003.parquet").rename(tmp_path / "out" / "part-000003.parquet")
    with pytest.raises(
        DataError, match=r"part-000003\.parquet, column content: the vectors are those of another model"
    ):
        cache_snapshot.snapshot(tmp_path / "out", tmp_path / "snapshot", "content")
    with pytest.raises(DataError, match=r"there is no part-\*\.parquet"):
        cache_snapshot.snapshot(tmp_path, tmp_path / "snapshot", "content")
    with pytest.raises(ValueError, match="kind is 'user'"):
        cache_snapshot.snapshot(tmp_path / "out", tmp_path / "snapshot", "user")
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "part-0.parquet")
    with pytest.raises(DataError, match="not a part of a bulk job"):
        cache_snapshot.snapshot(tmp_path, tmp_path / "snapshot", "content")


def test_parts_of_an_earlier_version_have_content_but_no_records(tmp_path):
    """Turns parts into what `learn embed` wrote for format 1: a column `item` without what the user tower reads."""
    bulk_embedding.embed_catalogue(job(tmp_path))
    want = vectors(read_parts(tmp_path / "out"), "content")
    for path in (tmp_path / "out").glob("part-*.parquet"):
        table = pq.read_table(path)
        items = pa.array([record[:16] for record in table["record"].to_pylist()], pa.list_(pa.float32(), 16))
        pq.write_table(table.drop_columns("record").append_column("item", items), path)
    with pytest.raises(DataError) as caught:
        cache_snapshot.snapshot(tmp_path / "out", tmp_path / "snapshot", "item")
    assert str(caught.value) == (
        f"{tmp_path}/out/part-000000.parquet, column item: an earlier version of `learn embed` wrote this part, "
        "without what the user tower reads of an item; embed the catalogue again, in an empty folder"
    )
    # Content does not depend on the towers.
    (file,) = cache_snapshot.snapshot(tmp_path / "out", tmp_path / "snapshot", "content")
    np.testing.assert_array_equal(safetensors.numpy.load_file(file)["vectors"], want)


def request_mid_emb(server, n_items):
    """Requests mid-embs for a page of catalogue items with their texts; the first three are also the history."""
    messages, services = grpc_messages.stubs()
    page = [grpc_messages.item(f"item-{n}", text) for n, text in enumerate(texts(n_items))]
    request = messages.GetMidEmbRequest(user_id="u", history=page[:3], candidates=page)
    with grpc.insecure_channel(server.grpc) as channel:
        answer = services.MidEmbServiceStub(channel).GetMidEmb(request, timeout=60)
    assert set(answer.statuses) == {messages.ROW_STATUS_OK} and answer.history_used == 3
    return grpc_messages.array(answer.mid_emb)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The mid-embs of a server that encodes the items itself."""
    with serving(FIXTURE, tmp_path_factory.mktemp("cold")) as server:
        found = request_mid_emb(server, 20)
        assert server.metric("midemb_batch_tokens_count") > 0
    return found


@pytest.mark.parametrize(
    ("kinds", "content_dtype", "atol"),
    [
        (["item"], "float32", 1e-5),
        (["content"], "float32", 1e-5),
        # The inputs of the towers are rounded, unless there are records, which are not.
        (["content"], "float16", 5e-3),
        (["content", "item"], "float16", 1e-5),
    ],
)
def test_a_server_with_imported_caches_encodes_nothing(tmp_path, computed, kinds, content_dtype, atol):
    bulk_embedding.embed_catalogue(job(tmp_path, content_dtype=content_dtype))
    files = [path for kind in kinds for path in cache_snapshot.snapshot(tmp_path / "out", tmp_path, kind)]
    with serving(FIXTURE, tmp_path) as server:
        output = server.import_cache(*files)
        assert all(f"{kind}, 20 entries, 0 skipped" in output for kind in kinds)
        imported = request_mid_emb(server, 20)
        assert server.metric("midemb_batch_tokens_count") == 0
        # Records need no content.
        cache = "item" if "item" in kinds else "content"
        hits, misses = (
            server.metric("midemb_cache_lookups_total", cache=cache, result=result) for result in ("hit", "miss")
        )
        assert hits >= 15 and misses == 0
    np.testing.assert_allclose(imported, computed, atol=atol)


def test_shards_are_the_same_with_or_without_a_final_newline(tmp_path):
    for end in ("", "\n"):
        path = tmp_path / f"items{len(end)}.jsonl"
        path.write_text("\n".join(f'{{"id": {n}, "title": "x{n}"}}' for n in range(7)) + end)
        shards, _digests = item_shards.plan(path, 3)
        assert [(shard.first_row, shard.n_rows) for shard in shards] == [(1, 3), (4, 3), (7, 1)]
        read = [item for shard in shards for item in item_shards.read(shard, 100)[0]]
        assert [(item.row, item.id, item.text.title) for item in read] == [(n + 1, str(n), f"x{n}") for n in range(7)]
