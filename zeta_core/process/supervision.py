"""Detecting a lost worker: while it is connected to the server, it writes the time to ``alive`` in the run directory.

A thread reads the file, so a process detects the loss while it loads, trains or saves. Times are those of the monotonic
clock that all processes of a machine share. Changes of the wall clock have no effect, and a process that starts late
counts from the worker's last sign of life, not from its own start. A process that was suspended reads the file before
it decides. If the worker gave no sign of life either, both were suspended, and the process exits.
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
    """Monitors the worker after `watch` is called; in a run without a worker, it does nothing."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._closed = threading.Event()
        self.is_lost = False  # no sign of life for ``self_stop_seconds``; reset when the worker returns

    def watch(self, run_file: RunFile, on_end: Callable[[], None]) -> None:
        """Start monitoring. After ``end_seconds``, call ``on_end`` and exit, whatever this process is doing."""
        if run_file.self_stop_seconds is None or run_file.end_seconds is None:
            return
        limits = (run_file.self_stop_seconds, run_file.end_seconds)
        threading.Thread(target=self._watch, args=(*limits, on_end), name="supervision", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self, self_stop_seconds: float, end_seconds: float, on_end: Callable[[], None]) -> None:
        tick = min(LONGEST_TICK_SECONDS, self_stop_seconds / 20)
        alive_at = time.monotonic()  # until the file exists
        while True:
            before, alive_at = alive_at, self._alive_at() or alive_at
            # After a machine was suspended, the worker may be first to write the file; the gap counts as well.
            silent_seconds = max(time.monotonic() - alive_at, alive_at - before)
            self.is_lost = silent_seconds >= self_stop_seconds
            if silent_seconds >= end_seconds:
                try:
                    on_end()
                finally:
                    os._exit(1)
            if self._closed.wait(tick):
                return

    def _alive_at(self) -> float | None:
        """The time in the file; ``None`` if it is missing or incomplete."""
        try:
            return float(self._file.read_text())
        except (FileNotFoundError, ValueError):
            return None
