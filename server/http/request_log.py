"""Request middleware: assigns request ids, logs and counts requests, and answers unexpected exceptions.

Guarantees: every response has an ``X-Request-Id``. An unexpected exception is logged with its traceback and answered
with a 500 error in the JSON shape of its path, without the exception's text. A response sent before a large body was
read closes the connection, so the rest of the body is never read.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping

from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.error_responses import InternalError
from server.http.proxies import route_path
from zeta_core.contract.errors import ZetaError

logger = logging.getLogger(__name__)

SKIPPABLE_BYTES = 64 * 1024  # a body this small has already arrived, so the connection can be reused
ResponseOf = Callable[[str], Callable[[ZetaError, Mapping[str, str] | None], Response]]
_SAFE_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")


class RequestMetrics:
    """Prometheus metrics of HTTP requests by method, route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route", "status")
        self._requests = Counter("zeta_http_requests", "HTTP requests that were answered.", labels, registry=registry)
        self._seconds = Histogram(
            "zeta_http_request_seconds", "Time until the response was complete.", ("method", "route"), registry=registry
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        label = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
        self._requests.labels(label, route, str(status)).inc()
        self._seconds.labels(label, route).observe(seconds)


class RequestLogMiddleware:
    def __init__(self, app: ASGIApp, metrics: RequestMetrics, response_of: ResponseOf) -> None:
        """``response_of`` returns the function that formats errors for a path."""
        self.app = app
        self.metrics = metrics
        self.response_of = response_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _SAFE_ID.match(sent_id) else f"req_{secrets.token_hex(12)}"
        status = 0
        body_is_read = False

        async def receiving() -> Message:
            nonlocal body_is_read
            message = await receive()
            body_is_read = not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["X-Request-Id"] = request_id
                if status >= 400 and not body_is_read and _has_large_body(headers):
                    response_headers["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        except Exception:
            logger.exception(
                "Request %s failed with an unexpected exception.", request_id, extra={"request_id": request_id}
            )
            if status:
                raise  # the response has started; only closing the connection can mark it as incomplete
            fault = InternalError(f"Internal server error; see the server log for request {request_id}.")
            respond = self.response_of(route_path(Request(scope)))
            await respond(fault, None)(scope, receiving, sending)
        finally:
            self._log(scope, request_id, status, time.monotonic() - started)

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "(none)")
        self.metrics.count(scope["method"], route, status, seconds)
        client = scope.get("client")
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
        logger.log(
            logging.DEBUG if route in ("/healthz", "/readyz", "/metrics") else logging.INFO,
            "%s %s was answered with %d in %.0f ms, for %s.",
            scope["method"],
            path,
            status,
            seconds * 1000,
            client[0] if client else "an unknown client",
            extra={"action": "request", "request_id": request_id, "status": status},
        )


def _has_large_body(headers: Headers) -> bool:
    length = headers.get("content-length", "0")
    return "transfer-encoding" in headers or not length.isdigit() or int(length) > SKIPPABLE_BYTES
