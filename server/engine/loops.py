"""The background loops of a server process. Each repeats one pass for as long as the process runs.

An exception of any kind in a pass is treated as an outage: it is logged once (with a traceback unless it is an expected
type), reported by ``/readyz``, and the pass is retried with growing pauses until it succeeds. A pass that hangs is
cancelled at its time limit, which also counts as an outage. If a pass keeps failing because of a defect, the process
exits, so that its supervisor starts a new one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from server.database.availability import DatabaseUnavailable
from zeta_core.contract.job.events import utc_now
from zeta_core.system.outage import GIVE_UP_SECONDS, OngoingFailure, error_text, give_up
from zeta_core.system.redis_access import RedisUnavailable

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.25, 2.0
STOP_SECONDS = 5.0
# Passes take milliseconds, and every call inside has a shorter timeout.
PASS_LIMIT_SECONDS = 300.0
EXPECTED_ERRORS = (DatabaseUnavailable, RedisUnavailable, OSError)  # expected types, whose message is sufficient

logger = logging.getLogger(__name__)
Pass = Callable[[], Awaitable[None]]
Item = TypeVar("Item")


class PassTimedOut(Exception):
    """A pass was cancelled at its time limit. This is a defect, because every call in a pass has a shorter timeout."""


@dataclass(frozen=True)
class Pace:
    """The pause between two passes of a loop, so that a long queue doesn't occupy the CPU.

    A loop pauses for at least ``rest_factor`` times the duration of the pass, even if it is woken. Then it waits until
    it is woken, for at most ``idle_seconds`` or ``idle_factor`` times the duration, whichever is longer.
    """

    idle_seconds: float = 0.0
    rest_factor: float = 0.0
    idle_factor: float = 0.0


class BackgroundLoop:
    """A loop; ``trouble`` is set from the first failed pass until the next successful one."""

    def __init__(
        self, name: str, one_pass: Pass, pace: Pace, *, limit_seconds: float | None, give_up_seconds: float
    ) -> None:
        self.name = name
        self.trouble: OngoingFailure | None = None
        self.waker = asyncio.Event()
        self._one_pass, self._pace, self._limit_seconds = one_pass, pace, limit_seconds
        self._give_up_seconds = give_up_seconds
        self._defect_since: float | None = None  # monotonic; set while failures are not of an expected type
        self._logged: set[str] = set()  # error types already logged in the current outage
        self._pause_seconds = FIRST_PAUSE_SECONDS

    async def run(self, stopping: asyncio.Event) -> None:
        """Repeat the pass until ``stopping`` is set or the task is cancelled."""
        while not stopping.is_set():
            self.waker.clear()
            began = time.monotonic()
            try:
                await self._limited_pass()
            except BaseException as error:
                task = asyncio.current_task()
                if (task is not None and task.cancelling()) or isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                self._record_failure(error)
                await wait_for_event(stopping, self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, MAX_PAUSE_SECONDS)
                continue
            self._record_success()
            took = time.monotonic() - began
            await wait_for_event(stopping, min(5.0, self._pace.rest_factor * took))
            await wait_for_event(self.waker, max(self._pace.idle_seconds, self._pace.idle_factor * took))

    async def _limited_pass(self) -> None:
        limit = asyncio.timeout(self._limit_seconds)
        try:
            async with limit:
                await self._one_pass()
        except TimeoutError as error:
            if limit.expired():
                raise PassTimedOut(f"a pass was cancelled after {self._limit_seconds:g} s") from error
            raise

    def _record_failure(self, error: BaseException) -> None:
        is_expected = isinstance(error, EXPECTED_ERRORS)
        reason = error_text(error) if is_expected else f"{type(error).__name__} (see the server log)"
        self.trouble = OngoingFailure(self.trouble.since if self.trouble else utc_now(), reason)
        kind = type(error).__qualname__
        if kind not in self._logged:
            logger.log(
                logging.WARNING if is_expected else logging.ERROR,
                "Loop %r is failing: %s. Retrying until it succeeds.",
                self.name,
                error_text(error),
                exc_info=None if is_expected else error,
                extra={"action": "outage", "loop": self.name},
            )
        self._logged.add(kind)
        if is_expected:
            self._defect_since = None
        elif self._defect_since is None:
            self._defect_since = time.monotonic()
        elif time.monotonic() - self._defect_since >= self._give_up_seconds:
            give_up(f"Loop {self.name!r} has been {self.trouble}.")

    def _record_success(self) -> None:
        if self.trouble is not None:
            logger.info("Loop %r has recovered.", self.name, extra={"action": "outage_over", "loop": self.name})
        self.trouble = self._defect_since = None
        self._logged.clear()
        self._pause_seconds = FIRST_PAUSE_SECONDS


class BackgroundLoops:
    """The loops of one process, started and stopped together."""

    def __init__(self, *, give_up_seconds: float = GIVE_UP_SECONDS) -> None:
        self.stopping = asyncio.Event()
        self._give_up_seconds = give_up_seconds
        self._loops: list[BackgroundLoop] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, one_pass: Pass, pace: Pace, *, limit_seconds: float | None = PASS_LIMIT_SECONDS) -> None:
        loop = BackgroundLoop(name, one_pass, pace, limit_seconds=limit_seconds, give_up_seconds=self._give_up_seconds)
        self._loops.append(loop)
        self._tasks.append(asyncio.create_task(loop.run(self.stopping), name=f"loop-{name}"))

    def wake(self, *names: str) -> None:
        """Start the next pass of these loops now; without names, of all loops."""
        for loop in self._loops:
            if not names or loop.name in names:
                loop.waker.set()

    def troubles(self) -> dict[str, OngoingFailure]:
        """The loops that are failing now, by name."""
        return {loop.name: loop.trouble for loop in self._loops if loop.trouble is not None}

    async def stop(self) -> None:
        """Stop the loops; the next start continues any interrupted work."""
        # Loops are signalled instead of cancelled: cancelling a statement loses its connection, and redis-py may
        # swallow a cancellation in asyncio.wait_for (bpo-42130). Only a hanging loop is cancelled.
        self.stopping.set()
        self.wake()
        left = set(self._tasks)
        if left:
            _, left = await asyncio.wait(left, timeout=STOP_SECONDS)
        while left:
            logger.warning("%s did not stop in time.", ", ".join(task.get_name() for task in left))
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1.0)
        self._loops, self._tasks = [], []


async def try_each(items: Iterable[Item], act: Callable[[Item], Awaitable[None]]) -> Exception | None:
    """Call ``act`` for every item even if some fail; returns the first failure. An outage is raised immediately."""
    first: Exception | None = None
    for item in items:
        try:
            await act(item)
        except EXPECTED_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - the caller raises it
            first = first or error
    return first


def raise_first(*failures: Exception | None) -> None:
    """Raise the first failure, if there is one."""
    for failure in failures:
        if failure is not None:
            raise failure


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event for at most ``seconds``."""
    if seconds <= 0:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
