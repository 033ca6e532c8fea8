"""The page of the project's limits, and how much of them is used."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Response

from server import projects
from server.routes.routing import TheService
from server.web.formatting import as_bytes, as_count
from server.web.pages import PageRouter, ReadPage
from zeta_core.contract.access import ProjectLimits

router = PageRouter()
# The limits whose use is known, with the name of that use.
_USES = {
    "max_queued_jobs": "queued_jobs",
    "max_running_jobs": "running_jobs",
    "max_gpus": "gpus",
    "max_stored_bytes": "stored_bytes",
}


@dataclass(frozen=True)
class LimitView:
    """A limit of the project as texts; ``share`` is the used part of it, from 0 to 1, if both are known."""

    name: str
    meaning: str
    used: str | None
    limit: str
    share: float | None


@router.get("/limits")
async def show_limits(service: TheService, page: ReadPage) -> Response:
    """The limits that apply to the project of this session."""
    project = await projects.get_project(service, page.caller, page.caller.project)
    usage = project.usage.model_dump()
    limits = [
        _view(name, usage.get(_USES.get(name, "")), project.effective_limits.get(name))
        for name in ProjectLimits.model_fields
    ]
    return page.render("limits.html", limits=limits)


def _view(name: str, used: int | None, limit: int | str | None) -> LimitView:
    show = as_bytes if name.endswith("_bytes") else as_count
    return LimitView(
        name=name,
        meaning=(ProjectLimits.model_fields[name].description or "").partition(";")[0],
        used=None if used is None else show(used),
        limit="no limit" if limit is None else str(limit) if isinstance(limit, str) else show(limit),
        share=min(1.0, used / limit) if used is not None and isinstance(limit, int) and limit > 0 else None,
    )
