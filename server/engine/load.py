"""The slots in use, the times when they become free, and whether the limits of a project let another job start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.placements import unreleased_placements
from server.database.projects import limits_by_project
from server.database.tables import AttemptRow, JobRow
from server.engine.candidate import Wait
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.job.kind import BACKGROUND_KINDS
from zeta_core.contract.job.status import JobStatus, WaitingCode


@dataclass
class Load:
    """Occupied slots by worker, and the jobs, GPUs and slots by project; ``own_limits`` are those that were set.

    ``placements`` are, by job, the workers that still hold a node of one of its attempts. ``seconds_left`` are the
    expected times until slots become free, by worker and slot; it lacks those that can't be estimated. Background slots
    count for no project.
    """

    default_limits: ProjectLimits
    own_limits: Mapping[str, Mapping[str, Any]]
    slots: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    jobs: Counter[str] = field(default_factory=Counter[str])
    gpus: Counter[str] = field(default_factory=Counter[str])
    held_slots: Counter[str] = field(default_factory=Counter[str])
    placements: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    seconds_left: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])

    @property
    def key(self) -> object:
        """The parts of the load that determine which jobs may start."""
        return self.own_limits, self.jobs, self.gpus, self.placements

    def copy(self) -> Load:
        """A copy to which `add` can count further jobs."""
        return replace(self, jobs=self.jobs.copy(), gpus=self.gpus.copy(), held_slots=self.held_slots.copy())

    def add(self, project: str, gpus: int, slots: int) -> None:
        """Count a job that starts."""
        self.jobs[project] += 1
        self.gpus[project] += gpus
        self.held_slots[project] += slots

    def limits(self, project: str) -> ProjectLimits:
        return self.default_limits.with_own(self.own_limits.get(project, {}))

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
        limits = self.limits(project)
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
    """The load of all workers and projects."""
    load = Load(default_limits, await limits_by_project(session))
    await _add_jobs(session, load, JobRow.worker.is_not(None))
    return load


async def read_load_for_dispatch(
    session: AsyncSession, default_limits: ProjectLimits, projects: Collection[str], workers: Collection[str]
) -> Load:
    """The part of the load that decides whether jobs of ``projects`` may still start on ``workers``.

    The jobs of a project on other workers are read only if the project has limits, so the cost of a dispatch doesn't
    grow with the number of running jobs.
    """
    load = Load(default_limits, await limits_by_project(session))
    relevant, limits = JobRow.worker.in_(workers), {project: load.limits(project) for project in projects}
    if limited := [project for project, own in limits.items() if (own.max_running_jobs, own.max_gpus) != (None, None)]:
        relevant = or_(relevant, JobRow.project.in_(limited))
    await _add_jobs(session, load, and_(JobRow.worker.is_not(None), relevant))
    return load


async def _add_jobs(session: AsyncSession, load: Load, condition: ColumnElement[bool]) -> None:
    """Add the jobs on workers for which the condition is true, and all placements that are not released."""
    resources = JobRow.resolved_spec_json["resources"]
    rows = await session.execute(
        select(
            JobRow.id,
            JobRow.kind,
            JobRow.project,
            JobRow.worker,
            JobRow.slots,
            resources["gpus"].as_integer().label("gpus"),
            resources["nodes"].as_integer().label("nodes"),
            JobRow.progress["eta_seconds"].as_float().label("eta_seconds"),
            JobRow.spec["time_limit_seconds"].as_float().label("time_limit"),
            _ran_seconds().label("ran_seconds"),
        ).where(JobRow.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]), condition)
    )
    seconds_left: dict[str, float] = {}  # by job
    for row in rows:
        slots, nodes = set(row.slots or []), row.nodes or 1
        load.slots.setdefault(str(row.worker), set()).update(slots)
        is_background = row.kind in BACKGROUND_KINDS
        load.add(row.project, (row.gpus or 0) * nodes, 0 if is_background else len(slots) * nodes)
        left = expected_seconds(row.eta_seconds, row.time_limit, row.ran_seconds or 0.0)
        if left is not None:
            seconds_left[row.id] = left
            load.seconds_left.setdefault(str(row.worker), {}).update(dict.fromkeys(slots, left))
    for placement in await unreleased_placements(session):
        load.slots.setdefault(placement.worker, set()).update(placement.slots)
        load.placements.setdefault(placement.job_id, []).append(placement.worker)
        if (left := seconds_left.get(placement.job_id)) is not None:
            load.seconds_left.setdefault(placement.worker, {}).update(dict.fromkeys(placement.slots, left))


def expected_seconds(eta_seconds: float | None, time_limit: float | None, ran_seconds: float = 0.0) -> float | None:
    """How long a job is expected to run from now; ``None`` if that can't be estimated.

    The estimate is that of its training, which includes all its remaining steps. A time limit is an upper bound.
    """
    limit = None if time_limit is None else max(0.0, time_limit - ran_seconds)
    known = [max(0.0, seconds) for seconds in (eta_seconds, limit) if seconds is not None]
    return min(known, default=None)


def _ran_seconds() -> ColumnElement[float | None]:
    """The running time of all attempts of a job, which is recorded only if the job has a time limit."""
    total = select(func.sum(AttemptRow.ran_seconds)).where(AttemptRow.job_id == JobRow.id)
    return total.correlate(JobRow).scalar_subquery()
