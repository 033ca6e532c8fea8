"""The list of jobs: the first page of the dashboard."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlencode

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server.database.pagination import PageQuery
from server.routes.routing import TheService
from server.service import Service
from server.web.job_views import GROUPS, count_by_group, list_views
from server.web.pages import Page, PageRouter, ReadPage
from zeta_core.contract.job.kind import JobKind

router = PageRouter()
PAGE_SIZE = 50
MAX_REFRESHED = 200


class ListQuery(BaseModel):
    """The filters; ``limit`` is the number of rows that the browser shows and refreshes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    show: Literal["all", "active", "paused", "succeeded", "failed", "cancelled"] = "all"
    kind: JobKind | None = None
    q: str = Field(default="", max_length=200)
    after: str | None = None
    limit: int = Field(default=PAGE_SIZE, ge=1, le=MAX_REFRESHED)

    def link(self, **changes: str | None) -> str:
        """The address of the list with some filters changed; ``None`` removes one."""
        values = {"show": self.show, "kind": self.kind, "q": self.q, **changes}
        query = urlencode({name: value for name, value in values.items() if value and (name, value) != ("show", "all")})
        return f"/?{query}" if query else "/"


@router.get("/")
async def show_jobs(service: TheService, page: ReadPage, query: Annotated[ListQuery, Query()]) -> Response:
    """The list of jobs, newest first."""
    return await _render(service, page, query, "jobs.html")


@router.get("/jobs/rows")
async def show_rows(service: TheService, page: ReadPage, query: Annotated[ListQuery, Query()]) -> Response:
    """The filters' numbers and the rows alone, which the browser refreshes regularly."""
    return await _render(service, page, query, "jobs_table.html")


async def _render(service: Service, page: Page, query: ListQuery, template: str) -> Response:
    page_query = PageQuery(limit=query.limit, after=query.after)
    views, has_more = await list_views(service, page.caller, query.show, query.q.strip(), page_query, query.kind)
    counts = await count_by_group(service, page.caller)
    return page.render(
        template, query=query, views=views, has_more=has_more, counts=counts, groups=list(GROUPS), kinds=list(JobKind)
    )
