"""Limits the number of processes and threads of a sandbox.

A guard, which is a small process outside of the sandbox, counts the processes and threads. The kernel holds each call
that creates one until the guard has allowed it (seccomp's user notification). When the limit is exceeded, the guard
allows no more calls, writes a file from which the worker learns the reason, and kills every process of the sandbox.
Meanwhile, processes that try to create others are stopped, so a fork bomb takes no processor time from the guard. The
guard exits with the last process of the sandbox. If it is killed, the sandbox can create no more processes.

RLIMIT_NPROC does not limit root and counts all processes of a user, and control groups need delegated permissions.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from zeta_core.contract.wire.run_directory import PROCESS_LIMIT_FILE

_MAX_DIGITS = 18
_PROGRAM = Path(__file__).with_name("task_guard.py")


@dataclass(frozen=True)
class TaskGuard:
    """A started guard, which waits for the descriptor of the notifications."""

    control: socket.socket

    @classmethod
    def start(cls, limit: int, file: str | None) -> TaskGuard:
        """Start it outside of the sandbox, so before this process enters it. Raises `OSError`.

        ``limit`` is the number of processes and threads; if it is exceeded, ``file`` is created.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(_PROGRAM), str(limit), *(() if file is None else (file,))],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)],
                setsid=True,
            )
        return cls(ours)

    def watch(self, listener: int, mark: int) -> None:
        """Pass on the descriptor of the notifications, and that of the file that all processes keep open."""
        file = os.fstat(mark)
        with self.control:
            socket.send_fds(self.control, [f"{mark} {file.st_dev} {file.st_ino}".encode()], [listener])
        os.close(listener)


def exceeded_limit(directory: Path) -> int | None:
    """The limit that the processes of this run directory have exceeded; ``None`` if they have not.

    They may have created the file themselves.
    """
    try:
        with (directory / PROCESS_LIMIT_FILE).open("rb") as file:
            text = file.read(_MAX_DIGITS + 1)
    except OSError:
        return None
    return int(text) if text.isdigit() and len(text) <= _MAX_DIGITS else None
