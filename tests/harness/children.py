"""Server processes that the tests start.

On Linux, the kernel sends a child its stop signal when the test process ends in any way, including SIGKILL. Children
must be started from the main thread, because the kernel watches the thread that started them. On other systems, a
killed test process leaves its servers running.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


class Child(Protocol):
    """A started process: a `subprocess.Popen`, or one that was forked from a prepared process."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Account:
    """The system user and group that a child runs as."""

    uid: int
    gid: int


def start_child(
    command: Sequence[str | Path],
    *,
    log_file: Path,
    environment: Mapping[str, str] | None = None,
    account: Account | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a server whose output goes to ``log_file`` (appended) and which ends with this process."""
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ if environment is None else environment),  # noqa: TID251 - a child's environment
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            preexec_fn=lambda: end_with_parent(stop_signal),
        )


def end_with_parent(stop_signal: signal.Signals) -> None:
    """Let this process get the signal when the one that started it ends (Linux)."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, stop_signal)


def stop_child(child: Child, *, stop_signal: signal.Signals, timeout_seconds: float = 60) -> int:
    """Stop a child with ``stop_signal``, or with SIGKILL after the timeout, and return its exit status."""
    if child.poll() is None:
        child.send_signal(stop_signal)
        try:
            child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
    return child.wait()


def exit_cleanly_on_sigterm() -> None:
    """Let SIGTERM raise `SystemExit`, so that this process stops its children and unmounts its disks."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
