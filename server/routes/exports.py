"""/v1/jobs/{id}/exports: export a checkpoint to another format, and list the exports of a job."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response

from server.database.pagination import PageQuery, cursor
from server.http.bodies import SPEC_SETTING, read_body
from server.routes.jobs import IDEMPOTENCY_KEY, created_job
from server.routes.routing import Router, TheCaller, TheService, TheSubmissions, json_body
from server.submitting import exports
from zeta_core.contract.identifiers import NEW_ID_PATTERN
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.responses import Page

router = Router(prefix="/v1/jobs/{job_id}/exports", tags=["exports"])


class ExportQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="job"))


@router.post("", status_code=201, openapi_extra=json_body("ExportRequest", required=True))
async def create_export(
    service: TheService,
    submissions: TheSubmissions,
    caller: TheCaller,
    request: Request,
    response: Response,
    job_id: str,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> Job:
    """Create a job that exports a checkpoint. Its files are its checkpoint `final`."""
    data = await read_body(request, service.settings.max_spec_bytes, empty={}, setting=SPEC_SETTING)
    created = await exports.create_export(service, submissions, caller, job_id, data, idempotency_key)
    return created_job(request, response, *created)


@router.get("")
async def list_exports(
    service: TheService, caller: TheCaller, job_id: str, query: Annotated[ExportQuery, Query()]
) -> Page[Job]:
    """List the export jobs of a job, newest first."""
    return await exports.list_exports(service, caller, job_id, query)
