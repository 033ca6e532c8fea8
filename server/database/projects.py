"""Creates projects, reads their limits, and counts what they contain and use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.access_tables import KeyRow, ProjectRow
from server.database.file_tables import FileRow, UploadPartRow, UploadRow
from server.database.inserts import dialect_insert
from server.database.job_counts import jobs_by_project
from server.database.tables import CheckpointRow, JobRow
from zeta_core.contract.access import ProjectUsage
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus


async def ensure_project(session: AsyncSession, name: str, *, created_by: str) -> bool:
    """Create the project unless it exists, and lock it until the transaction ends. Returns whether it is new."""
    values = {"name": name, "created_by": created_by, "created_at": utc_now(), "limits": {}}
    created = dialect_insert(session, ProjectRow).values(**values).on_conflict_do_nothing().returning(ProjectRow.name)
    if await session.scalar(created) is not None:
        return True
    await session.get(ProjectRow, name, with_for_update={"read": True})  # against deletion
    return False


async def limits_by_project(session: AsyncSession) -> Mapping[str, Mapping[str, Any]]:
    """The limits that were set, by project; a project without any may be missing."""
    rows = await session.execute(select(ProjectRow.name, ProjectRow.limits))
    return {name: limits for name, limits in rows if limits}


async def stored_bytes(session: AsyncSession, projects: Collection[str]) -> Mapping[str, int]:
    """The total size of the files, parts of uploads and checkpoints of each project."""
    files, parts = (
        select(table.project, func.sum(table.bytes)).where(table.project.in_(projects)).group_by(table.project)
        for table in (FileRow, UploadPartRow)
    )
    checkpoints = (
        select(JobRow.project, func.sum(CheckpointRow.bytes))
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(JobRow.project.in_(projects))
        .group_by(JobRow.project)
    )
    totals = Counter(dict.fromkeys(projects, 0))
    for query in (files, parts, checkpoints):
        for project, num_bytes in await session.execute(query):
            totals[project] += int(num_bytes)
    return totals


async def usage(session: AsyncSession, projects: Collection[str]) -> Mapping[str, ProjectUsage]:
    """What each of these projects uses now."""
    counts = await jobs_by_project(session)
    gpus: Counter[str] = Counter()
    running = select(JobRow.project, JobRow.resolved_spec_json["resources"]["gpus"].as_integer()).where(
        JobRow.status == JobStatus.RUNNING, JobRow.project.in_(projects)
    )
    for project, num_gpus in await session.execute(running):
        gpus[project] += num_gpus or 0
    stored = await stored_bytes(session, projects)
    return {
        project: ProjectUsage(
            queued_jobs=counts.get((project, JobStatus.QUEUED), 0),
            running_jobs=counts.get((project, JobStatus.RUNNING), 0),
            gpus=gpus[project],
            stored_bytes=stored[project],
        )
        for project in projects
    }


async def contents(session: AsyncSession, project: str) -> str | None:
    """What the project contains, as a phrase; ``None`` if it is empty. Ended uploads and revoked keys don't count."""
    queries = {
        "jobs": select(JobRow.id).where(JobRow.project == project),
        "files": select(FileRow.id).where(FileRow.project == project),
        "unfinished uploads": select(UploadRow.id).where(
            UploadRow.project == project, UploadRow.status == "pending", UploadRow.expires_at > utc_now()
        ),
        "keys": select(KeyRow.id).where(KeyRow.project == project, KeyRow.revoked_at.is_(None)),
    }
    kinds = [kind for kind, query in queries.items() if await session.scalar(query.limit(1)) is not None]
    return " and ".join(kinds) or None
