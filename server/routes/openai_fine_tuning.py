"""/openai/v1/fine_tuning: create, read and control jobs with the `openai` client."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from server.openai import checkpoints, events, jobs
from server.openai.bodies import read_fields
from server.openai.errors import OPENAI_ERRORS, OpenAIRoute
from server.openai.fine_tuning import FineTuning
from server.openai.fine_tuning_request import FineTuningRequest
from server.openai.job_objects import FineTuningJob
from server.openai.lists import OpenAIList
from server.routes.jobs import IDEMPOTENCY_KEY, METADATA
from server.routes.openai_files import RETRY_COUNT
from server.routes.routing import Router, TheCaller, TheService, json_body
from zeta_core.contract.errors import InvalidRequest

router = Router(prefix="/openai/v1/fine_tuning", tags=["openai"], route_class=OpenAIRoute, responses=OPENAI_ERRORS)


async def _fine_tuning(request: Request) -> FineTuning:
    fine_tuning = request.app.state.fine_tuning
    assert isinstance(fine_tuning, FineTuning)
    return fine_tuning


METADATA_OR_NULL = {**METADATA, "description": f"{METADATA['description']}; metadata=null: only jobs without metadata"}
TheFineTuning = Annotated[FineTuning, Depends(_fine_tuning)]


@router.post("/jobs", openapi_extra=json_body("FineTuningRequest", required=True))
async def create_openai_job(
    service: TheService,
    fine_tuning: TheFineTuning,
    caller: TheCaller,
    request: Request,
    retry_count: Annotated[int, RETRY_COUNT] = 0,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> FineTuningJob:
    """Check the data and create a job. A retry by the client returns the job of its first attempt."""
    body = await read_fields(request, service.settings.max_spec_bytes, FineTuningRequest)
    job_id = await fine_tuning.create(caller, body, attempt=retry_count, idempotency_key=idempotency_key)
    return await jobs.get_job(service, caller, job_id)


@router.get("/jobs", openapi_extra={"parameters": [METADATA_OR_NULL]})
async def list_openai_jobs(
    service: TheService, caller: TheCaller, query: Annotated[jobs.FineTuningJobQuery, Query()]
) -> OpenAIList[FineTuningJob]:
    """List the jobs of the project, newest first."""
    return await jobs.list_jobs(service, caller, query)


@router.get("/jobs/{job_id}")
async def get_openai_job(service: TheService, caller: TheCaller, job_id: str) -> FineTuningJob:
    """Return a job with its current status."""
    return await jobs.get_job(service, caller, job_id)


@router.post("/jobs/{job_id}/cancel")
async def cancel_openai_job(service: TheService, caller: TheCaller, job_id: str) -> FineTuningJob:
    """Cancel an unfinished job. A running job ends once its processes have exited."""
    return await jobs.run_command(service, caller, job_id, "cancel")


@router.post("/jobs/{job_id}/pause")
async def pause_openai_job(service: TheService, caller: TheCaller, job_id: str) -> FineTuningJob:
    """Pause a job; it is `pausing` until its checkpoint is stored."""
    return await jobs.run_command(service, caller, job_id, "pause")


@router.post("/jobs/{job_id}/resume")
async def resume_openai_job(service: TheService, caller: TheCaller, job_id: str) -> FineTuningJob:
    """Queue a paused job again; it continues from its newest checkpoint."""
    return await jobs.run_command(service, caller, job_id, "resume")


@router.get("/jobs/{job_id}/events")
async def list_openai_events(
    service: TheService, caller: TheCaller, job_id: str, query: Annotated[events.EventListQuery, Query()]
) -> OpenAIList[events.FineTuningEvent]:
    """List the events of a job, newest first."""
    return await events.list_events(service, caller, job_id, query)


@router.get("/jobs/{job_id}/checkpoints")
async def list_openai_checkpoints(
    service: TheService, caller: TheCaller, job_id: str, query: Annotated[checkpoints.CheckpointListQuery, Query()]
) -> OpenAIList[checkpoints.FineTuningCheckpoint]:
    """List the checkpoints of a job with their metrics, newest first."""
    return await checkpoints.list_checkpoints(service, caller, job_id, query)


# --- What this service does not have ----------------------------------------------------------------------------------

_NO_PERMISSIONS = "Checkpoint permissions are not supported; every key of a project can use all of its checkpoints."
_NO_GRADERS = "Graders are not supported, because the method 'reinforcement' is not; use method 'supervised' or 'dpo'."


@router.get("/checkpoints/{checkpoint:path}/permissions")
async def list_openai_permissions(caller: TheCaller, checkpoint: str) -> None:
    """Reject the request: checkpoint permissions are not supported."""
    raise InvalidRequest(_NO_PERMISSIONS, code="not_supported")


@router.post("/checkpoints/{checkpoint:path}/permissions")
async def create_openai_permission(caller: TheCaller, checkpoint: str) -> None:
    """Reject the request: checkpoint permissions are not supported."""
    raise InvalidRequest(_NO_PERMISSIONS, code="not_supported")


@router.delete("/checkpoints/{checkpoint:path}/permissions/{permission_id}")
async def delete_openai_permission(caller: TheCaller, checkpoint: str, permission_id: str) -> None:
    """Reject the request: checkpoint permissions are not supported."""
    raise InvalidRequest(_NO_PERMISSIONS, code="not_supported")


@router.post("/alpha/graders/run")
async def run_openai_grader(caller: TheCaller) -> None:
    """Reject the request: graders are not supported."""
    raise InvalidRequest(_NO_GRADERS, code="not_supported")


@router.post("/alpha/graders/validate")
async def validate_openai_grader(caller: TheCaller) -> None:
    """Reject the request: graders are not supported."""
    raise InvalidRequest(_NO_GRADERS, code="not_supported")
