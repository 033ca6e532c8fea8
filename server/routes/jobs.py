"""/v1/jobs: submit, list, read, and the commands to a job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from server import commands, jobs, submissions
from server.bodies import read_json
from server.callers import TheCaller
from server.job_query import JobQuery
from server.service import TheService
from zeta_core.contract.answers import Page
from zeta_core.contract.job import Job

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


@router.post("", status_code=201, openapi_extra=SPEC_BODY)
async def submit_job(
    service: TheService,
    caller: TheCaller,
    request: Request,
    response: Response,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Job:
    """Create a job; with an `Idempotency-Key` a repetition within 24 hours returns the same job."""
    job, was_answered = await submissions.submit(service, caller, await read_json(request), idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if was_answered:
        response.headers["Idempotent-Replayed"] = "true"
    return job


@router.get("")
async def list_jobs(service: TheService, caller: TheCaller, asked: Annotated[JobQuery, Query()]) -> Page[Job]:
    """The jobs of the project, newest first."""
    return await jobs.list_jobs(service, caller, asked)


@router.get("/{job_id}")
async def get_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """One job as it is now."""
    return await jobs.get_job(service, caller, job_id)


@router.post("/{job_id}/cancel", status_code=202)
async def cancel_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Cancel a job that has not ended; a running one ends when its processes did."""
    return await commands.obey(service, caller, job_id, "cancel")


@router.post("/{job_id}/pause", status_code=202)
async def pause_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Pause a job: a queued one at once, a running one when its checkpoint is stored and its device is free."""
    return await commands.obey(service, caller, job_id, "pause")


@router.post("/{job_id}/resume", status_code=202)
async def resume_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    return await commands.obey(service, caller, job_id, "resume")
