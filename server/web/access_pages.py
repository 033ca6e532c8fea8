"""The administrators' pages: API keys, projects, and the audit log."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server import audit, keys, projects
from server.database.pagination import MAX_LIMIT, PageQuery
from server.http.proxies import public_path
from server.routes.routing import TheService
from server.service import Service
from server.web.pages import AdminPage, PageRouter
from zeta_core.contract.access import SCOPE_SENTENCES, CreatedKey, KeyRotation, NewKey, NewProject, Scope
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.spec.validation import parse

router = PageRouter()
ENTRIES_PER_PAGE = 100
MAX_DAYS = 3650
_OFFERED = (Scope.SUBMIT, Scope.READ, Scope.ADMIN, Scope.METRICS)  # the most common one first


class AuditPageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = None
    object_id: str | None = Field(default=None, max_length=200)


@router.get("/keys")
async def show_keys(service: TheService, page: AdminPage) -> Response:
    """The keys of all projects, without their texts."""
    return await _render_keys(service, page)


@router.post("/keys")
async def create_key(service: TheService, page: AdminPage) -> Response:
    """Create a key, and show its text once."""
    try:
        created = await keys.create_key(service, page.caller, _new_key(page))
    except ZetaError as error:
        return await _render_keys(service, page, error=error)
    return await _render_keys(service, page, created=created)


@router.post("/keys/{key_id}/rotate")
async def rotate_key(service: TheService, page: AdminPage, key_id: str) -> Response:
    """Replace the text of a key, and show the new one once."""
    created = await keys.rotate_key(service, page.caller, key_id, KeyRotation())
    return await _render_keys(service, page, created=created)


@router.post("/keys/{key_id}/revoke")
async def revoke_key(service: TheService, page: AdminPage, key_id: str) -> Response:
    """Revoke a key and end its sessions."""
    await keys.revoke_key(service, page.caller, key_id)
    return page.redirect("/keys")


@router.get("/projects")
async def show_projects(service: TheService, page: AdminPage) -> Response:
    """The projects, to choose the one that this session acts in."""
    return await _render_projects(service, page)


@router.post("/projects")
async def create_project(service: TheService, page: AdminPage) -> Response:
    """Create a project."""
    try:
        request = parse(NewProject, {"name": page.form.get("name", "").strip()}, error_class=InvalidRequest)
        await projects.create_project(service, page.caller, request)
    except ZetaError as error:
        return await _render_projects(service, page, error=error)
    return page.redirect("/projects")


@router.post("/projects/{project}/choose")
async def choose_project(service: TheService, page: AdminPage, project: str) -> Response:
    """Let this session act in the project, and show its jobs."""
    token = page.request.cookies[service.sessions.cookie_name]
    await service.sessions.choose_project(token, page.caller, project)
    return page.redirect("/")


@router.get("/audit")
async def show_audit(service: TheService, page: AdminPage, query: Annotated[AuditPageQuery, Query()]) -> Response:
    """Who changed what, newest first."""
    filters = audit.AuditQuery(limit=ENTRIES_PER_PAGE, after=query.after, object_id=query.object_id or None)
    entries = await audit.list_entries(service, filters)
    return page.render("audit.html", entries=entries, query=query)


def _new_key(page: AdminPage) -> NewKey:
    """The request that the form describes. Raises `InvalidRequest`."""
    form = page.form
    days = form.get("days", "").strip()
    if days and not (days.isdecimal() and len(days) <= 4 and 1 <= int(days) <= MAX_DAYS):
        raise InvalidRequest(f"The key must expire in 1 to {MAX_DAYS} days, or never.", param="expires_at")
    data = {
        "name": form.get("name", "").strip(),
        "project": form.get("project", "").strip(),
        "scopes": [form.get("scope", "")],
        "expires_at": (utc_now() + timedelta(days=int(days))).isoformat() if days else None,
    }
    return parse(NewKey, data, error_class=InvalidRequest)


async def _render_keys(
    service: Service, page: AdminPage, created: CreatedKey | None = None, error: ZetaError | None = None
) -> Response:
    listed = await keys.list_keys(service, None, PageQuery(limit=MAX_LIMIT), include_revoked=False)
    request = page.request
    return page.render(
        "keys.html",
        status=200 if error is None else 422,
        keys=listed.data,
        created=created,
        error=error,
        form=page.form if error else {},
        scopes={scope.value: SCOPE_SENTENCES[scope] for scope in _OFFERED},
        server_url=f"{request.url.scheme}://{request.url.netloc}{public_path(request, '')}",
    )


async def _render_projects(service: Service, page: AdminPage, error: ZetaError | None = None) -> Response:
    listed = await projects.list_projects(service, page.caller, PageQuery(limit=MAX_LIMIT))
    return page.render("projects.html", status=200 if error is None else 422, projects=listed.data, error=error)
