"""Server processes that are forked from a process which has already imported the server.

Importing the server takes most of its start, and the tests start hundreds. The forked process runs the same entry
point as ``python -m server``, with its own environment; `tests.harness.children` starts servers from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.harness.children import end_with_parent

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["server.__main__"])


class ForkedServer:
    """A running server with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, environment: Mapping[str, str], log_file: Path, max_open_files: int | None = None) -> None:
        arguments = (dict(environment), str(log_file), max_open_files)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or the negative number of the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises `subprocess.TimeoutExpired` after ``timeout`` seconds."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("server", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(environment: dict[str, str], log_file: str, max_open_files: int | None) -> None:
    """Become the server, as ``python -m server`` with this environment would."""
    end_with_parent(signal.SIGTERM)
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    if max_open_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_open_files, max_open_files))
    os.environ.clear()  # noqa: TID251 - this process gets the environment of the server
    os.environ.update(environment)  # noqa: TID251

    from server.__main__ import main

    sys.exit(main())
