#!/usr/bin/env python3
"""Measures hot requests beside peers that misbehave: the calls of two attacks, each between two quiet runs.

    make bench-hostile                                  (or: .venv/bin/python benches/hostile.py)
    .venv/bin/python benches/hostile.py --rounds 5 --write benches/results/2026-11-27-hostile.md

Headers alone: 300 connections open 100 calls each and send no message; and 2,000 such calls per second come.
Expensive messages: two clients send messages of millions of empty fields, one after the other.
Beside both, `midemb-bench w1-hot` sends 100 requests per second. All traffic stays on this machine.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import grpc
from run import ROOT, Server, bench, machine, serving, table

sys.path.append(str(ROOT / "tests" / "faults"))
from frames import Peer

N_PEERS, N_CALLS = 300, 100
CALLS_PER_SECOND = 2000
RATE, N_REQUESTS, DEADLINE_MS = 100, 1000, 100
# limits.read_ms of the server, after which it ends calls whose message does not come. A run is shorter.
READ_MS = 60_000
MIB = 1 << 20
EMPTY_KEYWORD, EMPTY_ITEM, OUTPUT_UNSPECIFIED = b"\x2a\x00", b"\x1a\x00", b"\x00"


def field(number: int, value: bytes) -> bytes:
    """A field of bytes, as Protocol Buffers write it."""
    size, length = bytearray(), len(value)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + value


def user() -> bytes:
    return field(1, b"u")


def items(n_items: int, n_keywords: int) -> bytes:
    return user() + field(3, field(1, b"a") + field(2, EMPTY_KEYWORD * n_keywords)) * n_items


MESSAGES = {
    "4 MiB of one user id": field(1, b"u" * (4 * MIB - 64)),
    "4 MiB of empty keywords": items(1, 2 * MIB - 64),
    "16 MiB of empty keywords": items(1, 8 * MIB - 64),
    "16 MiB of empty keywords of 10,000 items": items(10_000, 750),
    "4 MiB of outputs": items(1, 0) + field(5, OUTPUT_UNSPECIFIED * (4 * MIB - 64)),
    "16 MiB of outputs": items(1, 0) + field(5, OUTPUT_UNSPECIFIED * (16 * MIB - 64)),
    "4 MiB of empty items": user() + EMPTY_ITEM * (2 * MIB - 64),
}


@contextmanager
def repeating(work: Callable[[threading.Event], None], n_threads: int) -> Iterator[None]:
    ends = threading.Event()
    threads = [threading.Thread(target=work, args=(ends,)) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


@contextmanager
def held(server: Server) -> Iterator[None]:
    """Calls without a message, which stay open."""
    peers = [Peer(server.grpc) for _ in range(N_PEERS)]
    for peer in peers:
        for _ in range(N_CALLS):
            peer.call("GetMidEmb", None, "1H")
    try:
        yield
    finally:
        for peer in peers:
            peer.close()


def coming(server: Server):
    """Such calls that come all the time, each connection with its own hundred."""

    def work(ends: threading.Event) -> None:
        began, n_calls = time.monotonic(), 0
        while not ends.is_set():
            with closing(Peer(server.grpc)) as peer:
                for _ in range(N_CALLS):
                    peer.call("GetMidEmb", None, "1H")
            n_calls += N_CALLS
            ends.wait(max(0.0, began + n_calls / CALLS_PER_SECOND - time.monotonic()))

    return repeating(work, 1)


def messages(server: Server, message: bytes):
    def work(ends: threading.Event) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(server.grpc, options=options) as channel:
            call = channel.unary_unary("/midemb.v1.MidEmbService/GetMidEmb")
            while not ends.is_set():
                try:
                    call(message, timeout=30)
                except grpc.RpcError as error:
                    if error.code() not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
                        raise

    return repeating(work, 2)


def one_round(server: Server, figures: dict[str, list[dict]]) -> None:
    attacks = {"alone": nullcontext}
    attacks["beside 30,000 calls without a message"] = lambda: held(server)
    attacks["beside 2,000 more such calls per second"] = lambda: coming(server)
    for name, message in MESSAGES.items():
        attacks[f"beside two messages of {name}"] = lambda message=message: messages(server, message)
    for name, attack in attacks.items():
        with attack():
            time.sleep(1)
            sizes = ["--rate", str(RATE), "--requests", str(N_REQUESTS), "--deadline-ms", str(DEADLINE_MS)]
            figures.setdefault(name, []).append(bench(server, "w1-hot", *sizes)[0])


def report(figures: dict[str, list[dict]], n_rounds: int) -> str:
    alone = [run["p99_ms"] for run in figures["alone"]]
    rows = []
    for name, runs in figures.items():
        p50, p99 = (statistics.median(run[key] for run in runs) for key in ("p50_ms", "p99_ms"))
        ratio = statistics.median(run["p99_ms"] / of for run, of in zip(runs, alone, strict=True))
        n_sent, n_late, n_shed = (sum(run[key] for run in runs) for key in ("sent", "late", "shed"))
        rss = max(run["server_rss_bytes"] for run in runs) / MIB
        rows.append(
            [name, f"{p50:.1f}", f"{p99:.1f}", f"{ratio:.2f}", f"{n_late} / {n_shed} of {n_sent}", f"{rss:.0f}"]
        )
    header = ["hot requests", "p50 ms", "p99 ms", "p99 / alone", "late / shed", "VmRSS MiB"]
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return "\n".join(
        [
            f"# Hot requests beside peers that misbehave, {date}",
            "",
            f"`.venv/bin/python benches/hostile.py --rounds {n_rounds}` on {machine()}, clients included.",
            f"{RATE} requests of W1 per second with a deadline of {DEADLINE_MS} ms. p50, p99 and the ratio within a",
            "round are medians over the rounds; VmRSS is the highest after a run, of one server for all runs.",
            "",
            *table(header, rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="also write the report to this Markdown file")
    args = parser.parse_args()
    figures: dict[str, list[dict]] = {}
    with serving(MIDEMB__LIMITS__READ_MS=str(READ_MS)) as server:
        for n in range(1, args.rounds + 1):
            print(f"round {n} of {args.rounds}", file=sys.stderr, flush=True)
            one_round(server, figures)
    text = report(figures, args.rounds)
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
