"""Computes the digests that are a server's cache keys.

A server caches content embeddings under (encoder digest, text digest) and item records under (tower digest, text
digest), which `src/domain/item_text.rs` and src/bundle/digest.rs define. An item record is the item embedding [E], then
what the user tower reads of the item [D]. A live server reports its digests through
GetModelInfo, and `learn verify` compares them with these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from learn.data.item_text import LIST_FIELDS, STRING_FIELDS, ItemText
from learn.serving.bundle_format import FORMAT, MANIFEST, batching, check_manifest, parse_manifest

N_BYTES = 16


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Reads a bundle's manifest. Raises FileNotFoundError, or ValueError with the path.

    The latter also for another format, and for keys and paths that `check_manifest` refuses.
    """
    path, manifest = bundle / MANIFEST, parse_manifest(bundle)
    if (found := manifest.get("format")) != FORMAT:
        convert = f"convert it with `learn upgrade {bundle} --out NEW`, where NEW is another folder"
        advice = convert if found == 1 else "use a newer `learn`"
        raise ValueError(f"{path} has format {found!r}, but this program reads format {FORMAT}: {advice}")
    check_manifest(manifest, path)
    return manifest


def text_digest(text: ItemText) -> bytes:
    """BLAKE3, cut to 16 bytes, over the fields with their lengths; raises UnicodeEncodeError for a lone surrogate."""
    hasher = blake3()
    for name in STRING_FIELDS:
        _add(hasher, getattr(text, name))
    for name in LIST_FIELDS:
        entries = getattr(text, name)
        hasher.update(len(entries).to_bytes(8, "little"))
        for entry in entries:
            _add(hasher, entry)
    return hasher.digest(length=N_BYTES)


def text_bytes(text: ItemText) -> int:
    """Returns the size that `limits.max_text_bytes` limits: UTF-8 bytes of all fields, plus one per list entry."""
    entries = [entry for name in LIST_FIELDS for entry in getattr(text, name)]
    strings = [getattr(text, name) for name in STRING_FIELDS]
    return sum(len(value.encode()) for value in (*strings, *entries)) + len(entries)


def encoder_digest(manifest: Mapping[str, Any]) -> str:
    """Digests everything except the text that a content embedding depends on; 32 hex digits."""
    return _encoder(manifest).hex()


def tower_digest(manifest: Mapping[str, Any]) -> str:
    """Digests everything except the text that an item record depends on; 32 hex digits."""
    hasher = _of_part(manifest, "item_tower")
    hasher.update(_encoder(manifest))
    _add_ports(hasher, manifest["item_tower"])
    return hasher.digest()[:N_BYTES].hex()


def bundle_digest(bundle: Path) -> str:
    """Returns the manifest's SHA-256 in hex, which covers every file, as the manifest holds the files' digests."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def _encoder(manifest: Mapping[str, Any]) -> bytes:
    hasher = _of_part(manifest, "encoder")
    _add(hasher, manifest["item_text"]["template"])
    hasher.update(manifest["item_text"]["max_tokens"].to_bytes(8, "little"))
    hasher.update(manifest["encoder"]["pad_id"].to_bytes(8, "little", signed=True))
    _add_ports(hasher, manifest["encoder"])
    # Vectors of a graph that must see one text per run are others than those of the same graph in batches.
    if batching(manifest) == "alone":
        _add(hasher, "alone")
    return hasher.digest()[:N_BYTES]


def _of_part(manifest: Mapping[str, Any], part: str) -> hashlib._Hash:
    hasher = hashlib.sha256()
    files = [entry for entry in manifest["files"] if entry["part"] == part]
    for entry in sorted(files, key=lambda entry: entry["path"].encode()):
        _add(hasher, entry["path"])
        _add(hasher, entry["sha256"])
    return hasher


def _add_ports(hasher: hashlib._Hash, graph: Mapping[str, Any]) -> None:
    for port in (*graph["inputs"], *graph["outputs"]):
        _add(hasher, port)


def _add(hasher: Any, text: str) -> None:
    raw = text.encode()
    hasher.update(len(raw).to_bytes(8, "little") + raw)
