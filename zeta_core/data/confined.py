"""Runs work on untrusted data in forked processes that have limits of memory and of processor time.

A small file can hold rows that take gigabytes, a chat template is a program, and a library that decodes a damaged file
can crash. So nothing of a file is decoded, rendered or tokenized in the training process itself.

Guaranteed on Linux: a process that allocates more than its limit, computes longer than its limit on one row, or crashes
becomes an `InvalidData` that names the place and the limit; nothing is left running when this process ends. Results
come back as JSON and plain arrays, never pickled. Not guaranteed elsewhere, where a fork is not safe: there the work is
done in this process, without limits.
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

from zeta_core.failures import InvalidData, TrainingFailed
from zeta_core.settings import free_memory_bytes

MEBIBYTE = 2**20
MOST_MEMORY_BYTES = 4096 * MEBIBYTE
LEAST_MEMORY_BYTES = 1024 * MEBIBYTE
RENDERING_SECONDS = 30.0
OTHER_STAGES = 4.0  # times as long: a row may be a whole book
PLACE_BYTES = 4096

Stage = Literal["reading", "rendering", "tokenizing"]
_NEEDED_MEMORY: dict[str, str] = {
    "reading": "decoding it takes more than {limit} of memory; write the data with smaller rows and row groups.",
    "rendering": "the tokenizer's chat template exceeded {limit} of memory when rendering this row; use a template "
    "that writes less, or remove the row.",
    "tokenizing": "tokenizing it takes more than {limit} of memory; split it into smaller rows.",
}
_NEEDED_TIME: dict[str, str] = {
    "reading": "decoding it takes longer than {limit} of processor time; write the data with smaller rows.",
    "rendering": "the tokenizer's chat template exceeded {limit} of processor time when rendering this row; use a "
    "template that ends sooner, or remove the row.",
    "tokenizing": "tokenizing it takes longer than {limit} of processor time; split it into smaller rows.",
}
_CRASHED: dict[str, str] = {
    "reading": "reading it crashed the process that decodes it ({signal}), so the file is damaged; write it anew.",
    "rendering": "rendering this row with the tokenizer's chat template crashed ({signal}); use another template, or "
    "remove the row.",
    "tokenizing": "tokenizing it crashed ({signal}); split it into smaller rows.",
}


@dataclass(frozen=True)
class Limits:
    """``memory_bytes``: what one process may allocate. ``rendering_seconds``: its processor time for one row."""

    memory_bytes: int = MOST_MEMORY_BYTES
    rendering_seconds: float = RENDERING_SECONDS

    @classmethod
    def for_processes(cls, number: int) -> Limits:
        """The limits of each of several processes, which together get half of the memory that is free."""
        share = free_memory_bytes() // (2 * number)
        return cls(memory_bytes=max(LEAST_MEMORY_BYTES, min(MOST_MEMORY_BYTES, share)))

    def exceeded_memory(self, place: str, stage: Stage) -> InvalidData:
        text = _NEEDED_MEMORY[stage].format(limit=f"{self.memory_bytes // MEBIBYTE:,} MiB")
        return InvalidData(f"{place}: {text}")

    def exceeded_time(self, place: str, stage: Stage) -> InvalidData:
        return InvalidData(f"{place}: {_NEEDED_TIME[stage].format(limit=f'{self.seconds(stage):g} s')}")

    def seconds(self, stage: Stage) -> float:
        """The processor time that a stage may take, for one row or for one unit of rows."""
        return self.rendering_seconds * (1.0 if stage == "rendering" else OTHER_STAGES)


class Position:
    """The place in the data that a process works on, in memory that it shares with the process that waits for it."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Without ``limits`` nothing is limited."""
        self._memory = mmap.mmap(-1, PLACE_BYTES)
        self._limits = limits

    def move(self, place: str, stage: Stage) -> None:
        """Begin with ``place``, for which the process gets its processor time anew."""
        self._memory.seek(0)
        self._memory.write(f"{stage}\0{place}\0".encode()[:PLACE_BYTES])
        if self._limits is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            soft = math.ceil(time.process_time() + self._limits.seconds(stage))
            resource.setrlimit(resource.RLIMIT_CPU, (_at_most(soft, hard), hard))

    def read(self) -> tuple[str, Stage]:
        stage, place, *_ = self._memory[:].split(b"\0")
        return place.decode("utf-8", "replace"), stage.decode() or "reading"  # pyright: ignore[reportReturnType]


class Confined:
    """A forked process that does ``work`` within its limits, and the reading end of its pipe."""

    def __init__(
        self,
        work: Callable[[Connection, Position], None],
        limits: Limits,
        *,
        name: str,
        others: Sequence[Confined] = (),
    ) -> None:
        """``others``: those of the same parent, whose pipes the new process must not hold open."""
        importlib.import_module("pyarrow")  # here, so that not every forked process imports it again
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
        """The next message of the work. Raises what it reports, or why it ended without a report."""
        try:
            message = json.loads(self.pipe.recv_bytes())
        except EOFError:
            raise self._unreported_end() from None
        if message["kind"] == "invalid":
            raise InvalidData(message["message"])
        if message["kind"] == "failed":
            raise TrainingFailed(message["message"])
        return message

    def stop(self) -> None:
        """Begin to end the process; `close` waits for that."""
        self.pipe.close()
        self._process.terminate()

    def close(self) -> None:
        self.stop()
        self._process.join()

    def _unreported_end(self) -> TrainingFailed:
        self._process.join()
        place, stage = self._position.read()
        code = self._process.exitcode or 0
        if code == -signal.SIGXCPU:
            return self._limits.exceeded_time(place, stage)
        if code == -signal.SIGABRT:  # C++ and Rust abort where an allocation fails
            return self._limits.exceeded_memory(place, stage)
        if code < 0 and code not in (-signal.SIGKILL, -signal.SIGTERM):
            return InvalidData(f"{place}: {_CRASHED[stage].format(signal=signal.Signals(-code).name)}")
        return TrainingFailed(
            f"A process that tokenizes the data ended with exit code {code}; it was killed, most likely because memory "
            "ran out.",
            hint="Give the job more memory, or data in smaller rows.",
        )


def confined(work: Callable[[Position], Any], limits: Limits | None = None) -> Any:
    """What ``work`` returns, which must be JSON, computed in a process of its own where that is possible."""
    if sys.platform != "linux":
        return work(Position())
    limits = limits or Limits.for_processes(1)

    def send(pipe: Connection, position: Position) -> None:
        tell(pipe, kind="result", value=work(position))

    with closing(Confined(send, limits, name="look")) as process:
        return process.receive()["value"]


def tell(pipe: Connection, **about: Any) -> None:
    pipe.send_bytes(json.dumps(about).encode())


def _run(
    work: Callable[[Connection, Position], None],
    limits: Limits,
    position: Position,
    pipe: Connection,
    foreign: Sequence[Connection],
) -> None:
    """The forked process: limit itself, do the work, report what went wrong."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; its parent ends it
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
            raise InvalidData(f"{position.read()[0]}: is nested too deeply; write it with fewer levels.") from None
    except InvalidData as error:
        tell(pipe, kind="invalid", message=error.message)
    except BrokenPipeError:
        pass  # the parent is gone, or wants no more
    except BaseException as error:  # noqa: BLE001 - reported to the parent, which raises it
        traceback.print_exception(error, file=sys.stderr)
        place, stage = position.read()
        tell(pipe, kind="failed", message=f"{place}: {stage} failed: {type(error).__name__}: {error}")


def _limit_this_process(limits: Limits) -> tuple[int, int]:
    """Apply the limits; returns the limit of memory as it was.

    RLIMIT_DATA counts private writable memory, by size and not by use (setrlimit(2), Linux 4.7). Arrow's own allocator
    reserves a gigabyte at once, so the system's is used.
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
