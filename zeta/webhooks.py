"""Managing the webhooks of a project: `Client.webhooks`. Each method needs the scope ``submit``.

with Client() as client:
    created = client.webhooks.create("https://example.org/hook")
    print(created.secret)  # can't be shown again
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from zeta.errors import parse_response
from zeta.pagination import read_pages
from zeta.transport import HttpTransport
from zeta_core.contract.job.responses import DeletedObject
from zeta_core.contract.webhooks import CreatedWebhook, Delivery, MessageFormat, Webhook, WebhookEvent


class Webhooks:
    """Each method calls one route of the API."""

    def __init__(self, transport: HttpTransport) -> None:
        self._transport = transport

    def create(
        self,
        url: str,
        *,
        name: str | None = None,
        events: Iterable[WebhookEvent] | None = None,
        format: MessageFormat | None = None,
    ) -> CreatedWebhook:
        """Create a webhook; ``events`` defaults to the ends of jobs. Only this result contains the secret."""
        body: dict[str, Any] = {"url": url, "name": name, "format": format}
        if events is not None:
            body["events"] = list(events)
        return parse_response(CreatedWebhook, self._transport.request("POST", "/v1/webhooks", json=body))

    def list(self, *, limit: int | None = None) -> list[Webhook]:
        """List the webhooks of the project, newest first."""
        return list(read_pages(self._transport, Webhook, "/v1/webhooks", {}, limit))

    def get(self, webhook_id: str) -> Webhook:
        """Read a webhook, without its secret."""
        return parse_response(Webhook, self._transport.request("GET", _path(webhook_id)))

    def change(self, webhook_id: str, **fields: Any) -> Webhook:
        """Change the fields ``url``, ``name``, ``events``, ``format`` or ``enabled``; absent ones stay."""
        return parse_response(Webhook, self._transport.request("PATCH", _path(webhook_id), json=fields))

    def rotate(self, webhook_id: str, *, grace_seconds: int = 0) -> CreatedWebhook:
        """Give a webhook a new secret; for the grace period, the old one signs, too."""
        body = {"grace_seconds": grace_seconds}
        return parse_response(CreatedWebhook, self._transport.request("POST", f"{_path(webhook_id)}/rotate", json=body))

    def test(self, webhook_id: str) -> Delivery:
        """Send a test message in the background; `deliveries` shows the result."""
        return parse_response(Delivery, self._transport.request("POST", f"{_path(webhook_id)}/test"))

    def deliveries(self, webhook_id: str, *, limit: int | None = 20) -> list[Delivery]:
        """List the messages to a webhook, newest first."""
        return list(read_pages(self._transport, Delivery, f"{_path(webhook_id)}/deliveries", {}, limit))

    def of_job(self, job_id: str, *, limit: int | None = 20) -> list[Delivery]:
        """List the messages about a job, newest first."""
        path = f"/v1/jobs/{quote(job_id, safe='')}/deliveries"
        return list(read_pages(self._transport, Delivery, path, {}, limit))

    def delete(self, webhook_id: str) -> DeletedObject:
        """Delete a webhook with its deliveries."""
        return parse_response(DeletedObject, self._transport.request("DELETE", _path(webhook_id)))


def _path(webhook_id: str) -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}"
