"""Creates, lists and deletes projects. A key that isn't an admin key sees only its own project."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller, project_not_found
from server.database.pagination import PageQuery, page, storable
from server.database.projects import contents, ensure_project
from server.database.tables import ProjectRow, SweepRow
from server.service import Service
from zeta_core.contract.access import DEFAULT_PROJECT, NewProject, Project
from zeta_core.contract.errors import Conflict
from zeta_core.contract.job.responses import DeletedObject, Page


async def create_project(service: Service, caller: Caller, request: NewProject) -> Project:
    """Create an empty project. Raises `Conflict` if it exists."""
    async with service.database.write() as session:
        if not await ensure_project(session, request.name, created_by=caller.key_id):
            raise Conflict(f"Project {request.name} exists already; use it, or choose another name.", code="name_taken")
        row = await session.get_one(ProjectRow, request.name)
        session.add(caller.audit_row("project.create", row.name, project=row.name))
    return _to_project(row)


async def list_projects(service: Service, caller: Caller, page_query: PageQuery) -> Page[Project]:
    """One page, sorted by name; ``after`` is the last name of the previous page."""
    query = select(ProjectRow).order_by(ProjectRow.name).limit(page_query.limit + 1)
    if not caller.is_admin:
        query = query.where(ProjectRow.name == caller.project)
    if page_query.after is not None:
        query = query.where(ProjectRow.name > storable(page_query.after))
    async with service.database.read() as session:
        rows = list(await session.scalars(query))
    projects = [_to_project(row) for row in rows[: page_query.limit]]
    return page(projects, len(rows) > page_query.limit, lambda project: project.name)


async def get_project(service: Service, caller: Caller, name: str) -> Project:
    """One project. Raises `NotFound`, also for a project that the caller may not see."""
    async with service.database.read() as session:
        return _to_project(await _find(session, caller, name))


async def delete_project(service: Service, caller: Caller, name: str) -> DeletedObject:
    """Delete an empty project. Raises `NotFound`, and `Conflict` if it contains anything."""
    async with service.database.write() as session:
        row = await _find(session, caller, name, lock=True)
        if name == DEFAULT_PROJECT:
            raise Conflict(f"Project {name} belongs to the service and can't be deleted.", code="project_in_use")
        if (contained := await contents(session, name)) is not None:
            raise Conflict(
                f"Project {name} contains {contained}; delete its jobs and files and revoke its keys first.",
                code="project_in_use",
            )
        await session.execute(delete(SweepRow).where(SweepRow.project == name))  # their jobs are deleted
        await session.delete(row)
        session.add(caller.audit_row("project.delete", name, project=name))
    return DeletedObject(id=name, object="project")


async def _find(session: AsyncSession, caller: Caller, name: str, *, lock: bool = False) -> ProjectRow:
    is_visible = caller.is_admin or name == caller.project
    row = await session.get(ProjectRow, storable(name), with_for_update=lock) if is_visible else None
    if row is None:
        raise project_not_found(name)
    return row


def _to_project(row: ProjectRow) -> Project:
    return Project(name=row.name, created_at=row.created_at, created_by=row.created_by)
