"""Digests that the server computes too: against hand-built bytes here, and a live server in test_verify_server.py."""

from __future__ import annotations

import hashlib
import struct

import pytest
import tomli_w
from blake3 import blake3
from conftest import FIXTURE, FIXTURES

from learn.data.item_text import ItemText
from learn.serving import digests


def test_a_text_digest_matches_hand_built_bytes():
    def field(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    raw = field("Café") + field("") + field("b") + field("9") + struct.pack("<Q", 2) + field("k") + field("")
    raw += struct.pack("<Q", 0)
    text = ItemText("Café", "", "b", "9", ("k", ""), ())
    assert digests.text_digest(text) == blake3(raw).digest()[:16]
    assert digests.text_bytes(text) == 5 + 1 + 1 + (1 + 1) + (0 + 1)


def test_texts_that_differ_only_in_field_boundaries_have_different_digests():
    texts = [
        ItemText("ab"),
        ItemText("a", "b"),
        ItemText("", "ab"),
        ItemText(keywords=("ab",)),
        ItemText(keywords=("a", "b")),
        ItemText(attributes=("ab",)),
        ItemText(keywords=("ab", "")),
    ]
    assert len({digests.text_digest(text) for text in texts}) == len(texts)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        digests.text_digest(ItemText("\ud800"))


def test_each_digest_covers_exactly_its_part_of_the_bundle():
    first, retrained, reencoded = (digests.read_manifest(FIXTURES / n) for n in ("bundle", "retrained", "reencoded"))
    assert digests.encoder_digest(first) == digests.encoder_digest(retrained) != digests.encoder_digest(reencoded)
    assert len({digests.tower_digest(manifest) for manifest in (first, retrained, reencoded)}) == 3
    for changed in ({"max_tokens": 7}, {"template": "{{ title }}"}):
        other = first | {"item_text": first["item_text"] | changed}
        assert digests.encoder_digest(other) != digests.encoder_digest(first)
        assert digests.tower_digest(other) != digests.tower_digest(first)
    # Records with and without what the user tower reads are not the same, but the content that they come from is.
    other = first | {"item_tower": first["item_tower"] | {"outputs": ["item"]}}
    assert digests.tower_digest(other) != digests.tower_digest(first)
    assert digests.encoder_digest(other) == digests.encoder_digest(first)
    raw = (FIXTURES / "bundle" / "manifest.toml").read_bytes()
    assert digests.bundle_digest(FIXTURES / "bundle") == hashlib.sha256(raw).hexdigest()


def test_the_tower_digest_matches_hand_built_bytes():
    manifest = digests.read_manifest(FIXTURES / "bundle")
    (file,) = (entry for entry in manifest["files"] if entry["part"] == "item_tower")
    strings = [file["path"], file["sha256"]]
    raw = b"".join(struct.pack("<Q", len(s)) + s.encode() for s in strings)
    raw += bytes.fromhex(digests.encoder_digest(manifest))
    raw += b"".join(struct.pack("<Q", len(s)) + s.encode() for s in ("content", "item", "adapted"))
    assert digests.tower_digest(manifest) == hashlib.sha256(raw).hexdigest()[:32]


def test_a_missing_or_malformed_manifest_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        digests.read_manifest(tmp_path)
    for raw in (b"format = ", b"name = '\xff'"):
        (tmp_path / "manifest.toml").write_bytes(raw)
        with pytest.raises(ValueError, match=r"^/.*/manifest\.toml: "):
            digests.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("encoder", "batching", "allone", "encoder.batching is 'allone', but it must be one of together, alone"),
        ("encoder", "tolerance", 0.1, "encoder.tolerance has 0.1, but it must have absolute and cosine"),
        ("history", "keeps", 1, "history.keeps is 1, but it must be a string"),
        ("history", "actions", "like", "history.actions is 'like', but it must be a list of strings"),
        ("history", "liked_from", "4", "history.liked_from is '4', but it must be a number"),
        ("history", "disliked_to", 2, "history.disliked_to is 2, but there is no liked_from; give both, or neither"),
        ("item_tower", "adapted_dim", 1.5, "item_tower.adapted_dim is 1.5, but it must be an integer"),
        ("golden", "file", 3, "golden.file is 3, but it must be a string"),
    ],
)
def test_a_value_that_a_server_refuses_is_refused_where_the_manifest_is_read(tmp_path, table, key, value, message):
    manifest = digests.read_manifest(FIXTURE)
    manifest[table][key] = value
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest))
    with pytest.raises(ValueError) as caught:
        digests.read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path}/manifest.toml: {message}"


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (
            "format = 1",
            "format 1, but this program reads format 2: convert it with `learn upgrade {0} --out NEW`, where NEW is "
            "another folder",
        ),
        ("format = 3", "format 3, but this program reads format 2: use a newer `learn`"),
        ("name = 'x'", "format None, but this program reads format 2: use a newer `learn`"),
    ],
)
def test_a_manifest_of_another_format_is_refused_with_what_to_do(tmp_path, line, advice):
    (tmp_path / "manifest.toml").write_text(line)
    with pytest.raises(ValueError) as caught:
        digests.read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path}/manifest.toml has {advice.format(tmp_path)}"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../cvr.onnx", "leaves the bundle's folder"),
        ("/etc/passwd", "leaves the bundle's folder"),
        ("a/./b", "leaves the bundle's folder"),
        ("", "leaves the bundle's folder"),
        ("manifest.toml", "is listed twice, or is the manifest itself"),
        ("golden.json", "is listed twice, or is the manifest itself"),
    ],
)
def test_a_manifest_whose_paths_a_server_refuses_is_refused_by_name(tmp_path, path, reason):
    manifest = digests.read_manifest(FIXTURE)
    manifest["files"].append(manifest["files"][0] | {"path": path})
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest))
    with pytest.raises(ValueError) as caught:
        digests.read_manifest(tmp_path)
    assert str(caught.value) == f"{tmp_path}/manifest.toml: the file {path!r} {reason}"


def test_a_file_that_is_used_but_not_listed_under_its_part_is_refused_by_name(tmp_path):
    for part, path, reason in (
        ("encoder", "other.onnx", "(encoder.file) is used, but not listed under [[files]]"),
        ("item_tower", "cvr.onnx", "is listed as part cvr, but used as item_tower"),
        ("golden", "cvr.json", "(golden.file) is used, but not listed under [[files]]"),
    ):
        manifest = digests.read_manifest(FIXTURE)
        manifest[part]["file"] = path
        (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest))
        with pytest.raises(ValueError) as caught:
            digests.read_manifest(tmp_path)
        assert str(caught.value) == f"{tmp_path}/manifest.toml: the file {path!r} {reason}"


def test_a_file_in_a_folder_of_the_bundle_is_accepted_as_by_a_server(tmp_path):
    manifest = digests.read_manifest(FIXTURE)
    manifest["files"].append(manifest["files"][0] | {"path": "parts/..data/more.weights"})
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest))
    assert digests.read_manifest(tmp_path) == manifest
