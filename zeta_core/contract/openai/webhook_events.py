"""The events of OpenAI's webhooks that this service sends: the ends of fine-tuning jobs and of batches.

A delivery has the body ``{"id", "object": "event", "created_at", "type", "data": {"id"}}``, and the signature of the
Standard Webhooks specification, so ``client.webhooks.unwrap`` of the `openai` client reads it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, get_args

from zeta_core.contract.job.kind import JobKind

OPENAI_FORMAT = "openai"  # of a webhook that receives these events
OpenAIEvent = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.cancelled",
]
OPENAI_EVENTS: tuple[OpenAIEvent, ...] = get_args(OpenAIEvent)

_NAMES: dict[tuple[JobKind, str], OpenAIEvent] = {
    (JobKind.TRAINING, "job.succeeded"): "fine_tuning.job.succeeded",
    (JobKind.TRAINING, "job.failed"): "fine_tuning.job.failed",
    (JobKind.TRAINING, "job.cancelled"): "fine_tuning.job.cancelled",
    (JobKind.BATCH, "job.succeeded"): "batch.completed",
    (JobKind.BATCH, "job.failed"): "batch.failed",
    (JobKind.BATCH, "job.cancelled"): "batch.cancelled",
}


def openai_event(kind: JobKind, event: str) -> OpenAIEvent | None:
    """OpenAI's name of an event of a job; ``None`` for one that OpenAI doesn't have."""
    return _NAMES.get((kind, event))


def event_body(delivery_id: str, event: str, object_id: str, at: datetime) -> dict[str, Any]:
    """The body of a delivery about a job or a batch."""
    return {
        "id": delivery_id.replace("delivery_", "evt_", 1),
        "object": "event",
        "created_at": int(at.timestamp()),
        "type": event,
        "data": {"id": object_id},
    }
