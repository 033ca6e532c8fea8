"""The page for a new job: a form or YAML, checked while the user types, with the estimate beside it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server import files
from server.database.pagination import PageQuery
from server.estimates import estimate
from server.http.bodies import check_size
from server.jobs.queries import get_job
from server.routes.routing import TheService, TheSubmissions
from server.service import Service
from server.web.job_views import ViewFilter, list_views
from server.web.pages import PageRequest, PageRouter, ReadPage, SubmitPage
from server.web.spec_form import METHODS, groups, spec_of
from server.web.spec_yaml import read_yaml, write_yaml
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.strict_json import JsonFault, read_json

router = PageRouter()
MAX_CHOICES = 200


class NewJobQuery(BaseModel):
    """What the form starts with: a data file, a model file, an earlier job's model, or the spec of a job to edit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = Field(default=None, max_length=100)
    model_file: str | None = Field(default=None, max_length=100)
    model_job: str | None = Field(default=None, max_length=100)
    edit: str | None = Field(default=None, max_length=100)


@router.get("/new")
async def show_form(service: TheService, page: ReadPage, query: Annotated[NewJobQuery, Query()]) -> Response:
    """The form, or the spec of a job as YAML."""
    if query.edit is not None:
        job = await get_job(service, page.caller, query.edit)
        if job.kind is not JobKind.TRAINING:
            raise InvalidRequest(
                f"Job {job.id} is a job of kind {job.kind}; only the spec of a training can be edited.",
                code="not_a_training",
                param="edit",
            )
        return await _render(service, page, {"yaml": await asyncio.to_thread(write_yaml, job.spec)})
    kind = "file" if query.model_file else "job" if query.model_job else "hub"
    form = {
        "data_file": query.data or "",
        "model_kind": kind,
        "model_file": query.model_file or "",
        "model_job": query.model_job or "",
        "method": "lora",
    }
    return await _render(service, page, form)


@router.post("/new/yaml")
async def show_yaml(service: TheService, page: SubmitPage) -> Response:
    """The same page with the spec of the form as YAML, to edit all of it."""
    text = await asyncio.to_thread(write_yaml, await read_spec_form(service, page.form))
    return await _render(service, page, {"yaml": text})


@router.post("/new/check")
async def check(service: TheService, page: SubmitPage) -> Response:
    """The faults of the spec or the estimate of its job, and the spec as YAML."""
    values: dict[str, Any] = {"estimate": None, "error": None, "yaml": ""}
    try:
        spec = await read_spec_form(service, page.form)
        values["yaml"] = await asyncio.to_thread(write_yaml, spec)
        values["estimate"] = await estimate.validate(service, page.caller, spec)
    except ZetaError as error:
        values["error"] = error
    return page.render("new_job_check.html", **values)


@router.post("/new")
async def submit(service: TheService, submissions: TheSubmissions, page: SubmitPage) -> Response:
    """Submit the job, or show the form again with the faults. Sending the same form twice creates one job."""
    try:
        spec = await read_spec_form(service, page.form)
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
        request_id = page.form.get("request_id", "")[:100] or secrets.token_hex(8)
        job, _ = await submissions.submit(page.caller, spec, f"{request_id}-{digest}")
    except ZetaError as error:
        if page.request.headers.get("hx-request") == "true":
            return page.render("new_job_check.html", estimate=None, error=error, yaml="")
        return await _render(service, page, page.form, error)
    return page.redirect(f"/jobs/{job.id}")


async def read_spec_form(service: Service, form: Mapping[str, str]) -> dict[str, Any]:
    """The spec of the form, in either mode. Raises a `ZetaError` for a text that can't be read."""
    return await asyncio.to_thread(_read_spec_form, form, service.settings.max_spec_bytes)


def _read_spec_form(form: Mapping[str, str], max_bytes: int) -> dict[str, Any]:
    if "yaml" in form:
        return read_yaml(form["yaml"], max_bytes)
    spec = spec_of(form)
    check_size(spec, max_bytes)
    try:
        return read_json(json.dumps(spec).encode())
    except JsonFault as fault:
        raise InvalidRequest(f"{fault.subject or 'The form'} {fault.reason}.", param=fault.param) from fault


async def _render(
    service: Service, page: PageRequest, form: Mapping[str, str], error: ZetaError | None = None
) -> Response:
    listed = (await files.list_files(service, page.caller, None, PageQuery(limit=MAX_CHOICES))).data
    trained = ViewFilter("succeeded", kind=JobKind.TRAINING)
    succeeded, _ = await list_views(service, page.caller, trained, PageQuery(limit=MAX_CHOICES))
    return page.render(
        "new_job.html",
        status=200 if error is None else 422,
        form=form,
        error=error,
        groups=groups(),
        methods=METHODS,
        data_files=[file for file in listed if file.purpose == "dataset"],
        model_files=[file for file in listed if file.purpose == "model"],
        model_jobs=[view for view in succeeded if view.job.final_checkpoint],
        max_bytes=files.max_upload_bytes(service, page.caller),
        request_id=secrets.token_hex(8),
    )
