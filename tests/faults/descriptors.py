"""File descriptors that run out."""

import socket

from frames import PREFACE, SETTINGS, frame
from kills import SNAPSHOTS
from lab import RETRAINED, Lab, config, eventually
from pages import Traffic, ask_all, check_restored, check_vectors

N_FILES = 128
TOO_MANY = "Too many open files"


def descriptors_run_out(lab: Lab) -> str:
    """Open connections go on, what needs a file fails with one line that says so, and all comes back with the files."""
    file = lab.write_config(*SNAPSHOTS)
    limited = ["sh", "-c", f'ulimit -n {N_FILES}; exec "$@"', "sh"]
    failed = "the snapshot of the caches cannot be written, the previous one is kept"
    with lab.start(file, prefix=limited) as server:
        with Traffic(lab, server) as traffic:
            ask_all(server.client)
            server.status()
            server.wait_for_log("caches written")
            n_before = server.n_open_files()
            peers = [socket.create_connection(address(server.grpc)) for _ in range(N_FILES)]
            for peer in peers:
                # A peer that speaks HTTP/2 keeps its connection for longer than a silent one.
                peer.sendall(PREFACE + frame(SETTINGS, 0, 0))
            server.wait_for_log("connections cannot be accepted, trying again")
            reason = server.refused_push(config(RETRAINED, *SNAPSHOTS))
            assert TOO_MANY in reason, reason
            assert TOO_MANY in server.wait_for_log(failed)["error"]
            traffic.wait_for_answers(20)
            for peer in peers:
                peer.close()
            server.wait_for_log("connections are accepted again")
            # Clients of the check below have connections of their own, so the count is taken first.
            back = eventually("the files are closed", lambda: server.n_open_files() <= n_before + 2)
            assert server.push(config(RETRAINED, *SNAPSHOTS)).result == "applied"
            check_vectors(lab, server)
            server.wait_for_log("caches written", len(server.logs("caches written")) + 2)
        calls = traffic.check()
        n_refused = len(server.logs("connections cannot be accepted, trying again"))
        assert n_refused <= 3, f"the log says {n_refused} times that connections cannot be accepted"
        server.stop()
    with lab.start(file, prefix=limited) as server:
        check_restored(lab, server)
        server.stop()
    return f"{N_FILES} files, {n_before} in use; a push and a snapshot refused, back after {back:.1f} s; {calls}"


def address(text: str) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    return host, int(port)
