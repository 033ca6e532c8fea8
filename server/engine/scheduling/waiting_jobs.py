"""Converts rows of the queue to the jobs that the plan considers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from server.engine.candidate import Wait
from server.engine.endings import MAX_BACKOFF_SECONDS
from server.engine.load import Load, expected_seconds
from server.engine.requirements import requirements
from server.engine.scheduling.input_keys import input_keys
from server.engine.scheduling.plan import WaitingJob
from server.engine.scheduling.queue_pages import QueuedRow
from zeta_core.contract.job.status import WaitingCode

REDIS_UNREACHABLE = Wait(
    WaitingCode.NO_WORKER, message="Redis is unreachable, so workers can't be reached; see the server log."
)


def waiting_job(row: QueuedRow, load: Load, now: datetime, *, is_connected: bool) -> WaitingJob:
    """The job of a row. ``is_connected`` is whether Redis, and therefore the workers, can be reached."""
    needs = requirements(
        kind=row.kind,
        attempt=row.attempt,
        resources=row.resources,
        resolved_resources=row.resolved_resources,
        resolved_threads=row.resolved_threads,
        device_kind=row.device_kind,
        time_limit=row.time_limit,
        resumed=row.resumed,
        elastic=row.elastic,
        global_batch_size=row.global_batch_size,
    )
    return WaitingJob(
        id=row.id,
        project=row.project,
        priority=row.priority,
        created_at=row.created_at,
        attempt=row.attempt,
        needs=needs,
        blocked=_blocking_reason(row, load, now) if is_connected else REDIS_UNREACHABLE,
        inputs=input_keys(row.project, row.model if row.resolved_model is None else row.resolved_model, row.dataset),
        expected_seconds=expected_seconds(row.eta_seconds, needs.max_seconds),
    )


def backoff_seconds(row: QueuedRow, now: datetime) -> float | None:
    """How long the back-off of the job lasts after a failure; ``None`` if it has none."""
    if row.not_before is None:
        return None
    seconds = (row.not_before - now).total_seconds()
    # A time beyond the longest back-off means that the clock was set back; ignore it.
    return seconds if 0 < seconds <= MAX_BACKOFF_SECONDS else None


def _blocking_reason(row: QueuedRow, load: Load, now: datetime) -> Wait | None:
    """Why the job can't start on any worker now, if there is a reason."""
    if backoff_seconds(row, now) is None:
        return load.ending_wait(row.id)
    stored: dict[str, Any] = row.waiting_reason or {}  # with the end of the attempt
    message = stored.get("message") if stored.get("code") == WaitingCode.RETRY_BACKOFF else None
    return Wait(WaitingCode.RETRY_BACKOFF, (("until", row.not_before.isoformat()),), message)
