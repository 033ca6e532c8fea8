"""Collects stack dumps: signals each process of a run in turn to write its stacks into the log."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from worker.run import processes
from worker.run.processes import RunProcesses
from zeta_core.contract.wire.run_directory import LOG_FILE, STACKS_SIGNAL

ANSWER_SECONDS = 2.0  # from the signal to the stack in the log
STACKS_BYTES = 16 * 1024


@dataclass
class _Request:
    process: psutil.Process
    name: str
    rank: int | None
    log_size: int
    sent_at: float


class StackDumps:
    """Requests stack dumps from the processes of an attempt, one after the other, without blocking."""

    def __init__(self, run_processes: RunProcesses) -> None:
        self._log = run_processes.directory / LOG_FILE
        self._begin = _size(self._log)
        self._left = [process for process in run_processes.alive() if _answers(process)]
        self._request: _Request | None = None
        self.reported: list[str] = []
        self.silent: list[str] = []
        self.silent_rank: int | None = None  # the first rank that did not respond, for which the others wait

    def step(self) -> bool:
        """Advance; returns whether all processes have responded or timed out."""
        now = time.monotonic()
        if self._request is not None:
            answered = _size(self._log) > self._request.log_size
            if not answered and now - self._request.sent_at < ANSWER_SECONDS:
                return False
            (self.reported if answered else self.silent).append(self._request.name)
            if not answered and self.silent_rank is None:
                self.silent_rank = self._request.rank
            self._request = None
            return False  # continue in the next tick, so that the output of one process stays together
        if not self._left:
            return True
        process = self._left.pop(0)
        rank = _rank(process)
        name = _name(process, rank)
        with self._log.open("ab") as log:
            log.write(f"--- Stacks of {name}:\n".encode())
        self._request = _Request(process, name, rank, _size(self._log), now)
        processes.send([process], signal.Signals[STACKS_SIGNAL])
        return False

    def summary(self) -> str:
        """Which processes responded and which did not, as sentences."""
        reported = (
            f"See the log for the stacks of {', '.join(self.reported)}."
            if self.reported
            else "No process reported its stacks."
        )
        return reported + (f" No response from {', '.join(self.silent)}." if self.silent else "")

    def text(self) -> str:
        """The output since the first request; only its end if it is long."""
        with self._log.open("rb") as log:
            log.seek(max(self._begin, _size(self._log) - STACKS_BYTES))
            return log.read(STACKS_BYTES).decode("utf-8", "replace")


def _rank(process: psutil.Process) -> int | None:
    try:
        rank = process.environ().get("RANK", "")
    except psutil.Error:
        return None
    return int(rank) if rank.isdecimal() else None


def _name(process: psutil.Process, rank: int | None) -> str:
    try:
        stopped = " (stopped by a signal)" if process.status() == psutil.STATUS_STOPPED else ""
    except psutil.Error:
        return f"process {process.pid}"
    return f"{'process' if rank is None else f'rank {rank}, process'} {process.pid}{stopped}"


def _answers(process: psutil.Process) -> bool:
    """Whether the process handles the signal, which would otherwise end it (known on Linux only)."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught & 1 << (signal.Signals[STACKS_SIGNAL] - 1))


def _size(file: Path) -> int:
    return os.stat(file).st_size if file.exists() else 0
