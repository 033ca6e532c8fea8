"""HTTP requests to the service, with authentication and retries. Every failure is a `ZetaError`.

A request is retried only if it is idempotent (GET, or POST with an ``Idempotency-Key``) and the failure is transient: a
failed connection, or status 429, 502, 503 or 504. Other errors from the server are raised immediately, with the
server's message. Redirects are not followed, except for downloads from the object store, which are requested without
the key; so the key is sent only to the configured URL.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx
from pydantic import ValidationError

from zeta.certificates import no_tls_context, pinned_context, tls_context
from zeta.connection_failures import (
    connection_failure,
    foreign_response,
    is_permanent,
    is_web_page,
    other_program,
    wrong_path,
)
from zeta.errors import Unreachable, error_from
from zeta.http_proxy import Proxy, choose_proxy
from zeta_core.contract.access import PROJECT_HEADER
from zeta_core.contract.errors import ErrorBody, InvalidRequest, Unavailable
from zeta_core.contract.job.responses import Health

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 5.0
TRANSIENT_STATUSES = frozenset({429, 502, 503, 504})


class HttpTransport:
    """Sends requests to one server with one key. Thread-safe; `close` also ends all waits between attempts."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        project: str | None = None,
        patience_seconds: float,
        variables: Mapping[str, str],
        use_proxy: bool = True,
        certificate: str | None = None,
    ) -> None:
        """``project`` is sent with every request. ``variables`` is the environment, which configures proxies and
        certificate authorities. ``certificate`` is that of the server (PEM), which is trusted instead of the
        authorities.

        Raises `InvalidSettings` if one of them applies but cannot be used.
        """
        self.base_url = base_url.rstrip("/")
        self._variables, self._use_proxy = variables, use_proxy
        self.patience_seconds = patience_seconds
        self._closed = Event()
        self._proxy = choose_proxy(self.base_url, variables) if use_proxy else None
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=_identity(api_key, project),
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            follow_redirects=False,
            # httpx would read the environment itself, and fail on settings that do not apply to this server.
            trust_env=False,
            **_route(self.base_url, self._proxy, variables, certificate),
        )

    def close(self) -> None:
        self._closed.set()
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request and return the complete response. Raises the server's `ZetaError`, or `Unreachable`."""
        repeatable = method in ("GET", "HEAD") or "Idempotency-Key" in (headers or {})
        backoff = self.backoff()
        while True:
            request = self._build(method, path, params=params, json=json, content=content, headers=headers)
            try:
                response = self._send(request)
            except httpx.RequestError as error:
                can_retry = (repeatable or isinstance(error, httpx.ConnectError)) and not is_permanent(error)
                if not can_retry or not backoff.wait():
                    raise self.unreachable(error) from error
                continue
            if response.status_code in TRANSIENT_STATUSES and repeatable and backoff.wait(retry_after(response)):
                continue
            self._raise_for(response)
            return response

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        read_seconds: float | None = READ_SECONDS,
        **body: Any,
    ) -> Generator[httpx.Response]:
        """Send a request once and stream the response. An error response is read and raised.

        Raises `httpx.TransportError` if the connection fails, so that the caller can reconnect and continue.
        """
        timeout = httpx.Timeout(read_seconds, connect=CONNECT_SECONDS)
        request = self._build(method, path, params=params, headers=headers, timeout=timeout, **body)
        with self._opened(request) as response:
            self._require_success(response)
            yield response

    @contextmanager
    def download(self, path: str, *, headers: Mapping[str, str]) -> Generator[httpx.Response]:
        """Stream a file like `stream`, from the server or from the object store to which it redirects.

        The store gets neither the key nor ``If-Range``, because its ETag is not the server's: verify the content.
        """
        with self._opened(self._build("GET", path, params=None, headers=headers)) as response:
            link = _store_link(response)
            if link is None:
                self._require_success(response)
                yield response
                return
        kept = {name: value for name, value in headers.items() if name.lower() != "if-range"}
        try:
            with self._store_client(link) as store, store.stream("GET", link, headers=kept) as content:
                if not content.is_success:
                    raise _store_failure(link, f"it responded with HTTP {content.status_code}")
                yield content
        except httpx.TransportError as error:
            raise _store_failure(link, str(error)) from error

    @contextmanager
    def _opened(self, request: httpx.Request) -> Generator[httpx.Response]:
        response = self._send(request, stream=True)
        try:
            yield response
        except httpx.DecodingError as error:  # a gateway's compressed response was truncated
            raise httpx.ReadError(str(error)) from error
        finally:
            response.close()

    def _require_success(self, response: httpx.Response) -> None:
        """Read and raise the error of a streamed response, if it is one."""
        if not response.is_success or is_web_page(response):
            response.read()
        self._raise_for(response)

    def _store_client(self, link: httpx.URL) -> httpx.Client:
        """A client without the key, for one download from the object store."""
        origin = str(link.copy_with(raw_path=b"/"))
        proxy = choose_proxy(origin, self._variables) if self._use_proxy else None
        return httpx.Client(
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            follow_redirects=False,
            trust_env=False,
            **_route(origin, proxy, self._variables, None),
        )

    def backoff(self, patience_seconds: float | None = None) -> Backoff:
        """Exponential backoff between attempts, until ``patience_seconds`` have passed."""
        return Backoff(self._closed, self.patience_seconds if patience_seconds is None else patience_seconds)

    def pause(self, seconds: float) -> bool:
        """Sleep between polls. Returns False if the transport was closed."""
        return not self._closed.wait(seconds)

    def unreachable(self, error: Exception) -> Unavailable:
        """The error for a failed connection."""
        return connection_failure(error, self.base_url, self._proxy)

    def _build(self, method: str, path: str, *, params: Mapping[str, Any] | None, **rest: Any) -> httpx.Request:
        """Build a request. Raises `InvalidRequest` for text that is invalid in HTTP, and on a closed client."""
        if self._closed.is_set():
            raise InvalidRequest("This client is closed; create a new one.", code="client_closed")
        try:
            return self._http.build_request(method, path, params=_without_none(params), **rest)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise InvalidRequest(f"{method} {path} contains text that is invalid in HTTP: {error}.") from error

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Send a request. Every failure is an `httpx.RequestError`."""
        try:
            return self._http.send(request, stream=stream)
        except UnicodeError as error:  # httpx reads the target of a redirect even where it does not follow it
            raise httpx.RemoteProtocolError(f"invalid host in location header: {error}", request=request) from error

    def _raise_for(self, response: httpx.Response) -> None:
        """Raise the `ZetaError` for a response (already read) unless it is a success of the service."""
        if response.is_success:
            if is_web_page(response):
                raise Unreachable(
                    f"{self.base_url} returned a web page (HTTP {response.status_code}, text/html), perhaps the "
                    "sign-in page of a gateway; set ZETA_URL to an address that reaches the server itself."
                )
            if "X-Request-Id" not in response.headers and not self._server_responds():  # the service always sends it
                raise other_program(response, self.base_url, self._proxy)
            return
        try:
            content = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            raise foreign_response(response, self.base_url, self._proxy, self._server_responds) from None
        if content.code == "route_not_found" and self._has_path and not self._server_responds():
            raise wrong_path(self.base_url)
        raise error_from(content, response.headers.get("X-Request-Id"))

    @property
    def _has_path(self) -> bool:
        return httpx.URL(self.base_url).path not in ("", "/")

    def _server_responds(self) -> bool:
        """Whether the service responds to a request that needs no key."""
        try:
            response = self._send(self._http.build_request("GET", "/healthz", timeout=CONNECT_SECONDS))
            Health.model_validate_json(response.content)
        except (httpx.RequestError, ValidationError):
            return False
        return response.is_success


class Backoff:
    """Exponential backoff from 0.1 s to 5 s, until ``patience_seconds`` have passed without a success."""

    def __init__(self, closed: Event, patience_seconds: float) -> None:
        self._closed = closed
        self._patience_seconds = patience_seconds
        self.restart()

    def restart(self) -> None:
        """Reset the backoff and the patience, after new data arrived."""
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self.renew_patience()

    def renew_patience(self) -> None:
        """Reset the patience but not the backoff, after a response without new data."""
        self._deadline: float | None = None

    def wait(self, at_least_seconds: float = 0.0) -> bool:
        """Pause. Returns False if the patience has run out or the transport was closed."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience_seconds
        if now >= self._deadline:
            return False
        pause = min(max(self._pause_seconds, at_least_seconds), max(self._deadline - now, FIRST_PAUSE_SECONDS))
        self._pause_seconds = min(self._pause_seconds * 2, MAX_PAUSE_SECONDS)
        return not self._closed.wait(pause)


def _store_link(response: httpx.Response) -> httpx.URL | None:
    """The address of the object store in a redirect of the service; gateways redirect without a request id."""
    if response.status_code != 307 or "X-Request-Id" not in response.headers:
        return None
    link = httpx.URL(response.headers.get("Location", ""))
    return link if link.scheme in ("http", "https") and link.host else None


def _store_failure(link: httpx.URL, reason: str) -> Unavailable:
    return Unavailable(
        f"The object store at {link.host}, to which the server redirected this download, failed: {reason}; try again "
        "later, or ask the operator whether this machine may reach it.",
        code="storage_unavailable",
    )


def retry_after(response: httpx.Response) -> float:
    """The delay in seconds that the server requests, or 0 if it requests none."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), 60.0) if value.isdecimal() else 0.0


def _route(base_url: str, proxy: Proxy | None, variables: Mapping[str, str], certificate: str | None) -> dict[str, Any]:
    """The arguments of `httpx.Client` for the proxy and the TLS context."""
    if not any(url.startswith("https://") for url in (base_url, proxy.url if proxy is not None else "")):
        context: ssl.SSLContext = no_tls_context()
    elif certificate is not None:
        context = pinned_context(certificate)
    else:
        context = tls_context(variables)
    if proxy is None:
        return {"verify": context}
    is_tls = proxy.url.startswith("https://")
    return {"verify": context, "proxy": httpx.Proxy(proxy.url, ssl_context=context if is_tls else None)}


def _identity(api_key: str | None, project: str | None) -> dict[str, str]:
    """The headers that say who makes the request."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return headers if project is None else {**headers, PROJECT_HEADER: project}


def _without_none(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}
