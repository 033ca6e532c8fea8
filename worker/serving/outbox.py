"""The parts of answers on their way to the server, with flow control.

A part stays here until the server has acknowledged it, and is repeated until then. At most `MAX_AHEAD` parts that the
client has not taken are sent; text that is generated in the meantime is collected for the next part. A request is given
up if its server sends no sign of life for `SILENCE_SECONDS`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from pydantic import BaseModel

from zeta_core.contract.wire.answers import (
    MAX_AHEAD,
    REPEAT_SECONDS,
    SILENCE_SECONDS,
    AnswerControl,
    AnswerPart,
    AnswerRequest,
    Failure,
    Generated,
    Piece,
    answer_stream,
)

# Sends a message on a channel; it replaces an unsent one with the same key.
Post = Callable[[tuple[object, ...], BaseModel, str], None]


class _Outbox:
    """The unacknowledged parts of one answer, and what was generated since the last one."""

    def __init__(self, request_id: str, server: str) -> None:
        now = time.monotonic()
        self.request_id = request_id
        self.channel = answer_stream(server)
        self.last_contact = now  # this and the following times are monotonic
        self.is_complete = False  # the last part was added
        self._number = 0
        self._consumed = 0
        self._parts: deque[AnswerPart] = deque()
        self._sent_at = 0.0
        self._pieces: list[Piece] = []
        self._prompt_tokens: int | None = None
        self._failure: Failure | None = None
        self._has_new = False

    @property
    def is_delivered(self) -> bool:
        """Whether the server has acknowledged the last part."""
        return self.is_complete and not self._parts and not self._has_new

    def add(self, generated: Generated) -> None:
        if self.is_complete:
            return
        self._pieces += generated.pieces
        if generated.prompt_tokens is not None:
            self._prompt_tokens = generated.prompt_tokens
        self._failure = generated.failure
        self.is_complete = generated.is_last
        self._has_new = True

    def acknowledge(self, control: AnswerControl) -> None:
        self.last_contact = time.monotonic()
        self._consumed = max(self._consumed, control.consumed)
        while self._parts and self._parts[0].number <= control.received:
            self._parts.popleft()

    def due(self) -> list[AnswerPart]:
        """The parts to send now: a new one, unacknowledged ones again, or a sign of life."""
        now = time.monotonic()
        due: list[AnswerPart] = []
        if self._parts and now - self._sent_at >= REPEAT_SECONDS:
            due += self._parts
        if self._has_new and self._number - self._consumed < MAX_AHEAD:
            due.append(self._new_part())
        if not due and now - self._sent_at >= REPEAT_SECONDS:
            due.append(AnswerPart(request_id=self.request_id, number=0))
        if due:
            self._sent_at = now
        return due

    def _new_part(self) -> AnswerPart:
        self._number += 1
        part = AnswerPart(
            request_id=self.request_id,
            number=self._number,
            pieces=self._pieces,
            prompt_tokens=self._prompt_tokens,
            is_last=self.is_complete,
            failure=self._failure,
        )
        self._parts.append(part)
        self._pieces, self._prompt_tokens, self._has_new = [], None, False
        return part


class Outboxes:
    """The outboxes of all open requests. Thread-safe: serving processes add from threads of their own."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._lock = threading.Lock()
        self._open: dict[str, _Outbox] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request: AnswerRequest) -> bool:
        """Open an outbox for a request; false if it has one, because the server has repeated the request."""
        with self._lock:
            if (known := self._open.get(request.request_id)) is not None:
                known.last_contact = time.monotonic()
                return False
            outbox = self._open[request.request_id] = _Outbox(request.request_id, request.server)
            self._send(outbox)  # a sign of life, so that the server stops repeating the request
            return True

    def add(self, generated: Generated) -> None:
        with self._lock:
            if (outbox := self._open.get(generated.request_id)) is not None:
                outbox.add(generated)
                self._send(outbox)

    def fail(self, request_ids: Collection[str], failure: Failure) -> None:
        """End answers with a failure; those that are complete stay as they are."""
        for request_id in request_ids:
            self.add(Generated(request_id=request_id, is_last=True, failure=failure))

    def acknowledge(self, control: AnswerControl) -> None:
        with self._lock:
            outbox = self._open.get(control.request_id)
            if outbox is None:
                return
            outbox.acknowledge(control)
            if control.cancel or outbox.is_delivered:
                del self._open[control.request_id]
            else:
                self._send(outbox)

    def step(self, silence_seconds: float = SILENCE_SECONDS) -> list[str]:
        """Repeat what is due. Returns the requests that were given up, because their server is silent."""
        with self._lock:
            now = time.monotonic()
            given_up = [
                request_id for request_id, outbox in self._open.items() if now - outbox.last_contact > silence_seconds
            ]
            for request_id in given_up:
                del self._open[request_id]
            for outbox in self._open.values():
                self._send(outbox)
            return given_up

    def _send(self, outbox: _Outbox) -> None:
        for part in outbox.due():
            self._post(("answer", outbox.request_id, part.number), part, outbox.channel)
