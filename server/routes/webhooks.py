"""/v1/webhooks: who is notified about the jobs of a project, and what was sent."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response

from server import webhooks
from server.database.pagination import PageQuery, cursor
from server.http.bodies import read_body
from server.http.proxies import public_path
from server.routes.routing import MAX_SMALL_BODY_BYTES, Router, TheCaller, TheService, json_body
from zeta_core.contract.access import KeyRotation
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import NEW_ID_PATTERN
from zeta_core.contract.job.responses import DeletedObject, Page
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.webhooks import CreatedWebhook, Delivery, NewWebhook, Webhook, WebhookChange

router = Router(prefix="/v1", tags=["webhooks"])


class WebhookQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="webhook"))


class DeliveryQuery(PageQuery):
    after: str | None = cursor(NEW_ID_PATTERN.format(prefix="delivery"))


@router.post("/webhooks", status_code=201, openapi_extra=json_body("NewWebhook", required=True))
async def create_webhook(
    service: TheService, caller: TheCaller, request: Request, response: Response
) -> CreatedWebhook:
    """Create a webhook. The response contains the secret that signs its messages, which can't be shown again."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES)
    created = await webhooks.create_webhook(service, caller, parse(NewWebhook, data, error_class=InvalidRequest))
    response.headers["Location"] = public_path(request, f"/v1/webhooks/{created.id}")
    return created


@router.get("/webhooks")
async def list_webhooks(
    service: TheService, caller: TheCaller, query: Annotated[WebhookQuery, Query()]
) -> Page[Webhook]:
    """List the webhooks of the project, newest first, without their secrets."""
    return await webhooks.list_webhooks(service, caller, query)


@router.get("/webhooks/{webhook_id}")
async def get_webhook(service: TheService, caller: TheCaller, webhook_id: str) -> Webhook:
    """Return a webhook without its secret."""
    return await webhooks.get_webhook(service, caller, webhook_id)


@router.patch("/webhooks/{webhook_id}", openapi_extra=json_body("WebhookChange", required=False))
async def change_webhook(service: TheService, caller: TheCaller, request: Request, webhook_id: str) -> Webhook:
    """Change a webhook. Fields that are absent stay."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES, empty={})
    change = parse(WebhookChange, data, error_class=InvalidRequest)
    return await webhooks.change_webhook(service, caller, webhook_id, change)


@router.delete("/webhooks/{webhook_id}")
async def delete_webhook(service: TheService, caller: TheCaller, webhook_id: str) -> DeletedObject:
    """Delete a webhook with its deliveries."""
    return await webhooks.delete_webhook(service, caller, webhook_id)


@router.post("/webhooks/{webhook_id}/rotate", openapi_extra=json_body("KeyRotation", required=False))
async def rotate_webhook_secret(
    service: TheService, caller: TheCaller, request: Request, webhook_id: str
) -> CreatedWebhook:
    """Replace the secret of a webhook. With `grace_seconds`, the old secret signs, too, for that time."""
    data = await read_body(request, MAX_SMALL_BODY_BYTES, empty={})
    rotation = parse(KeyRotation, data, error_class=InvalidRequest)
    return await webhooks.rotate_secret(service, caller, webhook_id, rotation)


@router.post("/webhooks/{webhook_id}/test", status_code=202)
async def test_webhook(service: TheService, caller: TheCaller, webhook_id: str) -> Delivery:
    """Send a test message once. The list of deliveries shows the result."""
    return await webhooks.send_test(service, caller, webhook_id)


@router.get("/webhooks/{webhook_id}/deliveries")
async def list_deliveries(
    service: TheService, caller: TheCaller, webhook_id: str, query: Annotated[DeliveryQuery, Query()]
) -> Page[Delivery]:
    """List the messages to a webhook of the last 30 days, newest first."""
    return await webhooks.list_deliveries(service, caller, webhook_id, query)


@router.get("/jobs/{job_id}/deliveries")
async def list_job_deliveries(
    service: TheService, caller: TheCaller, job_id: str, query: Annotated[DeliveryQuery, Query()]
) -> Page[Delivery]:
    """List the messages about a job of the last 30 days, newest first."""
    return await webhooks.list_job_deliveries(service, caller, job_id, query)
