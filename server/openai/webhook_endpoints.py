"""Webhook endpoints of the `openai` client: webhooks of the project that receive OpenAI's events in OpenAI's format.

They are ordinary webhooks with the format `OPENAI_FORMAT`, so `/v1/webhooks` lists them with their deliveries, too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from server import webhooks
from server.auth import Caller
from server.database.pagination import OrderedQuery, PageQuery, newest_first
from server.database.webhook_tables import DeliveryRow, WebhookRow
from server.openai.lists import NamedEndsList
from server.service import Service
from zeta_core.contract.access import KeyRotation
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.openai.webhook_events import OPENAI_FORMAT, OpenAIEvent
from zeta_core.contract.spec.validation import StrictModel
from zeta_core.contract.text import ShortLine
from zeta_core.contract.webhooks import WebhookUrl

GRACE_SECONDS = 24 * 3600
TEST_SECONDS = 20.0  # to send a test message and receive the response
POLL_SECONDS = 0.1
_HINT_CHARACTERS = 4


class NewEndpoint(StrictModel):
    """The body of ``POST /openai/v1/webhook_endpoints``."""

    url: WebhookUrl
    name: ShortLine
    event_types: list[OpenAIEvent] = Field(min_length=1, max_length=20)


class EndpointChange(StrictModel):
    """The body of ``POST /openai/v1/webhook_endpoints/{id}``; absent fields stay."""

    url: WebhookUrl | None = None
    name: ShortLine | None = None
    event_types: list[OpenAIEvent] | None = Field(default=None, min_length=1, max_length=20)


class SecretRotation(StrictModel):
    keep_old_secret_active_for_24_hours: bool = False


class EndpointTest(StrictModel):
    event_type: OpenAIEvent


class EndpointListQuery(PageQuery):
    limit: int = Field(default=20, ge=1, le=100, description="maximum number of webhook endpoints")


class _Object(BaseModel):
    model_config = ConfigDict(frozen=True)


class WebhookEndpoint(_Object):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str | None = None


class WebhookEndpointWithSecret(WebhookEndpoint):
    """A new endpoint, or one with a new secret, which can't be shown again."""

    signing_secret: str


class DeletedWebhookEndpoint(_Object):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookEndpointTestResult(_Object):
    webhook_endpoint_id: str
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int
    success: Literal[True] = True


async def create_endpoint(service: Service, caller: Caller, request: NewEndpoint) -> WebhookEndpointWithSecret:
    """Raises `InvalidRequest` for a URL that is not allowed, and `Conflict` at the limit of webhooks."""
    row = await webhooks.insert_webhook(
        service, caller, url=request.url, name=request.name, chosen_format=OPENAI_FORMAT, events=request.event_types
    )
    return _with_secret(row)


async def list_endpoints(service: Service, caller: Caller, query: EndpointListQuery) -> NamedEndsList[WebhookEndpoint]:
    """One page of the project's endpoints, newest first."""
    own = select(WebhookRow).where(WebhookRow.project == caller.project, WebhookRow.format == OPENAI_FORMAT)
    async with service.database.read() as session:
        matches = OrderedQuery(own, WebhookRow.created_at, WebhookRow.id)
        rows, has_more = await newest_first(session, WebhookRow, [matches], query, project=caller.project)
    data = [_endpoint(row) for row in rows]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return NamedEndsList(data=data, has_more=has_more, first_id=ends[0], last_id=ends[1])


async def get_endpoint(service: Service, caller: Caller, endpoint_id: str) -> WebhookEndpoint:
    """Raises `NotFound`."""
    async with service.database.read() as session:
        return _endpoint(await _find(session, caller, endpoint_id))


async def change_endpoint(
    service: Service, caller: Caller, endpoint_id: str, request: EndpointChange
) -> WebhookEndpoint:
    """Raises `NotFound`, and `InvalidRequest` for a URL that is not allowed."""
    if request.url is not None:
        webhooks.require_allowed_url(service.settings, request.url, OPENAI_FORMAT)
    given = {"name": request.name, "url": request.url, "events": request.event_types}
    changes = {name: value for name, value in given.items() if value is not None}
    async with service.database.write() as session:
        row = await _find(session, caller, endpoint_id, lock=True)
        for name, value in changes.items():
            setattr(row, name, sorted(set(value)) if isinstance(value, list) else value)
        session.add(caller.audit_row("webhook.change", row.id, project=row.project, fields=sorted(changes)))
        return _endpoint(row)


async def rotate_secret(
    service: Service, caller: Caller, endpoint_id: str, request: SecretRotation
) -> WebhookEndpointWithSecret:
    """Raises `NotFound`."""
    grace_seconds = GRACE_SECONDS if request.keep_old_secret_active_for_24_hours else 0
    await get_endpoint(service, caller, endpoint_id)
    await webhooks.rotate_secret(service, caller, endpoint_id, KeyRotation(grace_seconds=grace_seconds))
    async with service.database.read() as session:
        return _with_secret(await _find(session, caller, endpoint_id))


async def delete_endpoint(service: Service, caller: Caller, endpoint_id: str) -> DeletedWebhookEndpoint:
    """Raises `NotFound`."""
    await get_endpoint(service, caller, endpoint_id)
    await webhooks.delete_webhook(service, caller, endpoint_id)
    return DeletedWebhookEndpoint(id=endpoint_id)


async def test_endpoint(
    service: Service, caller: Caller, endpoint_id: str, request: EndpointTest
) -> WebhookEndpointTestResult:
    """Send a sample event, and wait for the response. Raises `NotFound`, and `InvalidRequest` if there is none."""
    await get_endpoint(service, caller, endpoint_id)
    sent = await webhooks.send_test(service, caller, endpoint_id, event=request.event_type)
    deadline = time.monotonic() + TEST_SECONDS
    while True:
        async with service.database.read() as session:
            row = await session.get(DeliveryRow, sent.id)
        if row is not None and row.status_code is not None:
            return WebhookEndpointTestResult(
                webhook_endpoint_id=endpoint_id, event_type=request.event_type, status_code=row.status_code
            )
        if row is None or row.status == "failed" or time.monotonic() >= deadline:
            reason = (row.error if row is not None else None) or f"there was no response within {TEST_SECONDS:g} s"
            raise InvalidRequest(
                f"The test message to {endpoint_id} could not be delivered: {reason.rstrip('.')}.",
                code="endpoint_unreachable",
            )
        await asyncio.sleep(POLL_SECONDS)


async def _find(session: AsyncSession, caller: Caller, endpoint_id: str, *, lock: bool = False) -> WebhookRow:
    """Raises `NotFound`, also for a webhook of another format."""
    row = await webhooks.find_webhook(session, caller, endpoint_id, lock=lock)
    if row.format != OPENAI_FORMAT:
        raise caller.not_found("webhook", endpoint_id, row.project)
    return row


def _endpoint(row: WebhookRow) -> WebhookEndpoint:
    return WebhookEndpoint(
        id=row.id,
        created_at=int(row.created_at.timestamp()),
        name=row.name or "",
        url=row.url,
        event_types=list(row.events),
        signing_secret_hint=f"...{row.secret[-_HINT_CHARACTERS:]}",
    )


def _with_secret(row: WebhookRow) -> WebhookEndpointWithSecret:
    return WebhookEndpointWithSecret(**_endpoint(row).model_dump(), signing_secret=row.secret)
