"""The pages of workers: their devices and jobs, draining, and the usage of a machine over time."""

from __future__ import annotations

from typing import Literal

from fastapi import Response

from server import workers
from server.database.pagination import MAX_LIMIT, PageQuery
from server.routes.routing import TheService
from server.service import Service
from server.web.pages import AdminPage, PageRequest, PageRouter, ReadPage

router = PageRouter()
Action = Literal["drain", "undrain"]


@router.get("/workers")
async def show_workers(service: TheService, page: ReadPage) -> Response:
    """The workers that were seen within the last day."""
    return await _render(service, page, "workers.html")


@router.get("/workers/list")
async def show_list(service: TheService, page: ReadPage) -> Response:
    """The list alone, which the browser refreshes regularly."""
    return await _render(service, page, "workers_list.html")


@router.get("/workers/{name}/use")
async def show_use(service: TheService, page: ReadPage, name: str) -> Response:
    """The usage of one worker's machine over time; the browser's script reads the curves. Raises `NotFound`."""
    await workers.read_usage(service, name, hours=1)
    return page.render("worker_use.html", name=name)


@router.post("/workers/{name}/{action}")
async def set_draining(service: TheService, page: AdminPage, name: str, action: Action) -> Response:
    """Drain or undrain a worker (scope ``admin``)."""
    await workers.set_draining(service, page.caller, name, action == "drain")
    if page.request.headers.get("hx-request") == "true":
        return await _render(service, page, "workers_list.html")
    return page.redirect("/workers")


async def _render(service: Service, page: PageRequest, template: str) -> Response:
    listed = await workers.list_workers(service, page.caller, PageQuery(limit=MAX_LIMIT))
    return page.render(template, workers=listed.data)
