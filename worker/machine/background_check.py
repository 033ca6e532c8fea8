"""Checks that may hang, such as calls of a driver or of a file system, run in a thread that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, ParamSpec, TypeVar

from worker.threads import Outage

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class BackgroundCheck(Generic[ResultT]):
    """One check at a time. A failed one is an outage, which the next successful one ends."""

    def __init__(self, executor: Executor, outage: Outage) -> None:
        self._executor = executor
        self._outage = outage
        self._running: Future[ResultT] | None = None

    def finish(self, apply: Callable[[ResultT], None]) -> None:
        """Apply the result if the check has ended. After a failure, the last known state remains."""
        if self._running is None or not self._running.done():
            return
        check, self._running = self._running, None
        error = check.exception()
        if error is not None:
            self._outage.begin(error)
            return
        self._outage.end()
        apply(check.result())

    def start(self, check: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Start the next check unless one is running; returns whether it was started."""
        if self._running is not None:
            return False
        self._running = self._executor.submit(check, *args, **kwargs)
        return True
