"""Lists: one page at a time, newest first, going on after the last id of the page before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import FileRow, JobRow
from zeta_core.contract.answers import Page
from zeta_core.contract.errors import InvalidRequest

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000

ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT", JobRow, FileRow)


class PageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    after: str | None = Field(default=None, description="the last id of the page before")


async def newest_first(
    session: AsyncSession, table: type[RowT], query: Select[RowT], asked: PageQuery
) -> tuple[list[RowT], bool]:
    """The rows of one page of ``query``, and whether more follow. Raises `InvalidRequest` for an unknown ``after``."""
    if asked.after is not None:
        start = await session.get(table, storable(asked.after))
        if start is None:
            raise InvalidRequest(
                f"after is {asked.after!r}, which is no id here; use the last_id of an earlier page.", param="after"
            )
        query = query.where(tuple_(table.created_at, table.id) < tuple_(start.created_at, start.id))
    query = query.order_by(table.created_at.desc(), table.id.desc()).limit(asked.limit + 1)
    rows = list(await session.scalars(query))
    return rows[: asked.limit], len(rows) > asked.limit


def page(items: Sequence[ItemT], has_more: bool, id_of: Callable[[ItemT], Any]) -> Page[ItemT]:
    return Page(
        data=list(items),
        has_more=has_more,
        first_id=str(id_of(items[0])) if items else None,
        last_id=str(id_of(items[-1])) if items else None,
    )


def storable(text: str) -> str:
    """``text`` as it may be compared with a column: PostgreSQL refuses the character NUL, which no value has."""
    return text.replace("\0", "\ufffd")
