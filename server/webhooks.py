"""Creates, lists, changes, tests and deletes the webhooks of a project, and lists their deliveries.

The secret of a webhook is returned when it is created or rotated, and never again. It is stored as it is, because the
server signs with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Text, cast, func, select
from sqlalchemy import delete as delete_rows
from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.announcements import Receiver, new_delivery
from server.database.pagination import OrderedQuery, PageQuery, newest_first, page
from server.database.webhook_tables import DeliveryRow, WebhookRow
from server.jobs.queries import find_job
from server.notifications.addresses import literal_fault
from server.notifications.delivery_log import end_pending
from server.notifications.messages import new_secret
from server.service import Service
from server.settings import ServerSettings
from zeta_core.contract.access import KeyRotation
from zeta_core.contract.errors import Conflict, InvalidRequest
from zeta_core.contract.identifiers import is_id, new_id_at
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.openai.webhook_events import OPENAI_FORMAT
from zeta_core.contract.spec.validation import error_from_details, invalid_value
from zeta_core.contract.webhooks import (
    MAX_WEBHOOKS,
    TEST_EVENT,
    CreatedWebhook,
    Delivery,
    NewWebhook,
    Webhook,
    WebhookChange,
    email_of,
    message_format,
)

_BODY_BYTES = func.length(cast(DeliveryRow.body, Text))
_MAX_BODY_BYTES = 16 * 1024  # of a job with long metadata


async def create_webhook(service: Service, caller: Caller, request: NewWebhook) -> CreatedWebhook:
    """Create a webhook. Raises `InvalidRequest` for a URL that is not allowed, `Conflict` at `MAX_WEBHOOKS`."""
    row = await insert_webhook(
        service,
        caller,
        url=request.url,
        name=request.name,
        chosen_format=request.format,
        events=request.events,
    )
    return CreatedWebhook(**_fields(row), secret=row.secret)


async def insert_webhook(
    service: Service,
    caller: Caller,
    *,
    url: str,
    name: str | None,
    chosen_format: str | None,
    events: Sequence[str],
) -> WebhookRow:
    """Store a new webhook, whose events have the names of its format. Raises the errors of `create_webhook`."""
    require_allowed_url(service.settings, url, chosen_format)
    webhook_id, created_at = new_id_at("webhook")
    row = WebhookRow(
        id=webhook_id,
        project=caller.project,
        created_by=caller.key_id,
        name=name,
        url=url,
        format=message_format(url, chosen_format),
        events=sorted(set(events)),
        secret=new_secret(),
        enabled=True,
        created_at=created_at,
    )
    async with service.database.write() as session:
        in_project = select(func.count()).where(WebhookRow.project == caller.project)
        if (await session.scalar(in_project) or 0) >= MAX_WEBHOOKS:
            raise Conflict(
                f"The project has {MAX_WEBHOOKS} webhooks, the limit; delete one with DELETE /v1/webhooks/ID.",
                code="too_many_webhooks",
            )
        session.add(row)
        session.add(caller.audit_row("webhook.create", row.id, project=row.project))
    return row


async def list_webhooks(service: Service, caller: Caller, page_query: PageQuery) -> Page[Webhook]:
    """One page of the project's webhooks, newest first."""
    query = select(WebhookRow).where(WebhookRow.project == caller.project)
    async with service.database.read() as session:
        matches = OrderedQuery(query, WebhookRow.created_at, WebhookRow.id)
        rows, has_more = await newest_first(session, WebhookRow, [matches], page_query, project=caller.project)
    return page([to_webhook(row) for row in rows], has_more, lambda webhook: webhook.id)


async def get_webhook(service: Service, caller: Caller, webhook_id: str) -> Webhook:
    async with service.database.read() as session:
        return to_webhook(await find_webhook(session, caller, webhook_id))


async def change_webhook(service: Service, caller: Caller, webhook_id: str, request: WebhookChange) -> Webhook:
    """Change a webhook. A disabled one no longer receives events, and its pending messages end.

    Raises `NotFound`, and `InvalidRequest` for a URL that is not allowed.
    """
    changed_fields = request.model_fields_set
    async with service.database.write() as session:
        row = await find_webhook(session, caller, webhook_id, lock=True)
        if row.format == OPENAI_FORMAT and {"format", "events"} & changed_fields:
            raise InvalidRequest(
                f"{webhook_id} receives OpenAI's events in OpenAI's format; change its event_types with POST "
                f"/openai/v1/webhook_endpoints/{webhook_id}, or create another webhook.",
                code="openai_webhook",
                param="format" if "format" in changed_fields else "events",
            )
        if {"url", "format"} & changed_fields:
            url = request.url or row.url
            is_openai = row.format == OPENAI_FORMAT  # whatever its URL
            current = None if not is_openai and (request.url is not None or row.format == "email") else row.format
            chosen = request.format or current
            require_allowed_url(service.settings, url, OPENAI_FORMAT if is_openai else request.format)
            row.url, row.format = url, message_format(url, chosen)
        if request.events is not None:
            row.events = sorted(set(request.events))
        if "name" in changed_fields:
            row.name = request.name
        if request.enabled is not None:
            row.enabled, row.disabled_reason, row.failing_since = request.enabled, None, None
            if not request.enabled:
                await end_pending(session, row.id)
        session.add(caller.audit_row("webhook.change", row.id, project=row.project, fields=sorted(changed_fields)))
    return to_webhook(row)


async def rotate_secret(service: Service, caller: Caller, webhook_id: str, request: KeyRotation) -> CreatedWebhook:
    """Give a webhook a new secret; for the grace period, the old one signs, too. Raises `NotFound`."""
    async with service.database.write() as session:
        row = await find_webhook(session, caller, webhook_id, lock=True)
        has_grace = request.grace_seconds > 0
        row.old_secret = row.secret if has_grace else None
        row.old_secret_expires_at = utc_now() + timedelta(seconds=request.grace_seconds) if has_grace else None
        row.secret = new_secret()
        details = {"grace_seconds": request.grace_seconds}
        session.add(caller.audit_row("webhook.rotate", row.id, project=row.project, **details))
    return CreatedWebhook(**_fields(row), secret=row.secret)


async def delete_webhook(service: Service, caller: Caller, webhook_id: str) -> DeletedObject:
    """Delete a webhook with its deliveries. Raises `NotFound`."""
    async with service.database.write() as session:
        row = await find_webhook(session, caller, webhook_id, lock=True)
        await session.execute(delete_rows(DeliveryRow).where(DeliveryRow.webhook_id == row.id))
        await session.delete(row)
        session.add(caller.audit_row("webhook.delete", row.id, project=row.project))
    return DeletedObject(id=webhook_id, object="webhook")


async def send_test(service: Service, caller: Caller, webhook_id: str, *, event: str = TEST_EVENT) -> Delivery:
    """Send a test message once, also to a disabled webhook. Raises `NotFound`.

    The message is sent in the background; the list of deliveries shows the result.
    """
    async with service.database.write() as session:
        row = await find_webhook(session, caller, webhook_id)
        data = {"webhook": row.id, "name": row.name}
        receiver = Receiver(row.url, row.format, row.id)
        delivery = new_delivery(receiver, event, data, project=row.project, at=utc_now())
        session.add(delivery)
        session.add(caller.audit_row("webhook.test", row.id, project=row.project))
    service.engine.loops.wake("notifications")
    return _to_delivery(delivery)


async def list_deliveries(service: Service, caller: Caller, webhook_id: str, page_query: PageQuery) -> Page[Delivery]:
    """One page of the messages to a webhook, newest first. Raises `NotFound`."""
    async with service.database.read() as session:
        await find_webhook(session, caller, webhook_id)
        query = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
        return await _delivery_page(session, caller, query, page_query)


async def list_job_deliveries(service: Service, caller: Caller, job_id: str, page_query: PageQuery) -> Page[Delivery]:
    """One page of the messages about a job, newest first. Raises `NotFound`."""
    async with service.database.read() as session:
        await find_job(session, caller, job_id)
        query = select(DeliveryRow).where(DeliveryRow.job_id == job_id)
        return await _delivery_page(session, caller, query, page_query)


def url_fault(settings: ServerSettings, url: str, chosen_format: str | None) -> str | None:
    """Why no messages can be sent to a URL in this format, as a clause; ``None`` if they can."""
    address = email_of(url)
    if address is None:
        return literal_fault(url, settings.allowed_networks)
    if chosen_format is not None:
        return f"e-mails have no format {chosen_format!r}; omit `format`"
    return settings.email_fault(address)


async def find_webhook(session: AsyncSession, caller: Caller, webhook_id: str, *, lock: bool = False) -> WebhookRow:
    """The caller's webhook. Raises `NotFound`, also for webhooks of other projects."""
    row = await session.get(WebhookRow, webhook_id, with_for_update=lock) if is_id(webhook_id, "webhook") else None
    if row is None or row.project != caller.project:
        raise caller.not_found("webhook", webhook_id, row.project if row is not None else None)
    return row


def to_webhook(row: WebhookRow) -> Webhook:
    return Webhook(**_fields(row))


async def _delivery_page(session: AsyncSession, caller: Caller, query: Any, page_query: PageQuery) -> Page[Delivery]:
    matches = OrderedQuery(query, DeliveryRow.created_at, DeliveryRow.id)
    rows, has_more = await newest_first(
        session,
        DeliveryRow,
        [matches],
        page_query,
        project=caller.project,
        size=_BODY_BYTES,
        max_row_bytes=_MAX_BODY_BYTES,
    )
    return page([_to_delivery(row) for row in rows], has_more, lambda delivery: delivery.id)


def require_allowed_url(settings: ServerSettings, url: str, chosen_format: str | None) -> None:
    """Raise `InvalidRequest` unless messages can be sent to ``url`` in this format."""
    fault = url_fault(settings, url, chosen_format)
    if fault is not None:
        raise error_from_details([invalid_value("url", url, fault)], InvalidRequest)


def _to_delivery(row: DeliveryRow) -> Delivery:
    same = ("id", "event", "url", "status", "attempts", "status_code", "error")
    times = ("created_at", "delivered_at", "next_attempt_at")
    fields = {name: getattr(row, name) for name in (*same, *times, "body")}
    return Delivery(**fields, webhook=row.webhook_id, job=row.job_id)


def _fields(row: WebhookRow) -> dict[str, Any]:
    names = ("id", "project", "name", "url", "events", "format", "enabled", "disabled_reason", "failing_since")
    return {name: getattr(row, name) for name in (*names, "created_by", "created_at")}
