"""Digests that a server computes, too: by hand here, and against the server's own answers in test_verify.py."""

from __future__ import annotations

import hashlib
import struct

import pytest
from blake3 import blake3
from conftest import FIXTURES

from learn.data.item_text import ItemText
from learn.serving import digests


def test_a_text_by_hand():
    def field(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    raw = field("Café") + field("") + field("b") + field("9") + struct.pack("<Q", 2) + field("k") + field("")
    raw += struct.pack("<Q", 0)
    text = ItemText("Café", "", "b", "9", ("k", ""), ())
    assert digests.text_digest(text) == blake3(raw).digest()[:16]
    assert digests.text_bytes(text) == 5 + 1 + 1 + (1 + 1) + (0 + 1)


def test_no_two_texts_share_bytes():
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


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(UnicodeEncodeError):
        digests.text_digest(ItemText("\ud800"))


def test_parts_of_bundles():
    first, retrained, reencoded = (digests.read_manifest(FIXTURES / n) for n in ("bundle", "retrained", "reencoded"))
    assert digests.encoder_digest(first) == digests.encoder_digest(retrained) != digests.encoder_digest(reencoded)
    assert len({digests.tower_digest(manifest) for manifest in (first, retrained, reencoded)}) == 3
    for changed in ({"max_tokens": 7}, {"template": "{{ title }}"}):
        other = first | {"item_text": first["item_text"] | changed}
        assert digests.encoder_digest(other) != digests.encoder_digest(first)
        assert digests.tower_digest(other) != digests.tower_digest(first)
    raw = (FIXTURES / "bundle" / "manifest.toml").read_bytes()
    assert digests.bundle_digest(FIXTURES / "bundle") == hashlib.sha256(raw).hexdigest()


def test_a_manifest_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        digests.read_manifest(tmp_path)
    (tmp_path / "manifest.toml").write_text("format = ")
    with pytest.raises(ValueError, match=r"manifest\.toml: "):
        digests.read_manifest(tmp_path)
