"""The HTTP protocol of a connection: uvicorn's parser with limits on what a client can make the server wait for.

Guarantees: the head of a request (request line and headers) is limited to `MAX_HEAD_BYTES`, `MAX_HEADERS` and
`HEAD_SECONDS`, and trailers are dropped; at most `MAX_PIPELINED` requests wait for the response to an earlier one; a
client that reads nothing of a response for `WRITE_SECONDS` is disconnected; a request that isn't valid HTTP gets an
error in the standard JSON shape; a response to HTTP/1.0 without a Content-Length isn't chunked but ended by closing the
connection (RFC 9112, section 6.1).
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.http.browser_protection import SECURITY_HEADERS
from server.http.connections import ConnectionLimit
from server.http.error_responses import HeadTooLarge, error_response
from zeta_core.contract.errors import MalformedRequest, Unavailable, ZetaError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256
HEAD_SECONDS = 30.0
MAX_PIPELINED = 16
WRITE_SECONDS = 60.0


class ServerProtocol(HttpToolsProtocol):
    """One connection."""

    _is_in_head = True  # until the headers of the next request are complete
    _has_begun_now = False  # the head began in the data that is being parsed
    _head_bytes = 0
    _trailer_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refusal: ZetaError | None = None

    def __init__(self, *args: Any, limit: ConnectionLimit, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = limit

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if not self._limit.register(self):
            self._refusal = Unavailable(
                f"The server has {self._limit.max_connections} connections, its maximum; try again in a few seconds.",
                code="too_many_connections",
            )
            self.send_400_response("")
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        self._limit.unregister(self)
        super().connection_lost(exc)

    def close_idle(self) -> None:
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        was_in_head, self._has_begun_now = self._is_in_head, False
        if was_in_head and self._head_timer is None:
            self._start_timer()
        super().data_received(data)
        if was_in_head and self._is_in_head and not self._has_begun_now:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refusal = _head_too_large()
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun_now, self._head_bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)
            return
        self._trailer_bytes += len(name) + len(value)  # a trailer: uvicorn would add it to the headers of the request
        if self._trailer_bytes > MAX_HEAD_BYTES:
            raise ValueError("stop the parser; `send_400_response` then closes the connection")

    def on_headers_complete(self) -> None:
        self._is_in_head, self._trailer_bytes = False, 0
        self._stop_timer()
        self._limit.mark_busy(self)
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise ValueError("stop the parser; `data_received` then sends the refusal")
        if len(self.headers) > MAX_HEADERS:
            self._refusal = HeadTooLarge(f"The request has {len(self.headers)} headers; send at most {MAX_HEADERS}.")
            raise ValueError("stop the parser; `data_received` then sends the refusal")
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("stop the parser; `send_400_response` then closes the connection")
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head = True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:
            self._limit.mark_idle(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Reject an invalid request and close the connection. An earlier request's response is cut off instead."""
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.abort()
            return
        error = self._refusal or MalformedRequest("The request is not valid HTTP; send it again.", code="invalid_http")
        own = {"X-Request-Id": f"req_{secrets.token_hex(12)}", "Connection": "close"}
        response = error_response(error, {**own, **SECURITY_HEADERS})
        head = b"".join(b"%b: %b\r\n" % (name, value) for name, value in response.raw_headers)
        self.transport.write(STATUS_LINE[response.status_code] + head + b"\r\n" + bytes(response.body))
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _until_close(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_write_timer(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._check_write_progress, size)

    def _check_write_progress(self, size_before: int) -> None:
        if self.transport.get_write_buffer_size() < size_before:
            self._start_write_timer()
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"The request line and headers exceed {MAX_HEAD_BYTES} bytes; send fewer or shorter parameters."
    )


def _until_close(cycle: RequestResponseCycle, app: Any) -> Any:
    """``app``, whose responses without a Content-Length are ended by closing the connection."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = True

        async def sending(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                header_names = {name.lower() for name, _ in message.get("headers", ())}
                has_length = b"content-length" in header_names
                if not has_length:
                    cycle.chunked_encoding = False
            elif not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, sending)

    return run
