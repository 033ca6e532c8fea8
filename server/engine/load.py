"""What running and dispatched jobs occupy, and whether the limits of a project let another job start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.placements import unreleased_placements
from server.database.projects import limits_by_project
from server.database.tables import JobRow
from server.engine.candidate import Wait
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.job.status import JobStatus, WaitingCode


@dataclass
class Load:
    """Occupied slots by worker, and the jobs and GPUs by project; ``own_limits`` are those that were set.

    ``placements`` are, by job, the workers that still hold a node of one of its attempts.
    """

    default_limits: ProjectLimits
    own_limits: Mapping[str, Mapping[str, Any]]
    slots: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    jobs: Counter[str] = field(default_factory=Counter[str])
    gpus: Counter[str] = field(default_factory=Counter[str])
    placements: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, project: str, gpus: int) -> None:
        """Count a job that starts."""
        self.jobs[project] += 1
        self.gpus[project] += gpus

    def ending_wait(self, job_id: str) -> Wait | None:
        """Why a queued job waits for the workers of its last attempt, or ``None``."""
        workers = self.placements.get(job_id)
        if not workers:
            return None
        message = (
            f"The last attempt has not ended yet on {' and '.join(workers)}; the next one starts when it has, or when "
            "the server has lost contact with them."
        )
        return Wait(WaitingCode.ENDING, (("workers", ", ".join(workers)),), message)

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
    resources = JobRow.resolved_spec_json["resources"]
    gpus_column, nodes_column = resources["gpus"].as_integer(), resources["nodes"].as_integer()
    rows = await session.execute(
        select(JobRow.project, JobRow.worker, JobRow.slots, gpus_column, nodes_column).where(
            JobRow.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]), JobRow.worker.is_not(None)
        )
    )
    for project, worker, slots, gpus, nodes in rows:
        load.slots.setdefault(str(worker), set()).update(slots or [])
        load.add(project, (gpus or 0) * (nodes or 1))
    for placement in await unreleased_placements(session):
        load.slots.setdefault(placement.worker, set()).update(placement.slots)
        load.placements.setdefault(placement.job_id, []).append(placement.worker)
    return load
