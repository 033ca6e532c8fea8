"""A process for each contestant, kept for the whole session: none changes the memory, threads or functions of another.

They take turns: while one works, the others wait in their queues and use no processor.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from benchmarks.work import Size

Given = ParamSpec("Given")
Found = TypeVar("Found")

_processes: dict[str, ProcessPoolExecutor] = {}


def turn_of(
    name: str, size: Size, function: Callable[Given, Found], *arguments: Given.args, **named: Given.kwargs
) -> Found:
    """What ``function`` returns in the process of this contestant (in this one for a small size)."""
    if not size.isolated:
        return function(*arguments, **named)
    if name not in _processes:
        _processes[name] = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    return _processes[name].submit(function, *arguments, **named).result()


@atexit.register
def _end() -> None:
    for process in _processes.values():
        process.shutdown()
