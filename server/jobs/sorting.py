"""The list of jobs in another order than newest first, page by page.

A page continues after the value and the id of the previous page's last job, not after the job itself. So the next page
begins at the same place even if this job has changed, moved or been deleted.

These values change with every step and have no index, which would slow down storing events. A page therefore reads the
values of all the project's matching jobs, and the rows of its own jobs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.pagination import rows_of_page, storable
from server.database.tables import JobRow
from server.jobs.queries import SPEC_BYTES
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.status import JobStatus

SortField = Literal["created", "name", "status", "progress", "time_left", "loss"]
SORT_FIELDS: tuple[SortField, ...] = get_args(SortField)
_STATUS_ORDER = (
    *(JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.PAUSED),
    *(JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.CANCELLED),
)


@dataclass(frozen=True)
class JobOrder:
    """The order of a list: by the values of a field, the smallest first unless ``descending``."""

    field: SortField
    descending: bool


@dataclass(frozen=True)
class SortPlace:
    """The place of a job in an order: its value, ``None`` if it has none, and its id."""

    value: str | float | None
    id: str


@dataclass(frozen=True)
class SortedPage:
    """The rows of a page, the place of the last one (``None`` for an empty page), and whether more follow."""

    rows: list[JobRow]
    last: SortPlace | None
    has_more: bool


def parse_place(field: SortField, value: str | None, job_id: str) -> SortPlace:
    """The place that a link contains. Raises `InvalidRequest`."""
    if not is_id(job_id, "job"):
        raise InvalidRequest("The link to this page is invalid; open the list again.", param="after")
    if value is None or field in ("created", "name"):
        return SortPlace(value, job_id)
    try:
        return SortPlace(float(value), job_id)
    except ValueError as error:
        raise InvalidRequest("The link to this page is invalid; open the list again.", param="after_value") from error


async def sorted_jobs(
    session: AsyncSession,
    conditions: Sequence[ColumnElement[bool]],
    order: JobOrder,
    after: SortPlace | None,
    limit: int,
    *,
    max_row_bytes: int,
) -> SortedPage:
    """One page of the jobs that meet the conditions. Jobs without a value come last, in either direction.

    Jobs with equal values are ordered newest first. ``max_row_bytes`` is the usual maximum of a row's spec.
    """
    key = _key(order.field)
    query = select(JobRow.id, key.label("value")).where(*conditions)
    if after is not None:
        query = query.where(_follows(key, after, descending=order.descending))
    columns = (key.is_(None), key.desc() if order.descending else key.asc(), JobRow.id.desc())
    keys = (await session.execute(query.order_by(*columns).limit(limit + 1))).all()
    ids = [job_id for job_id, _ in keys[:limit]]
    rows = await rows_of_page(session, JobRow, ids, SPEC_BYTES, max_row_bytes)
    last = SortPlace(keys[len(rows) - 1][1], rows[-1].id) if rows else None
    return SortedPage(rows, last, len(keys) > len(rows))


def _key(field: SortField) -> ColumnElement[Any]:
    """The value that orders the jobs."""
    match field:
        case "created":
            return JobRow.id.expression  # begins with the creation time
        case "name":
            return func.lower(func.coalesce(JobRow.entity_name, JobRow.id))
        case "status":
            return case({status: number for number, status in enumerate(_STATUS_ORDER)}, value=JobRow.status)
        case "progress":
            total = func.coalesce(_progress("total_steps"), JobRow.resolved_spec_json["total_steps"].as_float())
            return _progress("step") / func.nullif(total, 0)
        case "time_left":
            return case((JobRow.status == JobStatus.RUNNING, _progress("eta_seconds")))
        case "loss":
            return func.coalesce(_progress("recent_loss"), _progress("loss"))


def _progress(name: str) -> ColumnElement[Any]:
    """A number of the job's newest progress."""
    return JobRow.progress[name].as_float()


def _follows(key: ColumnElement[Any], after: SortPlace, *, descending: bool) -> ColumnElement[bool]:
    older = JobRow.id < after.id
    if after.value is None:
        return and_(key.is_(None), older)
    value = storable(after.value) if isinstance(after.value, str) else after.value
    return or_(key < value if descending else key > value, and_(key == value, older), key.is_(None))
