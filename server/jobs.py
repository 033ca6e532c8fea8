"""Jobs: submit, list, read, cancel. Each change is one transaction; the engine is woken after its commit.

Guarantees: a job that was answered with 201 is on the disk; two submissions with one ``Idempotency-Key`` give one job,
even when they race.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database import events, state
from server.database.tables import IdempotencyRow, JobRow
from server.job_objects import describe, describe_one
from server.job_query import JobQuery, matching
from server.pages import newest_first, page
from server.references import check_references, check_training_state, with_named_checkpoint
from server.service import Service
from zeta_core.contract.answers import Page
from zeta_core.contract.defaults import resolve
from zeta_core.contract.errors import Conflict, InvalidRequest, NotFound
from zeta_core.contract.events import utc_now
from zeta_core.contract.identifiers import is_id, new_id
from zeta_core.contract.job import ENDED, WAITING_SENTENCES, Job, JobStatus, StatusReason, WaitingCode, WaitingReason
from zeta_core.contract.spec import JobSpec
from zeta_core.contract.validation import parse

IDEMPOTENCY_HOURS = 24
MAX_IDEMPOTENCY_KEY_LENGTH = 255


async def submit(service: Service, caller: Caller, data: Any, idempotency_key: str | None) -> tuple[Job, bool]:
    """The job of a spec as it was sent, and whether it was answered before. Raises `InvalidRequest` kinds."""
    body_sha256 = _fingerprint(data)
    if idempotency_key is not None:
        _check_idempotency_key(idempotency_key)
        async with service.database.read() as session:
            earlier = await _answered(session, caller, idempotency_key, body_sha256)
            if earlier is not None:
                return await describe_one(session, earlier), True
    spec = parse(JobSpec, data)
    await check_training_state(service, caller, spec)
    async with service.database.write() as session:
        if idempotency_key is not None:
            earlier = await _claim_key(session, caller, idempotency_key, body_sha256)
            if isinstance(earlier, JobRow):
                return await describe_one(session, earlier), True
        files = await check_references(session, service.settings, caller.project, spec)
        spec = await with_named_checkpoint(session, spec)
        row = _row(service, caller, spec, data, files)
        session.add(row)
        if idempotency_key is not None:
            await _keep_answer(session, caller, idempotency_key, row.id)
        await session.flush()
        queued = {"status": JobStatus.QUEUED.value}
        await events.append(session, row, attempt=0, line=None, type="status", created_at=row.created_at, fields=queued)
        await session.flush()
        job = await describe_one(session, row)
    service.engine.wake()
    return job, False


async def list_jobs(service: Service, caller: Caller, asked: JobQuery) -> Page[Job]:
    async with service.database.read() as session:
        rows, has_more = await newest_first(session, JobRow, matching(caller.project, asked), asked)
        return page(await describe(session, rows), has_more, lambda job: job.id)


async def get_job(service: Service, caller: Caller, job_id: str) -> Job:
    async with service.database.read() as session:
        return await describe_one(session, await find_job(session, caller, job_id))


async def require_job(service: Service, caller: Caller, job_id: str) -> None:
    """Raise `NotFound` unless the caller has this job."""
    async with service.database.read() as session:
        await find_job(session, caller, job_id)


async def find_job(session: AsyncSession, caller: Caller, job_id: str) -> JobRow:
    """The caller's job. Raises `NotFound`, also for another project's."""
    row = await session.get(JobRow, job_id) if is_id(job_id, "job") else None
    if row is None or row.project != caller.project:
        raise NotFound(f"There is no job {job_id!r}; GET /v1/jobs lists yours.", code="job_not_found")
    return row


async def cancel(service: Service, caller: Caller, job_id: str) -> Job:
    """Cancel at once what does not run, ask the worker to stop what does. Raises `Conflict` for an ended job."""
    async with service.database.write() as session:
        await find_job(session, caller, job_id)
        row = await state.lock_job(session, job_id)
        assert row is not None, "the job vanished inside a transaction"
        await session.refresh(row)
        if JobStatus(row.status) in ENDED:
            raise Conflict(
                f"Job {job_id} is {row.status} already; only a job that has not ended can be cancelled.",
                code="job_ended",
            )
        if row.status == JobStatus.RUNNING:
            row.requested_action = "cancel"
        else:
            await state.change_status(
                session,
                row,
                JobStatus.CANCELLED,
                expect={JobStatus.QUEUED, JobStatus.PAUSED},
                attempt=row.attempt,
                reason=StatusReason.CANCELLED_BY_USER,
            )
        await session.flush()
        job = await describe_one(session, row)
    service.engine.wake()
    service.engine.stored.notify(job_id)
    return job


def _row(service: Service, caller: Caller, spec: JobSpec, data: Any, files: dict[str, Any]) -> JobRow:
    now = utc_now()
    return JobRow(
        id=new_id("job"),
        project=caller.project,
        created_by=caller.key_id,
        status=JobStatus.QUEUED,
        waiting_reason=_first_waiting_reason(service),
        entity_name=spec.entity_name,
        spec=data,
        resolved_spec={**resolve(spec), "files": files},
        priority=spec.priority,
        attempt=0,
        failures=0,
        losses=0,
        max_retries=spec.max_retries,
        created_at=now,
        last_seq=0,
        warnings=[],
        job_metadata=dict(spec.metadata),
    )


def _first_waiting_reason(service: Service) -> dict[str, Any] | None:
    """What can be said before the scheduler looked at the job."""
    if any(service.engine.is_alive(beat.worker) for beat in service.engine.workers()):
        return None
    code = WaitingCode.NO_WORKER
    return WaitingReason(code=code, message=WAITING_SENTENCES[code], since=utc_now()).model_dump(mode="json")


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
