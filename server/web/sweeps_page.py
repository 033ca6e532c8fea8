"""The pages of sweeps: the list, one sweep with the results of its jobs, and a new sweep."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server.database.pagination import PageQuery
from server.jobs import sweeps
from server.jobs.queries import get_job
from server.routes.routing import TheService
from server.submitting.sweeps import create_sweep
from server.web.compare import MAX_JOBS as MAX_COMPARED
from server.web.new_job import read_spec_form
from server.web.pages import PageRequest, PageRouter, ReadPage, SubmitPage
from server.web.spec_yaml import read_yaml, write_yaml
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.status import ENDED
from zeta_core.contract.job.sweep import SweepJob, SweepResult

router = PageRouter()
PAGE_SIZE = 100
EXAMPLE_GRID = "learning_rate: [0.0001, 0.0003]\n"


class SweepsQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = None


class NewSweepQuery(BaseModel):
    """``job``: the job whose spec is varied."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str | None = Field(default=None, max_length=100)


@router.get("/sweeps")
async def show_sweeps(service: TheService, page: ReadPage, query: Annotated[SweepsQuery, Query()]) -> Response:
    """The sweeps of the project, newest first."""
    listed = await sweeps.list_sweeps(service, page.caller, PageQuery(limit=PAGE_SIZE, after=query.after))
    return page.render("sweeps.html", sweeps=listed, after=query.after)


@router.get("/sweeps/new")
async def show_form(service: TheService, page: ReadPage, query: Annotated[NewSweepQuery, Query()]) -> Response:
    """The form for a new sweep, with the spec of a job."""
    spec = {} if query.job is None else (await get_job(service, page.caller, query.job)).spec
    return _render_form(page, {"yaml": await asyncio.to_thread(write_yaml, spec), "grid": EXAMPLE_GRID})


@router.post("/sweeps/new")
async def vary_new_job(service: TheService, page: SubmitPage) -> Response:
    """The form for a new sweep, with the spec that the form for a new job describes."""
    text = await asyncio.to_thread(write_yaml, await read_spec_form(service, page.form))
    return _render_form(page, {"yaml": text, "grid": EXAMPLE_GRID})


@router.post("/sweeps")
async def submit(service: TheService, page: SubmitPage) -> Response:
    """Create the sweep, or show the form again with the faults. Sending the same form twice creates one sweep."""
    try:
        body = await asyncio.to_thread(_body, page.form, service.settings.max_spec_bytes)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
        request_id = page.form.get("request_id", "")[:100] or secrets.token_hex(8)
        sweep, _ = await create_sweep(service, page.caller, body, f"{request_id}-{digest}")
    except ZetaError as error:
        return _render_form(page, page.form, error)
    return page.redirect(f"/sweeps/{sweep.id}")


@router.get("/sweeps/{sweep_id}")
async def show_sweep(service: TheService, page: ReadPage, sweep_id: str) -> Response:
    """The jobs of a sweep with their settings and losses, the best one first."""
    return _render_sweep(page, "sweep.html", await sweeps.get_sweep(service, page.caller, sweep_id))


@router.get("/sweeps/{sweep_id}/results")
async def show_results(service: TheService, page: ReadPage, sweep_id: str) -> Response:
    """The results alone, which the browser refreshes regularly."""
    return _render_sweep(page, "sweep_results.html", await sweeps.get_sweep(service, page.caller, sweep_id))


@router.post("/sweeps/{sweep_id}/cancel")
async def cancel_sweep(service: TheService, page: SubmitPage, sweep_id: str) -> Response:
    """Cancel all unfinished jobs of the sweep."""
    await sweeps.cancel_sweep(service, page.caller, sweep_id)
    return page.redirect(f"/sweeps/{sweep_id}")


def _body(form: Mapping[str, str], max_bytes: int) -> dict[str, Any]:
    """The request that the form describes. Raises `InvalidRequest`."""
    body: dict[str, Any] = {"spec": read_yaml(form.get("yaml", ""), max_bytes)}
    body["grid"] = read_yaml(form.get("grid", ""), max_bytes)
    if number := form.get("random", "").strip():
        if not (number.isdecimal() and len(number) < 10):
            raise InvalidRequest(f"{number[:40]!r} is not a number of combinations.", param="random")
        body["random"] = int(number)
    return body


def _render_form(page: PageRequest, form: Mapping[str, str], error: ZetaError | None = None) -> Response:
    return page.render("new_sweep.html", status=200 if error is None else 422, form=form, error=error)


def _render_sweep(page: PageRequest, template: str, sweep: SweepResult) -> Response:
    jobs = sorted(sweep.jobs, key=lambda job: _rank(job, sweep))
    compared = urlencode([("job", job.id) for job in jobs[:MAX_COMPARED]])
    can_cancel = any(job.status not in ENDED for job in jobs)
    return page.render(template, sweep=sweep, jobs=jobs, compared=compared, can_cancel=can_cancel)


def _rank(job: SweepJob, sweep: SweepResult) -> tuple[bool, float]:
    """The best job, then the others by the compared loss; those without one are last, in the order of creation."""
    loss = job.eval_loss if sweep.metric == "eval_loss" else job.loss
    return job.id != sweep.best, float("inf") if loss is None else loss
