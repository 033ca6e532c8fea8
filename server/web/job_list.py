"""The list of jobs: the first page of the dashboard."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server.database.pagination import PageQuery
from server.jobs.sorting import JobOrder, SortPosition, parse_position
from server.routes.routing import TheService
from server.service import Service
from server.web.job_views import GROUPS, ListedViews, ViewFilter, count_by_group, list_sorted_views, list_views
from server.web.pages import PageRequest, PageRouter, ReadPage
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.order import NEWEST_FIRST, JobSort, SortField

router = PageRouter()
PAGE_SIZE = 50
MAX_REFRESHED = 200
_DESCENDING_FIRST: tuple[SortField, ...] = ("created", "progress")  # the others begin with the smallest value
# The orders in a list for narrow screens, which have no column headings.
ORDERS = {
    NEWEST_FIRST: "newest first",
    "created": "oldest first",
    "name": "name",
    "status": "status",
    "-progress": "most progress first",
    "time_left": "least time left first",
    "loss": "lowest loss first",
}


class ListQuery(BaseModel):
    """The filters and the order; ``limit`` is the number of rows that the browser shows and refreshes.

    ``sort`` is a field, with a minus for descending order. Sorted pages continue after ``after_value`` and ``after``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    show: Literal["all", "active", "paused", "succeeded", "failed", "cancelled"] = "all"
    kind: JobKind | None = None
    q: str = Field(default="", max_length=200)
    sort: JobSort = NEWEST_FIRST
    after: str | None = None
    after_value: str | None = Field(default=None, max_length=1000)
    limit: int = Field(default=PAGE_SIZE, ge=1, le=MAX_REFRESHED)

    @property
    def order(self) -> JobOrder:
        return JobOrder.of(self.sort)

    def link(self, **changes: Any) -> str:
        """The address of the list with some filters changed; ``None`` removes one."""
        values = {"show": self.show, "kind": self.kind, "q": self.q, "sort": self.sort, **changes}
        defaults = {"show": "all", "q": "", "sort": NEWEST_FIRST}
        chosen = {name: value for name, value in values.items() if value is not None and value != defaults.get(name)}
        return f"/?{urlencode(chosen)}" if chosen else "/"

    def link_sorted(self, field: SortField) -> str:
        """The list in the order of this field, or in the opposite order if it has this order already."""
        first = f"-{field}" if field in _DESCENDING_FIRST else field
        opposite = field if first != field else f"-{field}"
        return self.link(sort=opposite if self.sort == first else first)

    def direction(self, field: SortField) -> str:
        """The value of ``aria-sort`` for the field's column."""
        if self.order.field != field:
            return "none"
        return "descending" if self.order.descending else "ascending"


@router.get("/")
async def show_jobs(service: TheService, page: ReadPage, query: Annotated[ListQuery, Query()]) -> Response:
    """The list of jobs, newest first unless another order is chosen."""
    return await _render(service, page, query, "jobs.html")


@router.get("/jobs/rows")
async def show_rows(service: TheService, page: ReadPage, query: Annotated[ListQuery, Query()]) -> Response:
    """The filters' numbers and the rows alone, which the browser refreshes regularly."""
    return await _render(service, page, query, "jobs_table.html")


async def _render(service: Service, page: PageRequest, query: ListQuery, template: str) -> Response:
    listed = await _read(service, page, query)
    following = None
    if listed.has_more and listed.last is not None:
        following = query.link(after=listed.last.id, after_value=listed.last.value)
    return page.render(
        template,
        query=query,
        views=listed.views,
        following=following,
        counts=await count_by_group(service, page.caller),
        groups=list(GROUPS),
        kinds=list(JobKind),
        orders=ORDERS,
    )


async def _read(service: Service, page: PageRequest, query: ListQuery) -> ListedViews:
    chosen = ViewFilter(query.show, query.q.strip(), query.kind)
    if query.sort != NEWEST_FIRST:
        order = query.order
        after = parse_position(order.field, query.after_value, query.after) if query.after is not None else None
        return await list_sorted_views(service, page.caller, chosen, order, after, query.limit)
    page_query = PageQuery(limit=query.limit, after=query.after)
    views, has_more = await list_views(service, page.caller, chosen, page_query)
    return ListedViews(views, SortPosition(None, views[-1].job.id) if views else None, has_more)
