"""Creates, lists, changes and deletes projects. A key that isn't an admin key sees only its own project."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller, project_not_found
from server.database.access_tables import ProjectRow
from server.database.nul_characters import replace_nul
from server.database.pagination import PageQuery, page
from server.database.projects import contents, ensure_project, usage
from server.database.tables import ModelNameRow, SweepRow
from server.database.webhook_tables import DeliveryRow, WebhookRow
from server.service import Service
from zeta_core.contract.access import DEFAULT_PROJECT, NO_LIMITS, NewProject, Project, ProjectChange, ProjectLimits
from zeta_core.contract.errors import Conflict, InvalidRequest
from zeta_core.contract.job.responses import DeletedObject, Page


async def create_project(service: Service, caller: Caller, request: NewProject) -> Project:
    """Create an empty project. Raises `Conflict` if it exists, and `InvalidRequest` for a limit that is too large."""
    limits = _limits_to_store(service, request.limits)
    async with service.database.write() as session:
        if not await ensure_project(session, request.name, created_by=caller.key_id):
            raise Conflict(f"Project {request.name} exists already; use it, or choose another name.", code="name_taken")
        row = await session.get_one(ProjectRow, request.name)
        row.limits = {name: limit for name, limit in limits.items() if limit is not None}
        session.add(caller.audit_row("project.create", row.name, project=row.name, **row.limits))
        await session.flush()
        return await _to_project(service, session, row)


async def list_projects(service: Service, caller: Caller, page_query: PageQuery) -> Page[Project]:
    """One page, sorted by name; ``after`` is the last name of the previous page."""
    query = select(ProjectRow).order_by(ProjectRow.name).limit(page_query.limit + 1)
    if not caller.is_admin:
        query = query.where(ProjectRow.name == caller.project)
    if page_query.after is not None:
        query = query.where(ProjectRow.name > replace_nul(page_query.after))
    async with service.database.read() as session:
        rows = list(await session.scalars(query))
        projects = await _to_projects(service, session, rows[: page_query.limit])
    return page(projects, len(rows) > page_query.limit, lambda project: project.name)


async def get_project(service: Service, caller: Caller, name: str) -> Project:
    """One project. Raises `NotFound`, also for a project that the caller may not see."""
    async with service.database.read() as session:
        return await _to_project(service, session, await _find(session, caller, name))


async def change_project(service: Service, caller: Caller, name: str, request: ProjectChange) -> Project:
    """Set limits; this server applies them at once, others within a second.

    Raises `NotFound`, and `InvalidRequest` for a limit that is too large.
    """
    changed = _limits_to_store(service, request.limits)
    async with service.database.write() as session:
        row = await _find(session, caller, name, lock=True)
        row.limits = {key: limit for key, limit in {**row.limits, **changed}.items() if limit is not None}
        if changed:
            session.add(caller.audit_row("project.change", name, project=name, **changed))
        await session.flush()
        project = await _to_project(service, session, row)
    service.keys.clear_cache()
    service.engine.wake()
    return project


async def delete_project(service: Service, caller: Caller, name: str) -> DeletedObject:
    """Delete an empty project. Raises `NotFound`, and `Conflict` if it contains anything."""
    async with service.database.write() as session:
        row = await _find(session, caller, name, lock=True)
        if name == DEFAULT_PROJECT:
            raise Conflict(f"Project {name} belongs to the service and can't be deleted.", code="project_in_use")
        if (contained := await contents(session, name)) is not None:
            raise Conflict(
                f"Project {name} contains {contained}; delete its jobs and files, complete or "
                "cancel its uploads, and revoke its keys first.",
                code="project_in_use",
            )
        # What a project without jobs, files and keys may still contain.
        for table in (SweepRow, ModelNameRow, DeliveryRow, WebhookRow):
            await session.execute(delete(table).where(table.project == name))
        await session.delete(row)
        session.add(caller.audit_row("project.delete", name, project=name))
    return DeletedObject(id=name, object="project")


async def _find(session: AsyncSession, caller: Caller, name: str, *, lock: bool = False) -> ProjectRow:
    is_visible = caller.is_admin or name == caller.project
    row = await session.get(ProjectRow, replace_nul(name), with_for_update=lock) if is_visible else None
    if row is None:
        raise project_not_found(name)
    return row


def _limits_to_store(service: Service, limits: ProjectLimits) -> dict[str, int | None]:
    """The limits that a request sets. Raises `InvalidRequest` for an upload size that the server doesn't accept."""
    most, own = service.settings.max_upload_bytes, limits.max_upload_bytes
    if own is not None and own > most:
        raise InvalidRequest(
            f"limits.max_upload_bytes is {own}, and this server accepts at most {most} bytes (ZETA_MAX_UPLOAD_BYTES); "
            "use a smaller limit.",
            code="invalid_value",
            param="limits.max_upload_bytes",
        )
    return limits.model_dump(exclude_unset=True)


async def _to_project(service: Service, session: AsyncSession, row: ProjectRow) -> Project:
    return (await _to_projects(service, session, [row]))[0]


async def _to_projects(service: Service, session: AsyncSession, rows: Sequence[ProjectRow]) -> list[Project]:
    used = await usage(session, [row.name for row in rows])
    defaults = service.settings.project_limits
    return [
        Project(
            name=row.name,
            created_at=row.created_at,
            created_by=row.created_by,
            limits=NO_LIMITS.with_own(row.limits).model_dump(),
            effective_limits=defaults.with_own(row.limits).model_dump(),
            usage=used[row.name],
        )
        for row in rows
    ]
