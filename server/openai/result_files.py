"""The result files of ended jobs: metrics as CSV and the final checkpoint as a .tar archive, or the files of a batch.

They are generated from the job's events and its checkpoint, so they are deleted with the job and use no further quota.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import replace
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import LATEST
from server.database.tables import JobRow
from server.http.downloads import Content
from server.jobs import checkpoints
from server.jobs.queries import find_job
from server.jobs.serialization import to_job
from server.jobs.training_curves import SERIES, read_curves
from server.openai.batch_results import stored_results
from server.openai.file_objects import BATCH_RESULTS, RESULTS, FileObject
from server.openai.result_file_ids import ResultFileId, parse_result_file_id, result_file_ids
from server.service import Service
from zeta_core.contract.errors import NotFound
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.responses import Curves
from zeta_core.contract.job.status import ENDED
from zeta_core.contract.openai.batch_files import ERROR_FILE, OUTPUT_FILE
from zeta_core.contract.spec.validation import shown

# The columns that OpenAI's files have, and the curves in them; the other curves follow under their own names.
_COLUMNS = {
    "train_loss": "loss",
    "train_accuracy": "token_accuracy",
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_token_accuracy",
}


async def find_result_file(service: Service, caller: Caller, result: ResultFileId) -> FileObject:
    """Raises `NotFound` if the job doesn't exist, has not ended, or has no such result."""
    job = await _require(service, caller, result)
    content = await _content(service, caller, job, result)
    return _file_object(job, result, content)


async def result_content(service: Service, caller: Caller, result: ResultFileId) -> Content:
    """The bytes of a result file. Raises `NotFound`."""
    return await _content(service, caller, await _require(service, caller, result), result)


async def result_files_of(service: Service, caller: Caller, job_id: str) -> list[FileObject]:
    """The result files of an ended job."""
    async with service.database.read() as session:
        job = await find_job(session, caller, job_id)
        ids = await _ids(session, job)
    results = [result for text in ids if (result := parse_result_file_id(text)) is not None]
    return [_file_object(job, result, await _content(service, caller, job, result)) for result in results]


async def _require(service: Service, caller: Caller, result: ResultFileId) -> JobRow:
    async with service.database.read() as session:
        try:
            job = await find_job(session, caller, result.job_id)
        except NotFound:
            job = None
        if job is not None and result.text in await _ids(session, job):
            return job
    raise NotFound(
        f"File {shown(result.text)} not found; GET /openai/v1/files lists your files.", code="file_not_found"
    )


async def _ids(session: AsyncSession, job: JobRow) -> list[str]:
    if job.status not in ENDED:
        return []
    found = await to_job(session, job)
    return result_file_ids(found, (await stored_results(session, [found])).get(job.id))


async def _content(service: Service, caller: Caller, job: JobRow, result: ResultFileId) -> Content:
    if result.kind == "model":
        stored = await checkpoints.find_checkpoint(service, caller, job.id, FINAL_CHECKPOINT)
        return checkpoints.archive_content(stored, job.id, include=None, state=False)
    if result.kind in ("output", "errors"):
        stored = await checkpoints.find_checkpoint(service, caller, job.id, LATEST)
        name = OUTPUT_FILE if result.kind == "output" else ERROR_FILE
        return replace(checkpoints.file_content(stored, name), filename=f"{job.id}-{name}")
    text = metrics_csv(await read_curves(service, job.id, None)).encode()
    return Content((text,), hashlib.sha256(text).hexdigest(), "text/csv", f"{job.id}-metrics.csv")


def metrics_csv(curves: Curves) -> str:
    """One line for each step, with OpenAI's columns first; missing values are empty."""
    others = [name for name in SERIES if name not in _COLUMNS.values()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", *_COLUMNS, *others))
    columns = [curves.step, *(getattr(curves, name) for name in (*_COLUMNS.values(), *others))]
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _file_object(job: JobRow, result: ResultFileId, content: Content) -> FileObject:
    time: datetime = job.finished_at or job.created_at
    return FileObject(
        id=result.text,
        bytes=content.num_bytes,
        created_at=int(time.timestamp()),
        filename=content.filename or result.text,
        purpose=BATCH_RESULTS if job.kind == JobKind.BATCH else RESULTS,
    )
