"""Records the usage of workers' machines: the means of short intervals for an hour, and of longer ones for a week.

The measurements come with the heartbeats. Several servers may record the same interval; the first one to store it
counts. So the table has at most about 2,300 rows for each worker, however long the service runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete

from server.database.connections import Database
from server.database.inserts import dialect_insert
from server.database.usage_table import UsageRow
from server.engine.known_workers import KnownWorkers
from zeta_core.contract.job.machine_usage import MAX_HOURS, GpuUsage, MachineUsage

READ_SECONDS = 2.5  # the pause between two readings of the newest measurements
CLEANUP_SECONDS = 300.0
MAX_PENDING_ROWS = 20_000  # during an outage of the database


@dataclass(frozen=True)
class Resolution:
    """An interval, and for how long its means are kept."""

    interval_seconds: int
    kept: timedelta

    def start_of(self, moment: float) -> int:
        """The start of the interval, in seconds since 1970."""
        return int(moment // self.interval_seconds) * self.interval_seconds


FINE = Resolution(15, timedelta(hours=1))
COARSE = Resolution(300, timedelta(hours=MAX_HOURS))
RESOLUTIONS = (FINE, COARSE)


@dataclass
class _Mean:
    """The mean of the numbers so far; ``None`` without any."""

    total: float = 0.0
    count: int = 0

    def add(self, number: float | None) -> None:
        if number is not None:
            self.total, self.count = self.total + number, self.count + 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _GpuMeans:
    utilization: _Mean = field(default_factory=_Mean)
    memory_bytes: _Mean = field(default_factory=_Mean)


@dataclass
class _Interval:
    """The means of one worker in an interval that began at ``started_at`` (seconds since 1970)."""

    started_at: int
    cpu: _Mean = field(default_factory=_Mean)
    memory_bytes: _Mean = field(default_factory=_Mean)
    gpus: dict[str, _GpuMeans] = field(default_factory=dict[str, _GpuMeans])

    def add(self, usage: MachineUsage) -> None:
        self.cpu.add(usage.cpu)
        self.memory_bytes.add(usage.memory_bytes)
        for gpu in usage.gpus:
            means = self.gpus.setdefault(gpu.device, _GpuMeans())
            means.utilization.add(gpu.utilization)
            means.memory_bytes.add(gpu.memory_bytes)

    def row(self, worker: str, resolution: Resolution) -> dict[str, Any]:
        """The values of the `UsageRow`."""
        gpus = [
            GpuUsage(
                device=device,
                utilization=means.utilization.value,
                memory_bytes=round(means.memory_bytes.value or 0),
            )
            for device, means in self.gpus.items()
        ]
        return {
            "worker": worker,
            "interval_seconds": resolution.interval_seconds,
            "started_at": datetime.fromtimestamp(self.started_at, UTC),
            "cpu": self.cpu.value,
            "memory_bytes": round(self.memory_bytes.value or 0),
            "gpus": [gpu.model_dump() for gpu in gpus],
        }


class UsageHistory:
    def __init__(
        self, database: Database, workers: KnownWorkers, system_clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._workers = workers
        self._system_clock = system_clock
        self._last_measured_at: dict[str, datetime] = {}  # by worker
        self._intervals: dict[tuple[str, Resolution], _Interval] = {}  # in progress
        self._pending: list[dict[str, Any]] = []  # rows of complete intervals that are not stored yet
        self._next_cleanup = 0.0  # monotonic

    async def one_pass(self) -> None:
        """Add the newest measurements, and store the intervals that are complete. Raises `DatabaseUnavailable`."""
        now = self._system_clock()
        self._finish_intervals(now)
        for beat in self._workers.workers():
            if beat.usage is not None and self._workers.is_alive(beat.worker):
                self._add(beat.worker, beat.usage, now)
        if self._pending:
            await self._store()
        if time.monotonic() >= self._next_cleanup:
            await self._remove_old(now)
            self._next_cleanup = time.monotonic() + CLEANUP_SECONDS

    def _add(self, worker: str, usage: MachineUsage, now: float) -> None:
        if self._last_measured_at.get(worker) == usage.measured_at:
            return  # the worker has not measured since the previous pass
        self._last_measured_at[worker] = usage.measured_at
        for resolution in RESOLUTIONS:
            interval = self._intervals.setdefault((worker, resolution), _Interval(resolution.start_of(now)))
            interval.add(usage)

    def _finish_intervals(self, now: float) -> None:
        for (worker, resolution), interval in list(self._intervals.items()):
            if interval.started_at != resolution.start_of(now):
                self._pending.append(interval.row(worker, resolution))
                del self._intervals[worker, resolution]
        del self._pending[:-MAX_PENDING_ROWS]

    async def _store(self) -> None:
        rows = list(self._pending)
        async with self._database.write() as session:
            await session.execute(dialect_insert(session, UsageRow).on_conflict_do_nothing(), rows)
        self._pending.clear()

    async def _remove_old(self, now: float) -> None:
        known = {beat.worker for beat in self._workers.workers()}
        self._last_measured_at = {name: at for name, at in self._last_measured_at.items() if name in known}
        async with self._database.write() as session:
            for resolution in RESOLUTIONS:
                oldest = datetime.fromtimestamp(now, UTC) - resolution.kept
                is_old = (UsageRow.interval_seconds == resolution.interval_seconds) & (UsageRow.started_at < oldest)
                await session.execute(delete(UsageRow).where(is_old))
