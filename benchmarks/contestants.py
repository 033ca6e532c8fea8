"""A process for each contestant, kept for the whole session: none changes the memory, threads or functions of another.

They take turns, and while one works, the others wait for a message and use no processor. Where speed is asked for they
take turns step by step: a machine that others use as well is another one every few seconds, and so is the same for all.
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

from benchmarks.work import SEED, Size

Given = ParamSpec("Given")
Found = TypeVar("Found")

_STEP_IS_DONE = "step is done"
_GO_ON = "go on"

_processes: dict[str, Connection] = {}  # in the process that asks: the other end of each contestant
_parent: Connection | None = None  # in a contestant's own


@dataclass(frozen=True)
class _Answered:
    answer: Any


@dataclass(frozen=True)
class _Failed:
    how: str


def turn_of(
    name: str, size: Size, function: Callable[Given, Found], *arguments: Given.args, **named: Given.kwargs
) -> Found:
    """What ``function`` returns in the process of this contestant (in this one for a small size)."""
    return side_by_side(size, {name: partial(function, *arguments, **named)})[name]


def side_by_side(size: Size, tasks: Mapping[str, Callable[[], Found]]) -> dict[str, Found]:
    """What each contestant's task returns; they take turns wherever a task calls `let_the_others_go`.

    The order of each turn is drawn anew, so that none always follows the same other one. Raises `RuntimeError`, with
    its traceback, for a task that failed.
    """
    if not size.isolated:
        return {name: task() for name, task in tasks.items()}
    answers: dict[str, Found] = {}
    messages: dict[str, object] = dict(tasks)
    draw = random.Random(SEED)
    while messages:
        for name in draw.sample(list(messages), len(messages)):
            contestant = _processes[name] if name in _processes else _start(name)
            contestant.send(messages[name])
            reply = contestant.recv()
            messages[name] = _GO_ON
            if isinstance(reply, _Failed):
                raise RuntimeError(f"{name} failed:\n{reply.how}")
            if isinstance(reply, _Answered):
                answers[name] = cast(Found, reply.answer)
                del messages[name]
    return answers


def let_the_others_go() -> float:
    """Called by a task between two steps: returns when it is its turn again, with the seconds that it waited."""
    if _parent is None:
        return 0.0
    started = time.perf_counter()
    _parent.send(_STEP_IS_DONE)
    _parent.recv()
    return time.perf_counter() - started


def _start(name: str) -> Connection:
    context = get_context("spawn")
    _processes[name], theirs = context.Pipe()
    context.Process(target=_work, args=(theirs,), name=name, daemon=True).start()
    theirs.close()
    return _processes[name]


def _work(parent: Connection) -> None:
    """The life of a contestant: one task after the other, until nobody asks any more."""
    global _parent
    _parent = parent
    while True:
        try:
            task = parent.recv()
        except EOFError:
            return
        try:
            reply: object = _Answered(task())
        except Exception:  # noqa: BLE001 - it is told where it was asked
            reply = _Failed(traceback.format_exc())
        parent.send(reply)


@atexit.register
def _end() -> None:
    for contestant in _processes.values():
        contestant.close()
