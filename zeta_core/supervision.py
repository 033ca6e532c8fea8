"""Whether this run's worker is still there and heard: it touches ``alive`` in the run directory while it is.

Looked at by a thread, so that a process notices while it loads, trains or saves. Counted is this process's own
monotonic time since the file was last seen to change: a wall clock that jumps changes nothing, and a process that was
stopped for long looks first and judges then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from zeta_core.contract.layout import RunFile

LONGEST_TICK_SECONDS = 1.0


class Supervision:
    """Nothing is watched before `watch`, and nothing at all in a run without a worker."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._closed = threading.Event()
        self.is_lost = False  # for ``self_stop_seconds``; a worker that is heard again in time ends it

    def watch(self, order: RunFile, on_end: Callable[[], None]) -> None:
        """Begin to count. After ``end_seconds`` ``on_end`` is called and this process ends, whatever it is at."""
        if order.self_stop_seconds is None or order.end_seconds is None:
            return
        limits = (order.self_stop_seconds, order.end_seconds)
        threading.Thread(target=self._watch, args=(*limits, on_end), name="supervision", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self, self_stop_seconds: float, end_seconds: float, on_end: Callable[[], None]) -> None:
        tick = min(LONGEST_TICK_SECONDS, self_stop_seconds / 20)
        seen, since = self._stamp(), time.monotonic()
        while not self._closed.wait(tick):
            stamp, now = self._stamp(), time.monotonic()
            if stamp != seen:
                seen, since = stamp, now
            self.is_lost = now - since >= self_stop_seconds
            if now - since >= end_seconds:
                try:
                    on_end()
                finally:
                    os._exit(1)

    def _stamp(self) -> int | None:
        try:
            return os.stat(self._file).st_mtime_ns
        except FileNotFoundError:
            return None
