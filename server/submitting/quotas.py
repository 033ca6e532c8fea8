"""Applies the limits of a project to a submission.

A spec whose fields exceed a limit is invalid. A full queue or storage rejects a submission only temporarily.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.access_tables import ProjectRow
from server.database.job_counts import queued_by_priority
from server.service import Service
from zeta_core.contract.access import ProjectLimits
from zeta_core.contract.errors import ErrorDetail, QuotaExceeded
from zeta_core.contract.spec.kinds import AnySpec
from zeta_core.contract.spec.validation import error_from_details


def check_field_limits(spec: AnySpec, limits: ProjectLimits) -> None:
    """Raise `InvalidSpec` if a field exceeds a limit of the project."""
    if details := list(_faults(spec, limits)):
        raise error_from_details(details)


async def check_stored_bytes(service: Service, caller: Caller) -> None:
    """Raise `QuotaExceeded` if the project has no space left for checkpoints."""
    limit = caller.limits.max_stored_bytes
    if limit is None:
        return
    stored = await service.uploads.count_stored(caller.project)
    if stored >= limit:
        raise QuotaExceeded(
            f"Project {caller.project!r} stores {stored} bytes, and its limit is {limit} (max_stored_bytes, by default "
            "ZETA_PROJECT_QUOTA_BYTES); delete files and jobs that are no longer needed.",
        )


class QueueLimits:
    """Counts the queued jobs of projects while a transaction adds some."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self._queued: dict[str, int] = {}

    async def add(self, caller: Caller) -> None:
        """Count one more queued job. Raises `QuotaExceeded` if the project is at its limit."""
        project, limit = caller.project, caller.limits.max_queued_jobs
        if limit is None:
            return
        if project not in self._queued:
            # Locks the project, so that other servers count after this transaction (on SQLite, it is the only one).
            await self._session.get(ProjectRow, project, with_for_update=True)
            self._queued[project] = sum((await queued_by_priority(self._session, project)).values())
        if self._queued[project] >= limit:
            raise QuotaExceeded(
                f"Project {project!r} has {self._queued[project]} queued jobs, and its limit is {limit} "
                "(max_queued_jobs, by default ZETA_PROJECT_MAX_QUEUED); submit again when some have started.",
            )
        self._queued[project] += 1


def _faults(spec: AnySpec, limits: ProjectLimits) -> Iterator[ErrorDetail]:
    if limits.max_priority is not None and spec.priority > limits.max_priority:
        message = f"priority is {spec.priority}; this project may use at most {limits.max_priority} (max_priority)."
        yield ErrorDetail(param="priority", message=message, code="above_project_limit")
    gpus = spec.resources.gpus
    if limits.max_gpus is not None and isinstance(gpus, int) and gpus > limits.max_gpus:
        message = f"resources.gpus is {gpus}, above the limit of this project (max_gpus: {limits.max_gpus})."
        yield ErrorDetail(param="resources.gpus", message=message, code="above_project_limit")
