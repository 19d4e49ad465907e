"""An object store on a loopback port, which serves bundles over http and fails as a test says."""

import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectStore:
    """Serves the files of `bundles` under their names. `misbehave` answers a request itself if it returns true."""

    def __init__(self, bundles: dict[str, Path]):
        self.bundles = bundles
        self.is_down = False
        self.misbehave: Callable[[Request], bool] = lambda request: False
        self.gets: list[str] = []
        self.ended = threading.Event()
        handler = type("Handler", (Request,), {"store": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        # A handler may be stalling; it ends with `ended`.
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "ObjectStore":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, bundle: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{bundle}"

    def file(self, path: str) -> Path:
        """The file that a request's path stands for."""
        bundle, name = path.lstrip("/").split("/", 1)
        return self.bundles[bundle] / name


class Request(BaseHTTPRequestHandler):
    store: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Nothing: a failed fault says what went wrong."""

    def do_GET(self) -> None:
        self.store.gets.append(self.path)
        self.close_connection = True
        try:
            if not self.store.is_down and not self.store.misbehave(self):
                self.answer(self.store.file(self.path).read_bytes())
        except (BrokenPipeError, ConnectionResetError):
            # The server may hang up on a store that misbehaves.
            pass

    def head(self, n_bytes: int, status: int = 200, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(n_bytes), "Last-Modified": self.date_time_string(0), "Connection": "close"}
        for name, value in (headers | (extra or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, body: bytes, etag: str = "") -> None:
        """Answers with all of the body, or with the range that was asked for."""
        extra = {"ETag": etag} if etag else {}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            self.head(end + 1 - start, 206, extra | {"Content-Range": f"bytes {start}-{end}/{len(body)}"})
            self.wfile.write(body[start : end + 1])
            return
        self.head(len(body), 200, extra)
        self.wfile.write(body)

    def stall(self, seconds: float) -> None:
        """Sends nothing for so long, unless the store is closed."""
        deadline = time.monotonic() + seconds
        self.wfile.flush()
        while time.monotonic() < deadline and not self.store.ended.wait(0.2):
            pass
