"""The engine of a server process: schedules jobs, answers claims, stores events and monitors workers.

There is one `Engine` per process, inside its event loop. Several servers on one PostgreSQL may each run one: every
change takes the job's row lock and checks the expected state, so a concurrent change by another server has no effect.
Its loops (`server.engine.loops`) survive outages of Redis and of the database.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from pydantic import BaseModel
from redis.exceptions import ResponseError

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.job_counts import MERGE_SECONDS, merge_counts
from server.database.tables import JobRow
from server.engine import database_claim, redis_claim, usage_history, worker_secrets
from server.engine.answers import KEEP_ALIVE_PACE_SECONDS, Answers
from server.engine.database_claim import DatabaseClaim
from server.engine.dispatcher import Dispatcher
from server.engine.event_signal import EventSignal
from server.engine.halving import SweepHalving
from server.engine.job_monitor import JobMonitor
from server.engine.job_traces import JobTraces
from server.engine.known_workers import KnownWorkers
from server.engine.loops import STOP_SECONDS, BackgroundLoops, Pace
from server.engine.message_consumer import MessageConsumer
from server.engine.monitor_resources import MonitorResources
from server.engine.new_events import NewEventReader
from server.engine.nodes.monitor import NodeMonitor
from server.engine.redis_claim import RedisClaim
from server.engine.redis_client import DroppedMessages, connect, remove_wrong_type, send_to_worker
from server.engine.scheduler import Scheduler
from server.engine.shared_counts import SharedCounts
from server.engine.signed_messages import SignedMessages
from server.engine.spec_checks import SpecChecks
from server.engine.usage_history import UsageHistory
from server.engine.worker_secrets import WorkerSecrets
from server.settings import ServerSettings
from server.tracing import Tracing
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.wire.messages import WORKERS_HASH, Heartbeat
from zeta_core.system.redis_access import RedisUnavailable, calling_redis

HEARTBEAT_SECONDS = 0.5  # the interval of reading the heartbeats
JOB_PACE = Pace(idle_seconds=1.0, rest_factor=3.0, idle_factor=20.0)  # of the loops over queued and running jobs

logger = logging.getLogger(__name__)


class Engine:
    """The HTTP layer calls `wake` or `wake_scheduler` after it has changed a job.

    It also uses `event_signal`, `new_events`, `workers`, `spec_checks`, `answers` and `request_counts`.
    """

    def __init__(
        self, database: Database, settings: ServerSettings, service: str, tracing: Tracing | None = None
    ) -> None:
        """``service`` is the id of the service that the database belongs to."""
        self.database = database
        self.settings = settings
        self.event_signal = EventSignal()
        self.new_events = NewEventReader(database, self.event_signal)
        self.dropped = DroppedMessages()
        self.loops = BackgroundLoops()
        self.secrets = WorkerSecrets(settings.worker_secret, allow_shared=settings.shared_worker_secret)
        self._workers = KnownWorkers(self.secrets)
        self._redis = connect(settings.redis_url)
        self.request_counts = SharedCounts(self._redis)
        self._redis_claim = RedisClaim(self._redis, settings.redis_url, service)
        self._database_claim = DatabaseClaim(database, self._redis, settings.redis_url)
        self._dispatcher = Dispatcher(settings.redis_url, self._redis, self.secrets)
        self._consumer = MessageConsumer(
            database,
            self._redis,
            settings,
            self.secrets,
            self.event_signal,
            self.dropped,
            self.wake,
            JobTraces(database, tracing),
        )
        self._scheduler = Scheduler(
            database,
            self._workers,
            self._dispatcher.send,
            claim_seconds=settings.claim_seconds,
            default_limits=settings.project_limits,
            half_life_seconds=settings.fair_share_half_life_seconds,
        )
        monitor_resources = self._monitor_resources()
        self._monitor = JobMonitor(monitor_resources)
        self._node_monitor = NodeMonitor(
            monitor_resources, claim_seconds=settings.claim_seconds, prepare_seconds=settings.prepare_seconds
        )
        self._usage_history = UsageHistory(database, self._workers)
        self._halving = SweepHalving(database, self.event_signal, self.wake)
        self.spec_checks = SpecChecks(
            database, self._workers, self._send_to_worker, limit_seconds=settings.check_seconds
        )
        self.answers = Answers(
            database,
            self._redis,
            self._workers,
            self._send_to_worker,
            self.dropped,
            SignedMessages(self.secrets),
            wake=lambda: self.loops.wake("answers"),
        )

    def _monitor_resources(self) -> MonitorResources:
        return MonitorResources(
            self.database,
            self._workers,
            self.secrets,
            self._send_to_worker,
            self.event_signal,
            self.wake,
            self.settings.lease_seconds,
        )

    async def claim(self) -> None:
        """Claim Redis and the database for each other. If one of them is unavailable, the loops retry.

        Raises `InvalidSettings` if Redis belongs to another service, or if the database is in use with another Redis.
        """
        with suppress(DatabaseUnavailable):
            await self.load_secrets()
        try:
            await self._redis_claim.take()
            await self._database_claim.take()
        except InvalidSettings:
            await self.stop()
            raise

    def start(self) -> None:
        """Start the loops, after `claim`. If Redis or the database is unavailable, the loops retry."""
        renewals = (
            ("redis claim", self._redis_claim.one_pass, redis_claim.RENEW_SECONDS),
            ("database claim", self._renew_database_claim, database_claim.RENEW_SECONDS),
        )
        for name, one_pass, seconds in renewals:
            self.loops.start(name, one_pass, Pace(idle_seconds=seconds))
        self.loops.start("worker secrets", self.load_secrets, Pace(idle_seconds=worker_secrets.REFRESH_SECONDS))
        self.loops.start("messages", self._read_messages, Pace())
        self.loops.start("heartbeats", self._read_heartbeats, Pace(idle_seconds=HEARTBEAT_SECONDS))
        self.loops.start("scheduler", self._scheduler.one_pass, JOB_PACE)
        self.loops.start("sweeps", self._halving.one_pass, JOB_PACE)
        self.loops.start("job counts", partial(merge_counts, self.database), Pace(idle_seconds=MERGE_SECONDS))
        self.loops.start("usage history", self._usage_history.one_pass, Pace(idle_seconds=usage_history.READ_SECONDS))
        self.loops.start("nodes", self._node_monitor.one_pass, JOB_PACE)
        for name, one_pass in self._monitor.passes().items():
            self.loops.start(name, one_pass, JOB_PACE)
        self.loops.start("answers", self._read_answers, Pace(idle_seconds=HEARTBEAT_SECONDS))
        self.loops.start("open requests", self.answers.keep_alive, Pace(idle_seconds=KEEP_ALIVE_PACE_SECONDS))

    async def load_secrets(self) -> None:
        """Read which secrets of workers are valid. Raises `DatabaseUnavailable`."""
        await self.secrets.load(self.database)

    async def stop(self) -> None:
        """Stop the loops; the next start continues any interrupted work."""
        await self.loops.stop()
        with suppress(RedisUnavailable, DatabaseUnavailable, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._database_claim.release()
        with suppress(RedisUnavailable, TimeoutError):  # without Redis there is no consumer group to leave
            async with asyncio.timeout(STOP_SECONDS):
                await self._redis_claim.release()
                await self._consumer.leave()
        with suppress(RedisUnavailable), calling_redis():
            await self._redis.aclose()
        self._dispatcher.close()

    def wake(self) -> None:
        """Process the queue and the running jobs now, because a job was cancelled, paused or resumed."""
        self._scheduler.queue_changed()
        self.loops.wake("scheduler", "nodes", *self._monitor.passes())

    def wake_scheduler(self) -> None:
        """Process the queue now, because a job was queued with the reason of `waiting_reason_of`."""
        self.loops.wake("scheduler")

    def waiting_reason_of(self, job: JobRow) -> dict[str, Any] | None:
        """The waiting reason of a job that is being queued; ``None`` if it will probably start now."""
        return self._scheduler.explain(job)

    @property
    def redis_ok(self) -> bool:
        """Whether the most recent Redis call succeeded."""
        return self._workers.is_connected

    def workers(self) -> list[Heartbeat]:
        """The latest heartbeat of every worker that was seen within a day, sorted by name."""
        return self._workers.workers()

    def heartbeat(self, worker: str) -> Heartbeat | None:
        """The latest heartbeat of a worker that was seen within a day."""
        return next((beat for beat in self.workers() if beat.worker == worker), None)

    def last_seen_at(self, worker: str) -> datetime | None:
        """When this server received the worker's latest heartbeat, on this server's clock."""
        return self._workers.last_seen_at(worker)

    def is_alive(self, worker: str) -> bool:
        """Whether a new heartbeat of the worker arrived within the last `HEARTBEAT_GONE_SECONDS`."""
        return self._workers.is_alive(worker)

    def clock_ahead_seconds(self, worker: str) -> float | None:
        """By how much the worker's clock is ahead of this server's; ``None`` if that is not known."""
        return self._workers.clock_ahead_seconds(worker)

    async def _renew_database_claim(self) -> None:
        self._redis_claim.require()
        await self._database_claim.one_pass()

    def _require_claims(self) -> None:
        """Raise `RedisUnavailable` unless Redis and the database are claimed for each other, and secrets are known."""
        self._redis_claim.require()
        self._database_claim.require()
        self.secrets.require()

    async def _read_messages(self) -> None:
        self._require_claims()
        await self._consumer.one_pass()

    async def _read_answers(self) -> None:
        """Read the parts of answers, without a pause while there are open requests."""
        if self.answers.has_open:
            self._require_claims()
            await self.answers.read_parts()
            self.loops.wake("answers")

    async def _read_heartbeats(self) -> None:
        """Read the heartbeats, and wake the scheduler when a worker appeared or a slot changed.

        This also removes the heartbeats of workers that have been silent for a day.
        """
        try:
            self._require_claims()
            with calling_redis():
                entries = await self._fetch_heartbeats()
                changed = self._workers.update(entries)
                gone = self._workers.expired_workers()
                if remove := [*self._workers.invalid, *gone]:
                    await self._redis.hdel(WORKERS_HASH, *remove)
                for key, rejection in self._workers.secret_rejections:
                    await send_to_worker(self._redis, rejection, key)
        except RedisUnavailable:
            self._workers.record_outage()
            raise
        for error in (*self._workers.invalid.values(), *self._workers.rejected):
            self.dropped.count_invalid("heartbeats", error)
        if gone:
            self._workers.forget(gone)
        if changed:
            self.wake()

    async def _fetch_heartbeats(self) -> dict[bytes, bytes]:
        try:
            entries: Any = await self._redis.hgetall(WORKERS_HASH)
        except ResponseError as error:
            if not await remove_wrong_type(self._redis, WORKERS_HASH, "hash", error):
                raise
            self.dropped.counts["heartbeats"] += 1
            return {}
        return entries

    async def _send_to_worker(self, worker: str, message: BaseModel) -> None:
        self._require_claims()
        await send_to_worker(self._redis, message, self.secrets.key_for_sending(worker))
