"""The stored results of ended batches: those of the final checkpoint, or of the newest one of an unfinished batch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import CheckpointRow
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.status import ENDED, JobStatus


class BatchResults(BaseModel):
    """The numbers of requests in the output file and in the error file, and of their tokens."""

    model_config = ConfigDict(frozen=True)

    num_answered: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def stored_results(session: AsyncSession, jobs: Collection[Job]) -> dict[str, BatchResults]:
    """The results of the batches among ``jobs`` that have ended with results, by job id."""
    found: dict[str, BatchResults] = {}
    unfinished: list[str] = []
    for job in jobs:
        if job.kind is not JobKind.BATCH or job.status not in ENDED:
            continue
        if job.status is not JobStatus.SUCCEEDED:
            unfinished.append(job.id)
        elif job.final_checkpoint is not None and job.result is not None:
            found[job.id] = BatchResults.model_validate(job.result.model_dump(exclude_none=True))
    if unfinished:
        # A checkpoint has the numbers of its results as its metrics, and the step is the number of results.
        newest = select(CheckpointRow).where(CheckpointRow.job_id.in_(unfinished)).order_by(CheckpointRow.step)
        for row in await session.scalars(newest):
            metrics: dict[str, Any] = row.metrics
            found[row.job_id] = BatchResults.model_validate({name: int(value) for name, value in metrics.items()})
    return found
