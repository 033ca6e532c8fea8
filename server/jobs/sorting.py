"""The list of jobs in a chosen order, page by page.

A page continues after the value and the id of the previous page's last job, not after the job itself. So the next page
begins at the same position even if this job has changed, moved or been deleted.

The order of creation is read from an index. The other values change with every step (or are rarely sorted by) and have
no index, which would slow down storing events. A page in such an order therefore reads the values of all the project's
matching jobs, and the rows of its own jobs only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self, cast

from sqlalchemy import ColumnElement, and_, case, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.nul_characters import replace_nul
from server.database.pagination import rows_of_page
from server.database.tables import JobRow
from server.jobs.serialization import SPEC_BYTES
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.order import JobSort, SortField
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.spec.validation import shown

_STATUS_ORDER = (
    *(JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.PAUSED),
    *(JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.CANCELLED),
)


@dataclass(frozen=True)
class JobOrder:
    """The order of a list: by the values of a field, the smallest first unless ``descending``."""

    field: SortField
    descending: bool

    @classmethod
    def of(cls, sort: JobSort) -> Self:
        return cls(cast("SortField", sort.removeprefix("-")), sort.startswith("-"))


@dataclass(frozen=True)
class SortPosition:
    """The position of a job in an order: its value, ``None`` if it has none, and its id."""

    value: str | float | datetime | None
    id: str

    def as_text(self) -> str:
        """The position as the parameter ``after``: the id, a comma, and the value as JSON. `read_position` reads it."""
        value = self.value.isoformat() if isinstance(self.value, datetime) else self.value
        return f"{self.id},{json.dumps(value)}"


@dataclass(frozen=True)
class SortedPage:
    """The rows of a page, the position of the last one (``None`` for an empty page), and whether more follow."""

    rows: list[JobRow]
    last: SortPosition | None
    has_more: bool


def read_position(field: SortField, after: str) -> SortPosition:
    """The position in an order by this field that a request continues after. Raises `InvalidRequest`."""
    job_id, comma, value = after.partition(",")
    try:
        if not is_id(job_id, "job") or not comma:
            raise ValueError("the id or the value is missing")
        return SortPosition(_read_value(field, json.loads(value)), job_id)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"after is {shown(after)}, which is not a position in the order of {field}; use the next_after of the "
            "previous page, with the same sort.",
            param="after",
        ) from error


def parse_position(field: SortField, value: str | None, job_id: str) -> SortPosition:
    """The position that a link of the dashboard contains. Raises `InvalidRequest`."""
    try:
        if not is_id(job_id, "job"):
            raise ValueError("not the id of a job")
        number = None if value is None or field in ("created", "name") else float(value)
        return SortPosition(_read_value(field, value if number is None else number), job_id)
    except ValueError as error:
        raise InvalidRequest("The link to this page is invalid; open the list again.", param="after") from error


def _read_value(field: SortField, value: Any) -> str | float | datetime | None:
    """A value of the field. Raises `ValueError` for another one."""
    if field == "created":
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
        if time is None or time.tzinfo is None:
            raise ValueError("not a time with a zone")
        return time
    if value is None:
        return None
    if field == "name":
        if not isinstance(value, str):
            raise ValueError("not a name")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a number")
    return float(value)


async def sorted_jobs(
    session: AsyncSession,
    conditions: Sequence[ColumnElement[bool]],
    order: JobOrder,
    after: SortPosition | None,
    limit: int,
    *,
    max_row_bytes: int,
) -> SortedPage:
    """One page of the jobs that meet the conditions. Jobs without a value come last, in either direction.

    Jobs with equal values are ordered newest first, except that the order of creation has only one direction.
    ``max_row_bytes`` is the usual maximum of a row's spec.
    """
    key = _key(order.field)
    query = select(JobRow.id, key.label("value")).where(*conditions)
    if after is not None:
        query = query.where(_follows(key, order, after))
    columns: list[ColumnElement[Any]] = [key.desc() if order.descending else key.asc()]
    if order.field == "created":  # as in the index
        columns.append(JobRow.id.desc() if order.descending else JobRow.id.asc())
    else:
        columns = [key.is_(None), *columns, JobRow.id.desc()]
    keys = (await session.execute(query.order_by(*columns).limit(limit + 1))).all()
    ids = [job_id for job_id, _ in keys[:limit]]
    rows = await rows_of_page(session, JobRow, ids, SPEC_BYTES, max_row_bytes)
    last = SortPosition(keys[len(rows) - 1][1], rows[-1].id) if rows else None
    return SortedPage(rows, last, len(keys) > len(rows))


def _key(field: SortField) -> ColumnElement[Any]:
    """The value that orders the jobs."""
    match field:
        case "created":
            return JobRow.created_at.expression
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
        case "eval_loss":
            return func.coalesce(JobRow.result["eval_loss"].as_float(), _progress("eval_loss"))


def _progress(name: str) -> ColumnElement[Any]:
    """A number of the job's newest progress."""
    return JobRow.progress[name].as_float()


def _follows(key: ColumnElement[Any], order: JobOrder, after: SortPosition) -> ColumnElement[bool]:
    if order.field == "created":
        job, position = tuple_(key, JobRow.id), (after.value, after.id)
        return job < position if order.descending else job > position
    older = JobRow.id < after.id
    if after.value is None:
        return and_(key.is_(None), older)
    value = replace_nul(after.value) if isinstance(after.value, str) else after.value
    return or_(key < value if order.descending else key > value, and_(key == value, older), key.is_(None))
