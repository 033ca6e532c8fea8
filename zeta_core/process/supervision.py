"""Whether this run's worker is still there and heard: while it is, it writes when into ``alive`` in the run directory.

Looked at by a thread, so that a process notices while it loads, trains or saves. Counted is the monotonic clock that
all processes of a machine share: a wall clock that jumps changes nothing, and a process that starts late (a rank, or
one that loads for long) counts from when the worker was heard, not from its own start. A process that was stopped for
long looks first and judges then; where its worker was not heard meanwhile either, both were, and it ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from zeta_core.contract.wire.run_directory import RunFile

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
        heard_at = time.monotonic()  # until the file says it
        while True:
            before, heard_at = heard_at, self._heard_at() or heard_at
            # A machine that was frozen for long may hear its worker first; the silence counts all the same.
            unheard_seconds = max(time.monotonic() - heard_at, heard_at - before)
            self.is_lost = unheard_seconds >= self_stop_seconds
            if unheard_seconds >= end_seconds:
                try:
                    on_end()
                finally:
                    os._exit(1)
            if self._closed.wait(tick):
                return

    def _heard_at(self) -> float | None:
        """What the file says; ``None`` where it is not there, or met half written."""
        try:
            return float(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return None
