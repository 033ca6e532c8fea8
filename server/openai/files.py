"""Files for the `openai` client: uploaded data, and the result files of jobs.

A list contains the uploaded files first and then the result files, each in the requested order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from server import files
from server.auth import Caller
from server.database.file_tables import FileRow
from server.database.pagination import position_of
from server.database.tables import JobRow
from server.http.downloads import Content
from server.openai.file_objects import BATCH_RESULTS, FORM, LISTED, RESULTS, FileObject, to_file_object
from server.openai.lists import NamedEndsList
from server.openai.result_file_ids import ResultFileId, parse_result_file_id
from server.openai.result_files import find_result_file, result_content, result_files_of
from server.service import Service
from zeta_core.contract.access import Scope
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.status import ENDED
from zeta_core.contract.spec.validation import shown

DEFAULT_LIMIT = 10_000  # OpenAI's; a page has at most `MAX_FILES` files, and `has_more` reports the rest
MAX_FILES = 1000
# The kinds of jobs whose result files a list contains, by its filter ``purpose``.
RESULT_KINDS: Mapping[str | None, Sequence[JobKind]] = {
    None: (JobKind.TRAINING, JobKind.BATCH),
    RESULTS: (JobKind.TRAINING,),
    BATCH_RESULTS: (JobKind.BATCH,),
}
MAX_RESULT_JOBS = 50  # per page, because the metrics of each job are generated to find their size


class FileListQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = Field(default=None, description="continue after this id")
    limit: int = Field(default=DEFAULT_LIMIT, ge=1, le=DEFAULT_LIMIT, description="maximum number of files")
    order: Literal["asc", "desc"] = Field(default="desc", description="by time of creation")
    purpose: str | None = Field(default=None, max_length=100, description="only files with this purpose")


class DeletedFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


async def create(service: Service, caller: Caller, request: Request) -> FileObject:
    """Store the file of a multipart body. Raises the errors of `files.upload`."""
    return to_file_object(await files.upload(service, caller, request, FORM))


async def list_files(service: Service, caller: Caller, query: FileListQuery) -> NamedEndsList[FileObject]:
    """One page of the project's files. Raises `InvalidRequest` for an invalid ``after``."""
    limit = min(query.limit, MAX_FILES)
    after = parse_result_file_id(query.after) if query.after is not None else None
    found: list[FileObject] = []
    has_more = False
    if (query.purpose is None or query.purpose not in RESULT_KINDS) and after is None:
        async with service.database.read() as session:
            rows = await _uploaded(session, caller, query, limit + 1)
        found, has_more = [to_file_object(row) for row in rows[:limit]], len(rows) > limit
    kinds = RESULT_KINDS.get(query.purpose, ())
    if kinds and not has_more:
        results, has_more = await _results(service, caller, query.order, kinds, after, limit - len(found))
        found += results
    return NamedEndsList(
        data=found,
        has_more=has_more,
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
    )


async def get_file(service: Service, caller: Caller, file_id: str) -> FileObject:
    result = parse_result_file_id(file_id)
    if result is not None:
        return await find_result_file(service, caller, result)
    return to_file_object(await files.get_file(service, caller, file_id))


async def content(service: Service, caller: Caller, file_id: str) -> Content:
    """The bytes of a file. Raises `PermissionDenied` for training data if the key lacks the scope `submit`."""
    result = parse_result_file_id(file_id)
    if result is not None:
        return await result_content(service, caller, result)
    caller.require(Scope.SUBMIT, "The content of an uploaded file")
    return await files.content(service, caller, file_id)


async def delete(service: Service, caller: Caller, file_id: str) -> DeletedFile:
    """Delete an uploaded file. Raises `InvalidRequest` for a result file, and `Conflict` while a job needs the file."""
    result = parse_result_file_id(file_id)
    if result is not None:
        await find_result_file(service, caller, result)
        raise InvalidRequest(
            f"{file_id} is a result of {result.job_id} and is deleted with it; delete the fine-tuned model, or the job "
            f"with `zeta delete {result.job_id}`.",
            code="result_file",
            param="file_id",
        )
    return DeletedFile(id=(await files.delete(service, caller, file_id)).id)


async def _uploaded(session: AsyncSession, caller: Caller, query: FileListQuery, limit: int) -> Sequence[FileRow]:
    """The uploaded files after ``query.after``, in order."""
    columns = (FileRow.created_at, FileRow.id)
    rows = select(FileRow).where(FileRow.project == caller.project)
    if query.purpose is not None:
        rows = rows.where(FileRow.purpose == LISTED.get(query.purpose))
    if query.after is not None:
        position = await position_of(session, FileRow, query.after, caller.project)
        if position is None:
            raise _invalid_after(query.after)
        rows = rows.where(tuple_(*columns) < position if query.order == "desc" else tuple_(*columns) > position)
    order = [column.desc() if query.order == "desc" else column.asc() for column in columns]
    return (await session.scalars(rows.order_by(*order).limit(limit))).all()


async def _results(
    service: Service,
    caller: Caller,
    order: str,
    kinds: Sequence[JobKind],
    after: ResultFileId | None,
    limit: int,
) -> tuple[list[FileObject], bool]:
    """Result files of jobs of these kinds after ``after``, and whether more follow.

    With a ``limit`` of 0, only whether there are any.
    """
    columns = (JobRow.created_at, JobRow.id)
    ended = select(JobRow.id).where(
        JobRow.project == caller.project,
        JobRow.deleted_at.is_(None),
        JobRow.status.in_(sorted(ENDED)),
        JobRow.attempt > 0,
        JobRow.kind.in_(kinds),
    )
    ended = ended.order_by(*(column.desc() if order == "desc" else column.asc() for column in columns))
    async with service.database.read() as session:
        if after is not None:
            position = await position_of(session, JobRow, after.job_id, caller.project)
            if position is None:
                raise _invalid_after(after.text)
            ended = ended.where(tuple_(*columns) <= position if order == "desc" else tuple_(*columns) >= position)
        job_ids = list(await session.scalars(ended.limit(MAX_RESULT_JOBS + 1)))
    if limit == 0:
        return [], bool(job_ids)
    found: list[FileObject] = []
    for number, job_id in enumerate(job_ids[:MAX_RESULT_JOBS]):
        of_job = await result_files_of(service, caller, job_id)
        if number == 0 and after is not None and job_id == after.job_id:
            ids = [file.id for file in of_job]
            of_job = of_job[ids.index(after.text) + 1 :] if after.text in ids else of_job
        found += of_job
        if len(found) > limit:
            return found[:limit], True
        if len(found) == limit:
            return found, number + 1 < len(job_ids)
    return found, len(job_ids) > MAX_RESULT_JOBS


def _invalid_after(after: str) -> InvalidRequest:
    return InvalidRequest(
        f"after is {shown(after)}, which is not the id of a file; use the last_id of an earlier page.", param="after"
    )
