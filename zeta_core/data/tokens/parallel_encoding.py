"""Encoding the units of all sources in parallel, in forked processes, while keeping the order of the data.

Each process reads the sources itself and encodes every n-th unit. It returns its results through its own pipe as plain
arrays, never pickled. This process reads the pipes in turn, so the results are in the order of the data, and a process
that is ahead waits.

Guarantees: the reported error is the first one in the data. The processes have limits, and a crash is reported
(`zeta_core.data.sandbox`). No process is left running, even if this process is killed (writing to the closed pipe then
fails). Without fork, which is used on Linux only, there are no limits and no parallelism.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from zeta_core.data.sandbox import Position, ProcessLimits, Sandbox, send_message
from zeta_core.data.sources import Source
from zeta_core.data.tokens.encoder import Encoded, Encoder
from zeta_core.environment import free_memory_bytes, variables

BYTES_PER_PROCESS = 1 << 20  # starting a process for less data takes longer than encoding it
MEMORY_PER_PROCESS = 512 << 20  # for the current units, which are many times larger as Python objects

_ARRAYS = ("ids_N", "lengths_D", "ends_D", "rows_D", "hashes_D", "groups_D", "labels_D", "supervised_N")
_VALUES = (
    "num_split",
    "templated",
    "added_beginning",
    "blank",
    "num_control_tokens",
    "first_control_token",
    "num_with_unused_turns",
    "num_untrained",
    "num_padding",
    "rows_with",
    "rows_without",
    "unused_columns",
    "mapped_columns",
)


def encoded_units(
    sources: Sequence[Source], encoder: Encoder, *, processes: int, limits: ProcessLimits | None = None
) -> Iterator[tuple[int, int, Encoded]]:
    """Yield (index of the source, position in it, documents) for every unit, in order. Raises `InvalidData`."""
    if sys.platform != "linux":
        yield from _units(sources, encoder, Position())
        return
    processes = num_processes(sources, processes)
    limits = limits or ProcessLimits.for_processes(processes)
    team: list[Sandbox] = []
    with variables(TOKENIZERS_PARALLELISM="false"), ExitStack() as ending:
        # Threads do not survive a fork, so the tokenizer in a forked process must not use its thread pool.
        for number in range(processes):

            def work(pipe: Connection, position: Position, number: int = number) -> None:
                for source, end, encoded in _units(sources, encoder, position, number, processes):
                    _send(pipe, source, end, encoded)
                send_message(pipe, kind="end")

            team.append(Sandbox(work, limits, name=f"tokenize-{number}", others=team))
            ending.callback(team[-1].close)
        for member in reversed(team):
            ending.callback(member.stop)  # terminate all of them before waiting for each
        turn = 0
        while (about := team[turn % processes].receive())["kind"] == "unit":
            yield about["source"], about["position"], _received(about, team[turn % processes].pipe)
            turn += 1
        # Units are assigned in order, so when one process has no more units, neither have the others.


def num_processes(sources: Sequence[Source], most: int, *, bytes_each: int = BYTES_PER_PROCESS) -> int:
    """The number of processes that read the sources fastest, with at least ``bytes_each`` per process."""
    useful = sum(source.num_bytes for source in sources) // bytes_each
    return max(1, min(most, useful, free_memory_bytes() // MEMORY_PER_PROCESS, _cores()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _units(
    sources: Sequence[Source], encoder: Encoder, position: Position, number: int = 0, processes: int = 1
) -> Iterator[tuple[int, int, Encoded]]:
    """Encode the units of process ``number``."""
    turn = 0
    for index, source in enumerate(sources):
        position.move(source.after(0), "reading")
        for unit in source.units():
            if turn % processes == number:
                yield index, unit.position, encoder.encode(source, unit.rows(), position)
            position.move(source.after(unit.position), "reading")
            turn += 1


def _send(pipe: Connection, source: int, position: int, encoded: Encoded) -> None:
    arrays = {name: array for name in _ARRAYS if (array := getattr(encoded, name)) is not None}
    dtypes = {name: array.dtype.str for name, array in arrays.items()}
    values = {name: getattr(encoded, name) for name in _VALUES}
    send_message(pipe, kind="unit", source=source, position=position, dtypes=dtypes, values=values)
    for array in arrays.values():
        pipe.send_bytes(array.tobytes())


def _received(about: dict[str, Any], pipe: Connection) -> Encoded:
    arrays = {name: np.frombuffer(pipe.recv_bytes(), np.dtype(dtype)) for name, dtype in about["dtypes"].items()}
    return Encoded(**arrays, **about["values"])
