"""The heartbeat: a thread with a connection of its own, so that a slow claim or publication never looks like death."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from worker.devices import count_cores, memory_bytes
from worker.link import REDIS_AWAY, Outage, connect
from worker.settings import WorkerSettings
from zeta_core.contract.events import utc_now
from zeta_core.contract.messages import HEARTBEAT_SECONDS, WORKERS_HASH, DeviceReport, Heartbeat, sign

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What changes from beat to beat."""

    slots: tuple[DeviceReport, ...]
    stopping: bool
    disk_free_bytes: int | None
    disk_low: bool


class Pulse:
    """``report`` is called from the thread for the worker as it is now."""

    def __init__(
        self,
        settings: WorkerSettings,
        incarnation: str,
        version: str,
        report: Callable[[], Report],
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._version = version
        self._report = report
        self._started_at = utc_now()
        self._cores, self._memory_bytes = count_cores(), memory_bytes()
        self._beat = 0
        self._now = threading.Event()
        self._stopped = threading.Event()
        self.heard_at = time.monotonic()  # when the last beat that Redis took was begun
        self._thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat_now(self) -> None:
        """Something changed that the server waits for: a slot, or that this worker stops."""
        self._now.set()

    def stop(self) -> None:
        """A last beat, then none."""
        self._stopped.set()
        self._now.set()
        self._thread.join(HEARTBEAT_SECONDS * 2)

    def _beat_on(self) -> None:
        outage = Outage("The heartbeat cannot be sent")
        with connect(self._settings.redis_url) as client:
            while True:
                last = self._stopped.is_set()
                self._now.clear()
                self._beat += 1
                signed = sign(self._heartbeat(), self._settings.worker_secret, channel=WORKERS_HASH)
                try:
                    begun = time.monotonic()
                    client.hset(WORKERS_HASH, self._settings.worker_name, json.dumps(signed))
                    self.heard_at = begun
                    outage.ended()
                except REDIS_AWAY as error:
                    outage.began(error)
                if last:
                    return
                self._now.wait(HEARTBEAT_SECONDS)

    def _heartbeat(self) -> Heartbeat:
        report = self._report()
        return Heartbeat(
            worker=self._settings.worker_name,
            incarnation=self._incarnation,
            beat=self._beat,
            version=self._version,
            host=socket.gethostname(),
            started_at=self._started_at,
            cores=self._cores,
            memory_bytes=self._memory_bytes,
            labels=self._settings.worker_labels,
            stopping=report.stopping,
            disk_free_bytes=report.disk_free_bytes,
            disk_low=report.disk_low,
            slots=list(report.slots),
        )
