"""The engine of a server process: hands jobs over, answers claims, keeps the events, watches the workers.

One `Engine` per process, inside its event loop. Several servers on one PostgreSQL may each run one: every change is
made under the job's row lock and guarded by the state it expects, so whoever comes second changes nothing. Its loops
survive Redis or the database being away: they say so once, go round again, and take up what they find.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from server.database.db import Database
from server.engine.checks import Checks
from server.engine.courier import Courier
from server.engine.fleet import Fleet
from server.engine.keeper import DATABASE_AWAY, Keeper, tell_worker
from server.engine.link import REDIS_AWAY, Outage, connect
from server.engine.scheduler import Scheduler
from server.engine.stored import Stored
from server.engine.watch import Watch
from server.settings import ServerSettings
from zeta_core.contract.messages import WORKERS_HASH, Heartbeat

LOOK_SECONDS = 0.5  # how often the heartbeats are read
PASS_SECONDS = 1.0  # how often the queue and the running jobs are looked at when nothing wakes the loops
# A loop rests so many times as long as its last pass took, so that a long queue cannot fill the CPU: woken, and idle.
REST_FACTOR, IDLE_FACTOR = 3.0, 20.0
STOP_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Engine:
    """What the HTTP side needs: `wake` after it changed a job, `stored` to follow events, `workers`, `checks`."""

    def __init__(self, database: Database, settings: ServerSettings) -> None:
        self.database = database
        self.settings = settings
        self.stored = Stored()
        self._fleet = Fleet(settings.worker_secret)
        self._redis = connect(settings.redis_url)
        self._courier = Courier(settings.redis_url, settings.worker_secret)
        self._keeper = Keeper(database, self._redis, settings, self.stored, self.wake)
        self._scheduler = Scheduler(
            database,
            self._fleet,
            self._courier.send,
            claim_seconds=settings.claim_seconds,
            project_max_running=settings.project_max_running,
        )
        self._watch = Watch(database, self._fleet, self._tell, self.stored, self.wake, lease=settings.lease_seconds)
        self.checks = Checks(database, self._fleet, self._tell, limit_seconds=settings.check_seconds)
        self._look_outage = Outage("Redis cannot be reached")
        self._stopping = asyncio.Event()
        self._wakers: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the loops; Redis and the database may be away, the loops wait for them."""
        self._start("keeper", self._keeper.run(self._stopping))
        self._start("fleet", self._look_at_workers())
        for name, one_pass in (("scheduler", self._scheduler.one_pass), ("watch", self._watch.one_pass)):
            waker = asyncio.Event()
            self._wakers.append(waker)
            self._start(name, _go_round(name, one_pass, waker, self._stopping))

    async def stop(self) -> None:
        """End the loops; whatever was under way is taken up again by the next start."""
        # Told, not cancelled: a cancellation in the middle of a statement costs its connection, and one inside redis-py
        # may be hidden by asyncio.wait_for (bpo-42130). Only what hangs is cancelled.
        self._stopping.set()
        self.wake()
        left = set(self._tasks)
        if left:
            _, left = await asyncio.wait(left, timeout=STOP_SECONDS)
        while left:
            logger.warning("%s did not stop in time.", ", ".join(task.get_name() for task in left))
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1.0)
        self._tasks, self._wakers = [], []
        with suppress(*REDIS_AWAY, TimeoutError):  # without Redis there is no group to leave
            async with asyncio.timeout(STOP_SECONDS):
                await self._keeper.leave()
        await self._redis.aclose()
        self._courier.close()

    def wake(self) -> None:
        """A job was queued, cancelled or resumed: look at the queue and the running jobs now."""
        for waker in self._wakers:
            waker.set()

    @property
    def redis_ok(self) -> bool:
        """Whether Redis answered the last time it was asked."""
        return self._fleet.watching

    def workers(self) -> list[Heartbeat]:
        """The last heartbeat of every worker heard within a day, by name."""
        return self._fleet.workers()

    def last_seen_at(self, worker: str) -> datetime | None:
        """When this server saw the worker's newest heartbeat, on this server's clock."""
        return self._fleet.last_seen_at(worker)

    def is_alive(self, worker: str) -> bool:
        """Whether the worker's heartbeat moved within the last `HEARTBEAT_GONE_SECONDS`."""
        return self._fleet.is_alive(worker)

    def _start(self, name: str, loop: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await loop
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.critical("The loop %r ended, which is a fault in the server", name, exc_info=True)
                raise

        self._tasks.append(asyncio.create_task(run(), name=f"engine-{name}"))

    async def _look_at_workers(self) -> None:
        """Read the heartbeats, and wake the scheduler when a worker came or a slot changed.

        The server, which alone knows for how long one has been silent, also removes those of workers that are gone.
        """
        while not self._stopping.is_set():
            try:
                entries: Any = await self._redis.hgetall(WORKERS_HASH)
                changed = self._fleet.update(entries)
                if gone := self._fleet.unlisted():
                    await self._redis.hdel(WORKERS_HASH, *gone)
                    self._fleet.forget(gone)
                self._look_outage.ended()
                if changed:
                    self.wake()
            except REDIS_AWAY as error:
                self._fleet.unreachable()
                self._look_outage.began(error)
            await _rest(self._stopping, LOOK_SECONDS)

    async def _tell(self, worker: str, message: BaseModel) -> None:
        await tell_worker(self._redis, worker, message, self.settings.worker_secret)


async def _go_round(
    name: str, one_pass: Callable[[], Awaitable[None]], waker: asyncio.Event, stopping: asyncio.Event
) -> None:
    """Run the pass again and again: when woken, and at least every `PASS_SECONDS`."""
    outage = Outage(f"The {name} cannot work")
    while not stopping.is_set():
        waker.clear()
        began = time.monotonic()
        try:
            await one_pass()
            outage.ended()
        except (*DATABASE_AWAY, *REDIS_AWAY) as error:
            outage.began(error)
        except Exception:
            # One bad row must not end the loop that all jobs depend on; the next pass tries again.
            logger.exception("A pass of the %s failed", name)
        took = time.monotonic() - began
        await _rest(stopping, min(5.0, REST_FACTOR * took))
        await _rest(waker, max(PASS_SECONDS, IDLE_FACTOR * took))


async def _rest(until: asyncio.Event, seconds: float) -> None:
    """Wait for the event, but no longer than ``seconds``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await until.wait()
