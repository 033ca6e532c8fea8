"""One HTTP connection to the service: authentication, retries, and every failure as a `ZetaError`.

A request is repeated only where repeating it is harmless (GET, or a POST with an ``Idempotency-Key``) and only for
what passes by itself: no connection, or an answer that says "not now" (429, 502, 503, 504). What the server refuses is
raised at once, with the server's own sentence.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from zeta_core.contract import errors
from zeta_core.contract.errors import ErrorBody, ErrorContent, Unavailable, ZetaError

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
PASSING_STATUSES = frozenset({429, 502, 503, 504})

AnswerT = TypeVar("AnswerT")


class Unreachable(Unavailable):
    """Nothing answers at the URL, or it is not this service that answers."""

    code = "unreachable"


class ServerFault(ZetaError):
    """The server failed at something that is not the caller's to mend; its log has the rest, by request id."""

    type = "internal_error"
    code = "internal_error"


class BadAnswer(ServerFault):
    """The server sent something else than the contract says; asking again would not help."""

    code = "bad_answer"


# A code of its own first, then the family: the classes are the contract's, so the names cannot drift apart.
_BY_CODE: dict[str, type[ZetaError]] = {errors.InvalidSpec.code: errors.InvalidSpec}
_BY_TYPE: dict[str, type[ZetaError]] = {
    family.type: family
    for family in (
        errors.InvalidRequest,
        errors.MalformedRequest,
        errors.AuthenticationFailed,
        errors.PermissionDenied,
        errors.NotFound,
        errors.Conflict,
        errors.TooLarge,
        errors.RequestTimeout,
        errors.QuotaExceeded,
        errors.Unavailable,
        errors.InvalidSettings,
        ServerFault,
    )
}


class Transport:
    """HTTP to one server with one key. Safe to share between threads; `close` ends every pause at once."""

    def __init__(self, base_url: str, api_key: str | None, *, patience_seconds: float) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.base_url = base_url.rstrip("/")
        self.patience_seconds = patience_seconds
        self._closed = Event()
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            # A proxy of the environment is for the world outside, not for a service on this machine.
            trust_env=not _on_this_machine(self.base_url),
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
        """The answer, read whole. Raises the `ZetaError` that the server sent, or `Unreachable`."""
        repeatable = method in ("GET", "HEAD") or "Idempotency-Key" in (headers or {})
        pauses = self.pauses()
        while True:
            request = self._http.build_request(
                method, path, params=_given(params), json=json, content=content, headers=headers
            )
            try:
                response = self._http.send(request)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if not (repeatable or isinstance(error, httpx.ConnectError)) or not pauses.wait():
                    raise self.unreachable(error) from error
                continue
            if response.status_code in PASSING_STATUSES and repeatable and pauses.wait(retry_after(response)):
                continue
            raise_for(response)
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
        """The answer while it arrives, tried once; a refusal is read and raised.

        Raises `httpx.TransportError` where the connection fails: the caller knows how to go on from where it was.
        """
        request = self._http.build_request(
            method,
            path,
            params=_given(params),
            headers=headers,
            timeout=httpx.Timeout(read_seconds, connect=CONNECT_SECONDS),
            **body,
        )
        response = self._http.send(request, stream=True)
        try:
            if not response.is_success:
                response.read()
            raise_for(response)
            yield response
        finally:
            response.close()

    def pauses(self, patience_seconds: float | None = None) -> Pauses:
        """Growing pauses between attempts, until patience ends."""
        return Pauses(self._closed, self.patience_seconds if patience_seconds is None else patience_seconds)

    def unreachable(self, error: Exception) -> Unreachable:
        """The sentence for a connection that failed."""
        reason = "no answer in time" if isinstance(error, httpx.TimeoutException) else str(error) or repr(error)
        return Unreachable(
            f"No Zeta server answers at {self.base_url} ({reason}); start one with `zeta up`, "
            "or set ZETA_URL to the right address."
        )


class Pauses:
    """0.1 s, 0.2 s, 0.4 s ... at most 5 s, until ``patience_seconds`` have passed without a success."""

    def __init__(self, closed: Event, patience_seconds: float) -> None:
        self._closed = closed
        self._patience_seconds = patience_seconds
        self.restart()

    def restart(self) -> None:
        """Something answered: patience begins anew."""
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._deadline: float | None = None

    def wait(self, at_least_seconds: float = 0.0) -> bool:
        """Pause; false when patience is at its end or the connection was closed."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience_seconds
        if now >= self._deadline:
            return False
        pause = min(max(self._pause_seconds, at_least_seconds), max(self._deadline - now, FIRST_PAUSE_SECONDS))
        self._pause_seconds = min(self._pause_seconds * 2, LONGEST_PAUSE_SECONDS)
        return not self._closed.wait(pause)


def read_answer(model: type[AnswerT], response: httpx.Response) -> AnswerT:
    """The answer as a model of the contract. Raises `BadAnswer` where it is none."""
    try:
        return TypeAdapter(model).validate_json(response.content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the answer"
        raise BadAnswer(
            f"{response.request.method} {response.request.url} answered what this client cannot read "
            f"({where}: {fault['msg']}); is the server of another version?"
        ) from error


def raise_for(response: httpx.Response) -> None:
    """Raise the `ZetaError` of an answer (already read) that is not a success."""
    if response.is_success:
        return
    try:
        content = ErrorBody.model_validate_json(response.content).error
    except ValidationError:
        raise _not_ours(response) from None
    raise error_from(content, response.headers.get("X-Request-Id"))


def error_from(content: ErrorContent, request_id: str | None = None) -> ZetaError:
    """The error class that the server raised, with its sentence, field and details."""
    family = _BY_CODE.get(content.code) or _BY_TYPE.get(content.type) or ServerFault
    message = content.message
    if family is ServerFault and request_id and request_id not in message:
        message = f"{message} (request {request_id})"
    return family(message, code=content.code, param=content.param, details=content.details)


def retry_after(response: httpx.Response) -> float:
    """The pause in seconds that the server asks for; 0 where it asks for none."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), 60.0) if value.isdecimal() else 0.0


def _not_ours(response: httpx.Response) -> ZetaError:
    url, status = response.request.url, response.status_code
    if status in PASSING_STATUSES:
        return Unreachable(f"The server at {url} is not available now (HTTP {status}); try again later.")
    if status >= 500:
        return ServerFault(f"The server failed at {url} (HTTP {status}); its log says why.")
    content_type = response.headers.get("Content-Type", "no type")
    return Unreachable(
        f"What answers at {url} is not a Zeta server (HTTP {status}, {content_type}); "
        "set ZETA_URL to the right address."
    )


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def _on_this_machine(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
