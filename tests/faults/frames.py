"""HTTP/2 frames made by hand (RFC 9113), for peers that no library would be."""

import socket
import struct

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
CANCEL = (8).to_bytes(4, "big")
INITIAL_WINDOW_SIZE = 4
# What a connection may send before its peer allows more (RFC 9113, section 6.9.2).
FIRST_WINDOW = 65_535
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: str, value: str) -> bytes:
    """A header as HPACK writes it without its tables and without Huffman's code (RFC 7541, section 6.2.2)."""
    assert len(name) < 127 and len(value) < 127, "a longer text needs a length of several bytes"
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def call_headers(method: str, timeout: str = "10S") -> bytes:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/midemb.v1.MidEmbService/{method}",
        ":authority": "midemb",
        "content-type": "application/grpc",
        "te": "trailers",
        "grpc-timeout": timeout,
    }
    return b"".join(literal(name, value) for name, value in headers.items())


def message(encoded: bytes) -> bytes:
    """A gRPC message, not compressed."""
    return b"\0" + len(encoded).to_bytes(4, "big") + encoded


class Peer:
    """A connection that sends frames and reads nothing unless it is told to."""

    def __init__(self, address: str, window: int = FIRST_WINDOW):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        # A server that stops reading shows as a send that does not end.
        self.socket.settimeout(0.5)
        settings = INITIAL_WINDOW_SIZE.to_bytes(2, "big") + window.to_bytes(4, "big")
        self.next_stream = 1
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings))

    def send(self, data: bytes) -> bool:
        """Sends all of it; false if the server closed the connection or does not read."""
        try:
            self.socket.sendall(data)
        except (TimeoutError, OSError):
            return False
        return True

    def stream(self) -> int:
        self.next_stream += 2
        return self.next_stream - 2

    def call(self, method: str, body: bytes | None, timeout: str = "10S") -> bool:
        """Opens a call. Without a body, the message stays out."""
        stream = self.stream()
        data = frame(HEADERS, END_HEADERS, stream, call_headers(method, timeout))
        if body is not None:
            size = 16_384
            parts = [body[at : at + size] for at in range(0, len(body), size)]
            for part in parts[:-1]:
                data += frame(DATA, 0, stream, part)
            data += frame(DATA, END_STREAM, stream, parts[-1])
        return self.send(data)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Closes with a TCP reset, as a process that was killed does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
