"""Measures the floor of W2: a bundle's encoder in a bare loop over items sorted by length, as in a batch job.

    python benches/peers/encoder.py --bundle models/default [--items 1000] [--threads 2] [--batch 32]

Prints one JSON object with items per second and CPU milliseconds per item, for the graph runs alone. Texts are rendered
and tokenized before the clock starts, while the server's figures include that work.
"""

import argparse
import json
import os
import time
import tomllib
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import jinja2
import numpy as np
import onnxruntime
import tokenizers

# Texts are as long as those of `midemb-bench w2-cold`: seven such words, a prefix and two numbers.
WORDS = ["silver", "river", "night", "garden", "winter", "paper", "lantern", "ocean", "copper", "mountain", "glass"]


def texts(n: int) -> list[dict]:
    random = np.random.default_rng(1)
    words = lambda k: " ".join(random.choice(WORDS, k))  # noqa: E731
    number = lambda: random.integers(1 << 62)  # noqa: E731
    empty = {"brand": "", "price": "", "keywords": [], "attributes": []}
    return [{"title": f"{words(4)} cold-{number()} {i}", "category": words(3), **empty} for i in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    manifest = tomllib.loads((args.bundle / "manifest.toml").read_text())
    template = jinja2.Environment(autoescape=False).from_string(manifest["item_text"]["template"])
    tokenizer = tokenizers.Tokenizer.from_file(str(args.bundle / manifest["encoder"]["tokenizer"]))
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(manifest["item_text"]["max_tokens"])
    rows = sorted((tokenizer.encode(template.render(**text)).ids for text in texts(args.items)), key=len)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.log_severity_level = 3
    path = str(args.bundle / manifest["encoder"]["file"])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names, outputs = manifest["encoder"]["inputs"], manifest["encoder"]["outputs"]

    def encode(batch: list[list[int]]) -> None:
        ids = np.full((len(batch), max(map(len, batch))), manifest["encoder"]["pad_id"], dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        session.run(outputs, dict(zip(names, (ids, mask), strict=True)))

    encode(rows[: args.batch])
    cpu, wall = time.process_time(), time.perf_counter()
    for start in range(0, len(rows), args.batch):
        encode(rows[start : start + args.batch])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = sum(map(len, rows)) / len(rows)
    print(json.dumps({"items_per_second": len(rows) / wall, "cpu_ms": cpu * 1e3 / len(rows), "tokens": tokens}))


if __name__ == "__main__":
    main()
