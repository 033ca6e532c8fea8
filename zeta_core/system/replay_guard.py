"""Rejects messages that are too old, from the future, or received before.

A receiver remembers the nonces of the messages that are still within the clock window, so an intercepted message
can't be used again. A restarted receiver has forgotten them, so for one clock window, only the idempotent handling of
messages protects it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from zeta_core.contract.wire.signatures import CLOCK_WINDOW_SECONDS, BadTime, Envelope, Replayed

MAX_NONCES = 200_000  # about 15 MB; a fleet sends some hundred messages a second


class ReplayGuard:
    """Checks the messages of one receiver. Call `check` only after the signature was verified."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """``clock`` returns seconds since 1970."""
        self._clock = clock
        self._entries: OrderedDict[str, tuple[object, float]] = OrderedDict()  # entry and expiry by nonce

    def check(self, envelope: Envelope, entry: object) -> None:
        """Accept the message in this ``entry`` of a stream or queue, which may be read several times.

        Raises `BadTime` outside the clock window, and `Replayed` if another entry contained the same message.
        """
        check_time(envelope, self._clock())
        earlier = self._entries.get(envelope.nonce)
        if earlier is not None:
            if earlier[0] != entry:
                raise Replayed(f"the message of worker {envelope.worker} was received before")
            return
        self._forget_expired()
        # Until the message is outside the window, by this clock.
        self._entries[envelope.nonce] = entry, envelope.sent_at + CLOCK_WINDOW_SECONDS

    def _forget_expired(self) -> None:
        """Remove expired nonces from the front. They are in the order of arrival, which is nearly that of expiry."""
        now = self._clock()
        while self._entries:
            _, expiry = next(iter(self._entries.values()))
            if expiry >= now and len(self._entries) < MAX_NONCES:
                return
            self._entries.popitem(last=False)


def check_time(envelope: Envelope, now: float) -> None:
    """Raise `BadTime` unless the message was sent within `CLOCK_WINDOW_SECONDS` of ``now``."""
    ahead_seconds = envelope.sent_at - now
    if abs(ahead_seconds) > CLOCK_WINDOW_SECONDS:
        direction = "in the future" if ahead_seconds > 0 else "ago"
        raise BadTime(
            f"the message from or to worker {envelope.worker} was sent {abs(ahead_seconds):.0f} s {direction} by this "
            f"machine's clock (limit: {CLOCK_WINDOW_SECONDS:.0f} s); if this continues, synchronize the clocks"
        )
