"""Finds the jobs whose models saw a file: those that read it, and those that continue from their checkpoints."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.file_tables import FileRow
from server.database.pagination import PageQuery, page
from server.database.tables import CheckpointRow, JobRow
from server.service import Service
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.responses import FileUse, Page
from zeta_core.contract.spec.validation import shown

_MODEL_JOB = JobRow.resolved_spec_json["model"]["job"].as_string()
_RESUMED = JobRow.spec["resume_from_checkpoint"].as_string()


async def list_file_jobs(service: Service, caller: Caller, file_id: str, page_query: PageQuery) -> Page[FileUse]:
    """One page of the jobs whose models saw a file, newest first. A deleted file is found while one of its jobs exists.

    Raises `NotFound`, and `InvalidRequest` for an ``after`` that is not one of the jobs.
    """
    async with service.database.read() as session:
        readers = await _readers(session, caller, file_id)
        continued = await _continuations(session, caller.project)
        used = _descendants(readers, continued)
        newest = sorted(used, reverse=True)  # ids begin with the time of their creation
        after = page_query.after
        if after is not None and after not in used:
            raise InvalidRequest(
                f"after is {shown(after)}, which is not a job of this list; use the last_id of an earlier page.",
                param="after",
            )
        rest = newest if after is None else newest[newest.index(after) + 1 :]
        ids = rest[: page_query.limit]
        jobs = {job.id: job for job in await session.scalars(select(JobRow).where(JobRow.id.in_(ids)))}
        checkpoints: dict[str, list[str]] = defaultdict(list)
        names = select(CheckpointRow.job_id, CheckpointRow.name).where(CheckpointRow.job_id.in_(ids))
        for job_id, name in await session.execute(names.order_by(CheckpointRow.step, CheckpointRow.name)):
            checkpoints[job_id].append(name)
    data = [
        FileUse(
            id=job_id,
            entity_name=jobs[job_id].entity_name,
            status=jobs[job_id].status,
            created_at=jobs[job_id].created_at,
            base=used[job_id],
            checkpoints=checkpoints[job_id],
        )
        for job_id in ids
    ]
    return page(data, len(rest) > page_query.limit, lambda use: use.id)


async def _readers(session: AsyncSession, caller: Caller, file_id: str) -> list[str]:
    """The jobs of the project whose specs name the file, except evaluations, which change no model.

    Raises `NotFound` if there are none and no such file.
    """
    if not is_id(file_id, "file"):
        raise caller.not_found("file", file_id, None)
    reads = JobRow.resolved_spec_json["files"][file_id].as_string().is_not(None)
    query = select(JobRow.id).where(
        JobRow.project == caller.project, JobRow.deleted_at.is_(None), JobRow.kind != JobKind.EVALUATION, reads
    )
    readers = list(await session.scalars(query))
    file = await session.get(FileRow, file_id)
    if not readers and (file is None or file.project != caller.project):
        raise caller.not_found("file", file_id, file.project if file is not None else None)
    return readers


async def _continuations(session: AsyncSession, project: str) -> dict[str, list[str]]:
    """The jobs that start from a checkpoint of another job, by the id of that job."""
    query = select(JobRow.id, _MODEL_JOB, _RESUMED).where(
        JobRow.project == project,
        JobRow.deleted_at.is_(None),
        or_(_MODEL_JOB.is_not(None), _RESUMED.is_not(None)),
    )
    continued: dict[str, list[str]] = defaultdict(list)
    for job_id, model_job, resumed in await session.execute(query):
        for base in {model_job, resumed.partition("/")[0] if resumed else None} - {None}:
            continued[str(base)].append(job_id)
    return continued


def _descendants(readers: Iterable[str], continued: dict[str, list[str]]) -> dict[str, str | None]:
    """The readers, and all jobs that continue from them, each with the job that it continues from."""
    used: dict[str, str | None] = dict.fromkeys(readers)
    queue = deque(used)
    while queue:
        base = queue.popleft()
        for job_id in continued.get(base, []):
            if job_id not in used:
                used[job_id] = base
                queue.append(job_id)
    return used
