"""The resources of one server process: settings, database, artifact store, engine, and the shutdown signal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

from server import receipt_signing
from server.artifact_ownership import claim_store
from server.artifacts import Artifacts
from server.auth import RECORD_USES_SECONDS, Caller, Keys, register_admin_key
from server.database.connections import Database
from server.database.schema import require_schema
from server.database.service_identity import identify_service
from server.engine.engine import Engine
from server.engine.event_signal import Subscription
from server.engine.job_removal import RETRY_SECONDS, finish_deletions
from server.engine.loops import Pace
from server.http.request_rates import RequestRates
from server.http.stream_limits import StreamLimits
from server.notifications import long_waits, notifier
from server.notifications.notifier import Notifier
from server.sessions import Sessions
from server.settings import ServerSettings
from server.tracing import Tracing
from server.uploads import removals
from server.uploads.expiry import EXPIRY_SECONDS, remove_expired
from server.uploads.quota import OpenUploads
from zeta_core.system.artifact_store import open_store
from zeta_core.system.home_folder import require_protected


class ShutdownSignal:
    """The shutdown signal. Streaming responses check `requested`, and are woken when shutdown begins."""

    def __init__(self) -> None:
        self.requested = False
        self._waiting: set[Subscription] = set()

    def request(self) -> None:
        self.requested = True
        for subscription in self._waiting:
            subscription.notify()

    @contextmanager
    def wakes(self, subscription: Subscription) -> Generator[None]:
        self._waiting.add(subscription)
        try:
            yield
        finally:
            self._waiting.discard(subscription)


@dataclass(frozen=True)
class Service:
    settings: ServerSettings
    database: Database
    artifacts: Artifacts
    engine: Engine
    uploads: OpenUploads
    keys: Keys
    sessions: Sessions
    streams: StreamLimits
    rates: RequestRates
    tracing: Tracing | None = None
    stopping: ShutdownSignal = field(default_factory=ShutdownSignal)

    async def count_request(self, caller: Caller) -> None:
        """Count a request or page of the caller's project; those of admin keys are exempt.

        Raises `QuotaExceeded` if the project is at its limit.
        """
        limit = caller.limits.max_requests_per_minute
        if limit is not None and not caller.is_admin:
            await self.rates.count(caller.project, limit)


@asynccontextmanager
async def open_service(settings: ServerSettings, tracing: Tracing | None = None) -> AsyncGenerator[Service]:
    """Open all resources and start the engine, which exports traces of jobs with ``tracing``.

    Raises a `ZetaError` that names the setting to fix.
    """
    require_protected(settings.home)
    database = Database(settings.database)
    try:
        await require_schema(database)
        artifacts = Artifacts(open_store(settings), min_free_bytes=settings.server_min_free_bytes)
        service = await identify_service(database)
        await asyncio.to_thread(artifacts.prepare)
        engine = Engine(database, settings, service, tracing)
        await engine.claim()  # first, so that a server that refuses to start changes neither store nor admin key
        try:
            await asyncio.to_thread(claim_store, settings, artifacts.store, service)
            await asyncio.to_thread(artifacts.remove_abandoned_uploads)
            await register_admin_key(database, settings.api_key)
            engine.start()
            uploads = OpenUploads(database, artifacts)
            keys = Keys(database, default_limits=settings.project_limits)
            sessions = Sessions(database, keys, service)
            streams = StreamLimits(settings.key_max_streams)
            rates = RequestRates(engine.request_counts)
            messages = Notifier(database, settings, wake=partial(engine.loops.wake, "notifications"))
            _start_loops(engine, artifacts, keys, messages)
            try:
                yield Service(settings, database, artifacts, engine, uploads, keys, sessions, streams, rates, tracing)
            finally:
                await messages.stop()
        finally:
            await engine.stop()
    finally:
        await database.close()


def _start_loops(engine: Engine, artifacts: Artifacts, keys: Keys, messages: Notifier) -> None:
    """Start the background loops that are not part of the engine."""
    database, loops = engine.database, engine.loops
    deletions = partial(finish_deletions, database, artifacts)
    loops.start("deletions", deletions, Pace(idle_seconds=RETRY_SECONDS), limit_seconds=None)
    expiry = partial(remove_expired, database, artifacts)
    loops.start("uploads", expiry, Pace(idle_seconds=EXPIRY_SECONDS), limit_seconds=None)
    due = partial(removals.remove_due, database, artifacts)
    loops.start("removals", due, Pace(idle_seconds=removals.PACE_SECONDS), limit_seconds=None)
    loops.start("key uses", keys.record_uses, Pace(idle_seconds=RECORD_USES_SECONDS))
    loops.start("notifications", messages.one_pass, Pace(idle_seconds=notifier.IDLE_SECONDS))
    waits = partial(long_waits.announce_long_waits, database, engine.settings.webhook_wait_seconds)
    loops.start("long waits", waits, Pace(idle_seconds=long_waits.PACE_SECONDS))
    signing = partial(receipt_signing.sign_receipts, database, artifacts)
    loops.start("receipts", signing, Pace(idle_seconds=receipt_signing.PACE_SECONDS))
