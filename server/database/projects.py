"""Reads and creates projects, and determines whether one is empty."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import FileRow, JobRow, KeyRow, ProjectRow
from zeta_core.contract.job.events import utc_now


async def ensure_project(session: AsyncSession, name: str, *, created_by: str) -> bool:
    """Create the project unless it exists, and lock it until the transaction ends. Returns whether it is new."""
    dialect_insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    values = {"name": name, "created_by": created_by, "created_at": utc_now(), "limits": {}}
    created = dialect_insert(ProjectRow).values(**values).on_conflict_do_nothing().returning(ProjectRow.name)
    if await session.scalar(created) is not None:
        return True
    await session.get(ProjectRow, name, with_for_update={"read": True})  # against deletion
    return False


async def contents(session: AsyncSession, project: str) -> str | None:
    """What the project contains, as a phrase; ``None`` if it is empty. Revoked keys don't count."""
    queries = {
        "jobs": select(JobRow.id).where(JobRow.project == project),
        "files": select(FileRow.id).where(FileRow.project == project),
        "keys": select(KeyRow.id).where(KeyRow.project == project, KeyRow.revoked_at.is_(None)),
    }
    kinds = [kind for kind, query in queries.items() if await session.scalar(query.limit(1)) is not None]
    return " and ".join(kinds) or None
