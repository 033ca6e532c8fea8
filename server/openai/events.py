"""Events of a job for the `openai` client, newest first."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from server.auth import Caller
from server.database.pagination import PageQuery, cursor
from server.database.tables import EventRow
from server.jobs.queries import find_training
from server.openai.lists import OpenAIList
from server.service import Service
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.spec.validation import shown

_ID = re.compile(r"ftevent-([0-9a-z]+)-([1-9][0-9]{0,17})\Z")
_TRAINED = {
    "loss": "train_loss",
    "token_accuracy": "train_mean_token_accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "epoch": "epoch",
    "tokens": "tokens",
}
_EVALUATED = {
    "eval_loss": ("valid_loss", "full_valid_loss"),  # every evaluation uses the whole validation file
    "eval_token_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
}


class EventListQuery(PageQuery):
    after: str | None = cursor(r"^ftevent-[0-9a-z]{20,32}-[1-9][0-9]{0,17}$")


class FineTuningEvent(BaseModel):
    """An event. ``data`` of type ``metrics`` has the metrics of a step, by OpenAI's names and further ones."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


async def list_events(
    service: Service, caller: Caller, job_id: str, query: EventListQuery
) -> OpenAIList[FineTuningEvent]:
    """One page of the job's events. Raises `NotFound`, and `InvalidRequest` for an invalid ``after``."""
    async with service.database.read() as session:
        await find_training(session, caller, job_id)
        rows = select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.seq.desc()).limit(query.limit + 1)
        if query.after is not None:
            rows = rows.where(EventRow.seq < _seq(query.after, job_id))
        found = list(await session.scalars(rows))
    return OpenAIList(data=[_event(row) for row in found[: query.limit]], has_more=len(found) > query.limit)


def _seq(after: str, job_id: str) -> int:
    match = _ID.match(after)
    if match is None or f"job_{match.group(1)}" != job_id:
        raise InvalidRequest(
            f"after is {shown(after)}, which is not the id of an event of {job_id}; use the id of the last event of "
            "the previous page.",
            param="after",
        )
    return int(match.group(2))


def _event(row: EventRow) -> FineTuningEvent:
    level, message, data = _content(row.type, row.fields)
    time: datetime = row.created_at
    return FineTuningEvent(
        id=f"ftevent-{row.job_id.removeprefix('job_')}-{row.seq}",
        created_at=int(time.timestamp()),
        level=level,
        message=message,
        type="message" if data is None else "metrics",
        data=data,
    )


def _content(
    event_type: str, fields: dict[str, Any]
) -> tuple[Literal["info", "warn", "error"], str, dict[str, Any] | None]:
    """The level, the message and the metrics of an event."""
    match event_type:
        case "status":
            status = str(fields.get("status"))
            message = str(fields.get("message") or f"The job is {status}.")
            return ("error" if status == "failed" else "info"), message, None
        case "progress":
            return "info", *_progress(fields)
        case "checkpoint":
            return "info", f"Checkpoint {fields.get('name')} created at step {fields.get('step')}.", None
        case "sample":
            sample = f"{str(fields.get('prompt'))[-200:]!r} -> {str(fields.get('text'))!r}"
            return "info", f"Sample after step {fields.get('step')}: {sample}", None
        case "warning" | "error":
            parts = (fields.get("message"), fields.get("hint"))
            message = " ".join(str(part) for part in parts if part)
            return ("warn" if event_type == "warning" else "error"), message, None
        case _:
            level = fields.get("level")
            known: Literal["warn", "error", "info"] = "warn" if level == "warning" else "info"
            return ("error" if level == "error" else known), str(fields.get("message", event_type)), None


def _progress(fields: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    step, total = fields.get("step"), fields.get("total_steps")
    at = {"step": step, "total_steps": total}
    if fields.get("eval_loss") is not None:
        evaluated = {
            name: fields[field]
            for field, names in _EVALUATED.items()
            for name in names
            if fields.get(field) is not None
        }
        return f"Step {step}/{total}: validation loss={fields['eval_loss']:.4f}", at | evaluated
    if fields.get("loss") is not None:
        trained = {name: fields[field] for field, name in _TRAINED.items() if fields.get(field) is not None}
        return f"Step {step}/{total}: training loss={fields['loss']:.4f}", at | trained
    return f"{str(fields.get('phase', 'progress')).replace('_', ' ').capitalize()}.", None
