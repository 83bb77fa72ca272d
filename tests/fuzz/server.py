"""A download server that misbehaves in one of several ways."""

from __future__ import annotations

import contextlib
import http.server
import threading
from typing import Iterator

from tests.fuzz.mutators import LFS_POINTER

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 40  # begins like an archive
MODES = (
    *("404", "500", "closes", "breaks off", "too long", "too short", "another range"),
    *(
        "html",
        "lfs pointer",
        "no archive",
        "another host",
        "a file",
        "itself",
        "no http",
        "silence",
    ),
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every request in the way of `server.mode`."""

    def do_GET(self) -> None:
        """Answer."""
        mode = self.server.mode  # type: ignore[attr-defined]
        targets = {"another host": "http://example.com/x", "a file": "file:///etc/hostname",
                   "itself": self.path}  # fmt: skip
        bodies = {"html": b"<html>moved</html>", "lfs pointer": LFS_POINTER}
        if mode.isdecimal():
            self.send_error(int(mode))
        elif mode in targets:
            self.send_response(302)
            self.send_header("Location", targets[mode])
            self.end_headers()
        elif mode == "closes":
            self.close_connection = True
        elif mode == "no http":
            self.wfile.write(b"\0\xff" * 100)
        elif mode == "silence":
            self.server.ended.wait()  # type: ignore[attr-defined]
        else:
            self._send(mode, bodies.get(mode, CONTENT))

    def _send(self, mode: str, content: bytes) -> None:
        lengths = {"breaks off": 9999, "too long": 10**15, "too short": 10}
        self.send_response(206 if mode == "another range" else 200)
        self.send_header("Content-Length", str(lengths.get(mode, len(content))))
        if mode == "another range":
            self.send_header("Content-Range", "bytes 7-9/3")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(mode: str) -> Iterator[str]:
    """Serve in a thread; gives the address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.ended = mode, threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.ended.set()  # type: ignore[attr-defined]
        server.shutdown()
