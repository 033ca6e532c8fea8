"""Pagination: newest first, each page continuing after the last id of the previous page.

An id contains the creation time of its row, so a list can continue even if that row has been deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Select, SQLColumnExpression, select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.access_tables import KeyRow
from server.database.file_tables import FileRow
from server.database.tables import JobRow, SweepRow
from server.database.webhook_tables import DeliveryRow, WebhookRow
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import IdPrefix, creation_time, is_id
from zeta_core.contract.job.responses import Page
from zeta_core.contract.spec.validation import shown

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000
# A page of large rows is cut at this size, but has at least one row; `has_more` reports the rest.
MAX_PAGE_BYTES = 4 << 20
MAX_UNMEASURED_ROWS = 50  # a page of so few rows of usual size is small enough, so their sizes are not read

ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT", JobRow, FileRow, KeyRow, SweepRow, WebhookRow, DeliveryRow)

_PREFIXES: dict[type[Any], IdPrefix] = {
    JobRow: "job",
    FileRow: "file",
    KeyRow: "key",
    SweepRow: "sweep",
    WebhookRow: "webhook",
    DeliveryRow: "delivery",
}


class PageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT, description="maximum number of items")] = DEFAULT_LIMIT
    after: str | None = Field(default=None, description="continue after this id, the last_id of the previous page")


def cursor(pattern: str) -> Any:
    """The field ``after`` of a list whose ids match ``pattern``, which is described but not checked here."""
    return Field(
        default=None,
        description="continue after this id, the last_id of the previous page",
        json_schema_extra={"pattern": pattern},
    )


@dataclass(frozen=True)
class OrderedQuery:
    """A query for the rows that match a list's filters, and the two columns that order them, newest first.

    An index must contain the filters followed by these two columns, so that a page is read without a scan or a sort.
    """

    query: Select[Any]
    created_at: SQLColumnExpression[datetime]
    id: SQLColumnExpression[str]


async def newest_first(
    session: AsyncSession,
    table: type[RowT],
    alternatives: Sequence[OrderedQuery],
    page_query: PageQuery,
    *,
    project: str | None,
    size: ColumnElement[int] | None = None,
    max_row_bytes: int = 0,
) -> tuple[list[RowT], bool]:
    """The rows of one page, and whether more follow. A row matches exactly one of ``alternatives`` or none.

    ``project`` contains the listed rows (``None``: all projects): ``after`` reveals nothing about a row of another one.
    ``size`` and ``max_row_bytes`` are those of `rows_of_page`.

    Raises `InvalidRequest` for an invalid ``after``.
    """
    start: tuple[datetime, str] | None = None
    if page_query.after is not None:
        start = await position_of(session, table, page_query.after, project)
        if start is None:
            raise InvalidRequest(
                f"after is {shown(page_query.after)}, which is not a valid id; use the last_id of an earlier page.",
                param="after",
            )
    limit = page_query.limit
    keys = (await session.execute(_keys(alternatives, start, limit + 1))).all()
    ids: list[str] = [key.id for key in keys]
    rows = await rows_of_page(session, table, ids[:limit], size, max_row_bytes)
    return rows, len(ids) > len(rows)


async def rows_of_page(
    session: AsyncSession,
    table: type[RowT],
    ids: Sequence[str],
    size: ColumnElement[int] | None = None,
    max_row_bytes: int = 0,
) -> list[RowT]:
    """The rows with these ids, in their order. The last ones are left out if the total exceeds `MAX_PAGE_BYTES`.

    ``size`` is the size in bytes of possibly large rows, and ``max_row_bytes`` its usual maximum.
    """
    limit = len(ids)
    if size is not None and limit > (
        MAX_UNMEASURED_ROWS if max_row_bytes * MAX_UNMEASURED_ROWS <= 2 * MAX_PAGE_BYTES else 1
    ):
        found = (await session.execute(select(table.id, size).where(table.id.in_(ids)))).all()
        sizes: dict[str, int] = dict(found)
        limit = max(1, sum(total <= MAX_PAGE_BYTES for total in accumulate(sizes[id_] for id_ in ids)))
    rows = {row.id: row for row in await session.scalars(select(table).where(table.id.in_(ids[:limit])))}
    return [rows[id_] for id_ in ids[:limit]]


def _keys(alternatives: Sequence[OrderedQuery], start: tuple[datetime, str] | None, limit: int) -> Select[Any]:
    """The creation times and ids of a page. Each alternative has its own limit, and is read in an index's order."""
    parts: list[Any] = []
    for matches in alternatives:
        query = matches.query.with_only_columns(matches.created_at.label("created_at"), matches.id.label("id"))
        if start is not None:
            query = query.where(tuple_(matches.created_at, matches.id) < start)
        parts.append(query.order_by(matches.created_at.desc(), matches.id.desc()).limit(limit))
    if len(parts) == 1:
        return parts[0]
    combined = union_all(*(select(part.subquery()) for part in parts)).subquery()
    return select(combined).order_by(combined.c.created_at.desc(), combined.c.id.desc()).limit(limit)


async def position_of(
    session: AsyncSession, table: type[RowT], after: str, project: str | None
) -> tuple[datetime, str] | None:
    """The creation time and the id of a row in a list, whether or not it still exists; ``None`` for an invalid id.

    The time of a row in another project than ``project`` (``None``: all projects) is that in its id.
    """
    if not is_id(after, _PREFIXES[table]):
        return None
    row = await session.get(table, after)
    is_listed = row is not None and project in (None, row.project)
    time = row.created_at if row is not None and is_listed else creation_time(after)
    return None if time is None else (time, after)


def page(
    items: Sequence[ItemT], has_more: bool, id_of: Callable[[ItemT], Any], next_after: str | None = None
) -> Page[ItemT]:
    """One page of a list.

    ``next_after`` is the position after which the next page continues; default: the id of the last item.
    """
    last_id = str(id_of(items[-1])) if items else None
    return Page(
        data=list(items),
        has_more=has_more,
        first_id=str(id_of(items[0])) if items else None,
        last_id=last_id,
        next_after=(next_after or last_id) if has_more else None,
    )
