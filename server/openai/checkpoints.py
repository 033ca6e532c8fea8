"""Checkpoints of a job for the `openai` client, newest first, with the metrics of their step."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from server.auth import Caller
from server.database.checkpoints import checkpoints_newest_first
from server.database.pagination import PageQuery, cursor
from server.database.tables import CheckpointRow
from server.jobs.queries import find_training
from server.jobs.training_curves import read_curves
from server.openai.lists import OpenAIList
from server.openai.model_names import fine_tuned_model
from server.service import Service
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.responses import Curves
from zeta_core.contract.spec.validation import shown


class CheckpointListQuery(PageQuery):
    after: str | None = cursor(r"^ftckpt-[0-9a-z]{20,32}-(step-[0-9]{1,18}|best|final)$")


class CheckpointMetrics(BaseModel):
    """The metrics at a step; null without a value. Every evaluation uses the whole validation data."""

    model_config = ConfigDict(frozen=True)

    step: float
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class FineTuningCheckpoint(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


async def list_checkpoints(
    service: Service, caller: Caller, job_id: str, query: CheckpointListQuery
) -> OpenAIList[FineTuningCheckpoint]:
    """One page of the job's checkpoints. Raises `NotFound`, and `InvalidRequest` for an invalid ``after``."""
    async with service.database.read() as session:
        job = await find_training(session, caller, job_id)
        names = list(await session.scalars(checkpoints_newest_first(job_id)))
        rows_of_job = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        rows = {row.name: row for row in await session.scalars(rows_of_job)}
    ids = [_id(job_id, name) for name in names]
    if query.after is not None and query.after not in ids:
        raise InvalidRequest(
            f"after is {shown(query.after)}, which is not the id of a checkpoint of {job_id}; use the id of the last "
            "checkpoint of the previous page.",
            param="after",
        )
    rest = names if query.after is None else names[ids.index(query.after) + 1 :]
    curves = await read_curves(service, job_id, None)
    data = [
        FineTuningCheckpoint(
            id=_id(job_id, name),
            created_at=_seconds(rows[name].created_at),
            fine_tuned_model_checkpoint=fine_tuned_model(job, name),
            fine_tuning_job_id=job_id,
            metrics=_metrics(curves, rows[name]),
            step_number=rows[name].step,
        )
        for name in rest[: query.limit]
        if name in rows
    ]
    return OpenAIList(data=data, has_more=len(rest) > query.limit)


def _id(job_id: str, name: str) -> str:
    return f"ftckpt-{job_id.removeprefix('job_')}-{name}"


def _metrics(curves: Curves, row: CheckpointRow) -> CheckpointMetrics:
    index = curves.step.index(row.step) if row.step in curves.step else None

    def value(series: list[float | None]) -> float | None:
        return series[index] if index is not None else None

    eval_loss, eval_accuracy = value(curves.eval_loss), value(curves.eval_token_accuracy)
    return CheckpointMetrics(
        step=float(row.step),
        train_loss=value(curves.loss),
        train_mean_token_accuracy=value(curves.token_accuracy),
        valid_loss=eval_loss,
        valid_mean_token_accuracy=eval_accuracy,
        full_valid_loss=eval_loss,
        full_valid_mean_token_accuracy=eval_accuracy,
    )


def _seconds(time: datetime) -> int:
    return int(time.timestamp())
