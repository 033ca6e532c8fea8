"""The pages of webhooks: the list, a new one, and one webhook with the log of its deliveries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from server import webhooks
from server.database.pagination import MAX_LIMIT, PageQuery
from server.routes.routing import TheService
from server.service import Service
from server.web.pages import PageRequest, PageRouter, SubmitPage
from zeta_core.contract.access import KeyRotation
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.webhooks import DEFAULT_EVENTS, CreatedWebhook, NewWebhook, WebhookChange, WebhookEvent

router = PageRouter()
DELIVERIES_PER_PAGE = 50
EVENTS: Mapping[str, str] = {
    "job.succeeded": "a job has succeeded",
    "job.failed": "a job has failed",
    "job.cancelled": "a job was cancelled",
    "job.waiting": "a job waits for a long time",
    "job.worker_lost": "a job has lost its worker",
    "webhook.disabled": "another webhook was disabled",
}
assert set(EVENTS) == set(get_args(WebhookEvent))


class DeliveriesQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = Field(default=None, max_length=100)


@router.get("/webhooks")
async def show_webhooks(service: TheService, page: SubmitPage) -> Response:
    """The webhooks of the project, and a form for a new one."""
    return await _render_list(service, page)


@router.post("/webhooks")
async def create_webhook(service: TheService, page: SubmitPage) -> Response:
    """Create a webhook, and show its secret once."""
    try:
        request = parse(NewWebhook, _new_webhook(page.form), error_class=InvalidRequest)
        created = await webhooks.create_webhook(service, page.caller, request)
    except ZetaError as error:
        return await _render_list(service, page, error=error)
    return await _render_list(service, page, created=created)


@router.get("/webhooks/{webhook_id}")
async def show_webhook(
    service: TheService, page: SubmitPage, webhook_id: str, query: Annotated[DeliveriesQuery, Query()]
) -> Response:
    """One webhook and the log of its deliveries, newest first."""
    return await _render_webhook(service, page, "webhook.html", webhook_id, after=query.after)


@router.get("/webhooks/{webhook_id}/log")
async def show_log(service: TheService, page: SubmitPage, webhook_id: str) -> Response:
    """The newest deliveries alone, which the browser refreshes regularly."""
    return await _render_webhook(service, page, "webhook_log.html", webhook_id)


@router.post("/webhooks/{webhook_id}/test")
async def send_test(service: TheService, page: SubmitPage, webhook_id: str) -> Response:
    """Send a test message; the log shows the result."""
    await webhooks.send_test(service, page.caller, webhook_id)
    return page.redirect(f"/webhooks/{webhook_id}")


@router.post("/webhooks/{webhook_id}/rotate")
async def rotate_secret(service: TheService, page: SubmitPage, webhook_id: str) -> Response:
    """Replace the secret, and show the new one once."""
    rotated = await webhooks.rotate_secret(service, page.caller, webhook_id, KeyRotation())
    return await _render_webhook(service, page, "webhook.html", webhook_id, rotated=rotated)


@router.post("/webhooks/{webhook_id}/delete")
async def delete_webhook(service: TheService, page: SubmitPage, webhook_id: str) -> Response:
    """Delete a webhook with the log of its deliveries."""
    await webhooks.delete_webhook(service, page.caller, webhook_id)
    return page.redirect("/webhooks")


@router.post("/webhooks/{webhook_id}/{action}")
async def set_enabled(
    service: TheService, page: SubmitPage, webhook_id: str, action: Literal["enable", "disable"]
) -> Response:
    """Enable a webhook, or disable it, which ends its pending messages."""
    change = WebhookChange(enabled=action == "enable")
    await webhooks.change_webhook(service, page.caller, webhook_id, change)
    return page.redirect(f"/webhooks/{webhook_id}")


def _new_webhook(form: Mapping[str, str]) -> dict[str, Any]:
    """The request that the form describes."""
    return {
        "url": form.get("url", "").strip(),
        "name": form.get("name", "").strip() or None,
        "events": [event for event in EVENTS if f"event.{event}" in form],
        "format": form.get("format") or None,
    }


async def _render_list(
    service: Service, page: PageRequest, created: CreatedWebhook | None = None, error: ZetaError | None = None
) -> Response:
    listed = await webhooks.list_webhooks(service, page.caller, PageQuery(limit=MAX_LIMIT))
    form = page.form if error else dict.fromkeys((f"event.{event}" for event in DEFAULT_EVENTS), "on")
    return page.render(
        "webhooks.html",
        status=200 if error is None else 422,
        webhooks=listed.data,
        created=created,
        error=error,
        form=form,
        events=EVENTS,
    )


async def _render_webhook(
    service: Service,
    page: PageRequest,
    template: str,
    webhook_id: str,
    *,
    after: str | None = None,
    rotated: CreatedWebhook | None = None,
) -> Response:
    webhook = await webhooks.get_webhook(service, page.caller, webhook_id)
    query = PageQuery(limit=DELIVERIES_PER_PAGE, after=after)
    deliveries = await webhooks.list_deliveries(service, page.caller, webhook_id, query)
    return page.render(template, webhook=webhook, deliveries=deliveries, after=after, created=rotated, events=EVENTS)
