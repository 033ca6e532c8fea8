"""Creates, lists, rotates and revokes API keys. The text of a key is returned once and never stored."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import CREATED_BY_SETTINGS, Caller, sha256
from server.database.access_tables import KeyRow
from server.database.nul_characters import replace_nul
from server.database.pagination import OrderedQuery, PageQuery, newest_first, page
from server.database.projects import ensure_project
from server.service import Service
from zeta_core.contract.access import CreatedKey, Key, KeyRotation, NewKey
from zeta_core.contract.errors import Conflict, InvalidRequest, NotFound
from zeta_core.contract.identifiers import is_id, new_id_at
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.spec.validation import shown

TEXT_PREFIX = "zeta_"  # so that scanners for leaked secrets can recognize a key
TEXT_BYTES = 32


async def create_key(service: Service, caller: Caller, request: NewKey) -> CreatedKey:
    """Create a key, and its project if that doesn't exist. Raises `InvalidRequest` for an expiry in the past."""
    key_id, created_at = new_id_at("key")
    if request.expires_at is not None and request.expires_at <= created_at:
        raise InvalidRequest(
            f"expires_at is {request.expires_at.isoformat()}, which is in the past; use a later time.",
            code="invalid_value",
            param="expires_at",
        )
    text = _new_text()
    row = KeyRow(
        id=key_id,
        project=request.project,
        created_by=caller.key_id,
        name=request.name,
        scopes=sorted({scope.value for scope in request.scopes}),
        secret_sha256=sha256(text),
        created_at=created_at,
        expires_at=request.expires_at,
    )
    async with service.database.write() as session:
        is_new_project = await ensure_project(session, request.project, created_by=caller.key_id)
        if is_new_project:
            session.add(caller.audit_row("project.create", request.project, project=request.project))
        session.add(row)
        details = {"name": row.name, "scopes": row.scopes}
        session.add(caller.audit_row("key.create", row.id, project=row.project, **details))
    return CreatedKey(**_fields(row), key=text, is_new_project=is_new_project)


async def list_keys(
    service: Service, project: str | None, page_query: PageQuery, *, include_revoked: bool
) -> Page[Key]:
    """One page of the keys of a project, or of all projects, newest first."""
    query = select(KeyRow)
    if project is not None:
        query = query.where(KeyRow.project == replace_nul(project))
    if not include_revoked:
        query = query.where(KeyRow.revoked_at.is_(None))
    async with service.database.read() as session:
        matches = OrderedQuery(query, KeyRow.created_at, KeyRow.id)
        rows, has_more = await newest_first(session, KeyRow, [matches], page_query, project=None)
    return page([_to_key(row) for row in rows], has_more, lambda key: key.id)


async def get_key(service: Service, key_id: str) -> Key:
    """One key, even if it is revoked. Raises `NotFound`."""
    async with service.database.read() as session:
        return _to_key(await _find(session, key_id))


async def rotate_key(service: Service, caller: Caller, key_id: str, request: KeyRotation) -> CreatedKey:
    """Give a key a new text; the old one works for the grace period. Its id, name and scopes stay the same.

    Raises `NotFound`, and `Conflict` for a revoked key or the key in the settings.
    """
    text = _new_text()
    async with service.database.write() as session:
        row = await _find(session, key_id, lock=True)
        _require_changeable(row)
        if row.revoked_at is not None:
            raise Conflict(f"Key {key_id} is revoked; create a new key with `zeta keys create`.", code="key_revoked")
        has_grace = request.grace_seconds > 0
        row.old_secret_sha256 = row.secret_sha256 if has_grace else None
        row.old_expires_at = utc_now() + timedelta(seconds=request.grace_seconds) if has_grace else None
        row.secret_sha256 = sha256(text)
        details = {"grace_seconds": request.grace_seconds}
        session.add(caller.audit_row("key.rotate", row.id, project=row.project, **details))
    service.keys.clear_cache()
    return CreatedKey(**_fields(row), key=text)


async def revoke_key(service: Service, caller: Caller, key_id: str) -> DeletedObject:
    """Revoke a key permanently. This is idempotent. Raises `NotFound`, and `Conflict` for the key in the settings."""
    async with service.database.write() as session:
        row = await _find(session, key_id, lock=True)
        _require_changeable(row)
        if row.revoked_at is None:
            row.revoked_at = utc_now()
            session.add(caller.audit_row("key.revoke", row.id, project=row.project))
    service.keys.clear_cache()
    return DeletedObject(id=key_id, object="key")


def _require_changeable(row: KeyRow) -> None:
    if row.created_by == CREATED_BY_SETTINGS and row.revoked_at is None:
        raise Conflict(
            f"Key {row.id} is the one in the server's settings; change ZETA_API_KEY (with `zeta up`: the file "
            "admin.key in its home) and restart the server.",
            code="key_in_settings",
        )


async def _find(session: AsyncSession, key_id: str, *, lock: bool = False) -> KeyRow:
    row = await session.get(KeyRow, key_id, with_for_update=lock) if is_id(key_id, "key") else None
    if row is None:
        raise NotFound(f"Key {shown(key_id)} not found; GET /v1/keys lists the keys.", code="key_not_found")
    return row


def _new_text() -> str:
    return f"{TEXT_PREFIX}{secrets.token_urlsafe(TEXT_BYTES)}"


def _to_key(row: KeyRow) -> Key:
    return Key(**_fields(row))


def _fields(row: KeyRow) -> dict[str, Any]:
    names = ("id", "name", "project", "scopes", "created_by", "created_at", "expires_at", "revoked_at", "last_used_at")
    return {**{name: getattr(row, name) for name in names}, "old_text_expires_at": row.old_expires_at}
