"""Units of all sources are encoded in order, by this process or by forked ones that share the work.

Each forked process reads the sources by itself and parses every n-th unit; its results come back through a pipe of its
own as plain arrays, never pickled, and this process takes them in turn, so the order is that of the data and whoever is
ahead waits. Where it is one process, the tokenizer's own threads are used.

Guaranteed: a fault is the one that comes first in the data; a process that dies is told, not waited for; nothing is
left running, also when this process is killed (a write into its closed pipe ends the others). Not guaranteed: help from
other cores where there is no fork (it is used on Linux only).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np

from zeta_core.data.encode import Encoded, Encoder
from zeta_core.data.sources import Source
from zeta_core.failures import InvalidData, TrainingFailed
from zeta_core.settings import free_memory_bytes, variables

BYTES_PER_PROCESS = 2 << 20  # less is done sooner than a process is started
MEMORY_PER_PROCESS = 512 << 20  # the units in work, many times their size as Python objects

_ARRAYS = ("ids_N", "lengths_D", "ends_D", "rows_D", "hashes_D", "supervised_N")
_VALUES = ("num_split", "templated", "blank")


def encoded_units(sources: Sequence[Source], encoder: Encoder, *, processes: int) -> Iterator[tuple[int, int, Encoded]]:
    """(number of the source, position in it, its documents) for every unit, in order. Raises `InvalidData`."""
    useful = sum(source.num_bytes for source in sources) // BYTES_PER_PROCESS
    processes = min(processes, useful, free_memory_bytes() // MEMORY_PER_PROCESS, _cores())
    if processes < 2 or sys.platform != "linux":
        for number, source in enumerate(sources):
            for unit in source.units():
                yield number, unit.position, encoder.encode(source, unit.rows())
        return
    # Threads do not survive a fork: the tokenizer in a forked process must not wait for its own.
    with variables(TOKENIZERS_PARALLELISM="false"), closing(_Team(sources, encoder, processes)) as team:
        yield from team.results()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Team:
    """Forked processes and the reading ends of their pipes."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, processes: int) -> None:
        self._members: list[tuple[ForkProcess, Connection]] = []
        context = multiprocessing.get_context("fork")
        for number in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            foreign = [ours, *(pipe for _, pipe in self._members)]
            work = (sources, encoder, number, processes, theirs, foreign)
            process = context.Process(target=_work, args=work, name=f"tokenize-{number}", daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def results(self) -> Iterator[tuple[int, int, Encoded]]:
        turn = 0
        while True:
            process, pipe = self._members[turn % len(self._members)]
            turn += 1
            try:
                about = json.loads(pipe.recv_bytes())
                if about["kind"] == "unit":
                    yield about["source"], about["position"], _received(about, pipe)
                    continue
            except EOFError:
                process.join()
                raise TrainingFailed(
                    f"A process that tokenizes the data ended with exit code {process.exitcode}; it was killed, most "
                    "likely because memory ran out.",
                    hint="Give the job more memory, or data in smaller rows.",
                ) from None
            if about["kind"] == "end":
                return  # units are dealt in order, so nobody has one left
            raise InvalidData(about["message"]) if about["kind"] == "invalid" else TrainingFailed(about["message"])

    def close(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.terminate()
        for process, _ in self._members:
            process.join()


def _work(
    sources: Sequence[Source],
    encoder: Encoder,
    number: int,
    processes: int,
    pipe: Connection,
    foreign: list[Connection],
) -> None:
    """What a forked process does: encode its share, tell what went wrong."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the first one ends us
    for other in foreign:
        other.close()
    try:
        turn = 0
        for index, source in enumerate(sources):
            for unit in source.units():
                if turn % processes == number:
                    _send(pipe, index, unit.position, encoder.encode(source, unit.rows()))
                turn += 1
        _tell(pipe, kind="end")
    except InvalidData as error:
        _tell(pipe, kind="invalid", message=error.message)
    except BrokenPipeError:
        pass  # the first process is gone, or wants no more
    except BaseException as error:  # noqa: BLE001 - told to the first process, which raises it
        traceback.print_exception(error, file=sys.stderr)
        _tell(pipe, kind="failed", message=f"Tokenizing failed: {type(error).__name__}: {error}")


def _tell(pipe: Connection, **about: Any) -> None:
    pipe.send_bytes(json.dumps(about).encode())


def _send(pipe: Connection, source: int, position: int, encoded: Encoded) -> None:
    arrays = {name: array for name in _ARRAYS if (array := getattr(encoded, name)) is not None}
    dtypes = {name: array.dtype.str for name, array in arrays.items()}
    values = {name: getattr(encoded, name) for name in _VALUES}
    _tell(pipe, kind="unit", source=source, position=position, dtypes=dtypes, values=values)
    for array in arrays.values():
        pipe.send_bytes(array.tobytes())


def _received(about: dict[str, Any], pipe: Connection) -> Encoded:
    arrays = {name: np.frombuffer(pipe.recv_bytes(), np.dtype(dtype)) for name, dtype in about["dtypes"].items()}
    return Encoded(**arrays, **about["values"])
