"""Streaming a job's events live (server-sent events). Each event is delivered once and in order, despite interruptions.

Some gateways, such as virus scanners, buffer the stream although they forward other requests. The client then polls the
stored events instead.

The parser follows https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream. It splits
lines at CR and LF only, because JSON may contain other Unicode line separators.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import httpx
from pydantic import ValidationError

from zeta.errors import InternalServerError, InvalidResponse, Unreachable, parse_response
from zeta.transport import HttpTransport
from zeta_core.contract.errors import Unavailable, ZetaError
from zeta_core.contract.job.answers import Page
from zeta_core.contract.job.events import EVENT, Event
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.status import ENDED

SILENCE_SECONDS = 20.0  # the server sends some bytes at once and a comment every 15 s
PATIENCE_SECONDS = 300.0  # long enough for a server to restart or a laptop to wake up
POLL_SECONDS = 2.0
MUTE_CONNECTIONS = 2  # after this many consecutive connections without an event, from a responsive server: poll
PAGE_SIZE = 1000


class WaitTimeout(ZetaError):
    """The job did not end before the deadline; it continues."""

    type = "timeout_error"
    code = "wait_timeout"


@dataclass
class Message:
    """One message of the stream. ``retry_seconds`` is the delay that the server requests before a reconnect."""

    event: str = "message"
    data: str = ""
    id: str | None = None
    retry_seconds: float | None = None


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
    reader = _Reader(transport, job_id, after, deadline)
    pauses = transport.pauses(PATIENCE_SECONDS)
    first_pauses = transport.pauses()  # if the server has never responded, give up sooner
    was_reported = False
    while True:
        failure: ZetaError
        num_answers = reader.num_answers
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
        if reader.num_answers > num_answers:
            pauses.restart()
            was_reported = False
        if reader.num_answers and on_interruption is not None and not was_reported:
            on_interruption(failure)
            was_reported = True
        waited = pauses.wait(min(reader.retry_seconds, 2.0)) if reader.num_answers else first_pauses.wait()
        if not waited:
            raise failure


def stored(transport: HttpTransport, job_id: str, *, after: int, limit: int | None = None) -> Iterator[Event]:
    """Yield the events that are stored now, oldest first."""
    num_left = limit
    while num_left is None or num_left > 0:
        wanted = PAGE_SIZE if num_left is None else min(PAGE_SIZE, num_left)
        response = transport.request("GET", f"/v1/jobs/{job_id}/events", params={"after": after, "limit": wanted})
        page = parse_response(Page[Event], response)
        yield from page.data
        if not page.has_more or not page.data:
            return
        after = page.data[-1].seq
        num_left = None if num_left is None else num_left - len(page.data)


class _Reader:
    """Reads one job's events from the live stream, or from the stored events if a gateway buffers the stream."""

    def __init__(self, transport: HttpTransport, job_id: str, after: int, deadline: float | None) -> None:
        self.num_answers = 0  # connections that delivered data, plus successful polls
        self.retry_seconds = 0.0
        self.has_ended = False
        self._transport, self._job_id, self._deadline = transport, job_id, deadline
        self._last, self._num_mute = after, 0

    @property
    def must_poll(self) -> bool:
        return self._num_mute >= MUTE_CONNECTIONS

    def poll(self) -> Iterator[Event]:
        """Yield the events that were stored since the last one seen."""
        response = self._transport.request("GET", f"/v1/jobs/{self._job_id}")
        status = parse_response(Job, response).status
        for event in stored(self._transport, self._job_id, after=self._last):
            self._last = event.seq
            yield event
        self.num_answers += 1
        self.has_ended = status in ENDED  # the status was read before the events, so no event is missing

    def stream(self) -> Iterator[Event]:
        """Yield the events of one connection, and those that it withheld. Returns if the next one may start at once.

        Raises the errors of `HttpTransport.stream`, and `Unreachable` if the server closed the stream.
        """
        num_answers, seen, began = self.num_answers, self._last, time.monotonic()
        try:
            yield from self._connection()
            if self.has_ended:
                return
            failure: Exception = Unreachable(f"The server at {self._transport.base_url} closed the event stream.")
        except (httpx.TransportError, Unavailable) as error:
            failure = error
        _check(self._deadline, self._job_id)
        has_data = self.num_answers > num_answers
        was_cut = has_data and not isinstance(failure, httpx.ReadTimeout)
        if was_cut and (self._last > seen or time.monotonic() - began >= SILENCE_SECONDS):
            self._num_mute = 0
            raise failure
        if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
            raise failure
        last = self._last
        yield from self.poll()
        is_quiet_job = has_data and not was_cut and self._last == last
        self._num_mute = 0 if is_quiet_job else self._num_mute + 1

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
            has_data = False
            for message in messages(response.iter_bytes()):
                _check(self._deadline, self._job_id)
                if not has_data:
                    has_data = True
                    self.num_answers += 1
                if message.retry_seconds is not None:
                    self.retry_seconds = message.retry_seconds
                if message.event == "end":
                    self.has_ended = True
                    return
                if message.data and (event := _event(message)).seq > self._last:
                    self._last = event.seq
                    yield event


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """Parse messages from a byte stream. A comment yields an empty message, so the caller can check its deadline."""
    message, data = Message(), list[str]()
    for raw in _lines(chunks):
        line = raw.decode("utf-8", errors="replace")
        if not line:
            message.data = "\n".join(data)
            yield message
            message, data = Message(), []
        elif line.startswith(":"):
            yield Message()
        else:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                message.event = value
            elif name == "id" and "\0" not in value:
                message.id = value
            elif name == "retry" and value.isdecimal():
                message.retry_seconds = int(value) / 1000


@dataclass
class _Splitter:
    """Splits chunks into lines that end in LF, CR or CRLF. A line may span several chunks."""

    rest: bytearray = field(default_factory=bytearray)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self.rest += chunk
        # A CR at the end of the chunk may be half of a CRLF, so it is kept for the next chunk.
        held = self.rest.endswith(b"\r")
        text = bytes(self.rest[:-1] if held else self.rest).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *complete, rest = text.split(b"\n")
        self.rest = bytearray(rest + (b"\r" if held else b""))
        yield from complete


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    splitter = _Splitter()
    for chunk in chunks:
        yield from splitter.feed(chunk)


def _event(message: Message) -> Event:
    try:
        return EVENT.validate_json(message.data)
    except ValidationError as error:
        raise InvalidResponse(f"The server sent an event that cannot be parsed: {message.data[:200]!r}.") from error


def _seconds_left(deadline: float | None) -> float:
    return max(0.0, deadline - time.monotonic()) if deadline is not None else float("inf")


def _check(deadline: float | None, job_id: str) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise WaitTimeout(f"{job_id} did not end before the timeout and continues; wait again, or cancel it.")
