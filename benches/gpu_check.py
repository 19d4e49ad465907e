#!/usr/bin/env python3
"""Checks the shipped bundle on the CUDA provider against the CPU's responses, then measures it.

    python3 benches/gpu_check.py --library /path/to/libonnxruntime.so [--write benches/results/DATE-gpu.md]

Needs a built `target/release/midemb`, the bundle's files (`make setup`) and a library with the CUDA provider beside it
(`python3 deploy/fetch.py --gpu`). Uses the standard library only. `--provider cpu` runs the same steps without a GPU.

1. `midemb bundle verify` checks every golden vector, one by one and in batches.
2. A server on the CPU and one on the provider answer the same page, each cold and warm. Statuses must be equal and
   vectors within 1e-4; otherwise the check ends with exit code 1.
3. `midemb-bench` runs w1-hot with 8 and 64 concurrent requests, scored one by one and together, and w2-cold.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))
from demo import MIDEMB, Server, serving  # noqa: E402

BENCH = ROOT / "target" / "release" / "midemb-bench"

TOLERANCE = 1e-4
CONCURRENCIES = (8, 64)
BATCHES = (1, 32)


def midemb(*arguments: str, program: Path = MIDEMB) -> str:
    run = subprocess.run([str(program), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"midemb {' '.join(arguments)}: exit code {run.returncode}\n{run.stderr}")
    return run.stdout


def settings(provider: str, library: Path, batch_requests: int = 0) -> dict[str, str]:
    return {
        "MIDEMB__INFERENCE__PROVIDER": provider,
        "MIDEMB__INFERENCE__ONNXRUNTIME": str(library),
        "MIDEMB__INFERENCE__BATCH_REQUESTS": str(batch_requests),
    }


def answers(server: Server) -> list[dict]:
    """Returns the responses for one page, cold and then warm."""
    query = ["query", "--server", server.grpc, "--json"]
    return [json.loads(midemb(*query)), json.loads(midemb(*query, "--ids-only"))]


def largest_difference(page: dict, other: dict) -> float:
    """Returns the largest difference of mid-embs and probabilities; infinite if an id differs or a status is not OK."""
    largest = 0.0
    for row, twin in zip(page["rows"], other["rows"], strict=True):
        if (row["id"], row["status"]) != (twin["id"], twin["status"]) or row["status"] != "OK":
            return float("inf")
        pairs = [*zip(row["mid_emb"], twin["mid_emb"], strict=True), (row["cvr"], twin["cvr"])]
        largest = max(largest, *(abs(a - b) for a, b in pairs))
    return largest


def bench(server: Server, *arguments: str) -> dict:
    addresses = ["--server", server.grpc, "--metrics", server.metrics]
    return json.loads(midemb(*arguments, "--json", *addresses, program=BENCH))


def measure(provider: str, library: Path) -> list[str]:
    rows = ["| what | per second | server CPU ms | p50 ms | p99 ms |", "|---|---|---|---|---|"]

    def note(what: str, figures: dict) -> None:
        quantiles = [figures[name] for name in ("p50_ms", "p99_ms")]
        cells = [f"{figures['good_per_second']:.0f}", f"{figures['server_cpu_ms']:.2f}"]
        cells += ["-" if quantile is None else f"{quantile:.2f}" for quantile in quantiles]
        rows.append(f"| {what} | {' | '.join(cells)} |")

    for batch in BATCHES:
        with serving(**settings(provider, library, batch)) as server:
            for concurrency in CONCURRENCIES:
                hot = bench(server, "w1-hot", "--concurrency", str(concurrency))
                note(f"w1-hot, {concurrency} at once, up to {batch} scored together", hot)
            if batch == BATCHES[-1]:
                note("w2-cold, items", bench(server, "w2-cold", "--items", "4000"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--provider", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--write", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    library = args.library.resolve()
    verified = midemb("bundle", "verify", str(ROOT / "models" / "default"), "--onnxruntime", str(library))
    print(verified, flush=True)
    if f" is good on {args.provider} " not in verified:
        sys.exit(f"{library} did not run the bundle on {args.provider}; give a library with that provider")
    with serving(**settings("cpu", library)) as server:
        expected = answers(server)
    with serving(**settings(args.provider, library)) as server:
        differences = [largest_difference(*pair) for pair in zip(answers(server), expected, strict=True)]
    print(f"largest difference from the CPU's responses: {differences[0]:.1e} cold, {differences[1]:.1e} warm\n")
    if max(differences) > TOLERANCE:
        sys.exit(f"the responses of {args.provider} and CPU differ by more than {TOLERANCE}")
    command = f"`python3 benches/gpu_check.py --library LIBRARY --provider {args.provider}`"
    report = "\n".join([f"{command} on {platform.machine()}:", "", *measure(args.provider, library)]) + "\n"
    print(report)
    if args.write:
        args.write.write_text(report)


if __name__ == "__main__":
    main()
