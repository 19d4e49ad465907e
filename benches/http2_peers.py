"""Callers that no gRPC library offers, on bare sockets: they stop in the middle of a call, or never read their answer.

They speak just enough HTTP/2 (RFC 9113) to begin a call. Every socket has a timeout, and the caller closes it.
"""

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
# A server may send frames of up to 16 KiB, and we keep to that as well.
MAX_FRAME = 16_384
STREAM = 1
SOCKET_TIMEOUT_SECONDS = 10


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: dict[str, str]) -> bytes:
    """Encodes headers as HPACK literals without indexing (RFC 7541, 6.2.2). Each has less than 127 bytes."""
    parts = []
    for name, value in headers.items():
        parts += [b"\0", bytes([len(name)]), name.encode(), bytes([len(value)]), value.encode()]
    return b"".join(parts)


def begin_call(address: str, path: str) -> socket.socket:
    """Connects and sends the headers of one call."""
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout=SOCKET_TIMEOUT_SECONDS)
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": address}
    headers |= {"te": "trailers", "content-type": "application/grpc"}
    block = frame(HEADERS, END_HEADERS, STREAM, header_block(headers))
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0, b"") + block)
    return connection


def send_message(connection: socket.socket, message: bytes, n_sent: int | None = None) -> None:
    """Sends a gRPC message, or only its first `n_sent` bytes; the call ends only with the whole message.

    At most 65,535 bytes fit, as the window that a connection begins with is never enlarged here.
    """
    whole = b"\0" + struct.pack(">I", len(message)) + message
    part = whole if n_sent is None else whole[:n_sent]
    for start in range(0, len(part), MAX_FRAME):
        piece = part[start : start + MAX_FRAME]
        is_last = n_sent is None and start + MAX_FRAME >= len(part)
        connection.sendall(frame(DATA, END_STREAM if is_last else 0, STREAM, piece))


def reset(connection: socket.socket) -> None:
    """Closes with a TCP reset, as a process that was killed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
