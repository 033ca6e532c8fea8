"""The resources that the monitors of running jobs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from server.database.connections import Database
from server.engine.event_signal import EventSignal
from server.engine.known_workers import KnownWorkers
from server.engine.lost_attempts import LostAttempts
from server.engine.redis_client import SendToWorker
from server.engine.worker_secrets import WorkerSecrets


@dataclass(frozen=True)
class MonitorResources:
    """``slot_freed`` wakes the scheduler; the server's lease on an attempt lasts ``lease_seconds``."""

    database: Database
    workers: KnownWorkers
    secrets: WorkerSecrets
    send_to_worker: SendToWorker
    event_signal: EventSignal
    slot_freed: Callable[[], None]
    lease_seconds: float

    def lost_attempts(self) -> LostAttempts:
        """A new search for lost attempts; each monitor needs its own, because it remembers what it has seen."""
        return LostAttempts(self.workers, self.secrets, lease_seconds=self.lease_seconds)
