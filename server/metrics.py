"""Prometheus metrics for ``GET /metrics``. No label contains a job id, so the number of series stays small.

Each scrape reads the counts in the database, which takes the same time for any number of jobs. Queue waits and requests
are counted since the process started.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import select

from server.database.job_counts import jobs_by_project
from server.database.tables import JobEndRow, JobRow
from server.service import Service
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WAIT_BUCKETS_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 3600, 6 * 3600, 24 * 3600)


class _Totals(Collector):
    """A counter with one label whose totals are maintained elsewhere and assigned to ``values`` before a scrape."""

    def __init__(self, name: str, help_text: str, label: str) -> None:
        self._name, self._help_text, self._labelnames = name, help_text, (label,)
        self.values: Mapping[str, int] = {}

    def collect(self) -> list[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._help_text, labels=self._labelnames)
        for value, count in sorted(self.values.items()):
            family.add_metric([value], count)
        return [family]


class JobMetrics:
    """Metrics of jobs, queue waits, workers and slots, from the database and the engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._jobs = Gauge("zeta_jobs", "Jobs by status.", ("status",), registry=registry)
        self._project_jobs = Gauge(
            "zeta_project_jobs", "Jobs by project and status.", ("project", "status"), registry=registry
        )
        self._slots = Gauge("zeta_slots", "Slots of connected workers.", ("state",), registry=registry)
        self._workers = Gauge("zeta_workers", "Connected workers.", registry=registry)
        self._redis = Gauge("zeta_redis_up", "Whether Redis is reachable from this server.", registry=registry)
        self._waits = Histogram(
            "zeta_queue_wait_seconds",
            "Time from a job's submission to its first start.",
            buckets=WAIT_BUCKETS_SECONDS,
            registry=registry,
        )
        # In the database, so that it survives restarts and deleted jobs.
        self._ends = _Totals("zeta_job_ends", "Jobs that have ended, by reason.", "reason")
        self._dropped = _Totals("zeta_dropped_messages", "Messages removed from Redis without effect.", "place")
        self._rejected = _Totals(
            "zeta_rejected_messages", "Messages of workers that were invalid, late or replayed, by reason.", "reason"
        )
        self._failing = Gauge("zeta_failing_loops", "Loops of this server that are failing now.", registry=registry)
        registry.register(self._ends)
        registry.register(self._dropped)
        registry.register(self._rejected)
        self._seen_until = utc_now()

    async def text(self, service: Service) -> bytes:
        """All metrics of the registry in Prometheus's text format."""
        async with service.database.read() as session:
            counts = await jobs_by_project(session)
            by_reason = await session.execute(select(JobEndRow.reason, JobEndRow.count))
            starts = await session.execute(
                select(JobRow.created_at, JobRow.started_at).where(JobRow.started_at > self._seen_until)
            )
        for status in JobStatus:
            self._jobs.labels(status.value).set(sum(num for (_, other), num in counts.items() if other == status))
        for (project, status), count in counts.items():
            self._project_jobs.labels(project, status).set(count)
        self._ends.values = dict(by_reason.tuples().all())
        for created_at, started_at in starts.tuples():
            if started_at is not None:
                self._waits.observe(max(0.0, (started_at - created_at).total_seconds()))
                self._seen_until = max(self._seen_until, started_at)
        workers = [beat for beat in service.engine.workers() if service.engine.is_alive(beat.worker)]
        slots = [slot for beat in workers for slot in beat.slots]
        busy = sum(slot.job_id is not None for slot in slots)
        self._workers.set(len(workers))
        self._slots.labels("busy").set(busy)
        self._slots.labels("free").set(len(slots) - busy)
        self._redis.set(service.engine.redis_ok)
        by_worker = {f"worker {beat.worker}": beat.num_dropped for beat in service.engine.workers()}
        self._dropped.values = {**service.engine.dropped.counts, **by_worker}
        self._rejected.values = service.engine.dropped.rejected
        self._failing.set(len(service.engine.loops.troubles()))
        return generate_latest(self._registry)
