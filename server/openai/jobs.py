"""Reads, lists and controls jobs for the `openai` client."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import exists, select

from server.auth import Caller
from server.database.pagination import OrderedQuery
from server.database.tables import JobMetadataRow, JobRow
from server.jobs import commands
from server.jobs.queries import JobQuery, MetadataQuery, find_training, matching_jobs, newest_jobs
from server.jobs.serialization import to_job, to_jobs
from server.openai.job_objects import FineTuningJob, to_fine_tuning_job
from server.openai.lists import OpenAIList
from server.service import Service
from zeta_core.contract.job.commands import Command
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.validation import shown


class FineTuningJobQuery(MetadataQuery):
    """``metadata[k]=v`` matches one entry, and ``metadata=null`` the jobs without metadata."""

    known_extras: ClassVar[frozenset[str]] = frozenset({"metadata"})

    @model_validator(mode="after")
    def _check_null(self) -> Self:
        extras = self.model_extra or {}
        if "metadata" in extras and extras["metadata"] != "null":
            sentence = f"metadata is {shown(extras['metadata'])}; it must be null, or metadata[k] with a value."
        elif "metadata" in extras and self.metadata_entries:
            sentence = "metadata=null and metadata[k] can't be combined; remove one of them."
        else:
            return self
        raise PydanticCustomError("invalid_metadata", "{sentence}", {"name": "metadata", "sentence": sentence})

    @property
    def without_metadata(self) -> bool:
        return "metadata" in (self.model_extra or {})


async def list_jobs(service: Service, caller: Caller, query: FineTuningJobQuery) -> OpenAIList[FineTuningJob]:
    """One page of the project's jobs, newest first, whichever interface has created them."""
    if query.without_metadata:
        without = ~exists().where(JobMetadataRow.job_id == JobRow.id)
        jobs = select(JobRow).where(
            JobRow.project == caller.project, JobRow.deleted_at.is_(None), JobRow.kind == JobKind.TRAINING, without
        )
        matching = [OrderedQuery(jobs, JobRow.created_at, JobRow.id)]
    else:
        matching = matching_jobs(
            caller.project, JobQuery.model_validate({**(query.model_extra or {}), "kind": JobKind.TRAINING})
        )
    async with service.database.read() as session:
        rows, has_more = await newest_jobs(session, service, caller, matching, query)
        found = await to_jobs(session, rows)
    data = [to_fine_tuning_job(row, job) for row, job in zip(rows, found, strict=True)]
    return OpenAIList(data=data, has_more=has_more)


async def get_job(service: Service, caller: Caller, job_id: str) -> FineTuningJob:
    async with service.database.read() as session:
        row = await find_training(session, caller, job_id)
        return to_fine_tuning_job(row, await to_job(session, row))


async def run_command(service: Service, caller: Caller, job_id: str, command: Command) -> FineTuningJob:
    """The job after the command. Raises `NotFound`, and `Conflict` if the command isn't possible in its status."""
    await get_job(service, caller, job_id)  # raises `NotFound` for a job that is not a training
    await commands.run_command(service, caller, job_id, command)
    return await get_job(service, caller, job_id)
