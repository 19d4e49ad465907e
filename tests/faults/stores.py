"""Object stores that lie, break and stall while a push fetches from them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from disks import unfinished
from kills import Push
from lab import BUNDLE, FIXTURES, PATIENCE_SECONDS, RETRAINED, Lab, Server, config, eventually, pb
from object_store import ObjectStore, Request
from pages import Traffic, check_vectors

FILE = "user_tower.onnx"
# Three attempts more, with pauses of half a second and less between them.
REFUSED_WITHIN_SECONDS = 10
# A transfer may pause for half a minute, and a manifest has a minute in all. The rest is for a busy machine.
REFUSED_LATE_WITHIN_SECONDS = 70


@dataclass(frozen=True)
class Misbehaviour:
    what: str
    file: str
    # A part of the reason.
    reason: str
    answer: Callable[[Request, bytes], None]


def body_is_cut_off(request: Request, body: bytes) -> None:
    request.head(len(body))
    request.wfile.write(body[: len(body) // 2])


def length_is_too_large(request: Request, body: bytes) -> None:
    request.head(len(body) + 1000)
    request.wfile.write(body)


def length_is_too_small(request: Request, body: bytes) -> None:
    request.head(len(body) - 1000)
    request.wfile.write(body)


def length_is_enormous(request: Request, body: bytes) -> None:
    request.head(1 << 60)
    request.wfile.write(body)


def other_bytes(request: Request, body: bytes) -> None:
    request.answer(body[::-1])


def not_text(request: Request, body: bytes) -> None:
    request.answer(b"\xff" * len(body))


def error_page(request: Request, body: bytes) -> None:
    page = b"<html>\n" + b"<p>internal error</p>\n" * 200
    request.head(len(page), status=500)
    request.wfile.write(page)


def other_object_after_a_break(request: Request, body: bytes) -> None:
    """The first answer is cut off, and the next one goes on in another object with another ETag."""
    if "Range" in request.headers:
        request.answer(body[::-1], etag='"two"')
    else:
        request.head(len(body), extra={"ETag": '"one"'})
        request.wfile.write(body[: len(body) // 2])


def half_and_no_more(request: Request, body: bytes) -> None:
    body_is_cut_off(request, body)
    request.stall(2 * REFUSED_LATE_WITHIN_SECONDS)


def byte_by_byte(request: Request, body: bytes) -> None:
    request.head(len(body))
    for i in range(2 * REFUSED_LATE_WITHIN_SECONDS):
        request.wfile.write(body[i : i + 1])
        request.stall(1)


def redirect_to_itself(request: Request, body: bytes) -> None:
    request.head(0, status=302, extra={"Location": request.path})


CANNOT, DIFFERS = "cannot be fetched", "is not what the manifest lists"
MISBEHAVIOURS = [
    Misbehaviour("cuts a file off", FILE, CANNOT, body_is_cut_off),
    Misbehaviour("cuts the manifest off", "manifest.toml", CANNOT, body_is_cut_off),
    Misbehaviour("promises more bytes than it sends", FILE, DIFFERS, length_is_too_large),
    Misbehaviour("promises fewer bytes than it sends", FILE, DIFFERS, length_is_too_small),
    Misbehaviour("promises 2^60 bytes", "manifest.toml", "at most", length_is_enormous),
    Misbehaviour("sends other bytes", FILE, DIFFERS, other_bytes),
    Misbehaviour("sends a manifest that is no text", "manifest.toml", "manifest.toml", not_text),
    Misbehaviour("answers 500", FILE, CANNOT, error_page),
    Misbehaviour("changes a file between two requests", FILE, FILE, other_object_after_a_break),
    Misbehaviour("redirects to itself", "manifest.toml", CANNOT, redirect_to_itself),
]


@contextmanager
def serving_from_a_store(lab: Lab) -> Iterator[tuple[ObjectStore, Server]]:
    """A server whose bundle is in a store that has another one, "v2", to push."""
    bundles = {"v1": BUNDLE, "v2": RETRAINED}
    with ObjectStore(bundles) as store, lab.start(lab.write_config(bundle=store.url("v1"))) as server:
        yield store, server


def store_misbehaves(lab: Lab) -> str:
    """Each push is refused in seconds with its reason, nothing half stays, calls go on, and a later push succeeds."""
    with serving_from_a_store(lab) as (store, server):
        slowest = 0.0
        with Traffic(lab, server, n_clients=1) as traffic:
            for misbehaviour in MISBEHAVIOURS:
                store.misbehave = only(misbehaviour)
                seconds = refuse(lab, server, store, misbehaviour)
                slowest = max(slowest, seconds)
                traffic.wait_for_answers(3)
            check_mended(lab, server, store)
        calls = traffic.check()
        server.stop()
    return f"{len(MISBEHAVIOURS)} ways, refused within {slowest:.1f} s; {calls}"


def only(misbehaviour: Misbehaviour) -> Callable[[Request], bool]:
    """Misbehaves for one file of the second bundle."""

    def misbehave(request: Request) -> bool:
        if request.path != f"/v2/{misbehaviour.file}":
            return False
        misbehaviour.answer(request, request.store.file(request.path).read_bytes())
        return True

    return misbehave


def check_mended(lab: Lab, server: Server, store: ObjectStore) -> None:
    """The store behaves again, and the same push is applied."""
    store.misbehave = lambda request: False
    assert server.push(config(store.url("v2"))).result == "applied"
    check_vectors(lab, server)


def refuse(lab: Lab, server: Server, store: ObjectStore, misbehaviour: Misbehaviour) -> float:
    began = time.monotonic()
    reason = server.refused_push(config(store.url("v2")))
    seconds = time.monotonic() - began
    assert misbehaviour.reason in reason, f"a store that {misbehaviour.what}: {reason}"
    assert seconds < REFUSED_WITHIN_SECONDS, f"a store that {misbehaviour.what}: refused after {seconds:.1f} s"
    left = unfinished(lab.folder / "bundles")
    assert not left, f"a store that {misbehaviour.what}: {left} was left"
    return seconds


def store_changes_between_files(lab: Lab) -> str:
    """A bundle that is replaced while it is fetched is refused by the digests of the manifest that came first."""
    with serving_from_a_store(lab) as (store, server):

        def misbehave(request: Request) -> bool:
            if request.path == f"/v2/{FILE}":
                store.bundles["v2"] = FIXTURES / "reencoded"
            return False

        store.misbehave = misbehave
        reason = server.refused_push(config(store.url("v2")))
        assert DIFFERS in reason, reason
        check_vectors(lab, server)
        store.misbehave = lambda request: False
        store.bundles["v2"] = RETRAINED
        assert server.push(config(store.url("v2"))).result == "applied"
        check_vectors(lab, server)
        server.stop()
    return "refused at the tower, " + reason.split(FILE, 1)[1].split(": it has")[0].strip()


def store_stalls_with_the_manifest(lab: Lab) -> str:
    """A push whose manifest stops coming is refused within a minute, calls go on, and a later push succeeds."""
    return refuse_late(lab, Misbehaviour("stalls", "manifest.toml", CANNOT, half_and_no_more))


def store_stalls_with_a_file(lab: Lab) -> str:
    """A push whose file stops coming is refused within a minute, calls go on, and a later push succeeds."""
    return refuse_late(lab, Misbehaviour("stalls", FILE, CANNOT, half_and_no_more))


def store_drips_the_manifest(lab: Lab) -> str:
    """A push whose manifest comes byte by byte is refused after a minute, calls go on, and a later push succeeds."""
    return refuse_late(lab, Misbehaviour("sends a byte per second", "manifest.toml", "no answer within", byte_by_byte))


def refuse_late(lab: Lab, misbehaviour: Misbehaviour) -> str:
    with serving_from_a_store(lab) as (store, server):
        store.misbehave = only(misbehaviour)
        with Traffic(lab, server, n_clients=1, pause=0.2) as traffic:
            began = time.monotonic()
            reason = server.refused_push(config(store.url("v2")), timeout=2 * REFUSED_LATE_WITHIN_SECONDS)
            seconds = time.monotonic() - began
            assert misbehaviour.reason in reason, reason
            assert seconds < REFUSED_LATE_WITHIN_SECONDS, f"refused after {seconds:.0f} s"
            check_mended(lab, server, store)
        calls = traffic.check()
        server.stop()
    return f"refused after {seconds:.0f} s; {calls}"


def killed_during_fetch(lab: Lab) -> str:
    """A restart serves the bundle before, and fetches the other one whole, past what the killed fetch left."""
    # In the order in which they are fetched: what is whole is not fetched again.
    files = ("manifest.toml", "cvr.onnx", FILE)
    for file in files:
        with serving_from_a_store(lab) as (store, server):
            store.misbehave = only(Misbehaviour("stalls", file, "", half_and_no_more))
            push = Push(server, config(store.url("v2")))
            eventually("the file is asked for", lambda s=store, f=file: f"/v2/{f}" in s.gets)
            server.process.kill()
            assert not push.is_acknowledged(), "half a fetch was acknowledged"
            server.end()
    with serving_from_a_store(lab) as (store, server):
        check_vectors(lab, server)
        assert server.push(config(store.url("v2"))).result == "applied"
        check_vectors(lab, server)
        n_left = len(unfinished(lab.folder / "bundles"))
        server.stop()
    return (
        f"kill -9 in {len(files)} fetches; {n_left} unfinished files and folders wait for their removal after an hour"
    )


def operators_while_a_store_stalls(lab: Lab) -> str:
    """A rollback does not wait for a push that waits for a store, and SIGTERM ends the server at once and with 0."""

    def stalls(request: Request) -> bool:
        if not request.path.startswith("/v2"):
            return False
        request.stall(2 * REFUSED_LATE_WITHIN_SECONDS)
        return True

    with serving_from_a_store(lab) as (store, server):
        assert server.push(config(store.url("v1"), "reload.warm_seconds = 7")).result == "applied"
        store.misbehave = stalls
        push = Push(server, config(store.url("v2")))
        eventually("the store is asked", lambda: "/v2/manifest.toml" in store.gets)
        began = time.monotonic()
        assert not server.operator.Rollback(pb.RollbackRequest(), timeout=PATIENCE_SECONDS).warning
        rolled_back = time.monotonic() - began
        check_vectors(lab, server)
        began = time.monotonic()
        server.stop()
        ended = time.monotonic() - began
        assert not push.is_acknowledged()
        assert max(rolled_back, ended) < 10, f"rolled back after {rolled_back:.1f} s, ended after {ended:.1f} s"
        assert server.logs("push refused")[0]["reason"] == "the server is draining"
    return f"rolled back after {rolled_back:.2f} s, ended after {ended:.2f} s"
