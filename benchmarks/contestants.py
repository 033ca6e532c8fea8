"""One process per contestant for the whole session, so that none changes the memory, threads or functions of another.

Contestants take turns: while one works, the others block on a message and use no CPU time. When speed is
measured, they take turns step by step, because the load of a shared machine changes within seconds.
"""

from __future__ import annotations

import atexit
import random
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar, cast

from benchmarks.workload import SEED, Size

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_STEP_DONE = "step done"
_CONTINUE = "continue"

_connections: dict[str, Connection] = {}  # in the benchmark's process: the connection to each contestant
_parent: Connection | None = None  # in a contestant's process: the connection to the benchmark


@dataclass(frozen=True)
class _Returned:
    value: Any


@dataclass(frozen=True)
class _Failed:
    traceback: str


def run_isolated(
    name: str,
    size: Size,
    function: Callable[Parameters, Returned],
    *arguments: Parameters.args,
    **named: Parameters.kwargs,
) -> Returned:
    """Call ``function`` in this contestant's process (for a small size, in this process), and return its result."""
    return run_in_turns(size, {name: partial(function, *arguments, **named)})[name]


def run_in_turns(size: Size, tasks: Mapping[str, Callable[[], Returned]]) -> dict[str, Returned]:
    """Run the contestants' tasks, and return their results. Tasks take turns wherever they call `wait_for_turn`.

    Each turn has a new random order, so that no contestant always follows the same one. If a task fails, raises
    `RuntimeError` with its traceback.
    """
    if not size.isolated:
        return {name: task() for name, task in tasks.items()}
    results: dict[str, Returned] = {}
    messages: dict[str, object] = dict(tasks)
    order = random.Random(SEED)
    while messages:
        for name in order.sample(list(messages), len(messages)):
            connection = _connections[name] if name in _connections else _start(name)
            connection.send(messages[name])
            reply = connection.recv()
            messages[name] = _CONTINUE
            if isinstance(reply, _Failed):
                raise RuntimeError(f"{name} failed:\n{reply.traceback}")
            if isinstance(reply, _Returned):
                results[name] = cast(Returned, reply.value)
                del messages[name]
    return results


def wait_for_turn() -> float:
    """Let the other contestants run; called by a task between two steps. Returns the seconds until its next turn."""
    if _parent is None:
        return 0.0
    started = time.perf_counter()
    _parent.send(_STEP_DONE)
    _parent.recv()
    return time.perf_counter() - started


def _start(name: str) -> Connection:
    context = get_context("spawn")
    _connections[name], theirs = context.Pipe()
    # Not a daemon, which could not have children: reading data files starts one.
    context.Process(target=_work, args=(theirs,), name=name).start()
    theirs.close()
    return _connections[name]


def _work(parent: Connection) -> None:
    """The main loop of a contestant's process: run one task after the other, until the benchmark's process exits.

    Its exit closes the connection, which also ends a task that waits for its turn.
    """
    global _parent
    _parent = parent
    while True:
        try:
            task = parent.recv()
        except EOFError:
            return
        try:
            reply: object = _Returned(task())
        except Exception:  # noqa: BLE001 - `run_in_turns` raises it
            reply = _Failed(traceback.format_exc())
        parent.send(reply)


@atexit.register
def _close_all() -> None:
    for connection in _connections.values():
        connection.close()
