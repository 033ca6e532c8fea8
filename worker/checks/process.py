"""The process that answers checks: started for the first one, kept for the next, gone when none comes for a while.

Its start takes seconds (torch and transformers are imported), an answer a fraction of one; and who validates a spec
mostly changes it and asks again. A spec may name a hostile model or tokenizer, so the process has limits. Guaranteed:
it is killed with all that it started when an answer takes longer than its limit or is larger than
`MOST_ANSWER_BYTES`; on Linux it gets no more memory than its limit, and none of its files more than
`LARGEST_FILE_BYTES`; every such end, and a crash, becomes a sentence that names the limit and its setting, and the next
check gets a new process. It ends when this worker does, whatever ends that (its standard input closes), and after
`MOST_ANSWERS`; where it has ended meanwhile, another one is started. While it is kept it holds about 400 MB of memory
and no processor.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from zeta_core.contract.layout import OUT_OF_MEMORY_EXIT

MEBIBYTE = 2**20
ENDING_SECONDS = 5.0  # from the end of its output to its own
MOST_ANSWERS = 100  # what libraries remember of the models that they were shown goes with the process
MOST_ANSWER_BYTES = 4 * MEBIBYTE
LARGEST_FILE_BYTES = 1024 * MEBIBYTE  # configs, tokenizers and its complaints are far smaller
COMPLAINT_BYTES = 64 * 1024  # of the end of its complaints
ARGUMENT = "checks"
# How C++ and Rust complain about a failed allocation, before they abort.
_ALLOCATION_FAILED = (b"bad_alloc", b"memory allocation of", b"MemoryError", b"can't allocate memory")


class Unanswered(Exception):
    """Why there is no answer, in a sentence."""


class CheckProcess:
    """For one thread; ``command checks`` answers each line of its input, a file's path, with one line."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path, *, memory_bytes: int
    ) -> None:
        self._command, self._environment, self._directory = [*command, ARGUMENT], dict(environment), directory
        self._memory_bytes = memory_bytes
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
            raise Unanswered(
                f"The check exceeded its limit of {limit_seconds:g} s and was ended; a larger ZETA_CHECK_SECONDS on "
                "the server gives it more time."
            ) from None
        except _AnswerTooLarge:
            self.end()
            raise Unanswered(f"The check's answer exceeded {MOST_ANSWER_BYTES // MEBIBYTE} MiB, its limit.") from None
        if not answer:
            raise Unanswered(self._why_it_ended())
        self._num_answers += 1
        if self._num_answers >= MOST_ANSWERS:
            self.end()
        return answer

    def end(self) -> bytes:
        """Kill it with all that it started, where there is one; returns the end of its complaints."""
        process, self._process = self._process, None
        complaints, self._complaints = self._complaints, None
        if process is None or complaints is None:
            return b""
        with complaints, process:  # which closes the pipes and waits
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - COMPLAINT_BYTES))
            return complaints.read()

    def _why_it_ended(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(timeout=ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0  # it closed its standard output and lives on
        complaints = self.end()
        aborted = status == -signal.SIGABRT and any(words in complaints for words in _ALLOCATION_FAILED)
        if status == OUT_OF_MEMORY_EXIT or aborted:
            return (
                f"The check exceeded its limit of {self._memory_bytes // MEBIBYTE:,} MiB of memory and was ended; a "
                "larger ZETA_CHECK_MEMORY_BYTES on the worker gives it more."
            )
        if status == -signal.SIGXFSZ:
            return f"The check wrote a file of more than {LARGEST_FILE_BYTES // MEBIBYTE:,} MiB, its limit."
        if status < 0:
            return f"The check crashed with {signal.Signals(-status).name}; the model or tokenizer may be damaged."
        lines = complaints.decode("utf-8", "replace").strip().splitlines() or ["nothing"]
        return f"The check ended without an answer (exit code {status}); its last output was: {lines[-1]}"

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
        self._limit(self._process.pid)

    def _limit(self, pid: int) -> None:
        """Limit the process from here, before it has read a question."""
        if sys.platform != "linux":
            return  # there is no prlimit(2) to do it with
        for kind, limit in (
            (resource.RLIMIT_DATA, self._memory_bytes),  # private writable memory, used or not: Linux 4.7
            (resource.RLIMIT_FSIZE, LARGEST_FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.prlimit(pid, kind)
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.prlimit(pid, kind, (limit, limit))

    def _exchange(self, file: Path, deadline: float) -> bytes:
        """Ask, and wait for the line that answers; empty where the process has ended.

        Raises `TimeoutError` and `_AnswerTooLarge`.
        """
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
            if len(answer) > MOST_ANSWER_BYTES:
                raise _AnswerTooLarge
        return answer


class _AnswerTooLarge(Exception):
    pass
