"""Records the use of workers' machines: the means of short intervals for an hour, and of longer ones for a week.

The measurements come with the heartbeats. Several servers may record the same interval; the first one to store it
counts. So the table has at most about 2,300 rows for each worker, however long the service runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite

from server.database.connections import Database
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
class _Sums:
    """The measurements of one worker in one interval."""

    started_at: int
    measurements: list[MachineUsage] = field(default_factory=list[MachineUsage])

    def row(self, worker: str, resolution: Resolution) -> dict[str, Any]:
        """The values of the `UsageRow`."""
        return {
            "worker": worker,
            "interval_seconds": resolution.interval_seconds,
            "started_at": datetime.fromtimestamp(self.started_at, UTC),
            "cpu": _mean(measured.cpu for measured in self.measurements),
            "memory_bytes": round(_mean(measured.memory_bytes for measured in self.measurements)),
            "gpus": [gpu.model_dump() for gpu in self._gpus()],
        }

    def _gpus(self) -> Iterable[GpuUsage]:
        by_device: dict[str, list[GpuUsage]] = {}
        for measured in self.measurements:
            for gpu in measured.gpus:
                by_device.setdefault(gpu.device, []).append(gpu)
        for device, usages in by_device.items():
            known = [usage.utilization for usage in usages if usage.utilization is not None]
            memory_bytes = round(_mean(usage.memory_bytes for usage in usages))
            yield GpuUsage(device=device, utilization=_mean(known) if known else None, memory_bytes=memory_bytes)


class UsageHistory:
    def __init__(
        self, database: Database, workers: KnownWorkers, system_clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._workers = workers
        self._system_clock = system_clock
        self._last_measured_at: dict[str, datetime] = {}  # by worker
        self._sums: dict[tuple[str, Resolution], _Sums] = {}
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
            sums = self._sums.setdefault((worker, resolution), _Sums(resolution.start_of(now)))
            sums.measurements.append(usage)

    def _finish_intervals(self, now: float) -> None:
        for (worker, resolution), sums in list(self._sums.items()):
            if sums.started_at != resolution.start_of(now):
                self._pending.append(sums.row(worker, resolution))
                del self._sums[worker, resolution]
        del self._pending[:-MAX_PENDING_ROWS]

    async def _store(self) -> None:
        rows = list(self._pending)
        async with self._database.write() as session:
            dialect_insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
            await session.execute(dialect_insert(UsageRow).on_conflict_do_nothing(), rows)
        self._pending.clear()

    async def _remove_old(self, now: float) -> None:
        async with self._database.write() as session:
            for resolution in RESOLUTIONS:
                oldest = datetime.fromtimestamp(now, UTC) - resolution.kept
                is_old = (UsageRow.interval_seconds == resolution.interval_seconds) & (UsageRow.started_at < oldest)
                await session.execute(delete(UsageRow).where(is_old))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
