"""The process that runs checks: started on demand, reused for later checks, and ended after a period without requests.

Starting it takes seconds, because it imports torch and transformers; a check takes a fraction of a second, and users
often validate a spec several times in a row. A spec may refer to a malicious model or tokenizer, so the process has
limits. Guaranteed: the process and its children are killed when a check exceeds its time limit or its result exceeds
`MAX_ANSWER_BYTES`. On Linux its memory is limited, and each of its files to `MAX_FILE_BYTES`. Every exceeded limit
and every crash is reported in a sentence that names the limit and its setting, and the next check gets a new process.
The process also exits when this worker exits for any reason (its standard input closes), and after `MAX_ANSWERS`
checks. While idle, it takes about 400 MB of memory and no CPU time.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from zeta_core.contract.wire.run_directory import OUT_OF_MEMORY_EXIT
from zeta_core.system.sandbox.task_limit import exceeded_limit

MEBIBYTE = 2**20
LOOK_SECONDS = 0.25  # the interval of `on_wait`
EXIT_SECONDS = 5.0  # from the end of its output to its exit
MAX_ANSWERS = 100  # restarting frees what libraries cache about the checked models
MAX_ANSWER_BYTES = 4 * MEBIBYTE
MAX_FILE_BYTES = 1024 * MEBIBYTE  # configs, tokenizers and error output are far smaller
ERROR_OUTPUT_BYTES = 64 * 1024  # the kept end of its error output
ARGUMENT = "checks"
# How C++ and Rust report a failed allocation before they abort.
_ALLOCATION_FAILED = (b"bad_alloc", b"memory allocation of", b"MemoryError", b"can't allocate memory")


class CheckFailed(Exception):
    """The reason why a check has no result, in one sentence."""


class CheckProcess:
    """Not thread-safe. ``command checks`` reads the path of a run file per line and answers with one line."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path, *, memory_bytes: int
    ) -> None:
        self._command, self._environment, self._directory = [*command, ARGUMENT], dict(environment), directory
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._error_output: IO[bytes] | None = None
        self._num_answers = 0

    def use_environment(self, environment: Mapping[str, str]) -> None:
        """Run the following checks with this environment; a process with another one is ended."""
        if environment != self._environment:
            self.end()
            self._environment = dict(environment)

    def prepare(self) -> None:
        """Start the process for the next check, unless one is running. Raises `OSError`."""
        if self._process is None:
            self._start()

    def check(self, file: Path, *, limit_seconds: float, on_wait: Callable[[], None] = lambda: None) -> bytes:
        """The result for the run file. ``on_wait`` is called several times a second, and may raise `CheckFailed`.

        Raises `CheckFailed`, and `OSError` if no process can be started.
        """
        deadline = time.monotonic() + limit_seconds
        try:
            answer = self._exchange(file, deadline, on_wait) if self._process is not None else b""
            if not answer:  # no process was running, or it had exited
                self.end()
                self._start()
                answer = self._exchange(file, deadline, on_wait)
        except CheckFailed:
            self.end()
            raise
        except TimeoutError:
            self.end()
            raise CheckFailed(
                f"The check exceeded its limit of {limit_seconds:g} s and was ended; a larger ZETA_CHECK_SECONDS on "
                "the server gives it more time."
            ) from None
        except _AnswerTooLarge:
            self.end()
            raise CheckFailed(f"The check's answer exceeded {MAX_ANSWER_BYTES // MEBIBYTE} MiB, the limit.") from None
        if not answer:
            raise CheckFailed(self._failure_reason(file.parent))
        self._num_answers += 1
        if self._num_answers >= MAX_ANSWERS:
            self.end()
        return answer

    def end(self) -> bytes:
        """Kill the process and its children, if it runs; returns the end of its error output."""
        process, self._process = self._process, None
        error_output, self._error_output = self._error_output, None
        if process is None or error_output is None:
            return b""
        with error_output, process:  # leaving the block closes the pipes and waits
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            error_output.seek(max(0, error_output.seek(0, os.SEEK_END) - ERROR_OUTPUT_BYTES))
            return error_output.read()

    def _failure_reason(self, directory: Path) -> str:
        """Why the process has ended; ``directory`` is that of the check."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout=EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0  # it closed its standard output but keeps running
        error_output = self.end()
        aborted = status == -signal.SIGABRT and any(message in error_output for message in _ALLOCATION_FAILED)
        if status == OUT_OF_MEMORY_EXIT or aborted:
            return (
                f"The check exceeded its limit of {self._memory_bytes // MEBIBYTE:,} MiB of memory and was ended; a "
                "larger ZETA_CHECK_MEMORY_BYTES on the worker gives it more."
            )
        if (limit := exceeded_limit(directory)) is not None:
            return (
                f"The check exceeded its limit of {limit:,} processes and threads and was ended; a larger "
                "ZETA_JOB_PROCESSES on the worker allows more."
            )
        if status == -signal.SIGXFSZ:
            return f"The check wrote a file of more than {MAX_FILE_BYTES // MEBIBYTE:,} MiB, the limit."
        if status < 0:
            return f"The check crashed with {signal.Signals(-status).name}; the model or tokenizer may be damaged."
        lines = error_output.decode("utf-8", "replace").strip().splitlines() or ["nothing"]
        return f"The check ended without an answer (exit code {status}); its last output was: {lines[-1]}"

    def _start(self) -> None:
        self._num_answers = 0
        self._error_output = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._error_output,
            bufsize=0,
            cwd=self._directory,
            env=self._environment,
            start_new_session=True,
        )
        self._limit(self._process.pid)

    def _limit(self, pid: int) -> None:
        """Set the limits of the process before it reads its first request."""
        if sys.platform != "linux":
            return  # no prlimit(2)
        for kind, limit in (
            (resource.RLIMIT_DATA, self._memory_bytes),  # private writable memory, used or not: Linux 4.7
            (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.prlimit(pid, kind)
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.prlimit(pid, kind, (limit, limit))

    def _exchange(self, file: Path, deadline: float, on_wait: Callable[[], None]) -> bytes:
        """Send the request and wait for the answer line; empty if the process has exited.

        Raises `TimeoutError`, `_AnswerTooLarge`, and what ``on_wait`` raises.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, answer = self._process.stdout.fileno(), b""
        try:
            self._process.stdin.write(f"{file}\n".encode())  # small enough to fit into the pipe's buffer
        except BrokenPipeError:
            return b""
        while not answer.endswith(b"\n"):
            seconds_left = deadline - time.monotonic()
            ready, _, _ = select.select([out], [], [], min(LOOK_SECONDS, max(0.0, seconds_left)))
            if not ready:
                if seconds_left <= 0:
                    raise TimeoutError
                on_wait()
                continue
            part = os.read(out, 1 << 16)
            if not part:
                return b""
            answer += part
            if len(answer) > MAX_ANSWER_BYTES:
                raise _AnswerTooLarge
        return answer


class _AnswerTooLarge(Exception):
    pass
