"""A receiver of webhooks on loopback: records every request, and responds as a test wants."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """A request; the names of headers are in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Receiver:
    """``status`` is that of the next responses; while ``is_slow`` is set, none is sent."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.status = 204
        self.response_headers: dict[str, str] = {}
        self.is_slow = threading.Event()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of(self, path: str) -> list[Received]:
        """The requests to this path."""
        return [request for request in self.requests if request.path == path]

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.requests.append(Received(self.path, headers, body))
                if receiver.is_slow.is_set():
                    receiver._ended.wait(60)
                self.send_response(receiver.status)
                for name, value in receiver.response_headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        return Handler


@contextmanager
def running_receiver() -> Generator[Receiver]:
    """A receiver until the block ends."""
    receiver = Receiver()
    try:
        yield receiver
    finally:
        receiver.close()
