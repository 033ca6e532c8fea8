"""/v1/keys, /v1/projects and /v1/audit: who may use the service, and who changed what."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import Field

from server import audit, keys, projects
from server.database.pagination import PageQuery, cursor
from server.http.bodies import read_body
from server.http.proxies import public_path
from server.routes.routing import MAX_SMALL_BODY_BYTES, Router, TheCaller, TheService, json_body
from zeta_core.contract.access import (
    AuditEntry,
    CreatedKey,
    Key,
    KeyRotation,
    NewKey,
    NewProject,
    Project,
    ProjectChange,
)
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import NEW_ID_PATTERN
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.spec.validation import parse

router = Router(prefix="/v1", tags=["keys and projects"])


class KeyQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="key"))
    project: str | None = Field(default=None, description="only keys of this project")
    include_revoked: bool = Field(default=False, description="also list revoked keys")


@router.post("/keys", status_code=201, openapi_extra=json_body("NewKey", required=True))
async def create_key(service: TheService, caller: TheCaller, request: Request, response: Response) -> CreatedKey:
    """Create an API key. The response contains its text, which can't be shown again."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES)
    created = await keys.create_key(service, caller, parse(NewKey, data, error_class=InvalidRequest))
    response.headers["Location"] = public_path(request, f"/v1/keys/{created.id}")
    return created


@router.get("/keys")
async def list_keys(service: TheService, query: Annotated[KeyQuery, Query()]) -> Page[Key]:
    """List the keys of all projects or of one, newest first, without their texts."""
    return await keys.list_keys(service, query.project, query, include_revoked=query.include_revoked)


@router.get("/keys/me")
async def get_own_key(service: TheService, caller: TheCaller) -> Key:
    """Return the key of this request: its project and scopes."""
    return await keys.get_key(service, caller.key_id)


@router.get("/keys/{key_id}")
async def get_key(service: TheService, key_id: str) -> Key:
    """Return a key without its text."""
    return await keys.get_key(service, key_id)


@router.post("/keys/{key_id}/rotate", openapi_extra=json_body("KeyRotation", required=False))
async def rotate_key(service: TheService, caller: TheCaller, request: Request, key_id: str) -> CreatedKey:
    """Replace the text of a key. With `grace_seconds`, the old text continues to work for that time."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES, empty={})
    return await keys.rotate_key(service, caller, key_id, parse(KeyRotation, data, error_class=InvalidRequest))


@router.delete("/keys/{key_id}")
async def revoke_key(service: TheService, caller: TheCaller, key_id: str) -> DeletedObject:
    """Revoke a key. Other servers of the service accept it for at most one more second."""
    return await keys.revoke_key(service, caller, key_id)


@router.post("/projects", status_code=201, openapi_extra=json_body("NewProject", required=True))
async def create_project(service: TheService, caller: TheCaller, request: Request, response: Response) -> Project:
    """Create a project."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES)
    created = await projects.create_project(service, caller, parse(NewProject, data, error_class=InvalidRequest))
    response.headers["Location"] = public_path(request, f"/v1/projects/{created.name}")
    return created


@router.get("/projects")
async def list_projects(service: TheService, caller: TheCaller, query: Annotated[PageQuery, Query()]) -> Page[Project]:
    """List projects by name: all of them for an admin key, otherwise the project of the key."""
    return await projects.list_projects(service, caller, query)


@router.get("/projects/{project}")
async def get_project(service: TheService, caller: TheCaller, project: str) -> Project:
    """Return a project."""
    return await projects.get_project(service, caller, project)


@router.patch("/projects/{project}", openapi_extra=json_body("ProjectChange", required=False))
async def change_project(service: TheService, caller: TheCaller, request: Request, project: str) -> Project:
    """Set limits of a project. Limits that are absent stay, and null restores the default."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES, empty={})
    change = parse(ProjectChange, data, error_class=InvalidRequest)
    return await projects.change_project(service, caller, project, change)


@router.delete("/projects/{project}")
async def delete_project(service: TheService, caller: TheCaller, project: str) -> DeletedObject:
    """Delete a project without jobs, files and keys. Its model names are deleted, too."""
    return await projects.delete_project(service, caller, project)


@router.get("/audit")
async def list_audit_entries(service: TheService, query: Annotated[audit.AuditQuery, Query()]) -> Page[AuditEntry]:
    """List the changes that requests made, newest first."""
    return await audit.list_entries(service, query)
