"""Units of all sources are encoded in order, by forked processes that share the work.

Each reads the sources by itself and parses every n-th unit; its results come back through a pipe of its own as plain
arrays, never pickled, and this process takes them in turn, so the order is that of the data and whoever is ahead waits.

Guaranteed: a fault is the one that comes first in the data; the processes have limits, and one that dies is reported
(`zeta_core.data.confined`); nothing is left running, also when this process is killed (a write into its closed pipe
ends the others). Not guaranteed: limits, and help from other cores, where there is no fork (it is used on Linux only).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from zeta_core.data.confined import Confined, Limits, Position, tell
from zeta_core.data.encode import Encoded, Encoder
from zeta_core.data.sources import Source
from zeta_core.settings import free_memory_bytes, variables

BYTES_PER_PROCESS = 1 << 20  # less is done sooner than a process is started
MEMORY_PER_PROCESS = 512 << 20  # the units in work, many times their size as Python objects

_ARRAYS = ("ids_N", "lengths_D", "ends_D", "rows_D", "hashes_D", "supervised_N")
_VALUES = ("num_split", "templated", "blank")


def encoded_units(
    sources: Sequence[Source], encoder: Encoder, *, processes: int, limits: Limits | None = None
) -> Iterator[tuple[int, int, Encoded]]:
    """(number of the source, position in it, its documents) for every unit, in order. Raises `InvalidData`."""
    if sys.platform != "linux":
        yield from _units(sources, encoder, Position())
        return
    useful = sum(source.num_bytes for source in sources) // BYTES_PER_PROCESS
    processes = max(1, min(processes, useful, free_memory_bytes() // MEMORY_PER_PROCESS, _cores()))
    limits = limits or Limits.for_processes(processes)
    team: list[Confined] = []
    with variables(TOKENIZERS_PARALLELISM="false"), ExitStack() as ending:
        # Threads do not survive a fork: the tokenizer in a forked process must not wait for its own.
        for number in range(processes):

            def work(pipe: Connection, position: Position, number: int = number) -> None:
                for source, end, encoded in _units(sources, encoder, position, number, processes):
                    _send(pipe, source, end, encoded)
                tell(pipe, kind="end")

            team.append(Confined(work, limits, name=f"tokenize-{number}", others=team))
            ending.callback(team[-1].close)
        for member in reversed(team):
            ending.callback(member.stop)  # all of them first, then each is waited for
        turn = 0
        while (about := team[turn % processes].receive())["kind"] == "unit":
            yield about["source"], about["position"], _received(about, team[turn % processes].pipe)
            turn += 1
        # Units are dealt in order, so when one process is at its end no other has a unit left.


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _units(
    sources: Sequence[Source], encoder: Encoder, position: Position, number: int = 0, processes: int = 1
) -> Iterator[tuple[int, int, Encoded]]:
    """The units of the process ``number``, encoded."""
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
    tell(pipe, kind="unit", source=source, position=position, dtypes=dtypes, values=values)
    for array in arrays.values():
        pipe.send_bytes(array.tobytes())


def _received(about: dict[str, Any], pipe: Connection) -> Encoded:
    arrays = {name: np.frombuffer(pipe.recv_bytes(), np.dtype(dtype)) for name, dtype in about["dtypes"].items()}
    return Encoded(**arrays, **about["values"])
