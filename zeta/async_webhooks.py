"""Managing the webhooks of a project for asyncio: `AsyncClient.webhooks`, with the methods of `zeta.webhooks`.

async with AsyncClient() as client:
    created = await client.webhooks.create("https://example.org/hook")
    print(created.secret)  # can't be shown again
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from zeta.webhooks import Webhooks
from zeta_core.contract.job.responses import DeletedObject
from zeta_core.contract.webhooks import CreatedWebhook, Delivery, MessageFormat, Webhook, WebhookEvent


class AsyncWebhooks:
    """Each method calls the method of `Webhooks` with its name in a thread."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks

    async def create(
        self,
        url: str,
        *,
        name: str | None = None,
        events: Iterable[WebhookEvent] | None = None,
        format: MessageFormat | None = None,
    ) -> CreatedWebhook:
        """Create a webhook; ``events`` defaults to the ends of jobs. Only this result contains the secret."""
        return await asyncio.to_thread(self._webhooks.create, url, name=name, events=events, format=format)

    async def list(self, *, limit: int | None = None) -> list[Webhook]:
        """List the webhooks of the project, newest first."""
        return await asyncio.to_thread(self._webhooks.list, limit=limit)

    async def get(self, webhook_id: str) -> Webhook:
        return await asyncio.to_thread(self._webhooks.get, webhook_id)

    async def change(self, webhook_id: str, **fields: Any) -> Webhook:
        """Change the fields ``url``, ``name``, ``events``, ``format`` or ``enabled``; absent ones stay."""
        return await asyncio.to_thread(self._webhooks.change, webhook_id, **fields)

    async def rotate(self, webhook_id: str, *, grace_seconds: int = 0) -> CreatedWebhook:
        """Give a webhook a new secret; for the grace period, the old one signs, too."""
        return await asyncio.to_thread(self._webhooks.rotate, webhook_id, grace_seconds=grace_seconds)

    async def test(self, webhook_id: str) -> Delivery:
        """Send a test message in the background; `deliveries` shows the result."""
        return await asyncio.to_thread(self._webhooks.test, webhook_id)

    async def deliveries(self, webhook_id: str, *, limit: int | None = 20) -> list[Delivery]:
        """List the messages to a webhook, newest first."""
        return await asyncio.to_thread(self._webhooks.deliveries, webhook_id, limit=limit)

    async def of_job(self, job_id: str, *, limit: int | None = 20) -> list[Delivery]:
        """List the messages about a job, newest first."""
        return await asyncio.to_thread(self._webhooks.of_job, job_id, limit=limit)

    async def delete(self, webhook_id: str) -> DeletedObject:
        """Delete a webhook with its deliveries."""
        return await asyncio.to_thread(self._webhooks.delete, webhook_id)
