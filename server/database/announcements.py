"""Stores the messages to the receivers of an event, in the transaction of the event.

`server.notifications` sends them, so an event is never lost, and a slow receiver doesn't delay the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.tables import JobRow
from server.database.webhook_tables import DeliveryRow, WebhookRow
from zeta_core.contract.identifiers import is_id, new_id_at
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.openai.webhook_events import OPENAI_FORMAT, event_body, openai_event
from zeta_core.contract.webhooks import DEFAULT_EVENTS, JobEvent, message_format

_WEBHOOKS = "enabled_webhooks"  # in the `info` of a session, by project


@dataclass(frozen=True)
class Receiver:
    """Where a message goes; ``webhook_id`` is ``None`` for a URL of a job's ``notify``."""

    url: str
    format: str
    webhook_id: str | None = None


async def announce(
    session: AsyncSession, job: JobRow, event: JobEvent, *, at: datetime, message: str | None = None
) -> None:
    """Store the messages about an event of a job, whose row the caller has locked."""
    receivers = await _receivers(session, job, event)
    if receivers:
        data = {**_job_data(job), "message": message}
        for receiver in receivers:
            name = openai_event(JobKind(job.kind), event) if receiver.format == OPENAI_FORMAT else event
            if name is not None:
                session.add(new_delivery(receiver, name, data, project=job.project, at=at, job_id=job.id))


async def announce_disabled(session: AsyncSession, webhook: WebhookRow, *, at: datetime) -> None:
    """Store the messages to the other webhooks of the project after the service has disabled ``webhook``."""
    data = {"webhook": webhook.id, "name": webhook.name, "reason": webhook.disabled_reason}
    for other in await _enabled_webhooks(session, webhook.project):
        if other.id != webhook.id and "webhook.disabled" in other.events:
            receiver = Receiver(other.url, other.format, other.id)
            session.add(new_delivery(receiver, "webhook.disabled", data, project=webhook.project, at=at))


def new_delivery(
    receiver: Receiver, event: str, data: Mapping[str, Any], *, project: str, at: datetime, job_id: str | None = None
) -> DeliveryRow:
    """The row of a message that is to be sent at once."""
    delivery_id, created_at = new_id_at("delivery")
    body: dict[str, Any] = {"type": event, "timestamp": at.isoformat(), "data": dict(data)}
    if receiver.format == OPENAI_FORMAT:
        body = event_body(delivery_id, event, str(data.get("id", delivery_id)), at)
    return DeliveryRow(
        id=delivery_id,
        project=project,
        webhook_id=receiver.webhook_id,
        job_id=job_id,
        event=event,
        url=receiver.url,
        format=receiver.format,
        body=body,
        status="pending",
        attempts=0,
        created_at=created_at,
        next_attempt_at=created_at,
    )


async def _receivers(session: AsyncSession, job: JobRow, event: JobEvent) -> list[Receiver]:
    """The enabled webhooks that receive the event, and the other targets of the job's ``notify``, each once."""
    named: list[dict[str, Any]] = [
        entry for entry in job.spec.get("notify") or [] if event in entry.get("events", DEFAULT_EVENTS)
    ]
    formats = {str(entry["to"]): entry.get("format") for entry in named}
    receivers: list[Receiver] = []
    for webhook in await _enabled_webhooks(session, job.project):
        name = openai_event(JobKind(job.kind), event) if webhook.format == OPENAI_FORMAT else event
        if name in webhook.events or webhook.id in formats:
            chosen = formats.get(webhook.id) if webhook.format not in ("email", OPENAI_FORMAT) else None
            receivers.append(Receiver(webhook.url, chosen or webhook.format, webhook.id))
    for url, chosen in formats.items():
        if not is_id(url, "webhook"):
            receivers.append(Receiver(url, message_format(url, chosen)))
    return receivers


async def _enabled_webhooks(session: AsyncSession, project: str) -> list[WebhookRow]:
    """The enabled webhooks of a project, which are read once per transaction, although many of its jobs may end."""
    known: dict[str, list[WebhookRow]] = session.info.setdefault(_WEBHOOKS, {})
    if project not in known:
        query = select(WebhookRow).where(WebhookRow.project == project, WebhookRow.enabled).order_by(WebhookRow.id)
        known[project] = list(await session.scalars(query))
    return known[project]


def _job_data(job: JobRow) -> dict[str, Any]:
    """The job as messages describe it; the API has the rest."""
    error: dict[str, Any] | None = job.error
    return {
        "object": "job",
        "kind": job.kind,
        "id": job.id,
        "project": job.project,
        "name": job.entity_name,
        "status": job.status,
        "status_reason": job.status_reason,
        "attempt": job.attempt,
        "created_at": job.created_at.isoformat(),
        "queued_at": job.queued_at.isoformat() if job.queued_at else None,
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
        "error": None if error is None else {name: error.get(name) for name in ("code", "message", "hint")},
        "result": job.result,
        "metadata": job.job_metadata,
    }
