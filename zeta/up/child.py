"""A child process of `zeta up`, restarted with exponential back-off.

Guarantees: on Linux, the kernel sends a child its death signal when `zeta up` exits for any reason, including SIGKILL.
(PR_SET_PDEATHSIG is set in the child between fork and exec. The kernel watches the *thread* that forked, so `start`
must be called on the main thread.) A child has its own process group, so Ctrl-C in the terminal reaches only `zeta up`,
which stops its children in order. On other systems, the children of a killed `zeta up` run until stopped manually.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0  # after running for this long, the back-off is reset
LOG_LIMIT_BYTES = 16 << 20

_libc = ctypes.CDLL(None)  # loaded at import, because nothing may be loaded between fork and exec


def end_with_parent(death_signal: signal.Signals) -> Callable[[], None]:
    """A function for the child to run between fork and exec: the kernel then signals it when its parent exits."""
    parent = os.getpid()

    def set_death_signal() -> None:
        if sys.platform == "linux":
            _libc.prctl(PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != parent:  # the parent exited before the call above
                os._exit(1)

    return set_death_signal


class Child:
    """A command that is kept running, with one log file and one process at a time."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        log_file: Path,
        death_signal: signal.Signals,
        inherited: int,
    ) -> None:
        """``inherited`` is a descriptor that the child keeps open until it exits (see `Home.children`)."""
        self.name = name
        self.log_file = log_file
        self.started_at = 0.0  # time.time(), for comparison with the start time that the child reports
        self.restart_at: float | None = None  # time.monotonic(); set while a restart is pending
        self._command, self._environment, self._directory = list(command), dict(environment), directory
        self._death_signal, self._inherited = death_signal, inherited
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._pause_seconds = 0.0, FIRST_PAUSE_SECONDS

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process; call this on the main thread."""
        _rotate_log(self.log_file)
        self.restart_at = None
        self._started, self.started_at = time.monotonic(), time.time()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=self._environment,
                pass_fds=(self._inherited,),
                process_group=0,
                umask=0o077,  # only this user can access the files that children create
                preexec_fn=end_with_parent(self._death_signal),
            )

    def poll(self) -> int | None:
        """The exit status once after the process exited (negative if killed by a signal), otherwise ``None``."""
        if self._process is None:
            return None
        status = self._process.poll()
        if status is not None:
            self._process = None
        return status

    def plan_restart(self) -> float:
        """Schedule the restart and return the pause in seconds, which doubles until the child keeps running."""
        if time.monotonic() - self._started >= STEADY_SECONDS:
            self._pause_seconds = FIRST_PAUSE_SECONDS
        pause = self._pause_seconds
        self._pause_seconds = min(pause * 2, MAX_PAUSE_SECONDS)
        self.restart_at = time.monotonic() + pause
        return pause

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def last_log_line(self) -> str:
        """The last line of its log, which usually gives the reason for an exit."""
        with contextlib.suppress(OSError), self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - 4096))
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
            if lines:
                return lines[-1][-500:]
        return "its log is empty"


def _rotate_log(log_file: Path) -> None:
    """Rename a log that has grown large, replacing the one renamed before."""
    with contextlib.suppress(FileNotFoundError):
        if log_file.stat().st_size > LOG_LIMIT_BYTES:
            log_file.replace(log_file.with_suffix(".earlier.log"))
