"""The engine of a server process: hands jobs over, answers claims, keeps the events, watches the workers.

One `Engine` per process, inside its event loop. Several servers on one PostgreSQL may each run one: every change is
made under the job's row lock and guarded by the state it expects, so whoever comes second changes nothing. Its loops
(`server.engine.loops`) outlive every outage of Redis and of the database.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from redis.exceptions import ResponseError

from server.database.db import Database
from server.engine.checks import Checks
from server.engine.courier import Courier
from server.engine.fleet import Fleet
from server.engine.keeper import Keeper
from server.engine.link import Dropped, connect, remove_wrong_type, tell_worker
from server.engine.loops import STOP_SECONDS, Loops, Pace
from server.engine.redis_claim import RENEW_SECONDS, RedisClaim
from server.engine.scheduler import Scheduler
from server.engine.stored import Stored
from server.engine.watch import Watch
from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.messages import WORKERS_HASH, Heartbeat
from zeta_core.contract.redis_access import RedisUnavailable, calling_redis

LOOK_SECONDS = 0.5  # how often the heartbeats are read
JOB_PACE = Pace(idle_seconds=1.0, rest_factor=3.0, idle_factor=20.0)  # of the queue and of the running jobs

logger = logging.getLogger(__name__)


class Engine:
    """What the HTTP side needs: `wake` after it changed a job, `stored` to follow events, `workers`, `checks`."""

    def __init__(self, database: Database, settings: ServerSettings, service: str) -> None:
        """``service`` is the id of the service that the database belongs to."""
        self.database = database
        self.settings = settings
        self.stored = Stored()
        self.dropped = Dropped()
        self.loops = Loops()
        self._fleet = Fleet(settings.worker_secret)
        self._redis = connect(settings.redis_url)
        self._claim = RedisClaim(self._redis, settings.redis_url, service)
        self._courier = Courier(settings.redis_url, self._redis, settings.worker_secret)
        self._keeper = Keeper(database, self._redis, settings, self.stored, self.dropped, self.wake)
        self._scheduler = Scheduler(
            database,
            self._fleet,
            self._courier.send,
            claim_seconds=settings.claim_seconds,
            project_max_running=settings.project_max_running,
        )
        self._watch = Watch(database, self._fleet, self._tell, self.stored, self.wake, lease=settings.lease_seconds)
        self.checks = Checks(database, self._fleet, self._tell, limit_seconds=settings.check_seconds)

    async def start(self) -> None:
        """Start the loops; Redis and the database may be away, the loops wait for them.

        Raises `InvalidSettings` where Redis belongs to another service.
        """
        try:
            await self._claim.take()
        except InvalidSettings:
            await self._redis.aclose()
            self._courier.close()
            raise
        self.loops.start("claim", self._claim.one_pass, Pace(idle_seconds=RENEW_SECONDS))
        self.loops.start("keeper", self._read_messages, Pace())
        self.loops.start("fleet", self._look_at_workers, Pace(idle_seconds=LOOK_SECONDS))
        self.loops.start("scheduler", self._scheduler.one_pass, JOB_PACE)
        for name, one_pass in self._watch.passes().items():
            self.loops.start(name, one_pass, JOB_PACE)

    async def stop(self) -> None:
        """End the loops; whatever was under way is taken up again by the next start."""
        await self.loops.stop()
        with suppress(RedisUnavailable, TimeoutError):  # without Redis there is no group to leave
            async with asyncio.timeout(STOP_SECONDS):
                await self._claim.release()
                await self._keeper.leave()
        with suppress(Exception):
            await self._redis.aclose()
        self._courier.close()

    def wake(self) -> None:
        """A job was queued, cancelled or resumed: look at the queue and the running jobs now."""
        self.loops.wake("scheduler", *self._watch.passes())

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

    async def _read_messages(self) -> None:
        self._claim.require()
        await self._keeper.one_pass()

    async def _look_at_workers(self) -> None:
        """Read the heartbeats, and wake the scheduler when a worker came or a slot changed.

        The server, which alone knows for how long one has been silent, also removes those of workers that are gone.
        """
        try:
            self._claim.require()
            with calling_redis():
                entries = await self._heartbeats()
                changed = self._fleet.update(entries)
                invalid = self._fleet.invalid()
                gone = self._fleet.unlisted()
                if remove := [*invalid, *gone]:
                    await self._redis.hdel(WORKERS_HASH, *remove)
        except RedisUnavailable:
            self._fleet.unreachable()
            raise
        for reason in invalid.values():
            self.dropped.add("heartbeats", reason)
        if gone:
            self._fleet.forget(gone)
        if changed:
            self.wake()

    async def _heartbeats(self) -> dict[bytes, bytes]:
        try:
            entries: Any = await self._redis.hgetall(WORKERS_HASH)
        except ResponseError as error:
            if not await remove_wrong_type(self._redis, WORKERS_HASH, "hash", error):
                raise
            self.dropped.counts["heartbeats"] += 1
            return {}
        return entries

    async def _tell(self, worker: str, message: BaseModel) -> None:
        self._claim.require()
        await tell_worker(self._redis, worker, message, self.settings.worker_secret)
