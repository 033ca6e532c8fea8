"""/v1/jobs: submit, list, read and control jobs."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Query, Request, Response

from server import receipts
from server.estimates import data_preview, estimate
from server.http.bodies import SPEC_SETTING, read_body
from server.http.proxies import public_path
from server.jobs import commands, deletions, queries
from server.routes.routing import Router, TheCaller, TheService, TheSubmissions, json_body
from server.submitting import reruns
from zeta_core.contract.job.data_preview import ShownRows
from zeta_core.contract.job.estimate import Estimate
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.receipt import Receipt

router = Router(prefix="/v1/jobs", tags=["jobs"])


IDEMPOTENCY_KEY = Header(
    description="a unique key; repeating the request with it returns the same job for 24 hours",
    # `Submissions` checks it, with an error code of its own. White space around a header's value is not part of it.
    json_schema_extra={"pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
)

# ``metadata[k]=v``: the query model can't list names chosen by clients.
METADATA = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "metadata[k]=v: only jobs with this metadata entry; if repeated, all entries must match",
    "schema": {
        "type": "object",
        "propertyNames": {"pattern": queries.METADATA_NAME_PATTERN},
        "maxProperties": queries.MAX_METADATA,
        "additionalProperties": {"type": "string"},
    },
}


@router.post("", status_code=201, openapi_extra=json_body("JobSpec", required=True))
async def submit_job(
    service: TheService,
    submissions: TheSubmissions,
    caller: TheCaller,
    request: Request,
    response: Response,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> Job:
    """Create a job. With an `Idempotency-Key`, repeating the request within 24 hours returns the same job."""
    data = await read_body(request, service.settings.max_spec_bytes, setting=SPEC_SETTING)
    return created_job(request, response, *await submissions.submit(caller, data, idempotency_key))


@router.post("/validate", openapi_extra=json_body("JobSpec", required=True))
async def validate_job(service: TheService, caller: TheCaller, request: Request) -> Estimate:
    """Validate a spec without creating a job, and estimate its steps, memory and disk usage."""
    return await estimate.validate(
        service, caller, await read_body(request, service.settings.max_spec_bytes, setting=SPEC_SETTING)
    )


@router.post("/preview", openapi_extra=json_body("PreviewRequest", required=True))
async def preview_data(service: TheService, caller: TheCaller, request: Request) -> ShownRows:
    """Show rows of a spec's data as training reads them: token by token, with those trained on and those cut off."""
    return await data_preview.preview(
        service, caller, await read_body(request, service.settings.max_spec_bytes, setting=SPEC_SETTING)
    )


@router.get("", openapi_extra={"parameters": [METADATA]})
async def list_jobs(service: TheService, caller: TheCaller, query: Annotated[queries.JobQuery, Query()]) -> Page[Job]:
    """List the jobs of the project, newest first unless `sort` names another order."""
    return await queries.list_jobs(service, caller, query)


@router.get("/{job_id}")
async def get_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Return a job with its current status."""
    return await queries.get_job(service, caller, job_id)


@router.post("/{job_id}/cancel", status_code=202)
async def cancel_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Cancel an unfinished job. A running job ends once its processes have exited."""
    return await commands.run_command(service, caller, job_id, "cancel")


@router.post("/{job_id}/pause", status_code=202)
async def pause_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Pause a job: immediately if it is queued; otherwise once its checkpoint is stored and its device is free."""
    return await commands.run_command(service, caller, job_id, "pause")


@router.post("/{job_id}/resume", status_code=202)
async def resume_job(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Queue a paused job again; it continues from its newest checkpoint."""
    return await commands.run_command(service, caller, job_id, "resume")


@router.post("/{job_id}/checkpoint", status_code=202)
async def save_checkpoint(service: TheService, caller: TheCaller, job_id: str) -> Job:
    """Save a checkpoint of a running job after its current step; the job continues."""
    return await commands.run_command(service, caller, job_id, "checkpoint")


@router.post("/{job_id}/rerun", status_code=201, openapi_extra=json_body("Rerun", required=False))
async def rerun_job(
    service: TheService,
    submissions: TheSubmissions,
    caller: TheCaller,
    request: Request,
    response: Response,
    job_id: str,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> Job:
    """Create a job from this job's patched spec, starting from the beginning or from one of its checkpoints."""
    data = await read_body(request, service.settings.max_spec_bytes, empty={}, setting=SPEC_SETTING)
    created = await reruns.rerun(service, submissions, caller, job_id, data, idempotency_key)
    return created_job(request, response, *created)


@router.get("/{job_id}/receipt")
async def get_receipt(service: TheService, caller: TheCaller, job_id: str) -> Receipt:
    """Return the signed receipt of an ended job: a DSSE envelope with an in-toto statement about its checkpoint."""
    return await receipts.get_receipt(service, caller, job_id)


@router.delete("/{job_id}")
async def delete_job(service: TheService, caller: TheCaller, job_id: str) -> DeletedObject:
    """Delete an ended job with its checkpoints, logs and events. Fails while an unfinished job depends on it."""
    return await deletions.delete(service, caller, job_id)


def created_job(request: Request, response: Response, job: Job, is_replayed: bool) -> Job:
    """The response to a request that created a job: its address, and whether an earlier request had created it."""
    response.headers["Location"] = public_path(request, f"/v1/jobs/{job.id}")
    if is_replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return job
