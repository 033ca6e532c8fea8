"""Protection against hostile web pages: the Host header, security headers of every response, and CORS.

A page that a user visits can send requests to servers on the user's machine. Guarantees: a server that listens on a
loopback address rejects names that do not belong to this machine, including a foreign name that resolves to 127.0.0.1
(DNS rebinding). Only pages of the origins in ``ZETA_CORS_ORIGINS`` can read responses. Responses are never
rendered in frames, and never as a type other than the declared one.
"""

from __future__ import annotations

from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.error_responses import error_response
from zeta_core.contract.access import PROJECT_HEADER
from zeta_core.contract.errors import MalformedRequest
from zeta_core.contract.spec.validation import shown

# Pages set their own Content-Security-Policy; nothing else may load or run anything.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
STRICT_TRANSPORT_SECURITY = "max-age=31536000"
CORS_SECONDS = 600
_REQUEST_HEADERS = (
    *("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", PROJECT_HEADER),
    *("Range", "If-Range", "If-None-Match", "X-Request-Id"),
)
_RESPONSE_HEADERS = ("X-Request-Id", "Location", "Idempotent-Replayed", "ETag", "Content-Range", "Retry-After")


class HostCheck:
    """Rejects requests without exactly one Host header, and foreign names if ``listens_on`` is a loopback address."""

    def __init__(self, app: ASGIApp, listens_on: str | None) -> None:
        """``listens_on`` is the loopback address or name; ``None`` accepts every name."""
        self._app = app
        self._listens_on = listens_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(scope) if scope["type"] == "http" else None
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await error_response(fault)(scope, receive, send)

    def _fault(self, scope: Scope) -> MalformedRequest | None:
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1 and not (scope["http_version"] == "1.0" and not hosts):
            return MalformedRequest(
                f"The request has {len(hosts)} Host headers; send exactly one.", code="invalid_host"
            )
        if self._listens_on is None or not hosts or self._is_local(hosts[0]):
            return None
        return MalformedRequest(
            f"The request is for the host {shown(hosts[0])}, which is not a name of this machine, but the server "
            f"listens on {self._listens_on}; use that address, or set ZETA_BEHIND_PROXY=yes if a reverse proxy "
            "forwards to it.",
            code="unknown_host",
        )

    def _is_local(self, host: str) -> bool:
        name = host.lower().rpartition(":")[0] if not host.endswith("]") and ":" in host else host.lower()
        name = name.removeprefix("[").removesuffix("]")
        if name in ("localhost", self._listens_on) or name.endswith(".localhost"):
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False


class SecurityHeaders:
    """Adds `SECURITY_HEADERS` to every response that does not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope.get("scheme") == "https":
                    headers.setdefault("Strict-Transport-Security", STRICT_TRANSPORT_SECURITY)
            await send(message)

        await self._app(scope, receive, sending)


def cors_middleware(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """``app`` for pages of these origins, which send an API key in a header; cookies are never accepted from them."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
        allow_headers=_REQUEST_HEADERS,
        expose_headers=_RESPONSE_HEADERS,
        max_age=CORS_SECONDS,
    )
