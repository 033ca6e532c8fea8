"""Request middleware that records each request as a span, if an exporter is configured."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.tracing import Tracing
from server.tracing.request import current_request

UNTRACED_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})  # polled every few seconds


class RequestTraceMiddleware:
    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app = app
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNTRACED_PATHS:
            await self.app(scope, receive, send)
            return
        status = 500  # unless a response is sent

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        span = self.tracing.start_request(scope["method"], scope["path"], Headers(scope=scope).get("traceparent"))
        try:
            with current_request(span):
                await self.app(scope, receive, send_and_note_status)
        finally:
            span.end(getattr(scope.get("route"), "path", "(none)"), status)
