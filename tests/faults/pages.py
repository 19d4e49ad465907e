"""Pages of items whose vectors are known, and the innocent clients that ask for them while a fault happens."""

import threading
import time
from dataclasses import dataclass

import grpc
import numpy as np
from lab import BUNDLE, PATIENCE_SECONDS, RETRAINED, Lab, Server, eventually, pb

# A vector that is computed anew may differ in its last bits, as the items beside it in a batch are others.
ALLOWED_DIFFERENCE = 1e-6
N_PAGES, N_HISTORY, N_CANDIDATES = 4, 6, 24
TENSORS = ("mid_emb", "cvr", "user_emb", "item_emb")
OUTPUTS = [pb.OUTPUT_MID_EMB, pb.OUTPUT_CVR, pb.OUTPUT_USER_EMB, pb.OUTPUT_ITEM_EMB]


def film(item_id: str, words: str = ""):
    text = pb.ItemText(title=f"{item_id} {words}", category="Drama", keywords=["river", "night"])
    return pb.Item(id=item_id, text=text)


def films(prefix: str, n: int, words: str = "") -> list:
    return [film(f"{prefix}-{i}", words) for i in range(n)]


def page(number: int, prefix: str = "page"):
    """A request for all vectors of a page."""
    history = films(f"{prefix}-{number}-h", N_HISTORY)
    candidates = films(f"{prefix}-{number}-c", N_CANDIDATES)
    return pb.GetMidEmbRequest(user_id=f"user-{number}", history=history, candidates=candidates, outputs=OUTPUTS)


def ids_only(request):
    """The same request without texts."""
    bare = pb.GetMidEmbRequest()
    bare.CopyFrom(request)
    for item in [*bare.history, *bare.candidates]:
        item.ClearField("text")
    return bare


@dataclass(frozen=True)
class Answer:
    version: str
    vectors: dict[str, np.ndarray]

    def difference(self, other: "Answer") -> float:
        assert self.version == other.version, f"model {self.version} answered, not {other.version}"
        pairs = [(self.vectors[name], other.vectors[name]) for name in TENSORS]
        assert all(one.shape == two.shape for one, two in pairs), "shapes differ"
        return max(float(np.abs(one - two).max()) for one, two in pairs)


def ask(client, request, timeout: float = PATIENCE_SECONDS) -> Answer:
    """Asks for a page, every row of which must be OK."""
    answer = client.GetMidEmb(request, timeout=timeout)
    assert set(answer.statuses) == {pb.ROW_STATUS_OK}, f"statuses {sorted(set(answer.statuses))}"
    arrays = {name: np.frombuffer(getattr(answer, name).data, dtype="<f4") for name in TENSORS}
    assert all(np.isfinite(array).all() for array in arrays.values()), "a vector is not finite"
    return Answer(answer.model.version, arrays)


def ask_all(client) -> list[Answer]:
    return [ask(client, page(number)) for number in range(N_PAGES)]


def compute_references(lab: Lab) -> None:
    """The answers of servers to which nothing happens."""
    for bundle in (BUNDLE, RETRAINED):
        with lab.start(lab.write_config(bundle=bundle)) as server:
            answers = ask_all(server.client)
            lab.references[answers[0].version] = answers
            server.stop()
    assert len(lab.references) == 2, "the two bundles have the same version, so nothing could be told apart"


def check_vectors(lab: Lab, server: Server) -> float:
    """Compares all pages with their references and returns the greatest difference."""
    answers = ask_all(server.new_client())
    references = lab.references[answers[0].version]
    difference = max(found.difference(expected) for found, expected in zip(answers, references, strict=True))
    assert difference <= ALLOWED_DIFFERENCE, f"vectors differ by {difference}"
    return difference


def check_restored(lab: Lab, server: Server) -> None:
    """All pages are answered by their ids alone and without encoding anything, with the vectors of their references."""
    server.wait_for_log("caches restored")
    assert not server.logs("a part of the snapshot of the caches was refused"), "a part was refused"
    n_before = server.n_encoded()
    for number in range(N_PAGES):
        found = ask(server.client, ids_only(page(number)))
        difference = found.difference(lab.references[found.version][number])
        assert difference <= ALLOWED_DIFFERENCE, f"restored vectors differ by {difference}"
    n_encoded = server.n_encoded() - n_before
    assert n_encoded == 0, f"{n_encoded} items were encoded again"


class Traffic:
    """Clients that ask for known pages and for new ones, and compare the answers with the references."""

    def __init__(self, lab: Lab, server: Server, n_clients: int = 2, pause: float = 0.01):
        self.lab, self.server, self.pause = lab, server, pause
        self.stopped = threading.Event()
        self.may_fail = False
        self.failures: list[str] = []
        self.seconds: list[float] = []
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(n_clients)]

    def __enter__(self) -> "Traffic":
        self.clients = [self.server.new_client() for _ in self.threads]
        for thread in self.threads:
            thread.start()
        self.wait_for_answers(2)
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(timeout=PATIENCE_SECONDS)

    def run(self, client: int) -> None:
        n_calls = 0
        while not self.stopped.wait(self.pause):
            began = time.monotonic()
            try:
                self.call(client, n_calls)
                self.seconds.append(time.monotonic() - began)
            except (grpc.RpcError, AssertionError) as error:
                reason = error.details() if isinstance(error, grpc.RpcError) else str(error)
                # A call that the server's death ended says nothing, but a wrong answer always does.
                if isinstance(error, AssertionError) or not self.may_fail:
                    self.failures.append(reason)
                if self.may_fail:
                    return
            n_calls += 1

    def call(self, client: int, n_calls: int) -> None:
        number = n_calls % N_PAGES
        if n_calls % 8 == 7:
            ask(self.clients[client], page(n_calls, f"new-{self.server.pid}-{client}"))
            return
        found = ask(self.clients[client], page(number))
        difference = found.difference(self.lab.references[found.version][number])
        assert difference <= ALLOWED_DIFFERENCE, f"vectors differ by {difference}"

    def wait_for_answers(self, n: int) -> None:
        """Waits for `n` answers from now on."""
        target = len(self.seconds) + n
        eventually("innocent calls are answered", lambda: len(self.seconds) >= target or bool(self.failures))
        assert not self.failures, f"an innocent call failed: {self.failures[0]}"

    def kill_server(self) -> None:
        """Kills the server; calls may fail from now on."""
        self.may_fail = True
        self.server.process.kill()

    def check(self) -> str:
        """What became of the calls; fails if one failed."""
        assert not self.failures, f"{len(self.failures)} innocent calls failed, the first: {self.failures[0]}"
        return f"{len(self.seconds)} innocent calls, slowest {max(self.seconds):.2f} s"
