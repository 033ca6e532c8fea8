"""Streaming a job's events live (server-sent events). Each event is delivered once and in order, despite interruptions.

Some gateways, such as virus scanners, buffer the stream although they forward other requests, and a server limits the
open streams of a key. The client then polls the stored events instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import httpx
from httpx_sse import EventSource, ServerSentEvent
from pydantic import ValidationError

from zeta.errors import InternalServerError, InvalidResponse, Unreachable, parse_response
from zeta.transport import HttpTransport
from zeta_core.contract.errors import QuotaExceeded, Unavailable, ZetaError
from zeta_core.contract.job.events import EVENT, Event
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import ENDED

SILENCE_SECONDS = 20.0  # the server sends some bytes at once and a comment every 15 s
PATIENCE_SECONDS = 300.0  # long enough for a server to restart or a laptop to wake up
POLL_SECONDS = 2.0
MAX_SILENT_CONNECTIONS = 2  # after this many consecutive connections without an event, from a responsive server: poll
PAGE_SIZE = 1000


class WaitTimeout(ZetaError):
    """The job did not end before the deadline; it continues."""

    type = "timeout_error"
    code = "wait_timeout"


def follow(
    transport: HttpTransport,
    job_id: str,
    *,
    after: int = 0,
    deadline: float | None = None,
    on_interruption: Callable[[ZetaError], None] | None = None,
) -> Iterator[Event]:
    """Yield every event with ``seq`` greater than ``after``, until the job has ended.

    ``deadline`` is a `time.monotonic` time; ``on_interruption`` is called once per outage. Raises `Unreachable` after
    `PATIENCE_SECONDS` without a server, `WaitTimeout` at the deadline, and the server's own errors.
    """
    reader = _EventReader(transport, job_id, after, deadline)
    backoff = transport.backoff(PATIENCE_SECONDS)
    first_backoff = transport.backoff()  # if the server has never responded, give up sooner
    was_reported = False
    while True:
        failure: ZetaError
        num_responses = reader.num_responses
        try:
            yield from reader.poll() if reader.must_poll else reader.stream()
            if reader.has_ended:
                return
            failure = Unreachable(f"This client was closed while it followed {job_id}.")
            if transport.pause(min(POLL_SECONDS, _seconds_left(deadline)) if reader.must_poll else 0):
                _check(deadline, job_id)
                continue
        except httpx.TransportError as error:
            failure = transport.unreachable(error)
        except InvalidResponse:
            raise
        except (Unavailable, InternalServerError) as error:  # the server responded that it cannot serve this now
            failure = error
        _check(deadline, job_id)
        if reader.num_responses > num_responses:
            backoff.restart()
            was_reported = False
        if reader.num_responses and on_interruption is not None and not was_reported:
            on_interruption(failure)
            was_reported = True
        waited = backoff.wait(min(reader.retry_seconds, 2.0)) if reader.num_responses else first_backoff.wait()
        if not waited:
            raise failure


def stored(transport: HttpTransport, job_id: str, *, after: int, limit: int | None = None) -> Iterator[Event]:
    """Yield the events that are stored now, oldest first."""
    num_left = limit
    while num_left is None or num_left > 0:
        page_size = PAGE_SIZE if num_left is None else min(PAGE_SIZE, num_left)
        response = transport.request("GET", f"/v1/jobs/{job_id}/events", params={"after": after, "limit": page_size})
        page = parse_response(Page[Event], response)
        yield from page.data
        if not page.has_more or not page.data:
            return
        after = page.data[-1].seq
        num_left = None if num_left is None else num_left - len(page.data)


class _EventReader:
    """Reads one job's events from the live stream, or from the stored events if a gateway buffers the stream."""

    def __init__(self, transport: HttpTransport, job_id: str, after: int, deadline: float | None) -> None:
        self.num_responses = 0  # connections that delivered data, plus successful polls
        self.retry_seconds = 0.0
        self.has_ended = False
        self._transport, self._job_id, self._deadline = transport, job_id, deadline
        self._last, self._num_silent = after, 0

    @property
    def must_poll(self) -> bool:
        return self._num_silent >= MAX_SILENT_CONNECTIONS

    def poll(self) -> Iterator[Event]:
        """Yield the events that were stored since the last one seen."""
        response = self._transport.request("GET", f"/v1/jobs/{self._job_id}")
        status = parse_response(Job, response).status
        for event in stored(self._transport, self._job_id, after=self._last):
            self._last = event.seq
            yield event
        self.num_responses += 1
        self.has_ended = status in ENDED  # the status was read before the events, so no event is missing

    def stream(self) -> Iterator[Event]:
        """Yield the events of one connection, and those that it withheld. Returns if the next one may start at once.

        Raises the errors of `HttpTransport.stream`, and `Unreachable` if the server closed the stream.
        """
        num_responses, seen, began = self.num_responses, self._last, time.monotonic()
        try:
            yield from self._connection()
            if self.has_ended:
                return
            failure: Exception = Unreachable(f"The server at {self._transport.base_url} closed the event stream.")
        except (httpx.TransportError, Unavailable, QuotaExceeded) as error:  # the last one: too many open streams
            failure = error
        _check(self._deadline, self._job_id)
        has_data = self.num_responses > num_responses
        was_cut = has_data and not isinstance(failure, httpx.ReadTimeout)
        if was_cut and (self._last > seen or time.monotonic() - began >= SILENCE_SECONDS):
            self._num_silent = 0
            raise failure
        if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
            raise failure
        last = self._last
        yield from self.poll()
        is_quiet_job = has_data and not was_cut and self._last == last
        self._num_silent = 0 if is_quiet_job else self._num_silent + 1

    def _watched(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Count a connection that delivers bytes, and check the deadline, also if they are only comments."""
        for number, chunk in enumerate(chunks):
            _check(self._deadline, self._job_id)
            if number == 0:
                self.num_responses += 1
            yield chunk

    def _connection(self) -> Iterator[Event]:
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",  # compression would delay events until a block is full
            "Cache-Control": "no-store",
            "Last-Event-ID": str(self._last),
        }
        path = f"/v1/jobs/{self._job_id}/events"
        silence = max(0.05, min(SILENCE_SECONDS, _seconds_left(self._deadline)))
        with self._transport.stream("GET", path, headers=headers, read_seconds=silence) as response:
            if response.status_code == 204:
                self.has_ended = True
                return
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise InvalidResponse(f"The response of {response.request.url} is not an event stream.")
            for message in parse_messages(self._watched(response.iter_bytes())):
                if message.retry is not None:
                    self.retry_seconds = message.retry / 1000
                if message.event == "end":
                    self.has_ended = True
                    return
                if message.data and (event := _event(message)).seq > self._last:
                    self._last = event.seq
                    yield event


def parse_messages(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """Parse the messages of a stream. A message that was cut off is not returned.

    httpx-sse decodes a stream by the charset in its headers, but server-sent events are always UTF-8.
    """
    return EventSource(httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=chunks)).iter_sse()


def _event(message: ServerSentEvent) -> Event:
    try:
        return EVENT.validate_json(message.data)
    except ValidationError as error:
        raise InvalidResponse(f"The server sent an event that cannot be parsed: {message.data[:200]!r}.") from error


def _seconds_left(deadline: float | None) -> float:
    return max(0.0, deadline - time.monotonic()) if deadline is not None else float("inf")


def _check(deadline: float | None, job_id: str) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise WaitTimeout(f"{job_id} did not end before the timeout and continues; wait again, or cancel it.")
