"""Reading a job's log once, or following it live. Each byte is delivered once, despite lost connections and gateways
that buffer the stream.

A log only grows. After a reconnect, the client requests the log from the position it has reached (``offset``), or skips
that many bytes if the server is too old for ``offset``. With ``tail``, it first finds its position in the whole log.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx

from zeta.errors import Unreachable, parse_response
from zeta.event_stream import PATIENCE_SECONDS, POLL_SECONDS
from zeta.transport import READ_SECONDS, HttpTransport
from zeta_core.contract.errors import InvalidRequest, Unavailable, ZetaError
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.status import ENDED

# A silent stream means a quiet job, a dead connection or a gateway that buffers the stream. After this much silence,
# the stream is compared with the stored log. The interval grows while the job stays quiet, because each comparison
# reads the log.
FIRST_SILENCE_SECONDS = 10.0
MAX_SILENCE_SECONDS = 300.0
MAX_POLL_SECONDS = 60.0
ANCHOR_BYTES = 1 << 16
QUIET_SECONDS = 25.0  # below the idle time-outs of proxies (60 s)


class LogStream:
    """Reads one job's log."""

    def __init__(self, transport: HttpTransport, job_id: str, *, tail: int | None, attempt: int | None) -> None:
        self._transport, self._job_id = transport, job_id
        self._tail, self._attempt = tail, attempt
        self._seen_bytes = 0  # counted from the start of the log, or of its tail while `_tail` is set
        self._anchor = b""  # the last bytes seen, while `_tail` is set
        self._has_responded = False
        self._server_has_offset = True
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self) -> Iterator[str]:
        """Yield the log as it is now."""
        backoff = self._transport.backoff()
        while True:
            try:
                yield from self._pieces()
                return
            except httpx.TransportError as error:
                if not backoff.wait():
                    raise self._transport.unreachable(error) from error
            except Unavailable:
                if not backoff.wait():
                    raise

    def follow(self, on_interruption: Callable[[ZetaError], None] | None = None) -> Iterator[str]:
        """Yield the log until the job has ended; ``on_interruption`` is called once per outage.

        Raises `Unreachable` after `PATIENCE_SECONDS` without a server.
        """
        backoff = self._transport.backoff(PATIENCE_SECONDS)
        first_backoff = self._transport.backoff()  # if the server has never responded, give up sooner
        silence = FIRST_SILENCE_SECONDS
        is_withheld = was_reported = False
        while True:
            seen_bytes, was_silent = self._seen_bytes, False
            failure: ZetaError | None = None
            self._has_responded, had_responded = False, self._has_responded
            try:
                if not is_withheld:
                    try:
                        yield from self._pieces(follow=True, read_seconds=silence)
                    except httpx.ReadTimeout:
                        was_silent = True
                # A stream also ends when the server stops. Only a log that was read after the job's end is complete.
                has_ended = self._has_ended()
                if has_ended or was_silent or is_withheld:
                    streamed_bytes, started = self._seen_bytes, time.monotonic()
                    yield from self._pieces()
                    if has_ended:
                        return
                    is_withheld = is_withheld or self._seen_bytes > streamed_bytes
                    if is_withheld:
                        pause = min(max(POLL_SECONDS, 10 * (time.monotonic() - started)), MAX_POLL_SECONDS)
                        self._transport.pause(pause)
            except httpx.TransportError as error:
                failure = self._transport.unreachable(error)
            except Unavailable as error:
                failure = error
            if self._seen_bytes > seen_bytes:
                backoff.restart()
                silence = FIRST_SILENCE_SECONDS
            elif failure is None and not was_silent:
                backoff.restart()  # the server ended a quiet response
            elif was_silent:
                silence = min(2 * silence, MAX_SILENCE_SECONDS)
            if self._has_responded:
                backoff.renew_patience()
                was_reported = False
            elif failure is not None and had_responded and on_interruption is not None and not was_reported:
                on_interruption(failure)
                was_reported = True
            self._has_responded = self._has_responded or had_responded
            waits = backoff if self._has_responded else first_backoff
            if not waits.wait():
                raise failure or Unreachable(f"This client was closed while it followed the log of {self._job_id}.")

    def _pieces(self, *, follow: bool = False, read_seconds: float = READ_SECONDS) -> Iterator[str]:
        """Yield the text after the seen bytes, from one connection. Raises the errors of `HttpTransport.stream`."""
        self._locate_in_whole_log()
        skip = self._seen_bytes
        if skip and self._tail is None and self._server_has_offset:
            try:
                for chunk in self._chunks(follow, None, read_seconds, offset=skip):
                    self._seen_bytes += len(chunk)
                    yield self._decode(chunk)
                return
            except InvalidRequest:
                self._server_has_offset = False
        for chunk in self._chunks(follow, self._tail, read_seconds):
            fresh = chunk[skip:]
            skip -= min(skip, len(chunk))
            if fresh:
                self._seen_bytes += len(fresh)
                if self._tail is not None:
                    self._anchor = (self._anchor + fresh)[-ANCHOR_BYTES:]
                yield self._decode(fresh)

    def _chunks(
        self, follow: bool, tail: int | None, read_seconds: float, *, offset: int | None = None
    ) -> Iterable[bytes]:
        params: dict[str, Any] = {"follow": "true" if follow else None, "tail": tail, "attempt": self._attempt}
        # Keep-alives would count as bytes of the log, so the client requests that the server end a quiet response.
        params |= {"offset": offset, "quiet_seconds": QUIET_SECONDS if follow else None}
        headers = {"Accept-Encoding": "identity"}  # compression would delay text until a block is full
        path = f"/v1/jobs/{self._job_id}/logs"
        with self._transport.stream("GET", path, params=params, headers=headers, read_seconds=read_seconds) as response:
            self._has_responded = True
            yield from response.iter_bytes()

    def _locate_in_whole_log(self) -> None:
        """Convert the position in the tail to one in the whole log, so that a new connection can continue from it.

        The position is after the last occurrence of the seen bytes. Raises `Unreachable` if the log does not contain
        them.
        """
        # The response starts with a line that marks the attempt. In the whole log, it is not directly before the tail.
        is_whole = len(self._anchor) == self._seen_bytes
        needle = self._anchor.partition(b"\n")[2] if is_whole else self._anchor
        if self._tail is None or not needle:
            return
        window, num_bytes, end = b"", 0, None
        for chunk in self._chunks(False, None, READ_SECONDS):
            text = window + chunk
            at = text.rfind(needle)
            if at >= 0:
                end = num_bytes - len(window) + at + len(needle)
            num_bytes += len(chunk)
            window = text[len(text) - len(needle) + 1 :] if len(text) >= len(needle) else text
        if end is None:
            raise Unreachable(
                f"The connection to the log of {self._job_id} was lost, and it cannot be continued; read it again."
            )
        self._tail, self._seen_bytes, self._anchor = None, end, b""

    def _has_ended(self) -> bool:
        """Whether the log is complete."""
        job = parse_response(Job, self._transport.request("GET", f"/v1/jobs/{self._job_id}"))
        is_over = any(attempt.attempt == self._attempt and attempt.finished_at is not None for attempt in job.attempts)
        return is_over or job.status in ENDED
