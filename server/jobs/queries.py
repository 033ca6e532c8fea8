"""Finds and lists the jobs of a project: ``?status=&entity_name=&kind=&metadata[k]=v&sort=``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import ColumnElement, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from server.auth import Caller
from server.database.nul_characters import replace_nul
from server.database.pagination import OrderedQuery, PageQuery, cursor, newest_first, page
from server.database.tables import JobMetadataRow, JobRow
from server.database.transitions import lock_job
from server.jobs.serialization import SPEC_BYTES, to_job, to_jobs
from server.jobs.sorting import JobOrder, read_position, sorted_jobs
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.identifiers import NEW_ID_PATTERN, is_id
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.order import NEWEST_FIRST, JobSort
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import JobStatus

MAX_METADATA = 16  # maximum number of entries of a job
_TRAINING = literal_column(f"'{JobKind.TRAINING}'")  # a parameter would not match the partial index
METADATA_NAME_PATTERN = r'^[^"\\\]]+$'
POSITION_PATTERN = NEW_ID_PATTERN.format(prefix="job").removesuffix("$") + "(,.*)?$"
_METADATA = re.compile(r"\Ametadata\[([^\"\\\]]+)\]\Z")


class MetadataQuery(PageQuery):
    """``metadata[k]=v`` matches one entry; if it is repeated, all entries must match."""

    model_config = ConfigDict(frozen=True, extra="allow")  # for metadata[k]; other extra names are rejected below

    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="job"))

    known_extras: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _reject_unknown_names(self) -> Self:
        for name in self.model_extra or {}:
            if not _METADATA.match(name) and name not in self.known_extras:
                raise PydanticCustomError("extra_forbidden", "{name}", {"name": name})
        if (count := len(self.model_extra or {})) > MAX_METADATA:
            sentence = f"metadata[k] is given {count} times; a job has at most {MAX_METADATA} entries."
            raise PydanticCustomError("too_many", "{sentence}", {"name": "metadata", "sentence": sentence})
        return self

    @property
    def metadata_entries(self) -> dict[str, str]:
        matches = ((_METADATA.match(name), value) for name, value in (self.model_extra or {}).items())
        return {match.group(1): str(value) for match, value in matches if match}


class JobQuery(MetadataQuery):
    """All filters must match; several ``status`` values match any of them."""

    status: list[JobStatus] = Field(
        default_factory=list[JobStatus], description="only jobs with this status; repeat it to match any of several"
    )
    entity_name: str | None = Field(default=None, description="only jobs with this entity_name")
    kind: JobKind | None = Field(default=None, description="only jobs of this kind")
    sort: JobSort = Field(
        default=NEWEST_FIRST,
        description="the order of the jobs: by this field, descending with a minus; jobs without a value come last",
    )
    after: str | None = Field(
        default=None,
        description="continue after this position, the next_after of the previous page",
        json_schema_extra={"pattern": POSITION_PATTERN},
    )


def matching_jobs(project: str, filters: JobQuery) -> list[OrderedQuery]:
    """The queries for the jobs that match; an index orders the jobs of each."""
    conditions, statuses = _conditions(filters), _statuses(filters)
    if filters.metadata_entries:
        if statuses:
            conditions.append(JobRow.status.in_(statuses))
        return [_with_metadata(project, filters.metadata_entries, conditions)]
    query = select(JobRow).where(JobRow.project == project, *conditions)
    queries = [query.where(JobRow.status == status) for status in statuses] or [query]
    return [OrderedQuery(each, JobRow.created_at, JobRow.id) for each in queries]


def _conditions(filters: JobQuery) -> list[ColumnElement[bool]]:
    """The conditions of the filters, except those of the statuses and the metadata."""
    conditions: list[ColumnElement[bool]] = [JobRow.deleted_at.is_(None)]
    if filters.entity_name is not None:
        conditions.append(JobRow.entity_name == replace_nul(filters.entity_name))
    if filters.kind is not None:
        conditions += kind_conditions(filters.kind)
    return conditions


def _statuses(filters: JobQuery) -> list[JobStatus]:
    """The statuses that jobs must have; empty if each is allowed."""
    return sorted(set(filters.status)) if len(set(filters.status)) < len(JobStatus) else []


def kind_conditions(kind: JobKind) -> list[ColumnElement[bool]]:
    """The conditions for jobs of this kind, so that the index of the kinds other than trainings can be used."""
    return [JobRow.kind == _TRAINING] if kind is JobKind.TRAINING else [JobRow.kind != _TRAINING, JobRow.kind == kind]


def _with_metadata(project: str, entries: Mapping[str, str], conditions: Sequence[ColumnElement[bool]]) -> OrderedQuery:
    """Jobs with all these metadata entries: the index of one entry orders them, and the rest is looked up by job.

    The lookups are scalar subqueries, which no planner turns into a join that reads a whole table.
    """
    (key, value), *others = ((replace_nul(key), replace_nul(value)) for key, value in entries.items())
    entry = JobMetadataRow
    query = select(entry).where(entry.project == project, entry.key == key, entry.value == value)
    for other_key, other_value in others:
        other = aliased(entry)
        found = select(other.value).where(other.job_id == entry.job_id, other.key == other_key)
        query = query.where(found.scalar_subquery() == other_value)
    job = select(JobRow.id).where(JobRow.id == entry.job_id, *conditions)
    return OrderedQuery(query.where(job.scalar_subquery().is_not(None)), entry.created_at, entry.job_id)


async def list_jobs(service: Service, caller: Caller, filters: JobQuery) -> Page[Job]:
    """One page of the caller's jobs that match the filters, in the order that they name."""
    async with service.database.read() as session:
        if filters.sort != NEWEST_FIRST:
            return await _list_sorted(session, service, caller, filters)
        matching = matching_jobs(caller.project, filters)
        rows, has_more = await newest_jobs(session, service, caller, matching, filters)
        return page(await to_jobs(session, rows), has_more, lambda job: job.id)


async def _list_sorted(session: AsyncSession, service: Service, caller: Caller, filters: JobQuery) -> Page[Job]:
    order = JobOrder.of(filters.sort)
    after = None if filters.after is None else read_position(order.field, filters.after)
    conditions = [JobRow.project == caller.project, *_conditions(filters)]
    if statuses := _statuses(filters):
        conditions.append(JobRow.status.in_(statuses))
    for key, value in filters.metadata_entries.items():
        entry = select(JobMetadataRow.job_id).where(
            JobMetadataRow.project == caller.project,
            JobMetadataRow.key == replace_nul(key),
            JobMetadataRow.value == replace_nul(value),
        )
        conditions.append(JobRow.id.in_(entry))
    max_row_bytes = 2 * service.settings.max_spec_bytes
    listed = await sorted_jobs(session, conditions, order, after, filters.limit, max_row_bytes=max_row_bytes)
    next_after = None if listed.last is None else listed.last.as_text()
    return page(await to_jobs(session, listed.rows), listed.has_more, lambda job: job.id, next_after)


async def newest_jobs(
    session: AsyncSession, service: Service, caller: Caller, matching: Sequence[OrderedQuery], page_query: PageQuery
) -> tuple[list[JobRow], bool]:
    """The rows of one page of the caller's jobs, limited in bytes, too; and whether more follow."""
    return await newest_first(
        session,
        JobRow,
        matching,
        page_query,
        project=caller.project,
        size=SPEC_BYTES,
        max_row_bytes=2 * service.settings.max_spec_bytes,
    )


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
    if row is None or row.deleted_at is not None:
        raise caller.not_found("job", job_id, None)
    if row.project != caller.project:
        raise caller.not_found("job", job_id, row.project)
    return row


async def find_training(session: AsyncSession, caller: Caller, job_id: str) -> JobRow:
    """The caller's job, which must be a training. Raises `NotFound`."""
    row = await find_job(session, caller, job_id)
    if row.kind != JobKind.TRAINING:
        raise NotFound(
            f"{job_id} is a job of kind {row.kind}, not a training; see it with `zeta job {job_id}`.",
            code="not_a_training",
        )
    return row
