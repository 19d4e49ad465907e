"""A process that is stopped and goes on, as on a machine that was paused."""

import signal
import time

import grpc
from lab import PATIENCE_SECONDS, ROOT, Lab, Server, Skipped, eventually, pb
from pages import Traffic, ask_all, check_vectors, films

SHIPPED = ROOT / "models" / "default"
PAUSE_SECONDS = 4
N_CALLS, N_ITEMS = 4, 12
# Longer than the calls need to reach the encoder, shorter than their items need there: 10 ms each, or more.
DEADLINE_SECONDS = 1.5
NEXT_CALL_WITHIN_SECONDS = 10


def paused_while_calls_wait(lab: Lab) -> str:
    """Calls that expired in the pause are over after it, and their items are encoded behind those of the next calls."""
    if not (SHIPPED / "model.safetensors").exists():
        raise Skipped(f"models/{SHIPPED.name} is incomplete: run `make setup`")
    with lab.start(lab.write_config(bundle=SHIPPED)) as server:
        before = answer(server, "warm")
        requests = [
            pb.GetMidEmbRequest(user_id="paused", candidates=films(f"cold-{i}", N_ITEMS, "river " * 150))
            for i in range(N_CALLS)
        ]
        calls = [server.client.GetMidEmb.future(request, timeout=DEADLINE_SECONDS) for request in requests]
        eventually("their items wait for the encoder", lambda: server.figure("midemb_queue_depth") > N_ITEMS)
        server.signal(signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        n_late = sum(is_late(call) for call in calls)
        server.signal(signal.SIGCONT)
        began = time.monotonic()
        assert answer(server, "warm").mid_emb.data == before.mid_emb.data, "a cached vector differs"
        answer(server, "new")
        seconds = time.monotonic() - began
        n_behind = int(server.figure("midemb_queue_depth"))
        assert n_late > 0, "every call was answered before the pause, so nothing was shown"
        assert seconds < NEXT_CALL_WITHIN_SECONDS, f"the next calls took {seconds:.1f} s"
        eventually("no call is in flight", lambda: server.figure("midemb_in_flight_requests") == 0)
        eventually("the queues are empty", lambda: server.figure("midemb_queue_depth") == 0, within=60)
        # What the expired calls began was not for nothing.
        n_encoded = server.n_encoded()
        for request in requests:
            assert set(server.client.GetMidEmb(request, timeout=PATIENCE_SECONDS).statuses) == {pb.ROW_STATUS_OK}
        n_again = server.n_encoded() - n_encoded
        assert n_again == 0, f"{n_again} items were encoded again"
        server.stop()
    return (
        f"SIGSTOP for {PAUSE_SECONDS} s, {n_late} of {N_CALLS} calls expired; the next two, one of them for new items, "
        f"took {seconds:.2f} s together, with {n_behind} items still waiting behind them"
    )


def answer(server: Server, prefix: str):
    """The answer for three items; all rows must be OK."""
    request = pb.GetMidEmbRequest(user_id=prefix, candidates=films(prefix, 3))
    found = server.client.GetMidEmb(request, timeout=PATIENCE_SECONDS)
    assert set(found.statuses) == {pb.ROW_STATUS_OK}, f"statuses {sorted(set(found.statuses))}"
    return found


def is_late(call: grpc.Future) -> bool:
    try:
        found = call.result(timeout=PATIENCE_SECONDS)
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    return pb.ROW_STATUS_NOT_IN_TIME in found.statuses


def paused_under_traffic(lab: Lab) -> str:
    """Clients whose deadline is longer than the pause get their answers after it, and none is wrong."""
    with lab.start(lab.write_config()) as server:
        ask_all(server.client)
        with Traffic(lab, server) as traffic:
            for _ in range(2):
                server.signal(signal.SIGSTOP)
                time.sleep(PAUSE_SECONDS / 2)
                server.signal(signal.SIGCONT)
                traffic.wait_for_answers(20)
            check_vectors(lab, server)
        calls = traffic.check()
        server.stop()
    return f"SIGSTOP twice for {PAUSE_SECONDS / 2:.0f} s; {calls}"
