"""Requests to stop a run: the ``stop`` file, SIGTERM, and a lost worker."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from zeta_core.contract.job.status import StopAction
from zeta_core.contract.wire.run_directory import StopFile
from zeta_core.process.worker_monitor import WorkerMonitor


class Interrupted(BaseException):
    """SIGTERM arrived before the first step, so nothing is saved. Not an `Exception`, which a library might catch."""


class Stop:
    """The requested stop action: that of the ``stop`` file, or to hand the job back after SIGTERM or a lost worker.

    While ``exits_on_signal`` is set, SIGTERM raises `Interrupted` once, wherever the main thread is.
    """

    def __init__(self, file: Path, worker_monitor: WorkerMonitor) -> None:
        self._file = str(file)
        self._worker_monitor = worker_monitor
        self.was_signalled = False
        self.exits_on_signal = True
        self.write_on_signal = False  # in the process that starts the ranks, because all of them read the file

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.was_signalled = True
        if self.write_on_signal and not os.path.exists(self._file):
            with suppress(OSError):  # on a full disk, the ranks have the signal only
                Path(self._file).write_text(StopFile(action="hand_back").model_dump_json())
        if self.exits_on_signal:
            self.exits_on_signal = False
            raise Interrupted

    @contextmanager
    def deferred(self) -> Generator[None]:
        """Defer SIGTERM, because an exception during the initialization of torch's C++ code aborts the process."""
        exits_on_signal, self.exits_on_signal = self.exits_on_signal, False
        yield
        self.exits_on_signal = exits_on_signal
        if exits_on_signal and self.was_signalled:
            self.exits_on_signal = False
            raise Interrupted

    def on_training_start(self) -> None:
        """Let the run stop by itself between two steps from now on."""
        self.exits_on_signal = False

    def __call__(self) -> StopAction | None:
        by_itself: StopAction | None = "hand_back" if self.was_signalled or self._worker_monitor.is_lost else None
        try:
            os.stat(self._file)
        except FileNotFoundError:
            return by_itself
        try:
            return StopFile.model_validate_json(Path(self._file).read_bytes()).action
        except ValidationError:
            return by_itself  # it is incomplete; the next step reads it again
