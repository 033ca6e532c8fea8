"""The loops of a server process: each repeats one pass, and none ends while the process lives.

An exception of any kind in a pass is an outage: it is logged once, with its traceback where it is not an ordinary one,
shown by ``/readyz``, and tried again with growing pauses until a pass succeeds. A pass that hangs is cancelled at its
time limit, which is an outage too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from server.database.availability import DatabaseUnavailable
from zeta_core.contract.events import utc_now
from zeta_core.contract.redis_access import RedisUnavailable

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 2.0
STOP_SECONDS = 5.0
# Passes take milliseconds; everything they wait for has a shorter limit of its own.
PASS_LIMIT_SECONDS = 300.0
ORDINARY = (DatabaseUnavailable, RedisUnavailable, OSError)  # these explain themselves

logger = logging.getLogger(__name__)
Pass = Callable[[], Awaitable[None]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Trouble:
    """Why a loop makes no progress, and since when."""

    since: datetime
    reason: str

    def __str__(self) -> str:
        return f"failing since {self.since.isoformat(timespec='seconds')}: {self.reason}"


@dataclass(frozen=True)
class Pace:
    """How long a loop rests after a pass: until it is woken, at most the longest of these.

    A pass rests for at least ``rest_factor`` times its own duration even if it is woken, and ``idle_factor`` times if
    it is not, so that a long queue cannot fill the CPU.
    """

    idle_seconds: float = 0.0
    rest_factor: float = 0.0
    idle_factor: float = 0.0


class Loop:
    """One loop; ``trouble`` is set from the first failed pass to the next successful one."""

    def __init__(self, name: str, one_pass: Pass, pace: Pace, *, limit_seconds: float | None) -> None:
        self.name = name
        self.trouble: Trouble | None = None
        self.waker = asyncio.Event()
        self._one_pass, self._pace, self._limit_seconds = one_pass, pace, limit_seconds
        self._logged: set[str] = set()  # kinds of errors of the present outage
        self._pause_seconds = FIRST_PAUSE_SECONDS

    async def run(self, stopping: asyncio.Event) -> None:
        """Repeat the pass until told to stop, or cancelled."""
        while not stopping.is_set():
            self.waker.clear()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._limit_seconds):
                    await self._one_pass()
            except BaseException as error:
                task = asyncio.current_task()
                if (task is not None and task.cancelling()) or isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                self._failed(error)
                await rest(stopping, self._pause_seconds)
                self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
                continue
            self._succeeded()
            took = time.monotonic() - began
            await rest(stopping, min(5.0, self._pace.rest_factor * took))
            await rest(self.waker, max(self._pace.idle_seconds, self._pace.idle_factor * took))

    def _failed(self, error: BaseException) -> None:
        is_ordinary = isinstance(error, ORDINARY)
        reason = _sentence(error) if is_ordinary else f"{type(error).__name__}, see the server's log"
        self.trouble = Trouble(self.trouble.since if self.trouble else utc_now(), reason)
        kind = type(error).__qualname__
        if kind not in self._logged:
            logger.log(
                logging.WARNING if is_ordinary else logging.ERROR,
                "The loop %r fails: %s. Trying again until it works.",
                self.name,
                _sentence(error),
                exc_info=None if is_ordinary else error,
                extra={"action": "outage", "loop": self.name},
            )
        self._logged.add(kind)

    def _succeeded(self) -> None:
        if self.trouble is not None:
            logger.info("The loop %r works again.", self.name, extra={"action": "outage_over", "loop": self.name})
        self.trouble = None
        self._logged.clear()
        self._pause_seconds = FIRST_PAUSE_SECONDS


class Loops:
    """The loops of one process, started and stopped together."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self._loops: list[Loop] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, one_pass: Pass, pace: Pace, *, limit_seconds: float | None = PASS_LIMIT_SECONDS) -> None:
        loop = Loop(name, one_pass, pace, limit_seconds=limit_seconds)
        self._loops.append(loop)
        self._tasks.append(asyncio.create_task(loop.run(self.stopping), name=f"loop-{name}"))

    def wake(self, *names: str) -> None:
        """End the rest of these loops, or of all."""
        for loop in self._loops:
            if not names or loop.name in names:
                loop.waker.set()

    def troubles(self) -> dict[str, Trouble]:
        """What fails now, by the name of the loop."""
        return {loop.name: loop.trouble for loop in self._loops if loop.trouble is not None}

    async def stop(self) -> None:
        """End the loops; whatever was under way is taken up again by the next start."""
        # Told, not cancelled: a cancellation in the middle of a statement costs its connection, and one inside redis-py
        # may be hidden by asyncio.wait_for (bpo-42130). Only what hangs is cancelled.
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
    """Act on every item, also where it fails for some; returns the first failure. An outage is raised at once."""
    first: Exception | None = None
    for item in items:
        try:
            await act(item)
        except ORDINARY:
            raise
        except Exception as error:  # noqa: BLE001 - the caller raises it
            first = first or error
    return first


def raise_first(*failures: Exception | None) -> None:
    """Raise the first failure, if there is one."""
    for failure in failures:
        if failure is not None:
            raise failure


async def rest(until: asyncio.Event, seconds: float) -> None:
    """Wait for the event, but no longer than ``seconds``."""
    if seconds <= 0:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await until.wait()


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__
