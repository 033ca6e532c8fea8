"""What running and dispatched jobs occupy, and whether the limits of a project let another job start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.projects import limits_by_project
from server.database.tables import JobRow
from server.engine.candidate import Wait
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.job.status import JobStatus, WaitingCode


@dataclass
class Load:
    """Occupied slots by worker, and the jobs and GPUs by project; ``own_limits`` are those that were set."""

    default_limits: ProjectLimits
    own_limits: Mapping[str, Mapping[str, Any]]
    slots: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    jobs: Counter[str] = field(default_factory=Counter[str])
    gpus: Counter[str] = field(default_factory=Counter[str])

    def add(self, project: str, gpus: int) -> None:
        """Count a job that starts."""
        self.jobs[project] += 1
        self.gpus[project] += gpus

    def quota_wait(self, project: str, gpus: int) -> Wait | None:
        """The limit of the project that makes a job with this many GPUs wait, or ``None``."""
        limits = self.default_limits.with_own(self.own_limits.get(project, {}))
        if limits.max_running_jobs is not None and self.jobs[project] >= limits.max_running_jobs:
            return Wait(
                WaitingCode.QUOTA,
                (("limit", limits.max_running_jobs),),
                "The project is at its limit of running jobs (max_running_jobs, by default ZETA_PROJECT_MAX_RUNNING); "
                "the job starts when one of them ends.",
            )
        if limits.max_gpus is not None and gpus > 0 and self.gpus[project] + gpus > limits.max_gpus:
            return Wait(
                WaitingCode.QUOTA,
                (("limit", limits.max_gpus), ("needed", gpus)),
                "The project is at its limit of GPUs (max_gpus, by default ZETA_PROJECT_MAX_GPUS); the job starts when "
                "enough of them are free.",
            )
        return None


async def read_load(session: AsyncSession, default_limits: ProjectLimits) -> Load:
    load = Load(default_limits, await limits_by_project(session))
    gpus_column = JobRow.resolved_spec_json["resources"]["gpus"].as_integer()
    rows = await session.execute(
        select(JobRow.project, JobRow.worker, JobRow.slots, gpus_column).where(
            JobRow.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]), JobRow.worker.is_not(None)
        )
    )
    for project, worker, slots, gpus in rows:
        load.slots.setdefault(str(worker), set()).update(slots or [])
        load.add(project, gpus or 0)
    return load
