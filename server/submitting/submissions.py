"""Creates jobs from submitted specs.

Guarantees: a job is on disk before its 201 response. Two requests with the same ``Idempotency-Key`` create one job,
even if they arrive at the same time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.tables import IdempotencyRow, JobRow
from server.database.transitions import create_job
from server.jobs.queries import initial_waiting_reason
from server.jobs.serialization import to_job
from server.service import Service
from server.submitting.acceptance import AcceptedSpec, accept, read_spec
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import new_id_at
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Job

IDEMPOTENCY_HOURS = 24
MAX_IDEMPOTENCY_KEY_LENGTH = 255


@dataclass(frozen=True)
class RequestIdentity:
    """Identifies a repeated request: its ``Idempotency-Key``, if any, and the SHA-256 of its body."""

    idempotency_key: str | None
    body_sha256: str


def identify_request(idempotency_key: str | None, body: Any) -> RequestIdentity:
    """The identity of a request with this JSON body. Raises `InvalidRequest` for an invalid key."""
    if idempotency_key is not None:
        _check_idempotency_key(idempotency_key)
    return RequestIdentity(idempotency_key, _fingerprint(body))


async def submit(service: Service, caller: Caller, body: Any, idempotency_key: str | None) -> tuple[Job, bool]:
    """Create a job; returns it, and whether an earlier request created it. Raises subclasses of `InvalidRequest`."""
    request = identify_request(idempotency_key, body)
    earlier = await find_created_job(service, caller, request)
    if earlier is not None:
        return earlier, True
    return await create(service, caller, body, request)


async def find_created_job(service: Service, caller: Caller, request: RequestIdentity) -> Job | None:
    """The job that an earlier, equal request created. Raises `InvalidRequest` if the key was used for another body."""
    if request.idempotency_key is None:
        return None
    async with service.database.read() as session:
        earlier = await _find_job_by_key(session, caller, request.idempotency_key, request.body_sha256)
        return await to_job(session, earlier) if earlier is not None else None


async def create(
    service: Service, caller: Caller, body: dict[str, Any], request: RequestIdentity, *, parent: str | None = None
) -> tuple[Job, bool]:
    """Create a job from the ``body``, or return the one that an equal request has just created."""
    spec = await read_spec(service, caller, body)
    key = request.idempotency_key
    async with service.database.write() as session:
        if key is not None:
            earlier = await _claim_key(session, caller, key, request.body_sha256)
            if earlier is not None:
                return await to_job(session, earlier), True
        row = _row(service, caller, await accept(session, service, caller, spec), body, parent)
        await create_job(session, row)
        if key is not None:
            await _record_job(session, caller, key, row.id)
        await session.flush()
        job = await to_job(session, row)
    service.engine.wake()
    return job, False


def _row(service: Service, caller: Caller, accepted: AcceptedSpec, body: Any, parent: str | None) -> JobRow:
    (job_id, created_at), spec = new_id_at("job"), accepted.spec
    return JobRow(
        id=job_id,
        project=caller.project,
        created_by=caller.key_id,
        parent=parent,
        waiting_reason=initial_waiting_reason(service),
        entity_name=spec.entity_name,
        spec=body,
        resolved_spec=accepted.resolved_spec,
        priority=spec.priority,
        max_retries=spec.max_retries,
        created_at=created_at,
        job_metadata=dict(spec.metadata),
    )


# --- Idempotency ------------------------------------------------------------------------------------------------------


def _fingerprint(body: Any) -> str:
    """The SHA-256 of a JSON body, independent of white space and the order of fields."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_idempotency_key(key: str) -> None:
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_LENGTH or not key.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key has {len(key)} characters; use 1 to {MAX_IDEMPOTENCY_KEY_LENGTH} printable ones.",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )


async def _find_job_by_key(session: AsyncSession, caller: Caller, key: str, body_sha256: str) -> JobRow | None:
    """The job that was created with this key. Raises `InvalidRequest` if the body was different."""
    row = await session.get(IdempotencyRow, (caller.key_id, key), populate_existing=True)
    if row is None or row.created_at < utc_now() - timedelta(hours=IDEMPOTENCY_HOURS):
        return None
    if row.body_sha256 != body_sha256:
        raise InvalidRequest(
            f"Idempotency-Key {key!r} was used for a different body within {IDEMPOTENCY_HOURS} hours; use a new key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return await session.get(JobRow, row.job_id)


async def _claim_key(session: AsyncSession, caller: Caller, key: str, body_sha256: str) -> JobRow | None:
    """Claim the key, or return the job of the transaction that claimed it first (PostgreSQL waits for its end)."""
    old = IdempotencyRow.created_at < utc_now() - timedelta(hours=IDEMPOTENCY_HOURS)
    await session.execute(delete(IdempotencyRow).where(old))
    claim = IdempotencyRow(
        key_id=caller.key_id, idempotency_key=key, body_sha256=body_sha256, job_id="", created_at=utc_now()
    )
    try:
        async with session.begin_nested():
            session.add(claim)
    except IntegrityError:
        return await _find_job_by_key(session, caller, key, body_sha256)
    return None


async def _record_job(session: AsyncSession, caller: Caller, key: str, job_id: str) -> None:
    claim = await session.get(IdempotencyRow, (caller.key_id, key))
    assert claim is not None, "the key was claimed in this transaction"
    claim.job_id = job_id
