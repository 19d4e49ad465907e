"""Clients that do what no client should, beside innocent ones."""

import time
from collections.abc import Callable
from contextlib import closing

from frames import (
    CANCEL,
    CONTINUATION,
    END_HEADERS,
    FIRST_WINDOW,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    Peer,
    call_headers,
    frame,
    literal,
    message,
)
from lab import MIB, PATIENCE_SECONDS, Lab, Server, eventually, pb
from pages import OUTPUTS, Traffic, ask, ask_all, films, ids_only, page

LIMITS = ("limits.read_ms = 2000", "limits.write_ms = 2000", "limits.max_unsent_mb = 32")
# The allocator keeps some of what was freed.
ALLOWED_GROWTH = 24 * MIB
ALLOWED_FILES = 2
N_CONNECTIONS = 8


def beside_innocent_clients(lab: Lab, misbehave: Callable[[Server], str]) -> str:
    """Lets peers misbehave twice, and compares memory and files after the second time with those before it."""
    with lab.start(lab.write_config(*LIMITS)) as server:
        ask_all(server.client)
        with Traffic(lab, server) as traffic:
            misbehave(server)
            settle(server)
            before, n_files = server.resident_bytes(), server.n_open_files()
            done = misbehave(server)
            greatest = server.resident_bytes()
            traffic.wait_for_answers(10)
            eventually(
                f"no more than {n_files} + {ALLOWED_FILES} files are open",
                lambda: server.n_open_files() <= n_files + ALLOWED_FILES,
            )
            settle(server)
            after = server.resident_bytes()
        calls = traffic.check()
        grown = after - before
        assert grown <= ALLOWED_GROWTH, f"{grown / MIB:.0f} MiB more than before the peers came"
        server.stop()
    memory = f"{before // MIB} MiB before, {greatest // MIB} at their end, {after // MIB} after"
    return f"{done}; {memory}; {calls}"


def settle(server: Server) -> None:
    """Waits until nothing is held for anybody but the innocent."""
    held = lambda: server.figure("midemb_budget_bytes") + server.figure("midemb_budget_calls")  # noqa: E731
    eventually("nothing is held", lambda: held() == 0, every=0.05)


def peers_reset_their_calls(lab: Lab) -> str:
    """Innocent calls succeed, and memory and files are as before, after calls that were reset as soon as opened."""

    def misbehave(server: Server) -> str:
        n_sent = 0
        for _ in range(4 * N_CONNECTIONS):
            with closing(Peer(server.grpc)) as peer:
                headers = call_headers("GetMidEmb")
                for _ in range(20):
                    data = b""
                    for _ in range(50):
                        stream = peer.stream()
                        data += frame(HEADERS, END_HEADERS, stream, headers) + frame(RST_STREAM, 0, stream, CANCEL)
                    if not peer.send(data):
                        break
                    n_sent += 50
        return f"{n_sent} calls opened and reset"

    return beside_innocent_clients(lab, misbehave)


def peers_flood(lab: Lab) -> str:
    """The same after floods of pings and settings whose answers nobody reads."""

    def misbehave(server: Server) -> str:
        n_bytes = 0
        frames = [
            frame(PING, 0, 0, b"12345678"),
            frame(SETTINGS, 0, 0),
            frame(SETTINGS, 0, 0, bytes([0, 4, 0, 0, 1, 0])),
        ]
        for i in range(N_CONNECTIONS):
            with closing(Peer(server.grpc)) as peer:
                data = frames[i % len(frames)] * 2000
                for _ in range(200):
                    if not peer.send(data):
                        break
                    n_bytes += len(data)
        return f"{n_bytes / MIB:.0f} MiB of pings and settings"

    return beside_innocent_clients(lab, misbehave)


def peers_read_nothing(lab: Lab) -> str:
    """The same after peers with a window of zero asked for megabytes; their answers are dropped in time."""
    n_calls = 2
    items = films("large", 2000)
    request = pb.GetMidEmbRequest(user_id="large", candidates=items, outputs=OUTPUTS)
    body = message(ids_only(request).SerializeToString())
    assert n_calls * len(body) <= FIRST_WINDOW, "a peer that reads nothing may not send as much"

    def misbehave(server: Server) -> str:
        server.client.GetMidEmb(request, timeout=PATIENCE_SECONDS)
        peers = [Peer(server.grpc, window=0) for _ in range(2 * N_CONNECTIONS)]
        for peer in peers:
            for _ in range(n_calls):
                assert peer.call("GetMidEmb", body, "1H"), "the call could not be sent"
        eventually("answers wait for their readers", lambda: server.figure("midemb_budget_bytes", "unsent") > 0)
        unsent = server.figure("midemb_budget_bytes", "unsent")
        assert unsent <= 32 * MIB, f"{unsent / MIB:.0f} MiB of answers are held"
        seconds = eventually("they are dropped", lambda: server.figure("midemb_budget_bytes", "unsent") == 0)
        for peer in peers:
            peer.close()
        return f"{len(peers) * n_calls} answers that nobody read, dropped after {seconds:.1f} s"

    return beside_innocent_clients(lab, misbehave)


def peers_cancel(lab: Lab) -> str:
    """The same after calls for new items that were cancelled a moment later."""
    n_calls = 400

    def misbehave(server: Server) -> str:
        client = server.new_client()
        for i in range(n_calls):
            call = client.GetMidEmb.future(page(i, f"cancelled-{time.monotonic_ns()}"), timeout=PATIENCE_SECONDS)
            if i % 8 == 0:
                time.sleep(0.005)
            call.cancel()
        eventually("no call is in flight", lambda: server.figure("midemb_queue_depth") == 0)
        server.channels.pop().close()
        return f"{n_calls} calls cancelled"

    return beside_innocent_clients(lab, misbehave)


def peers_send_headers_only(lab: Lab) -> str:
    """The same after calls whose message never comes, which end after `limits.read_ms`."""
    n_calls = 200

    def misbehave(server: Server) -> str:
        peers = [Peer(server.grpc) for _ in range(N_CONNECTIONS)]
        for peer in peers:
            for _ in range(n_calls):
                peer.call("GetMidEmb", None, "1H")
        waiting = lambda: server.figure("midemb_budget_calls", "receiving")  # noqa: E731
        eventually("they wait", lambda: waiting() > N_CONNECTIONS)
        seconds = eventually("they end", lambda: waiting() < 2)
        for peer in peers:
            peer.close()
        return f"{len(peers) * n_calls} calls without a message, ended after {seconds:.1f} s"

    return beside_innocent_clients(lab, misbehave)


def peers_send_endless_headers(lab: Lab) -> str:
    """The same after headers that never end, and after frames and prefaces that were cut off."""

    def misbehave(server: Server) -> str:
        n_bytes = 0
        header = b"".join(literal(f"x-{i}", "v" * 120) for i in range(100))
        for _ in range(N_CONNECTIONS):
            with closing(Peer(server.grpc)) as peer:
                peer.send(frame(HEADERS, 0, 1, call_headers("GetMidEmb")))
                for _ in range(500):
                    if not peer.send(frame(CONTINUATION, 0, 1, header)):
                        break
                    n_bytes += len(header)
        whole = frame(HEADERS, END_HEADERS, 1, call_headers("GetMidEmb"))
        for end in range(1, len(whole), 4):
            with closing(Peer(server.grpc)) as peer:
                peer.send(whole[:end])
        ask(server.new_client(), page(0))
        server.channels.pop().close()
        return f"{n_bytes / MIB:.1f} MiB of headers taken, {len(whole) // 4} frames cut off"

    return beside_innocent_clients(lab, misbehave)
