"""Creates and lists the export jobs of a checkpoint."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from server.auth import Caller
from server.database.pagination import OrderedQuery, PageQuery, page
from server.database.tables import JobRow
from server.jobs.checkpoints import find_checkpoint
from server.jobs.queries import find_job, kind_conditions, newest_jobs
from server.jobs.serialization import to_jobs
from server.service import Service
from server.submitting.submissions import CreatedJob, SubmissionOrigin, Submissions, find_created_job, identify_request
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.responses import Page
from zeta_core.contract.spec.export_spec import ExportRequest
from zeta_core.contract.spec.validation import error_from_details, invalid_value, parse


async def create_export(
    service: Service, submissions: Submissions, caller: Caller, job_id: str, body: Any, idempotency_key: str | None
) -> CreatedJob:
    """Create an export job, or return the one that an earlier, equal request created.

    Raises `NotFound` for a job or a checkpoint that doesn't exist, and subclasses of `InvalidRequest`.
    """
    identity = identify_request(idempotency_key, {"export": job_id, "body": body})
    if (created := await find_created_job(service, caller, identity)) is not None:
        return created, True
    async with service.database.read() as session:
        job = await find_job(session, caller, job_id)
    request = parse(ExportRequest, body)
    if job.kind != JobKind.TRAINING:
        raise InvalidRequest(
            f"{job_id} is a job of kind {job.kind}; export the checkpoint of a training.", code="not_a_training"
        )
    checkpoint = (await find_checkpoint(service, caller, job_id, request.checkpoint)).manifest
    if checkpoint.format == "module":
        raise InvalidRequest(
            f"Checkpoint {checkpoint.name} of {job_id} is a custom module, which has no other format.",
            code="cannot_export",
        )
    if request.to == "adapter" and checkpoint.format != "adapter":
        fix = f"checkpoint {checkpoint.name} of {job_id} is a whole model; use merged or gguf"
        raise error_from_details([invalid_value("to", request.to, fix)])
    options = request.model_dump(mode="json", exclude_unset=True, exclude={"checkpoint"})
    spec = {"model": {"job": job_id, "checkpoint": checkpoint.name}, **options}
    return await submissions.create(caller, spec, identity, SubmissionOrigin(kind=JobKind.EXPORT))


async def list_exports(service: Service, caller: Caller, job_id: str, query: PageQuery) -> Page[Job]:
    """One page of the export jobs of a job, newest first."""
    async with service.database.read() as session:
        await find_job(session, caller, job_id)
        exports = select(JobRow).where(
            JobRow.project == caller.project,
            JobRow.deleted_at.is_(None),
            *kind_conditions(JobKind.EXPORT),
            JobRow.spec["model"]["job"].as_string() == job_id,
        )
        matching = [OrderedQuery(exports, JobRow.created_at, JobRow.id)]
        rows, has_more = await newest_jobs(session, service, caller, matching, query)
        return page(await to_jobs(session, rows), has_more, lambda job: job.id)
