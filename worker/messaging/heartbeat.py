"""Sends heartbeats from a thread with its own connection, so that a slow claim or upload never looks like a crash.

Each beat also reads the entry that it replaces, and so detects another worker with the same name. Two such workers
would receive each other's messages, and the server couldn't know whose run is lost. The one that started later
gives way. A starting worker that finds the last beat of another folder first waits to see whether another one follows.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis

from worker.machine.devices import count_cores, memory_bytes
from worker.messaging.link import connect, remove_wrong_type
from worker.settings import WorkerSettings
from worker.threads import RetryingThread
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.machine_usage import MachineUsage
from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.wire.messages import (
    HEARTBEAT,
    HEARTBEAT_SECONDS,
    WORKERS_HASH,
    Heartbeat,
    parse_folder_id,
)
from zeta_core.contract.wire.signatures import BadMessage, read_heartbeat_envelope, sign_heartbeat
from zeta_core.system.redis_access import RedisUnavailable, calling_redis

EXPIRY_SECONDS = 2.5 * HEARTBEAT_SECONDS
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class WorkerState:
    """The part of a heartbeat that changes."""

    slots: tuple[DeviceReport, ...]
    background_slots: tuple[DeviceReport, ...]
    stopping: bool
    disk_free_bytes: int | None
    disk_low: bool
    failing: Mapping[str, str]
    num_dropped: int
    usage: MachineUsage | None = None
    cached_inputs: tuple[str, ...] = ()

    @property
    def all_slots(self) -> tuple[DeviceReport, ...]:
        return (*self.slots, *self.background_slots)


@dataclass(frozen=True)
class _OtherBeat:
    heartbeat: Heartbeat
    sent_at: float  # seconds since 1970, on the clock of its sender


class HeartbeatSender:
    """``report`` returns the worker's current state; it is called from the thread."""

    def __init__(
        self,
        settings: WorkerSettings,
        incarnation: str,
        version: str,
        report: Callable[[], WorkerState],
        *,
        cpu_kind: str | None,
        sandbox: str | None = None,
    ) -> None:
        self._settings = settings
        self._incarnation = incarnation
        self._version = version
        self._report = report
        self._cpu_kind, self._sandbox = cpu_kind, sandbox
        self._key = settings.worker_key
        self._started_at = utc_now()
        self._cores, self._memory_bytes = count_cores(), memory_bytes()
        self._beat = 0
        self._now = threading.Event()
        self.last_contact = time.monotonic()  # when the last beat accepted by Redis was begun (monotonic)
        self.is_name_checked = threading.Event()  # set once it is known whether another worker uses this name
        self.name_conflict: InvalidSettings | None = None  # why this worker must give way to another one
        self._other_beats: dict[str, int] = {}  # the last beat of each other process with this name
        self._client = connect(settings.redis_url)
        self.thread = RetryingThread("heartbeat", "The heartbeat cannot be sent", self._one_pass)

    def start(self) -> None:
        self.thread.start()

    def beat_now(self) -> None:
        """Send a heartbeat now, because of a change that the server should learn immediately."""
        self._now.set()

    def stop(self) -> None:
        """Send a last beat and stop."""
        self.thread.stopped.set()
        self._now.set()
        self.thread.stop(HEARTBEAT_SECONDS * 2)
        if self.is_name_checked.is_set() and self.name_conflict is None:
            with suppress(RedisUnavailable):
                self._send()
        self._client.close()

    def _one_pass(self) -> None:
        """Send one beat, then wait until the next. Raises `RedisUnavailable`."""
        if not self.is_name_checked.is_set():
            self._wait_for_other_worker()
            self.is_name_checked.set()
            if self.name_conflict is not None:
                self.thread.stopped.set()
                return
        self._now.clear()
        self._send()
        self._now.wait(HEARTBEAT_SECONDS)

    def _send(self) -> None:
        self._beat += 1
        begun = time.monotonic()
        with calling_redis():
            earlier = self._replace(sign_heartbeat(self._heartbeat(), self._key, channel=WORKERS_HASH))
        self.last_contact = begun
        if other := self._other(earlier):
            self._give_way_if_later(other)

    def _wait_for_other_worker(self) -> None:
        """Wait until it is known whether the worker that last used this name is still alive."""
        deadline = time.monotonic() + EXPIRY_SECONDS
        while self.name_conflict is None and time.monotonic() < deadline:
            try:
                with calling_redis():
                    entry: Any = self._client.hget(WORKERS_HASH, self._settings.worker_name)
            except RedisUnavailable:
                return  # each beat checks again
            other = self._other(entry)
            if other is None or parse_folder_id(other.heartbeat.incarnation) in (
                parse_folder_id(self._incarnation),
                None,
            ):
                return
            self._give_way_if_later(other)
            if self.thread.stopped.wait(POLL_SECONDS):
                return

    def _replace(self, beat: str) -> bytes | None:
        """Write the beat and return the previous entry."""
        name = self._settings.worker_name
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hget(WORKERS_HASH, name)
            pipeline.hset(WORKERS_HASH, name, beat)
            try:
                earlier, _ = pipeline.execute()
            except redis.ResponseError as error:
                remove_wrong_type(self._client, WORKERS_HASH, "hash", error)
                raise
        return earlier

    def _other(self, entry: bytes | None) -> _OtherBeat | None:
        """The beat of another process with this name."""
        if entry is None:
            return None
        try:
            envelope = read_heartbeat_envelope(entry)
            other = envelope.open(HEARTBEAT, self._key, channel=WORKERS_HASH)
        except BadMessage:
            return None  # the server ignores it, too
        is_own = other.incarnation == self._incarnation
        return None if is_own else _OtherBeat(other, sent_at=envelope.sent_at)

    def _give_way_if_later(self, found: _OtherBeat) -> None:
        """Give way to another process with this name if it is active and started earlier.

        A beat from before this process was started may have been intercepted and written into Redis again.
        """
        other = found.heartbeat
        is_active = (
            other.beat > self._other_beats.get(other.incarnation, other.beat)
            and found.sent_at > self._started_at.timestamp()
        )
        self._other_beats[other.incarnation] = other.beat
        if is_active and (other.started_at, other.incarnation) < (self._started_at, self._incarnation):
            self.name_conflict = InvalidSettings(
                f"ZETA_WORKER_NAME is {other.worker!r}, but a worker with that name already runs on {other.host}; "
                "choose another name.",
                param="ZETA_WORKER_NAME",
            )

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
            failing=dict(report.failing),
            num_dropped=report.num_dropped,
            usage=report.usage,
            cached_inputs=list(report.cached_inputs),
            cpu_kind=self._cpu_kind,
            sandbox=self._sandbox,
            data_root=self._settings.data_root is not None,
            slots=list(report.slots),
            background_slots=list(report.background_slots),
        )
