"""A job's events, live: server-sent events that go on after any interruption, each event once and in order.

The parser follows https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream, and splits
lines at CR and LF only: JSON may hold the other signs that Unicode counts as line ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import httpx
from pydantic import ValidationError

from zeta.transport import READ_SECONDS, BadAnswer, ServerFault, Transport, Unreachable
from zeta_core.contract.errors import Unavailable, ZetaError
from zeta_core.contract.events import Event

SILENCE_SECONDS = 45.0  # the server sends a comment every 15 s; three missed ones are a dead connection
PATIENCE_SECONDS = 300.0  # a server may restart, a laptop may sleep


class WaitTimeout(ZetaError):
    """The job did not end within the time that the caller wanted to wait; it goes on."""

    type = "timeout_error"
    code = "wait_timeout"


@dataclass
class Message:
    """One message of the stream; ``retry_seconds`` is the pause that the server asks for before a reconnect."""

    event: str = "message"
    data: str = ""
    id: str | None = None
    retry_seconds: float | None = None


def follow(
    transport: Transport,
    job_id: str,
    *,
    after: int = 0,
    deadline: float | None = None,
    on_interruption: Callable[[ZetaError], None] | None = None,
) -> Iterator[Event]:
    """Every event with ``seq`` above ``after``, as it is stored, until the job has ended and all were seen.

    ``deadline`` is a `time.monotonic` time; ``on_interruption`` is called once for each outage. Raises `Unreachable`
    after `PATIENCE_SECONDS` without a server, `WaitTimeout` at the deadline, and what the server refuses.
    """
    last = after
    pauses = transport.pauses(PATIENCE_SECONDS)
    least_pause = 0.0
    first_failure_patience = transport.pauses()  # a server that was never there is told soon
    connected = is_told = False
    while True:
        failure: ZetaError
        try:
            headers = {"Accept": "text/event-stream", "Cache-Control": "no-store", "Last-Event-ID": str(last)}
            with transport.stream(
                "GET", f"/v1/jobs/{job_id}/events", headers=headers, read_seconds=_patience(deadline)
            ) as response:
                if response.status_code == 204:
                    return
                if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    raise BadAnswer(f"The answer of {response.request.url} is no event stream.")
                connected, is_told = True, False
                pauses.restart()
                for message in messages(response.iter_bytes()):
                    _check(deadline, job_id)
                    if message.retry_seconds is not None:
                        least_pause = message.retry_seconds
                    if message.event == "end":
                        return
                    if not message.data:
                        continue
                    event = _event(message)
                    if event.seq > last:
                        last = event.seq
                        yield event
            failure = Unreachable(f"The server at {transport.base_url} closed the stream.")
        except httpx.TransportError as error:
            failure = transport.unreachable(error)
        except BadAnswer:
            raise
        except (Unavailable, ServerFault) as error:  # it says itself that it cannot answer now
            failure = error
        _check(deadline, job_id)
        if connected and on_interruption is not None and not is_told:
            on_interruption(failure)
            is_told = True
        waited = pauses.wait(min(least_pause, 2.0)) if connected else first_failure_patience.wait()
        if not waited:
            raise failure


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """Messages out of a byte stream; a comment comes as an empty message, so that the reader sees time pass."""
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
    """Lines that end in LF, CR or CRLF, across the borders of chunks."""

    rest: bytearray = field(default_factory=bytearray)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self.rest += chunk
        # A CR at the very end may be the first half of a CRLF: it waits for the next chunk.
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
        return Event.model_validate_json(message.data)
    except ValidationError as error:
        raise BadAnswer(f"The server sent an event that is none: {message.data[:200]!r}.") from error


def _patience(deadline: float | None) -> float:
    if deadline is None:
        return SILENCE_SECONDS
    return max(0.05, min(SILENCE_SECONDS, deadline - time.monotonic(), READ_SECONDS))


def _check(deadline: float | None, job_id: str) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise WaitTimeout(f"{job_id} has not ended in the time given; it goes on. Wait again, or cancel it.")
