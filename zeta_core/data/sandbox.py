"""Processing untrusted data in forked processes with memory and CPU time limits.

A small file can contain rows that expand to gigabytes, a chat template is a program, and a library can crash while it
decodes a damaged file. The training process therefore never decodes, renders or tokenizes data itself.

Guarantees on Linux: if a process exceeds its memory limit, exceeds its CPU time limit for one row, or crashes, the
caller gets an `InvalidData` error that names the row and the limit. A failing tokenizer is reported as `InvalidModel`.
No process is left running when this process exits. Results are returned as JSON and plain arrays, never pickled. On
other systems, where forking is not safe, the work runs in this process without limits.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from zeta_core.environment import free_memory_bytes
from zeta_core.failures import InvalidData, InvalidModel, TrainingFailed, tokenizer_failure

MEBIBYTE = 2**20
MAX_MEMORY_BYTES = 4096 * MEBIBYTE
MIN_MEMORY_BYTES = 1024 * MEBIBYTE
RENDERING_SECONDS = 30.0
OTHER_STAGES_FACTOR = 4.0  # times the limit for rendering, because a row may be a whole book
LOCATION_BYTES = 4096

Stage = Literal["reading", "rendering", "tokenizing"]
_NEEDED_MEMORY: dict[str, str] = {
    "reading": "decoding it requires more than {limit} of memory; write the data with smaller rows and row groups.",
    "rendering": "the tokenizer's chat template exceeded {limit} of memory when rendering this row; use a template "
    "with less output, or remove the row.",
    "tokenizing": "tokenizing it requires more than {limit} of memory; split it into smaller rows.",
}
_NEEDED_TIME: dict[str, str] = {
    "reading": "decoding it requires more than {limit} of CPU time; write the data with smaller rows.",
    "rendering": "the tokenizer's chat template exceeded {limit} of CPU time when rendering this row; use a faster "
    "template, or remove the row.",
    "tokenizing": "tokenizing it requires more than {limit} of CPU time; split it into smaller rows.",
}
_CRASHED: dict[str, str] = {
    "reading": "decoding it crashed ({signal}), so the file is probably damaged; write it again.",
    "rendering": "rendering this row with the tokenizer's chat template crashed ({signal}); use another template, or "
    "remove the row.",
    "tokenizing": "tokenizing it crashed ({signal}); split it into smaller rows.",
}


@dataclass(frozen=True)
class ProcessLimits:
    """The limits of one process: the memory that it may allocate, and its CPU time for rendering one row."""

    memory_bytes: int = MAX_MEMORY_BYTES
    rendering_seconds: float = RENDERING_SECONDS

    @classmethod
    def for_processes(cls, number: int) -> ProcessLimits:
        """The limits for each of several processes, which share half of the free memory."""
        share = free_memory_bytes() // (2 * number)
        return cls(memory_bytes=max(MIN_MEMORY_BYTES, min(MAX_MEMORY_BYTES, share)))

    def exceeded_memory(self, location: str, stage: Stage) -> InvalidData:
        text = _NEEDED_MEMORY[stage].format(limit=f"{self.memory_bytes // MEBIBYTE:,} MiB")
        return InvalidData(f"{location}: {text}")

    def exceeded_time(self, location: str, stage: Stage) -> InvalidData:
        return InvalidData(f"{location}: {_NEEDED_TIME[stage].format(limit=f'{self.seconds(stage):g} s')}")

    def seconds(self, stage: Stage) -> float:
        """The CPU time limit of a stage, for one row or for one unit of rows."""
        return self.rendering_seconds * (1.0 if stage == "rendering" else OTHER_STAGES_FACTOR)


class Position:
    """The location in the data that a process is working on, in memory shared with its parent."""

    def __init__(self, limits: ProcessLimits | None = None) -> None:
        """Without ``limits``, CPU time is not limited."""
        self._memory = mmap.mmap(-1, LOCATION_BYTES)
        self._limits = limits

    def move(self, location: str, stage: Stage) -> None:
        """Start working on ``location``, and reset the CPU time limit."""
        self._memory.seek(0)
        self._memory.write(f"{stage}\0{location}\0".encode()[:LOCATION_BYTES])
        if self._limits is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            soft = math.ceil(time.process_time() + self._limits.seconds(stage))
            resource.setrlimit(resource.RLIMIT_CPU, (_at_most(soft, hard), hard))

    def read(self) -> tuple[str, Stage]:
        stage, location, *_ = self._memory[:].split(b"\0")
        return location.decode("utf-8", "replace"), stage.decode() or "reading"  # pyright: ignore[reportReturnType]


class Sandbox:
    """A forked process that runs ``work`` within its limits, and the reading end of its pipe."""

    def __init__(
        self,
        work: Callable[[Connection, Position], None],
        limits: ProcessLimits,
        *,
        name: str,
        others: Sequence[Sandbox] = (),
    ) -> None:
        """``others`` are the parent's other sandboxes, whose pipes the new process must not keep open."""
        importlib.import_module("pyarrow")  # imported once in the parent instead of in every forked process
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        self._limits = limits
        self._position = Position(limits)
        foreign = [self.pipe, *(other.pipe for other in others)]
        arguments = (work, limits, self._position, theirs, foreign)
        self._process = context.Process(target=_run, args=arguments, name=name, daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises the error that the process reports, or the reason why it exited."""
        try:
            message = json.loads(self.pipe.recv_bytes())
        except EOFError:
            raise self._unreported_end() from None
        if message["kind"] == "invalid":
            raise InvalidData(message["message"], code=message["code"])
        if message["kind"] == "invalid_model":
            raise InvalidModel(message["message"], hint=message["hint"])
        if message["kind"] == "failed":
            raise TrainingFailed(message["message"])
        return message

    def stop(self) -> None:
        """Terminate the process without waiting for it; `close` waits."""
        self.pipe.close()
        self._process.terminate()

    def close(self) -> None:
        self.stop()
        self._process.join()

    def _unreported_end(self) -> TrainingFailed:
        self._process.join()
        location, stage = self._position.read()
        code = self._process.exitcode or 0
        if code == -signal.SIGXCPU:
            return self._limits.exceeded_time(location, stage)
        if code == -signal.SIGABRT:  # C++ and Rust abort when an allocation fails
            return self._limits.exceeded_memory(location, stage)
        if code < 0 and code not in (-signal.SIGKILL, -signal.SIGTERM):
            return InvalidData(f"{location}: {_CRASHED[stage].format(signal=signal.Signals(-code).name)}")
        return TrainingFailed(
            f"A tokenization process exited with code {code}; it was probably killed because memory ran out.",
            hint="Give the job more memory, or use smaller rows.",
        )


def run_in_sandbox(work: Callable[[Position], Any], limits: ProcessLimits | None = None) -> Any:
    """Run ``work``, in a separate process if possible, and return its result, which must be JSON."""
    if sys.platform != "linux":
        return work(Position())
    limits = limits or ProcessLimits.for_processes(1)

    def send(pipe: Connection, position: Position) -> None:
        send_message(pipe, kind="result", value=work(position))

    with closing(Sandbox(send, limits, name="inspect")) as process:
        return process.receive()["value"]


def send_message(pipe: Connection, **fields: Any) -> None:
    pipe.send_bytes(json.dumps(fields).encode())


def _run(
    work: Callable[[Connection, Position], None],
    limits: ProcessLimits,
    position: Position,
    pipe: Connection,
    foreign: Sequence[Connection],
) -> None:
    """The main function of the forked process: apply the limits, run the work, and report errors."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches this process; its parent stops it
    for other in foreign:
        other.close()
    allowed = _limit_this_process(limits)
    try:
        try:
            work(pipe, position)
        except MemoryError:
            resource.setrlimit(resource.RLIMIT_DATA, allowed)
            raise limits.exceeded_memory(*position.read()) from None
        except RecursionError:
            raise InvalidData(f"{position.read()[0]} is nested too deeply; write it with fewer levels.") from None
    except InvalidData as error:
        send_message(pipe, kind="invalid", message=error.message, code=error.code)
    except BrokenPipeError:
        pass  # the parent exited, or needs no more results
    except BaseException as error:  # noqa: BLE001 - reported to the parent, which raises it
        traceback.print_exception(error, file=sys.stderr)
        location, stage = position.read()
        if (failure := tokenizer_failure(error)) is not None:
            send_message(pipe, kind="invalid_model", message=f"{location}: {failure.message}", hint=failure.hint)
            return
        send_message(pipe, kind="failed", message=f"{location}: {stage} failed: {type(error).__name__}: {error}")


def _limit_this_process(limits: ProcessLimits) -> tuple[int, int]:
    """Apply the limits, and return the previous memory limit.

    RLIMIT_DATA counts private writable memory by its reserved size, used or not (setrlimit(2), Linux 4.7). Arrow's own
    allocator reserves a gigabyte at once, so the system's allocator is used.
    """
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _at_most(_private_bytes() + limits.memory_bytes, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (_at_most(limit, hard), hard))
    return soft, hard


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def _at_most(value: int, limit: int) -> int:
    return value if limit == resource.RLIM_INFINITY else min(value, limit)
