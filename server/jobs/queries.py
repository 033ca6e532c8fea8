"""Finds and lists the jobs of a project, with the filters ``?status=&entity_name=&metadata[k]=v``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import Select, Text, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from server.auth import Caller
from server.database.pagination import Matches, PageQuery, newest_first, page, storable
from server.database.tables import JobMetadataRow, JobRow
from server.database.transitions import lock_job
from server.jobs.serialization import to_job, to_jobs
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import Job, WaitingReason
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import WAITING_SENTENCES, JobStatus, WaitingCode
from zeta_core.contract.spec.validation import shown

MAX_METADATA = 16  # maximum number of entries of a job
_METADATA = re.compile(r"\Ametadata\[([^\"\\\]]+)\]\Z")
# A job contains its spec twice: as submitted, and resolved.
_SPEC_BYTES = 2 * func.length(cast(JobRow.spec, Text))


class JobQuery(PageQuery):
    """All filters must match; several ``status`` values match any of them. ``metadata[k]=v`` matches one entry."""

    model_config = ConfigDict(frozen=True, extra="allow")  # for metadata[k]; other extra names are rejected below

    status: list[JobStatus] = Field(
        default_factory=list[JobStatus], description="only jobs with this status; repeat it to match any of several"
    )
    entity_name: str | None = Field(default=None, description="only jobs with this entity_name")

    @model_validator(mode="after")
    def _reject_unknown_names(self) -> JobQuery:
        for name in self.model_extra or {}:
            if not _METADATA.match(name):
                raise PydanticCustomError("extra_forbidden", "{name}", {"name": name})
        if (count := len(self.model_extra or {})) > MAX_METADATA:
            sentence = f"metadata[k] is given {count} times; a job has at most {MAX_METADATA} entries."
            raise PydanticCustomError("too_many", "{sentence}", {"name": "metadata", "sentence": sentence})
        return self

    @property
    def metadata(self) -> dict[str, str]:
        matches = ((_METADATA.match(name), value) for name, value in (self.model_extra or {}).items())
        return {match.group(1): str(value) for match, value in matches if match}


def matching_jobs(project: str, filters: JobQuery) -> list[Matches]:
    """The queries for the jobs that match; an index orders the jobs of each."""
    query = select(JobRow).where(JobRow.project == project, JobRow.deleted_at.is_(None))
    if filters.entity_name is not None:
        query = query.where(JobRow.entity_name == storable(filters.entity_name))
    statuses = sorted(set(filters.status))
    entries = [(storable(name), storable(value)) for name, value in filters.metadata.items()]
    if entries:
        if statuses:
            query = query.where(JobRow.status.in_(statuses))
        return [_with_metadata(query, project, entries)]
    if not statuses or len(statuses) == len(JobStatus):
        return [Matches(query, JobRow.created_at, JobRow.id)]
    return [Matches(query.where(JobRow.status == status), JobRow.created_at, JobRow.id) for status in statuses]


def _with_metadata(query: Select[JobRow], project: str, entries: Sequence[tuple[str, str]]) -> Matches:
    """Jobs with all these metadata entries: the index of the first one orders them, the others are looked up."""
    tables = [aliased(JobMetadataRow) for _ in entries]
    for table, (key, value) in zip(tables, entries, strict=True):
        query = query.join(table, table.job_id == JobRow.id).where(table.key == key, table.value == value)
    first = tables[0]
    return Matches(query.where(first.project == project), first.created_at, first.job_id)


async def list_jobs(service: Service, caller: Caller, filters: JobQuery) -> Page[Job]:
    """One page of the caller's jobs that match the filters, newest first."""
    async with service.database.read() as session:
        matching = matching_jobs(caller.project, filters)
        rows, has_more = await newest_first(session, JobRow, matching, filters, size=_SPEC_BYTES)
        return page(await to_jobs(session, rows), has_more, lambda job: job.id)


async def get_job(service: Service, caller: Caller, job_id: str) -> Job:
    async with service.database.read() as session:
        return await to_job(session, await find_job(session, caller, job_id))


async def require_job(service: Service, caller: Caller, job_id: str) -> None:
    """Raise `NotFound` unless the caller has this job."""
    async with service.database.read() as session:
        await find_job(session, caller, job_id)


async def find_job(session: AsyncSession, caller: Caller, job_id: str, *, lock: bool = False) -> JobRow:
    """The caller's job, locked for the transaction if ``lock``. Raises `NotFound`, also for jobs of other projects."""
    row: JobRow | None = None
    if is_id(job_id, "job"):
        row = await (lock_job(session, job_id) if lock else session.get(JobRow, job_id))
    if row is None or row.project != caller.project or row.deleted_at is not None:
        raise NotFound(f"Job {shown(job_id)} not found; GET /v1/jobs lists your jobs.", code="job_not_found")
    return row


def initial_waiting_reason(service: Service) -> dict[str, Any] | None:
    """The waiting reason of a new job until the scheduler has processed it."""
    if any(service.engine.is_alive(beat.worker) for beat in service.engine.workers()):
        return None
    code = WaitingCode.NO_WORKER
    return WaitingReason(code=code, message=WAITING_SENTENCES[code], since=utc_now()).model_dump(mode="json")
