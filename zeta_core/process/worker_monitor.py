"""Detecting a lost worker, which writes the time to ``alive`` in the run directory while it is connected to the server.

A thread reads the file, so a process detects the loss even while it loads, trains or saves. Times are read from the
monotonic clock that all processes of a machine share. Changes of the wall clock have no effect, and a process that
starts late counts from the worker's last sign of life, not from its own start. A process that was suspended reads the
file before it decides. If the worker gave no sign of life either, both were suspended, and the process exits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from zeta_core.contract.wire.run_directory import RunFile

MAX_POLL_SECONDS = 1.0


class WorkerMonitor:
    """Watches for the worker's signs of life after `start` is called. Does nothing in a run without a worker."""

    def __init__(self, alive_file: Path) -> None:
        self._alive_file = alive_file
        self._closed = threading.Event()
        self.is_lost = False  # no sign of life for ``self_stop_seconds``; reset when the worker returns

    def start(self, run_file: RunFile, on_exit: Callable[[], None]) -> None:
        """Start a thread that calls ``on_exit`` and exits the process after ``end_seconds`` without a sign of life."""
        if run_file.self_stop_seconds is None or run_file.end_seconds is None:
            return
        limits = (run_file.self_stop_seconds, run_file.end_seconds)
        threading.Thread(target=self._run, args=(*limits, on_exit), name="worker-monitor", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _run(self, self_stop_seconds: float, end_seconds: float, on_exit: Callable[[], None]) -> None:
        poll_seconds = min(MAX_POLL_SECONDS, self_stop_seconds / 20)
        alive_at = time.monotonic()  # until the file exists
        while True:
            before, alive_at = alive_at, self._last_sign_of_life() or alive_at
            # After a machine was suspended, the worker may be first to write the file; the gap counts as well.
            silent_seconds = max(time.monotonic() - alive_at, alive_at - before)
            self.is_lost = silent_seconds >= self_stop_seconds
            if silent_seconds >= end_seconds:
                try:
                    on_exit()
                finally:
                    os._exit(1)
            if self._closed.wait(poll_seconds):
                return

    def _last_sign_of_life(self) -> float | None:
        """The time in the file; ``None`` if it is missing or incomplete."""
        try:
            return float(self._alive_file.read_text())
        except (FileNotFoundError, ValueError):
            return None
