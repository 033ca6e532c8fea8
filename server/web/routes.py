"""All routes of the dashboard, and its style sheet and scripts."""

from __future__ import annotations

from fastapi import Response

from server.web import (
    access_pages,
    compare,
    data_preview,
    files_page,
    job_list,
    job_page,
    limits_page,
    login,
    new_job,
    samples_page,
    sweeps_page,
    webhooks_page,
    workers_page,
)
from server.web.assets import load_assets
from server.web.pages import SECURITY_HEADERS, PageRouter
from zeta_core.contract.errors import NotFound

assets = PageRouter()


@assets.get("/assets/{digest}/{name:path}")
async def read_asset(digest: str, name: str) -> Response:
    """A style sheet, script or image; the digest of all assets makes the address unique to this version."""
    found = load_assets().files.get(name) if digest == load_assets().digest else None
    if found is None:
        raise NotFound("There is no such file in this version; reload the page.", code="file_not_found")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", **SECURITY_HEADERS}
    return Response(found.content, media_type=found.media_type, headers=headers)


_MODULES = (
    *(login, job_list, job_page, samples_page, compare, new_job, data_preview),
    *(sweeps_page, files_page, limits_page, workers_page, webhooks_page, access_pages),
)
ROUTERS: tuple[PageRouter, ...] = (assets, *(module.router for module in _MODULES))
