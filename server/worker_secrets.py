"""Adds workers that have a secret of their own, and lists, rotates and revokes these secrets.

The text of a secret is returned once. The database contains only its id, from which the server derives the secret.
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.access_tables import WorkerSecretRow
from server.database.inserts import dialect_insert
from server.database.nul_characters import replace_nul
from server.database.pagination import PageQuery, page
from server.service import Service
from zeta_core.contract.access import CreatedWorkerSecret, NewWorkerSecret, WorkerSecret, WorkerSecretRotation
from zeta_core.contract.errors import Conflict, NotFound
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.spec.validation import shown

ID_BYTES = 8  # random, so that an id from a restored backup is never used again for a new secret


async def add_worker(service: Service, caller: Caller, request: NewWorkerSecret) -> CreatedWorkerSecret:
    """Create the secret of a new or revoked worker. Raises `Conflict` if the worker has a valid one."""
    now, secret_id = utc_now(), secrets.token_hex(ID_BYTES)
    async with service.database.write() as session:
        row = await _insert_or_lock(session, request.name, caller, now)
        if row.revoked_at is None:
            raise Conflict(
                f"Worker {request.name} has a secret already; `zeta workers rotate {request.name}` replaces it.",
                code="worker_exists",
                param="name",
            )
        _renew(row, caller, secret_id, now)
        session.add(caller.audit_row("worker.add", request.name, project=None))
    return await _to_created_secret(service, row)


async def list_worker_secrets(service: Service, query: PageQuery) -> Page[WorkerSecret]:
    """One page, sorted by the name of the worker; ``after`` is the last name of the previous page."""
    rows_after = select(WorkerSecretRow).order_by(WorkerSecretRow.worker).limit(query.limit + 1)
    if query.after is not None:
        rows_after = rows_after.where(WorkerSecretRow.worker > replace_nul(query.after))
    async with service.database.read() as session:
        rows = list(await session.scalars(rows_after))
    listed = [WorkerSecret(**_fields(row)) for row in rows[: query.limit]]
    return page(listed, len(rows) > query.limit, lambda secret: secret.name)


async def rotate_worker_secret(
    service: Service, caller: Caller, name: str, request: WorkerSecretRotation
) -> CreatedWorkerSecret:
    """Replace a worker's secret; the old one works for the grace period. Raises `NotFound` and `Conflict`."""
    now, secret_id = utc_now(), secrets.token_hex(ID_BYTES)
    async with service.database.write() as session:
        row = await _find(session, name)
        if row.revoked_at is not None:
            raise Conflict(
                f"Worker {name} is revoked; `zeta workers add {name}` creates a new secret.", code="worker_revoked"
            )
        old_secret_id = row.secret_id
        _renew(row, caller, secret_id, now)
        if request.grace_seconds > 0:
            row.old_secret_id = old_secret_id
            row.old_expires_at = now + timedelta(seconds=request.grace_seconds)
        details = {"grace_seconds": request.grace_seconds}
        session.add(caller.audit_row("worker.rotate", name, project=None, **details))
    return await _to_created_secret(service, row)


async def revoke_worker(service: Service, caller: Caller, name: str) -> DeletedObject:
    """Revoke a worker's secret; its jobs move to other workers at once. This is idempotent. Raises `NotFound`."""
    async with service.database.write() as session:
        row = await _find(session, name)
        if row.revoked_at is None:
            row.revoked_at = utc_now()
            session.add(caller.audit_row("worker.revoke", name, project=None))
    await service.engine.load_secrets()
    service.engine.wake()
    return DeletedObject(id=name, object="worker_secret")


async def _insert_or_lock(session: AsyncSession, name: str, caller: Caller, now: datetime) -> WorkerSecretRow:
    """The locked row of a worker; a new one counts as revoked. Concurrent requests wait for each other."""
    values = {"worker": name, "secret_id": "", "created_by": caller.key_id, "created_at": now, "revoked_at": now}
    await session.execute(dialect_insert(session, WorkerSecretRow).values(**values).on_conflict_do_nothing())
    row = await session.get(WorkerSecretRow, name, with_for_update=True)
    assert row is not None, "no row is ever deleted"
    return row


def _renew(row: WorkerSecretRow, caller: Caller, secret_id: str, now: datetime) -> None:
    row.secret_id, row.created_by, row.created_at = secret_id, caller.key_id, now
    row.revoked_at = row.old_secret_id = row.old_expires_at = None


async def _to_created_secret(service: Service, row: WorkerSecretRow) -> CreatedWorkerSecret:
    await service.engine.load_secrets()
    secret = service.engine.secrets.derive(row.worker, row.secret_id).text
    return CreatedWorkerSecret(**_fields(row), secret=secret)


async def _find(session: AsyncSession, name: str) -> WorkerSecretRow:
    row = await session.get(WorkerSecretRow, replace_nul(name), with_for_update=True)
    if row is None:
        raise NotFound(
            f"Worker {shown(name)} has no secret of its own; `zeta workers secrets` or GET /v1/workers/secrets lists "
            "the workers that have one.",
            code="worker_not_found",
        )
    return row


def _fields(row: WorkerSecretRow) -> dict[str, Any]:
    names = ("created_by", "created_at", "revoked_at")
    fields = {name: getattr(row, name) for name in names}
    return {**fields, "name": row.worker, "old_secret_expires_at": row.old_expires_at}
