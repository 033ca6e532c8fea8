"""The process that answers checks: started for the first one, kept for the next, gone when none comes for a while.

Its start takes seconds (torch and transformers are imported), an answer a fraction of one; and who validates a spec
mostly changes it and asks again. Guaranteed: it is killed with all that it started when an answer takes longer than its
limit; it ends when this worker does, whatever ends that (its standard input closes), and after `MOST_ANSWERS`; where it
has ended meanwhile, another one is started. While it is kept it holds about 400 MB of memory and no processor.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

MOST_ANSWERS = 100  # what libraries remember of the models that they were shown goes with the process
ARGUMENT = "checks"


class Unanswered(Exception):
    """Why there is no answer, in a sentence."""


class CheckProcess:
    """For one thread; ``command checks`` answers each line of its input, a file's path, with one line."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
        self._command, self._environment, self._directory = [*command, ARGUMENT], dict(environment), directory
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._num_answers = 0

    def ask(self, file: Path, *, limit_seconds: float) -> bytes:
        """The answer to what ``file`` says. Raises `Unanswered`, and `OSError` where no process can be started."""
        deadline = time.monotonic() + limit_seconds
        try:
            answer = self._exchange(file, deadline) if self._process is not None else b""
            if not answer:  # there was none, or it has ended by itself
                self.end()
                self._start()
                answer = self._exchange(file, deadline)
        except TimeoutError:
            self.end()
            raise Unanswered(f"The check took longer than {limit_seconds:g} s.") from None
        if not answer:
            raise Unanswered(f"The check ended without an answer; its last words were: {self.end()}")
        self._num_answers += 1
        if self._num_answers >= MOST_ANSWERS:
            self.end()
        return answer

    def end(self) -> str:
        """Kill it with all that it started, where there is one; returns the last line of its complaints."""
        process, self._process = self._process, None
        complaints, self._complaints = self._complaints, None
        if process is None or complaints is None:
            return ""
        with complaints, process:  # which closes the pipes and waits
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            complaints.seek(0)
            lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _start(self) -> None:
        self._num_answers = 0
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
            cwd=self._directory,
            env=self._environment,
            start_new_session=True,
        )

    def _exchange(self, file: Path, deadline: float) -> bytes:
        """Ask, and wait for the line that answers; empty where the process has ended. Raises `TimeoutError`."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, answer = self._process.stdout.fileno(), b""
        try:
            self._process.stdin.write(f"{file}\n".encode())  # fits into a pipe whole, whoever reads it and when
        except BrokenPipeError:
            return b""
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(out, 1 << 16)
            if not part:
                return b""
            answer += part
        return answer
