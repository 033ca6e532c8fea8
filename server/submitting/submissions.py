"""Creates jobs from submitted specs.

Guarantees: a job is on disk before its 201 response. Two requests with the same ``Idempotency-Key`` create one job,
even if they arrive at the same time or at two servers. An invalid submission doesn't affect those that share its
transaction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.access_tables import AuditRow
from server.database.audit_entries import insert_entries
from server.database.events import append, warn
from server.database.tables import IdempotencyRow, JobRow
from server.database.transitions import create_jobs
from server.jobs.serialization import to_job, to_jobs
from server.service import Service
from server.submitting.acceptance import AcceptedSpec, accept, read_any_spec
from server.submitting.group_commit import GroupCommit
from server.submitting.quotas import QueueLimits, check_stored_bytes
from server.tracing import current_trace_parent, request_part
from zeta_core.contract.errors import InvalidRequest, QuotaExceeded
from zeta_core.contract.identifiers import new_id_at
from zeta_core.contract.job.events import WarningLine, utc_now
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.kinds import AnySpec
from zeta_core.contract.spec.validation import shown

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
        check_idempotency_key(idempotency_key)
    return RequestIdentity(idempotency_key, _fingerprint(body))


@dataclass(frozen=True)
class SubmissionOrigin:
    """What a new job records besides its spec.

    ``parent`` is the job that it is a rerun of, ``openai_request`` the part of an OpenAI request that is not in the
    spec, and ``warnings`` are reported at once.
    """

    kind: JobKind = JobKind.TRAINING
    parent: str | None = None
    sweep: str | None = None
    openai_request: dict[str, Any] | None = None
    warnings: Sequence[WarningLine] = ()


NEW = SubmissionOrigin()


@dataclass(frozen=True)
class _Submission:
    """A valid spec that is ready to become a job."""

    caller: Caller
    spec: AnySpec
    body: dict[str, Any]
    request: RequestIdentity
    origin: SubmissionOrigin
    trace_parent: str | None = None  # of the request, if it is traced

    @property
    def key(self) -> tuple[str, str, str] | None:
        """The primary key of its `IdempotencyRow`."""
        key = self.request.idempotency_key
        return None if key is None else (self.caller.project, self.caller.key_id, key)

    def audit_row(self, job_id: str) -> AuditRow:
        if self.origin.parent is not None:
            action, details = "job.rerun", {"parent": self.origin.parent}
        else:
            is_training = self.origin.kind is JobKind.TRAINING
            action, details = "job.submit", {} if is_training else {"kind": self.origin.kind}
        return self.caller.audit_row(action, job_id, project=self.caller.project, **details)


CreatedJob = tuple[Job, bool]  # a job, and whether an earlier request created it


class Submissions:
    """Creates the jobs of one server process; concurrent submissions share transactions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._commits = GroupCommit[_Submission, CreatedJob](
            service.database, self._create_jobs, key=lambda submission: submission.key
        )

    async def submit(
        self, caller: Caller, body: Any, idempotency_key: str | None, origin: SubmissionOrigin = NEW
    ) -> CreatedJob:
        """Create a job, or return the one that an earlier, equal request created.

        Raises subclasses of `InvalidRequest`, and `QuotaExceeded`.
        """
        request = identify_request(idempotency_key, body)
        try:
            return await self.create(caller, body, request, origin)
        except (InvalidRequest, QuotaExceeded):
            # A repeated request returns the job even if the files or checkpoints in its spec have been removed since.
            earlier = await find_created_job(self._service, caller, request)
            if earlier is None:
                raise
            return earlier, True

    async def create(
        self, caller: Caller, body: dict[str, Any], request: RequestIdentity, origin: SubmissionOrigin = NEW
    ) -> CreatedJob:
        """Create a job from the ``body``, or return the one that an equal request has just created."""
        with request_part("validation"):
            spec = await read_any_spec(self._service, caller, origin.kind, body)
            await check_stored_bytes(self._service, caller)
        submission = _Submission(caller, spec, body, request, origin, current_trace_parent())
        created = await self._commits.commit(submission)
        self._service.engine.wake_scheduler()
        return created

    async def _create_jobs(
        self, session: AsyncSession, submissions: Sequence[_Submission]
    ) -> Sequence[CreatedJob | Exception]:
        """Create the jobs of several submissions in one transaction; see `GroupCommit`."""
        earlier = await _earlier_jobs(session, submissions)
        queue = QueueLimits(session)
        rows: dict[int, JobRow] = {}
        faults: dict[int, Exception] = {}
        for number, submission in enumerate(submissions):
            if number in earlier:
                continue
            try:
                accepted = await accept(session, self._service, submission.caller, submission.spec)
                await queue.add(submission.caller)
            except (InvalidRequest, QuotaExceeded) as error:
                faults[number] = error
            else:
                rows[number] = new_job_row(
                    self._service, submission.caller, submission.body, accepted, submission.origin
                )
        traced = {row.id: submissions[number].trace_parent for number, row in rows.items()}
        await create_jobs(session, list(rows.values()), traced)
        for number, row in rows.items():
            _store_warnings(session, row, submissions[number].origin.warnings)
        await _record_keys(session, {rows[number].id: submissions[number] for number in rows})
        await insert_entries(session, [submissions[number].audit_row(row.id) for number, row in rows.items()])
        replayed = {number: row for number, row in earlier.items() if isinstance(row, JobRow)}
        jobs_by_number = {**rows, **replayed}
        jobs = dict(zip(jobs_by_number, await to_jobs(session, list(jobs_by_number.values())), strict=True))
        faults |= {number: error for number, error in earlier.items() if isinstance(error, InvalidRequest)}
        return [
            faults[number] if number in faults else (jobs[number], number in earlier)
            for number in range(len(submissions))
        ]


def new_job_row(
    service: Service, caller: Caller, body: dict[str, Any], accepted: AcceptedSpec, origin: SubmissionOrigin
) -> JobRow:
    """The row of a new job, with the submitted ``body``; `create_jobs` inserts it."""
    (job_id, created_at), spec = new_id_at("job"), accepted.spec
    row = JobRow(
        id=job_id,
        kind=origin.kind,
        project=caller.project,
        created_by=caller.key_id,
        parent=origin.parent,
        sweep=origin.sweep,
        openai_request=origin.openai_request,
        entity_name=spec.entity_name,
        spec=body,
        resolved_spec=accepted.resolved_spec,
        priority=spec.priority,
        max_retries=spec.max_retries,
        created_at=created_at,
        job_metadata=dict(spec.metadata),
    )
    row.waiting_reason = service.engine.waiting_reason_of(row)
    return row


async def find_created_job(service: Service, caller: Caller, request: RequestIdentity) -> Job | None:
    """The job that an earlier, equal request created. Raises `InvalidRequest` if the key was used for another body."""
    key = request.idempotency_key
    if key is None:
        return None
    async with service.database.read() as session:
        row = await session.get(IdempotencyRow, (caller.project, caller.key_id, key))
        job_id = _job_id_of_key(row, request) if row is not None else None
        job = await session.get(JobRow, job_id) if job_id is not None else None
        return await to_job(session, job) if job is not None else None


def _store_warnings(session: AsyncSession, job: JobRow, warnings: Sequence[WarningLine]) -> None:
    for line in warnings:
        fields = line.model_dump(mode="json", exclude={"type", "created_at"}, exclude_none=True)
        append(session, job, attempt=0, line=None, type="warning", created_at=line.created_at, fields=fields)
        warn(job, line)


# --- Idempotency ------------------------------------------------------------------------------------------------------


def _fingerprint(body: Any) -> str:
    """The SHA-256 of a JSON body, independent of white space and the order of fields."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_idempotency_key(key: str) -> None:
    """Raise `InvalidRequest` for an invalid key."""
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_LENGTH or not (key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key is {shown(key)}; use 1 to {MAX_IDEMPOTENCY_KEY_LENGTH} printable ASCII characters.",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )


def _job_id_of_key(row: IdempotencyRow, request: RequestIdentity) -> str | None:
    """The id of the job that was created with this key. Raises `InvalidRequest` if the body was different."""
    if row.created_at < _oldest_valid():
        return None
    if row.body_sha256 != request.body_sha256:
        raise InvalidRequest(
            f"Idempotency-Key {row.idempotency_key!r} was used for a different body within {IDEMPOTENCY_HOURS} hours; "
            "use a new key.",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return row.job_id


def _oldest_valid() -> datetime:
    return utc_now() - timedelta(hours=IDEMPOTENCY_HOURS)


async def _earlier_jobs(
    session: AsyncSession, submissions: Sequence[_Submission]
) -> dict[int, JobRow | InvalidRequest]:
    """By number, the submissions whose key is in use: the job that it created, or the error for another body.

    If another server uses one of the keys at the same time, one of the two inserts fails in `_record_keys`, and its
    submission is applied again.
    """
    keys = {submission.key: number for number, submission in enumerate(submissions) if submission.key is not None}
    if not keys:
        return {}
    await session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < _oldest_valid()))
    columns = tuple_(IdempotencyRow.project, IdempotencyRow.key_id, IdempotencyRow.idempotency_key)
    used = await session.scalars(select(IdempotencyRow).where(columns.in_(list(keys))))
    found: dict[int, JobRow | InvalidRequest] = {}
    for row in used:
        number = keys[row.project, row.key_id, row.idempotency_key]
        try:
            job_id = _job_id_of_key(row, submissions[number].request)
        except InvalidRequest as error:
            found[number] = error
        else:
            job = await session.get(JobRow, job_id) if job_id is not None else None
            if job is not None:
                found[number] = job
            else:
                await session.delete(row)
    return found


async def _record_keys(session: AsyncSession, created: Mapping[str, _Submission]) -> None:
    """Record which job each key has created; the order of the inserts is fixed, to avoid deadlocks."""
    now = utc_now()
    keyed = sorted((submission.key, job_id) for job_id, submission in created.items() if submission.key is not None)
    values = [
        {
            "project": project,
            "key_id": key_id,
            "idempotency_key": key,
            "body_sha256": created[job_id].request.body_sha256,
            "job_id": job_id,
            "created_at": now,
        }
        for (project, key_id, key), job_id in keyed
    ]
    if values:
        await session.execute(insert(IdempotencyRow), values)
