"""Submissions: from what was sent to a job that is on the disk.

Guarantees: a job that was answered with 201 is on the disk; two submissions with one ``Idempotency-Key`` give one job,
even when they race.
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
from server.submitting.acceptance import Accepted, accept, read_spec
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import new_id_at
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Job

IDEMPOTENCY_HOURS = 24
MAX_IDEMPOTENCY_KEY_LENGTH = 255


@dataclass(frozen=True)
class Submission:
    """What a request is known by when it comes again: its ``Idempotency-Key``, if it has one, and what was sent."""

    idempotency_key: str | None
    sent_sha256: str


def submission(idempotency_key: str | None, sent: Any) -> Submission:
    """``sent`` is the request as JSON data. Raises `InvalidRequest` for a key that cannot be one."""
    if idempotency_key is not None:
        _check_idempotency_key(idempotency_key)
    return Submission(idempotency_key, _fingerprint(sent))


async def submit(service: Service, caller: Caller, data: Any, idempotency_key: str | None) -> tuple[Job, bool]:
    """The job of a spec as it was sent, and whether it was answered before. Raises `InvalidRequest` kinds."""
    request = submission(idempotency_key, data)
    earlier = await answered_before(service, caller, request)
    if earlier is not None:
        return earlier, True
    return await create(service, caller, data, request)


async def answered_before(service: Service, caller: Caller, request: Submission) -> Job | None:
    """The job that the same request was answered with. Raises `InvalidRequest` if its key came with another one."""
    if request.idempotency_key is None:
        return None
    async with service.database.read() as session:
        earlier = await _answered(session, caller, request.idempotency_key, request.sent_sha256)
        return await to_job(session, earlier) if earlier is not None else None


async def create(
    service: Service, caller: Caller, data: dict[str, Any], request: Submission, *, parent: str | None = None
) -> tuple[Job, bool]:
    """A new job of ``data``, a spec as it was sent, or the one that the same request got in the meantime."""
    spec = await read_spec(service, caller, data)
    key = request.idempotency_key
    async with service.database.write() as session:
        if key is not None:
            earlier = await _claim_key(session, caller, key, request.sent_sha256)
            if earlier is not None:
                return await to_job(session, earlier), True
        row = _row(service, caller, await accept(session, service, caller, spec), data, parent)
        await create_job(session, row)
        if key is not None:
            await _keep_answer(session, caller, key, row.id)
        await session.flush()
        job = await to_job(session, row)
    service.engine.wake()
    return job, False


def _row(service: Service, caller: Caller, accepted: Accepted, data: Any, parent: str | None) -> JobRow:
    (job_id, created_at), spec = new_id_at("job"), accepted.spec
    return JobRow(
        id=job_id,
        project=caller.project,
        created_by=caller.key_id,
        parent=parent,
        waiting_reason=initial_waiting_reason(service),
        entity_name=spec.entity_name,
        spec=data,
        resolved_spec=accepted.resolved_spec,
        priority=spec.priority,
        max_retries=spec.max_retries,
        created_at=created_at,
        job_metadata=dict(spec.metadata),
    )


# --- Idempotency ------------------------------------------------------------------------------------------------------


def _fingerprint(data: Any) -> str:
    """The SHA-256 of what was sent, whatever the order of its fields and its white space."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_idempotency_key(key: str) -> None:
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_LENGTH or not key.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key has {len(key)} characters; use 1 to {MAX_IDEMPOTENCY_KEY_LENGTH} printable ones.",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )


async def _answered(session: AsyncSession, caller: Caller, key: str, body_sha256: str) -> JobRow | None:
    """The job that this key was answered with. Raises `InvalidRequest` if it came with another body."""
    row = await session.get(IdempotencyRow, (caller.key_id, key), populate_existing=True)
    if row is None or row.created_at < utc_now() - timedelta(hours=IDEMPOTENCY_HOURS):
        return None
    if row.body_sha256 != body_sha256:
        raise InvalidRequest(
            f"Idempotency-Key {key!r} was used with another body within {IDEMPOTENCY_HOURS} hours; use a new key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return await session.get(JobRow, row.job_id)


async def _claim_key(session: AsyncSession, caller: Caller, key: str, body_sha256: str) -> JobRow | None:
    """Take the key for this transaction, or find the job of whoever took it first (PostgreSQL waits for him)."""
    old = IdempotencyRow.created_at < utc_now() - timedelta(hours=IDEMPOTENCY_HOURS)
    await session.execute(delete(IdempotencyRow).where(old))
    claim = IdempotencyRow(
        key_id=caller.key_id, idempotency_key=key, body_sha256=body_sha256, job_id="", created_at=utc_now()
    )
    try:
        async with session.begin_nested():
            session.add(claim)
    except IntegrityError:
        return await _answered(session, caller, key, body_sha256)
    return None


async def _keep_answer(session: AsyncSession, caller: Caller, key: str, job_id: str) -> None:
    claim = await session.get(IdempotencyRow, (caller.key_id, key))
    assert claim is not None, "the key was claimed in this transaction"
    claim.job_id = job_id
