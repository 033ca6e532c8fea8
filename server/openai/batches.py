"""Creates, lists and cancels batches: jobs that answer the requests of a file.

Every line of the file is checked before a job is created, so a script learns of all faults at once.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import select

from server.artifacts import Artifacts
from server.auth import Caller
from server.database.file_tables import FileRow
from server.database.pagination import PageQuery
from server.database.tables import JobRow
from server.jobs import commands
from server.jobs.queries import JobQuery, find_job, matching_jobs, newest_jobs
from server.jobs.serialization import to_job, to_jobs
from server.openai.answer_weights import find_weights
from server.openai.batch_objects import Batch, to_batch
from server.openai.batch_results import stored_results
from server.openai.lists import NamedEndsList
from server.openai.repeated_requests import RepeatedRequests
from server.service import Service
from server.submitting.submissions import SubmissionOrigin, Submissions
from zeta_core.contract.errors import InvalidRequest, NotFound
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.openai.batch_files import MAX_INPUT_BYTES, BatchEndpoint, InputFile, read_input
from zeta_core.contract.spec.job_spec import Metadata
from zeta_core.contract.spec.validation import StrictModel, error_from_details, parse, shown

MAX_LIMIT = 100
MAX_READING = 2  # input files that are checked at once


class NewBatch(StrictModel):
    """The body of ``POST /openai/v1/batches``. ``completion_window`` is required by OpenAI and has no effect."""

    input_file_id: str
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class BatchListQuery(PageQuery):
    limit: int = Field(default=20, ge=1, le=MAX_LIMIT, description="maximum number of batches")


class Batches:
    """Creates the batches of one server process."""

    def __init__(self, service: Service, submissions: Submissions) -> None:
        self._service = service
        self._submissions = submissions
        self._requests = RepeatedRequests(service, "batch")
        self._reading = asyncio.Semaphore(MAX_READING)  # checking a file takes up to ten seconds of a processor

    async def create(self, caller: Caller, body: Any, *, attempt: int, idempotency_key: str | None) -> Batch:
        """The new batch, or the one that an earlier attempt of this request has created.

        Raises `InvalidRequest` with every fault of the file, and `NotFound` for an unknown model.
        """
        job_id = await self._requests.create(
            caller, body, partial(self._create, caller, body), attempt=attempt, idempotency_key=idempotency_key
        )
        return await get_batch(self._service, caller, job_id)

    async def _create(self, caller: Caller, body: Any, idempotency_key: str) -> str:
        request = parse(NewBatch, body, error_class=InvalidRequest)
        await self._check_input(caller, request.input_file_id)
        async with self._reading:
            read = await asyncio.to_thread(_read_file, self._service.artifacts, request.input_file_id, request.endpoint)
        if read.faults:
            raise error_from_details(read.faults, InvalidRequest)
        name = read.model
        assert name is not None, "a file without requests has a fault"
        weights = await find_weights(self._service, caller, name)
        spec = {
            "model": weights.model,
            "model_name": name,
            "fingerprint": weights.fingerprint,
            "has_manifest": weights.has_manifest,
            "quantize": weights.quantize,
            "endpoint": request.endpoint,
            "input": {"file": request.input_file_id},
            "num_requests": read.num_requests,
            "metadata": dict(request.metadata or {}),
        }
        job, _ = await self._submissions.submit(caller, spec, idempotency_key, SubmissionOrigin(kind=JobKind.BATCH))
        return job.id

    async def _check_input(self, caller: Caller, file_id: str) -> None:
        """Raise `InvalidRequest` if this can't be the input of a batch."""
        row: FileRow | None = None
        if is_id(file_id, "file"):
            async with self._service.database.read() as session:
                row = await session.scalar(
                    select(FileRow).where(FileRow.id == file_id, FileRow.project == caller.project)
                )
        if row is None:
            raise InvalidRequest(
                f"input_file_id is {shown(file_id)}, which does not exist; upload it with "
                "client.files.create(file=..., purpose='batch').",
                code="file_not_found",
                param="input_file_id",
            )
        if row.purpose != "batch":
            raise InvalidRequest(
                f"input_file_id is {file_id!r}, which was uploaded with another purpose; upload it with "
                "purpose='batch'.",
                code="wrong_purpose",
                param="input_file_id",
            )
        if row.bytes > MAX_INPUT_BYTES:
            raise InvalidRequest(
                f"input_file_id is {file_id!r}, which has {row.bytes:,} bytes; a batch has at most "
                f"{MAX_INPUT_BYTES:,}. Split the file.",
                code="file_too_large",
                param="input_file_id",
            )


async def list_batches(service: Service, caller: Caller, query: BatchListQuery) -> NamedEndsList[Batch]:
    """One page of the project's batches, newest first."""
    matching = matching_jobs(caller.project, JobQuery(kind=JobKind.BATCH))
    async with service.database.read() as session:
        rows, has_more = await newest_jobs(session, service, caller, matching, query)
        jobs = await to_jobs(session, rows)
        results = await stored_results(session, jobs)
    data = [to_batch(job, results.get(job.id)) for job in jobs]
    return NamedEndsList(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


async def get_batch(service: Service, caller: Caller, batch_id: str) -> Batch:
    """Raises `NotFound`, also for a job of another kind."""
    async with service.database.read() as session:
        row: JobRow = await find_job(session, caller, batch_id)
        if row.kind != JobKind.BATCH:
            raise NotFound(
                f"{batch_id} is a job of kind {row.kind}, not a batch; see it with `zeta job {batch_id}`.",
                code="not_a_batch",
            )
        job = await to_job(session, row)
        return to_batch(job, (await stored_results(session, [job])).get(batch_id))


async def cancel_batch(service: Service, caller: Caller, batch_id: str) -> Batch:
    """The batch after its cancellation. Raises `NotFound`, and `Conflict` if it has ended."""
    await get_batch(service, caller, batch_id)  # raises `NotFound` for a job that is not a batch
    await commands.run_command(service, caller, batch_id, "cancel")
    return await get_batch(service, caller, batch_id)


def _read_file(artifacts: Artifacts, file_id: str, endpoint: BatchEndpoint) -> InputFile:
    with artifacts.open_file(file_id) as lines:
        return read_input(lines, endpoint, keep_requests=False)
