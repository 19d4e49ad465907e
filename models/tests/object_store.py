"""A folder served as an S3 bucket: enough of the protocol for pyarrow to list, and to read ranges of objects."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@contextlib.contextmanager
def serving_bucket(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the folders in `root` as buckets. Gives the endpoint, and a list of the requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            url = urlsplit(self.path)
            requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            bucket, _, key = unquote(url.path).strip("/").partition("/")
            if "list-type" in parse_qs(url.query):
                return self.send(200, _listing(root, bucket, parse_qs(url.query)).encode(), "application/xml")
            path = root / bucket / key
            if not key or not path.is_file():
                found = not key and (root / bucket).is_dir()
                return self.send(200 if found else 404, b"", "application/xml")
            raw = path.read_bytes()
            wanted = self.headers.get("Range")
            if wanted is None:
                return self.send(200, raw, "application/octet-stream")
            first, last = wanted.removeprefix("bytes=").split("-")
            self.send(206, raw[int(first) : int(last) + 1], "application/octet-stream")

        def send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            path = root / unquote(urlsplit(self.path).path).strip("/")
            is_head = self.command == "HEAD"
            self.send_header("Content-Length", str(path.stat().st_size if is_head and path.is_file() else len(body)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("ETag", '"0"')
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listing(root: Path, bucket: str, query: dict[str, list[str]]) -> str:
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    paths = sorted(path for path in (root / bucket).rglob("*") if path.is_file())
    keys = [str(path.relative_to(root / bucket)) for path in paths]
    keys = [key for key in keys if key.startswith(prefix)]
    folders: list[str] = []
    if delimiter:
        rest = {key: key.removeprefix(prefix) for key in keys}
        folders = sorted({prefix + part.partition("/")[0] + "/" for part in rest.values() if "/" in part})
        keys = [key for key in keys if "/" not in rest[key]]
    found = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>0</ETag>"
        f"<Size>{(root / bucket / key).stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for key in keys
    )
    found += "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
    count = len(keys) + len(folders)
    return (
        f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
    )
