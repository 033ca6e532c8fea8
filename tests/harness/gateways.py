"""HTTP gateways between a client and a server on the loopback interface that misbehave as real ones do.

A gateway forwards requests or responds itself (a rejection, a redirect, a sign-in page), and may buffer or compress
responses. For gateways that cut idle connections, see `tests.harness.tcp_relay.TcpRelay`.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHUNK_BYTES = 65_536
_OWN_HEADERS = frozenset({"transfer-encoding", "content-length", "connection", "date", "server", "content-encoding"})


@dataclass(frozen=True)
class GatewayResponse:
    """A response of the gateway itself."""

    status: int
    body: bytes = b"<html><body>A page of the gateway</body></html>"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/html"})


class Gateway:
    """An HTTP gateway in front of ``target_port``; use `running`."""

    def __init__(
        self,
        target_port: int | None = None,
        *,
        respond: Callable[[str, str], GatewayResponse | None] = lambda method, path: None,
        buffers: bool = False,
        compresses: bool = False,
        cuts_events_at: int | None = None,
        drops: frozenset[str] = frozenset(),
        program: str = "nginx/1.22.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """``respond`` returns the gateway's own response to a method and path; ``None`` forwards the request.

        ``cuts_events_at`` is the number of bytes of an event stream after which the gateway ends the response.
        ``drops`` are request headers to remove, in lower case.
        """
        self.target_port = target_port
        self.respond = respond
        self.buffers = buffers
        self.compresses = compresses
        self.cuts_events_at = cuts_events_at
        self.drops = drops
        self.program = program
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Generator[Gateway]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Handles the requests of one connection to a gateway."""

    protocol_version = "HTTP/1.1"

    def __init__(self, gateway: Gateway, *connection: Any) -> None:
        self._gateway = gateway
        super().__init__(*connection)  # handles the requests

    def version_string(self) -> str:
        return self._gateway.program

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client disconnected
            super().handle()

    def do_GET(self) -> None:
        self._gateway.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        own = self._gateway.respond(self.command, self.path)
        if own is None:
            self._forward(body)
        else:
            self._respond(own.status, own.headers, own.body)

    do_POST = do_PUT = do_DELETE = do_CONNECT = do_GET

    def _respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _forward(self, body: bytes) -> None:
        gateway = self._gateway
        assert gateway.target_port is not None, f"nothing is behind the gateway for {self.path}"
        connection = http.client.HTTPConnection("127.0.0.1", gateway.target_port)
        with contextlib.closing(connection):
            passed = {name: text for name, text in self.headers.items() if name.lower() not in gateway.drops}
            connection.request(self.command, self.path, body, passed)
            response = connection.getresponse()
            headers = {name: text for name, text in response.getheaders() if name.lower() not in _OWN_HEADERS}
            if response.status == 204:
                self._respond(204, headers, b"")
            elif gateway.buffers:
                self._respond(response.status, headers, response.read())
            else:
                self._stream(response, headers)

    def _stream(self, response: http.client.HTTPResponse, headers: Mapping[str, str]) -> None:
        packer = zlib.compressobj(wbits=31) if self._gateway.compresses else None  # 31: gzip
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        if packer is not None:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Connection", "close")  # no length: the end of the connection ends the response
        self.end_headers()
        cuts_at = self._gateway.cuts_events_at
        is_cut = cuts_at is not None and self.headers.get("Accept") == "text/event-stream"
        if is_cut:
            self.wfile.write(response.read(cuts_at))
        while not is_cut and (chunk := response.read1(CHUNK_BYTES)):
            if packer is not None:
                chunk = packer.compress(chunk) + packer.flush(zlib.Z_SYNC_FLUSH)
            self.wfile.write(chunk)
        if packer is not None:
            self.wfile.write(packer.flush())
        self.close_connection = True
