"""/v1/jobs/{id}/evaluations: evaluate a checkpoint on a file."""

from __future__ import annotations

from typing import Annotated

from fastapi import Request, Response

from server import evaluations
from server.http.bodies import SPEC_SETTING, read_body
from server.routes.jobs import IDEMPOTENCY_KEY, created_job
from server.routes.routing import Router, TheCaller, TheService, TheSubmissions, json_body
from zeta_core.contract.job.job import Job

router = Router(prefix="/v1/jobs/{job_id}/evaluations", tags=["evaluations"])


@router.post("", status_code=201, openapi_extra=json_body("NewEvaluation", required=True))
async def create_evaluation(
    service: TheService,
    submissions: TheSubmissions,
    caller: TheCaller,
    request: Request,
    response: Response,
    job_id: str,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> Job:
    """Create a job that evaluates a checkpoint of this job on an uploaded file, alone or compared with its base."""
    data = await read_body(request, service.settings.max_spec_bytes, empty={}, setting=SPEC_SETTING)
    created = await evaluations.create(service, submissions, caller, job_id, data, idempotency_key)
    return created_job(request, response, *created)
