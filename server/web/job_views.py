"""Reads jobs with the further data that the pages show: owners, sparklines, and the number of jobs by status."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, and_, cast, func, or_, select, text, union_all
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.access_tables import KeyRow
from server.database.pagination import OrderedQuery, PageQuery
from server.database.tables import IS_RARE_EVENT, EventRow, JobRow
from server.engine.new_events import to_event
from server.jobs.queries import find_job, kind_conditions, newest_jobs
from server.jobs.serialization import to_jobs
from server.jobs.sorting import JobOrder, SortPosition, sorted_jobs
from server.service import Service
from server.web.job_text import JobView
from zeta_core.contract.job.events import EventType, UntypedEvent
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.status import JobStatus

NUM_SAMPLES = 32  # events from which a sparkline is drawn
SPARKLINE_WIDTH, SPARKLINE_HEIGHT = 96, 24
GROUPS: dict[str, tuple[JobStatus, ...]] = {
    "all": tuple(JobStatus),
    "active": (JobStatus.RUNNING, JobStatus.QUEUED),
    "paused": (JobStatus.PAUSED,),
    "succeeded": (JobStatus.SUCCEEDED,),
    "failed": (JobStatus.FAILED,),
    "cancelled": (JobStatus.CANCELLED,),
}


@dataclass(frozen=True)
class ViewFilter:
    """The jobs of a group and a kind (``None``: any) that contain a text in their id, name or spec."""

    group: str = "all"
    search: str = ""
    kind: JobKind | None = None


@dataclass(frozen=True)
class ListedViews:
    """A page of jobs, the position of the last one in a chosen order, and whether more jobs follow."""

    views: list[JobView]
    last: SortPosition | None
    has_more: bool


async def list_views(
    service: Service, caller: Caller, chosen: ViewFilter, page_query: PageQuery
) -> tuple[list[JobView], bool]:
    """One page of the project's jobs, newest first, and whether more follow."""
    query = select(JobRow).where(*_conditions(caller, chosen))
    statuses = GROUPS[chosen.group]
    queries = [query] if len(statuses) == len(JobStatus) else [query.where(JobRow.status == each) for each in statuses]
    matches = [OrderedQuery(each, JobRow.created_at, JobRow.id) for each in queries]
    async with service.database.read() as session:
        rows, has_more = await newest_jobs(session, service, caller, matches, page_query)
        views = await _views(session, rows)
    return views, has_more


async def list_sorted_views(
    service: Service,
    caller: Caller,
    chosen: ViewFilter,
    order: JobOrder,
    after: SortPosition | None,
    limit: int,
) -> ListedViews:
    """One page of the project's jobs in another order; see `list_views`."""
    conditions = _conditions(caller, chosen)
    if len(GROUPS[chosen.group]) < len(JobStatus):
        conditions.append(JobRow.status.in_(GROUPS[chosen.group]))
    async with service.database.read() as session:
        max_row_bytes = 2 * service.settings.max_spec_bytes
        listed = await sorted_jobs(session, conditions, order, after, limit, max_row_bytes=max_row_bytes)
        return ListedViews(await _views(session, listed.rows), listed.last, listed.has_more)


async def read_view(service: Service, caller: Caller, job_id: str) -> JobView:
    """One job. Raises `NotFound`."""
    async with service.database.read() as session:
        (view,) = await _views(session, [await find_job(session, caller, job_id)])
    return view


async def read_recent(service: Service, job_id: str, types: Collection[EventType], limit: int) -> list[UntypedEvent]:
    """The newest events of these types, newest first; ``types`` must not contain ``progress``."""
    newest = union_all(*(select(_newest_of_type(job_id, type, limit).subquery().c.seq) for type in types))
    chosen = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq.in_(newest))
    async with service.database.read() as session:
        rows = await session.scalars(chosen.order_by(EventRow.seq.desc()).limit(limit))
        return [to_event(row) for row in rows]


def _newest_of_type(job_id: str, type: EventType, limit: int) -> Select[int]:
    """The numbers of the newest events of one type, from the index of rare events."""
    query = select(EventRow.seq).where(EventRow.job_id == job_id, EventRow.type == type, text(IS_RARE_EVENT))
    return query.order_by(EventRow.seq.desc()).limit(limit)


async def count_by_group(service: Service, caller: Caller) -> dict[str, int]:
    """The number of the project's jobs in each of `GROUPS`."""
    counted = select(JobRow.status, func.count()).where(JobRow.project == caller.project, JobRow.deleted_at.is_(None))
    async with service.database.read() as session:
        counts = dict((await session.execute(counted.group_by(JobRow.status))).tuples().all())
    return {group: sum(counts.get(status, 0) for status in statuses) for group, statuses in GROUPS.items()}


async def key_names(session: AsyncSession, key_ids: Collection[str]) -> dict[str, str]:
    """The names of API keys by their ids; a deleted key is missing."""
    rows = await session.execute(select(KeyRow.id, KeyRow.name).where(KeyRow.id.in_(key_ids)))
    return dict(rows.tuples().all())


def _conditions(caller: Caller, chosen: ViewFilter) -> list[ColumnElement[bool]]:
    """The conditions of the filter, except that of its group."""
    conditions: list[ColumnElement[bool]] = [JobRow.project == caller.project, JobRow.deleted_at.is_(None)]
    if chosen.search:
        conditions.append(_contains(chosen.search))
    if chosen.kind is not None:
        conditions += kind_conditions(chosen.kind)
    return conditions


def _contains(search: str) -> ColumnElement[bool]:
    texts = (JobRow.id, JobRow.entity_name, cast(JobRow.spec, Text))
    return or_(*(text.icontains(search.replace("\0", ""), autoescape=True) for text in texts))


async def _views(session: AsyncSession, rows: Sequence[JobRow]) -> list[JobView]:
    jobs: list[Job] = await to_jobs(session, rows)
    owners = await key_names(session, {row.created_by for row in rows})
    losses = await _sample_losses(session, rows)
    return [
        JobView(job, owners.get(job.created_by, job.created_by), sparkline_points(losses.get(job.id, [])))
        for job in jobs
    ]


async def _sample_losses(session: AsyncSession, rows: Sequence[JobRow]) -> dict[str, list[float]]:
    """Losses of each job from up to `NUM_SAMPLES` events, evenly spaced, so that a long run costs no more."""
    started = [row for row in rows if row.attempt > 0 and row.last_seq > 1]
    if not started:
        return {}
    chosen = or_(
        *(and_(EventRow.job_id == row.id, EventRow.seq.in_(_spaced(row.last_seq, NUM_SAMPLES))) for row in started)
    )
    columns = (EventRow.job_id, EventRow.fields)
    query = select(*columns).where(chosen, EventRow.type == "progress").order_by(EventRow.job_id, EventRow.seq)
    losses: dict[str, list[float]] = {}
    for job_id, fields in (await session.execute(query)).tuples():
        loss: Any = fields.get("loss")
        if isinstance(loss, int | float):
            losses.setdefault(job_id, []).append(float(loss))
    return losses


def _spaced(last: int, count: int) -> list[int]:
    """Up to ``count`` evenly spaced numbers from 1 to ``last``, with both ends."""
    if last <= count:
        return list(range(1, last + 1))
    return sorted({1 + round(number * (last - 1) / (count - 1)) for number in range(count)})


def sparkline_points(values: Sequence[float]) -> str:
    """The points of an SVG polyline in a box of `SPARKLINE_WIDTH` by `SPARKLINE_HEIGHT`."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    x_step = (SPARKLINE_WIDTH - 2) / (len(values) - 1)
    return " ".join(
        f"{1 + number * x_step:.1f},{SPARKLINE_HEIGHT - 2 - (value - low) / span * (SPARKLINE_HEIGHT - 4):.1f}"
        for number, value in enumerate(values)
    )
