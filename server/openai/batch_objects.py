"""Batches as the `openai` client reads them, converted from jobs of this service."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from server.openai.batch_results import BatchResults
from server.openai.result_file_ids import batch_file_ids
from zeta_core.contract.job.job import Job, WaitingReason
from zeta_core.contract.job.status import ENDED, JobStatus, StatusReason
from zeta_core.contract.openai.batch_files import BatchEndpoint
from zeta_core.contract.spec.batch_spec import BatchSpec

COMPLETION_WINDOW = "24h"
BatchStatus = Literal["validating", "in_progress", "completed", "failed", "cancelling", "cancelled"]


class _Object(BaseModel):
    model_config = ConfigDict(frozen=True)


class BatchError(_Object):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(_Object):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(_Object):
    total: int
    completed: int
    failed: int


class InputTokensDetails(_Object):
    cached_tokens: int = 0


class OutputTokensDetails(_Object):
    reasoning_tokens: int = 0


class BatchUsage(_Object):
    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class NativeBatchState(_Object):
    """The state of the job in this service."""

    status: JobStatus
    status_reason: StatusReason | None
    waiting_reason: WaitingReason | None
    queue_position: int | None
    progress: dict[str, Any] | None


class Batch(_Object):
    """A batch. Times are Unix times in seconds. A batch has no deadline, so ``expires_at`` is null."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: BatchEndpoint
    model: str
    input_file_id: str
    completion_window: str = COMPLETION_WINDOW
    status: BatchStatus
    errors: BatchErrors | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None = None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str]
    zeta: NativeBatchState


def to_batch(job: Job, results: BatchResults | None) -> Batch:
    """The batch of a job of this kind; ``results`` are those of an ended one."""
    spec = BatchSpec.model_validate(job.spec)
    output, errors = batch_file_ids(job.id, results)
    finished = _unix(job.finished_at)
    error = None if job.error is None else BatchError(code=job.error.code, message=job.error.message)
    return Batch(
        id=job.id,
        endpoint=spec.endpoint,
        model=spec.model_name,
        input_file_id=spec.input.file,
        status=_status(job),
        errors=None if error is None or job.status != JobStatus.FAILED else BatchErrors(data=[error]),
        output_file_id=output,
        error_file_id=errors,
        created_at=int(job.created_at.timestamp()),
        in_progress_at=_unix(job.started_at),
        finalizing_at=finished if job.status == JobStatus.SUCCEEDED else None,
        completed_at=finished if job.status == JobStatus.SUCCEEDED else None,
        failed_at=finished if job.status == JobStatus.FAILED else None,
        cancelled_at=finished if job.status == JobStatus.CANCELLED else None,
        request_counts=_counts(job, spec, results),
        usage=_usage(results),
        metadata=dict(job.metadata),
        zeta=NativeBatchState(
            status=job.status,
            status_reason=job.status_reason,
            waiting_reason=job.waiting_reason,
            queue_position=job.queue_position,
            progress=job.progress,
        ),
    )


def _status(job: Job) -> BatchStatus:
    """``validating`` until the batch has been started, because OpenAI has no status for a batch that waits."""
    match job.status:
        case JobStatus.SUCCEEDED:
            return "completed"
        case JobStatus.FAILED:
            return "failed"
        case JobStatus.CANCELLED:
            return "cancelled"
        case _ if job.requested_action == "cancel":
            return "cancelling"
        case _:
            return "in_progress" if job.attempt else "validating"


def _counts(job: Job, spec: BatchSpec, results: BatchResults | None) -> RequestCounts:
    """The requests in the files of an ended batch, or those that a batch has answered so far."""
    if job.status in ENDED:
        results = results or BatchResults()
        completed, failed = results.num_answered, results.num_failed
    else:
        progress: dict[str, Any] = dict(job.progress or {})
        failed = int(progress.get("num_failed") or 0)
        completed = int(progress.get("step") or 0) - failed
    return RequestCounts(total=spec.num_requests, completed=completed, failed=failed)


def _usage(results: BatchResults | None) -> BatchUsage | None:
    if results is None:
        return None
    return BatchUsage(
        input_tokens=results.prompt_tokens,
        output_tokens=results.completion_tokens,
        total_tokens=results.prompt_tokens + results.completion_tokens,
    )


def _unix(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())
