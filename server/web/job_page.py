"""The pages of one job: overview with curves, log, events, checkpoints, data and settings, and its commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from server.jobs import commands, deletions
from server.jobs.chart_points import DEFAULT_POINTS, ChartPoints, ChartQuery, XAxis
from server.jobs.checkpoints import list_checkpoints
from server.jobs.event_stream import read_events
from server.routes.routing import TheService, TheSubmissions
from server.submitting import exports, reruns
from server.web.job_text import JobView
from server.web.job_views import read_recent, read_view
from server.web.pages import PageRouter, ReadPage, SubmitPage
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.data_report import DataReport
from zeta_core.contract.spec.kinds import SPEC_MODELS, resolve
from zeta_core.contract.spec.validation import parse

router = PageRouter()
EVENTS_PER_PAGE = 200
MAX_CHECKPOINTS = 1000
Command = Literal["cancel", "pause", "resume"]

# Facts in the resolved spec that are not settings.
_FACTS = (
    *("run_id", "device", "device_kind", "threads", "world_size", "first_world_size", "dtype", "strategy"),
    *("num_parameters", "num_trained_parameters", "total_steps", "total_sequences", "eval_documents", "eval_tokens"),
    *("template_date", "data_report", "files", "memory"),
)


@dataclass(frozen=True)
class Setting:
    """A field of the resolved spec. ``origin``: given by the user, the documented default, or decided by the run."""

    name: str
    value: Any
    origin: Literal["given", "decided", "default"]
    help: str


class CurvePageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    x: XAxis = "step"
    first: float | None = Field(default=None, allow_inf_nan=False)
    last: float | None = Field(default=None, allow_inf_nan=False)
    points: int = Field(default=DEFAULT_POINTS, ge=10, le=20_000)


class EventPageQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: int = Field(default=0, ge=0, lt=2**53)


@router.get("/jobs/{job_id}")
async def show_overview(service: TheService, page: ReadPage, job_id: str) -> Response:
    """Status, progress and curves."""
    view = await read_view(service, page.caller, job_id)
    events = await read_recent(service, job_id, ("status", "log", "checkpoint", "warning", "error"), 8)
    samples = await read_recent(service, job_id, ("sample",), 6)
    return page.render("job_overview.html", view=view, tab="overview", events=events, samples=samples)


@router.get("/jobs/{job_id}/header")
async def show_header(service: TheService, page: ReadPage, job_id: str) -> Response:
    """The part with status, progress and commands, which is refreshed when the status changes."""
    return page.render("job_header.html", view=await read_view(service, page.caller, job_id))


@router.get("/jobs/{job_id}/curves")
async def read_chart_points(
    service: TheService, page: ReadPage, job_id: str, query: Annotated[CurvePageQuery, Query()]
) -> Response:
    """The points of the curves in a range of the x axis, for the charts."""
    points = _points(page.request, service)
    chart = ChartQuery(x=query.x, first=query.first, last=query.last, max_points=query.points)
    return JSONResponse(await points.read(page.caller, job_id, chart))


@router.get("/jobs/{job_id}/log")
async def show_log(service: TheService, page: ReadPage, job_id: str) -> Response:
    """The output of the training processes; the browser's script reads and follows it."""
    return page.render("job_log.html", view=await read_view(service, page.caller, job_id), tab="log")


@router.get("/jobs/{job_id}/events")
async def show_events(
    service: TheService, page: ReadPage, job_id: str, query: Annotated[EventPageQuery, Query()]
) -> Response:
    """All events, oldest first."""
    view = await read_view(service, page.caller, job_id)
    events = await read_events(service, job_id, query.after, EVENTS_PER_PAGE)
    return page.render("job_events.html", view=view, tab="events", events=events, after=query.after)


@router.get("/jobs/{job_id}/checkpoints")
async def show_checkpoints(service: TheService, page: ReadPage, job_id: str) -> Response:
    """The checkpoints with their metrics and files."""
    view = await read_view(service, page.caller, job_id)
    manifests = (await list_checkpoints(service, page.caller, job_id, None, MAX_CHECKPOINTS)).data
    return page.render("job_checkpoints.html", view=view, tab="checkpoints", manifests=manifests)


@router.get("/jobs/{job_id}/chat")
async def show_chat(service: TheService, page: ReadPage, job_id: str) -> Response:
    """A chat with the newest checkpoint, and with the base model unless the job trains from scratch."""
    view = await read_view(service, page.caller, job_id)
    model = view.job.spec.get("model")
    has_base = not (isinstance(model, dict) and "config" in model)
    return page.render("job_chat.html", view=view, tab="chat", has_base=has_base)


@router.get("/jobs/{job_id}/data")
async def show_data(service: TheService, page: ReadPage, job_id: str) -> Response:
    """The report on the data that the run has read."""
    view = await read_view(service, page.caller, job_id)
    report = view.job.resolved_spec.data_report
    parsed = DataReport.model_validate(report) if report else None
    return page.render("job_data.html", view=view, tab="data", report=parsed)


@router.get("/jobs/{job_id}/settings")
async def show_settings(service: TheService, page: ReadPage, job_id: str) -> Response:
    """Every setting with its origin, and the facts that the run has recorded."""
    view = await read_view(service, page.caller, job_id)
    resolved = view.job.resolved_spec.as_json()
    facts = {name: resolved[name] for name in _FACTS if resolved.get(name) not in (None, {}, [])}
    facts.pop("data_report", None)
    return page.render("job_settings.html", view=view, tab="settings", settings=list(_settings(view)), facts=facts)


@router.post("/jobs/{job_id}/commands/{command}")
async def run_command(service: TheService, page: SubmitPage, job_id: str, command: Command) -> Response:
    """Run a command, and return the header with the new status."""
    await commands.run_command(service, page.caller, job_id, command)
    if page.request.headers.get("hx-request") != "true":
        return page.redirect(f"/jobs/{job_id}")
    return page.render("job_header.html", view=await read_view(service, page.caller, job_id))


@router.post("/jobs/{job_id}/rerun")
async def rerun(service: TheService, submissions: TheSubmissions, page: SubmitPage, job_id: str) -> Response:
    """Submit the job again: with the patch of its error or of one of its warnings, or unchanged."""
    view = await read_view(service, page.caller, job_id)
    advice, start = page.form.get("advice", ""), page.form.get("from", "start")
    body = {"patch": _suggested_patch(view, advice), "from": start}
    request_id = page.form.get("request_id", "")[:100]
    key = f"{request_id}-{advice}-{start}"[:200] if request_id else None
    job, _ = await reruns.rerun(service, submissions, page.caller, job_id, body, key)
    return page.redirect(f"/jobs/{job.id}")


@router.post("/jobs/{job_id}/export")
async def export(service: TheService, submissions: TheSubmissions, page: SubmitPage, job_id: str) -> Response:
    """Export a checkpoint; ``format`` is that of the export, with the type of its weights for GGUF (``gguf:q8_0``)."""
    to, _, weight_type = page.form.get("format", "").partition(":")
    checkpoint = page.form.get("checkpoint", "")
    body = {"to": to, "checkpoint": checkpoint, **({"type": weight_type} if weight_type else {})}
    request_id = page.form.get("request_id", "")[:100]
    key = f"{request_id}-{checkpoint}-{to}-{weight_type}"[:200] if request_id else None
    job, _ = await exports.create_export(service, submissions, page.caller, job_id, body, key)
    return page.redirect(f"/jobs/{job.id}")


@router.post("/jobs/{job_id}/delete")
async def delete_job(service: TheService, page: SubmitPage, job_id: str) -> Response:
    """Delete an ended job with its artifacts."""
    await deletions.delete(service, page.caller, job_id)
    return page.redirect("/")


def _points(request: Request, service: TheService) -> ChartPoints:
    """The points kept in this process, created at the first request."""
    points = getattr(request.app.state, "chart_points", None)
    if points is None:
        points = request.app.state.chart_points = ChartPoints(service)
    return points


def _suggested_patch(view: JobView, advice: str) -> dict[str, Any]:
    """The patch of the error, or of the warning with this number; ``advice`` is empty for an unchanged rerun."""
    if advice == "":
        return {}
    if advice == "error" and view.job.error is not None and view.job.error.patch:
        return dict(view.job.error.patch)
    if advice.isdecimal() and int(advice) < len(view.job.warnings):
        patch = view.job.warnings[int(advice)].get("patch")
        if isinstance(patch, dict):
            return patch
    raise InvalidRequest(f"Job {view.job.id} has no advice {advice!r}; reload the page.", param="advice")


def _settings(view: JobView) -> Iterator[Setting]:
    """The settings of the job in the order of the spec; those that are unset are omitted."""
    given, resolved, defaults = view.job.spec, view.job.resolved_spec.as_json(), _defaults(view)
    model = SPEC_MODELS[view.job.kind]
    names = [*model.model_fields, *(name for name in resolved if name not in model.model_fields)]
    for name in names:
        value = resolved.get(name)
        if name in _FACTS or value is None:
            continue
        field = model.model_fields.get(name)
        help_text = (field.description or "") if field is not None else ""
        if name in given and (given[name] == value or isinstance(given[name], dict | list)):
            yield Setting(name, given[name], "given", help_text)
        else:
            yield Setting(name, value, "default" if value == defaults.get(name) else "decided", help_text)


def _defaults(view: JobView) -> dict[str, Any]:
    """The documented defaults for this spec; empty if an older version accepted a spec that is invalid now."""
    try:
        return resolve(parse(SPEC_MODELS[view.job.kind], dict(view.job.spec))).as_json()
    except ZetaError:
        return {}
