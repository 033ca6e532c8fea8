"""Claims due deliveries, and records their outcomes.

A claim moves the time of the next attempt into the future, so that one server at a time sends a message. If that server
dies, another one (or the same, after a restart) sends it again when the claim ends: at least once, with the same id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.database.announcements import announce_disabled
from server.database.connections import Database
from server.database.webhook_tables import DeliveryRow, WebhookRow
from server.notifications.http_sender import DeliveryOutcome
from server.notifications.messages import Message
from server.notifications.schedule import has_failed_too_long, retry_delay
from server.notifications.sending_capacity import Destination, Due, SendingCapacity
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.webhooks import TEST_EVENT

CLAIM_SECONDS = 15.0  # in addition to the time limit of a request
KEEP_DAYS = 30  # ended deliveries are listed for this long
MAX_TARGETS = 500  # considered at a time
REMOVAL_CHUNK = 1000

logger = logging.getLogger(__name__)
_TARGET = func.coalesce(DeliveryRow.webhook_id, DeliveryRow.url)  # one message at a time is sent to each
_DISABLED = "the webhook was disabled before this message was delivered"


class DeliveryLog:
    def __init__(self, database: Database, *, limit_seconds: float, disable_days: float) -> None:
        """``limit_seconds`` is the time limit of a request, ``disable_days`` that of a webhook that only fails."""
        self._database = database
        self._claim = timedelta(seconds=limit_seconds + CLAIM_SECONDS)
        self._disable_days = disable_days

    async def claim(self, capacity: SendingCapacity) -> list[Message]:
        """Claim the oldest due messages for which there is capacity."""
        chosen = list(capacity.choose(await self._due(capacity.targets)))
        if not chosen:
            return []
        async with self._database.write() as session:
            claimed = [await self._claim_one(session, message.id) for message in chosen]
        return [message for message in claimed if message is not None]

    async def record(self, message: Message, outcome: DeliveryOutcome) -> None:
        """Record the outcome of an attempt, unless the message was claimed again or ended in the meantime."""
        async with self._database.write() as session:
            row = await session.get(DeliveryRow, message.id, with_for_update=True)
            if row is None or row.status != "pending" or row.attempts != message.attempt:
                return
            webhook = await _lock_webhook(session, row.webhook_id)
            now = utc_now()
            row.status_code, row.error = outcome.status_code, outcome.error
            if outcome.error is None:
                row.status, row.delivered_at, row.next_attempt_at = "delivered", now, None
                if webhook is not None:
                    webhook.failing_since = None
                return
            delay = None if row.event == TEST_EVENT else retry_delay(row.attempts, outcome.retry_after_seconds)
            if delay is None:
                row.status, row.next_attempt_at = "failed", None
            else:
                row.next_attempt_at = now + timedelta(seconds=delay)
            if webhook is not None and webhook.enabled:
                since = webhook.failing_since or now
                webhook.failing_since = since
                if outcome.is_gone or has_failed_too_long(since, now, self._disable_days):
                    await self._disable(session, webhook, outcome)

    async def remove_old(self) -> bool:
        """Remove deliveries that ended more than `KEEP_DAYS` ago from the log; returns whether there are more.

        It removes `REMOVAL_CHUNK` of them, so other writers don't wait long.
        """
        old = utc_now() - timedelta(days=KEEP_DAYS)
        query = select(DeliveryRow.id).where(DeliveryRow.created_at < old, DeliveryRow.status != "pending")
        async with self._database.read() as session:
            ids = list(await session.scalars(query.limit(REMOVAL_CHUNK)))
        if ids:
            async with self._database.write() as session:
                await session.execute(delete(DeliveryRow).where(DeliveryRow.id.in_(ids)))
        return len(ids) == REMOVAL_CHUNK

    async def _due(self, busy_targets: Sequence[str]) -> list[Due]:
        """The oldest due message of each target that is not busy."""
        first = func.min(DeliveryRow.id)
        query = (
            select(first, DeliveryRow.project, func.min(DeliveryRow.url), func.min(DeliveryRow.format))
            .where(
                DeliveryRow.status == "pending",
                DeliveryRow.next_attempt_at <= utc_now(),
                _TARGET.not_in(busy_targets),
            )
            .group_by(_TARGET, DeliveryRow.project)
            .order_by(func.min(DeliveryRow.next_attempt_at))
            .limit(MAX_TARGETS)
        )
        async with self._database.read() as session:
            due = (await session.execute(query)).all()
        return [Due(row[0], Destination.of(row[1], row[2], row[3])) for row in due]

    async def _claim_one(self, session: AsyncSession, delivery_id: str) -> Message | None:
        """Claim a message, unless another server has done so."""
        query = select(DeliveryRow).where(DeliveryRow.id == delivery_id).with_for_update(skip_locked=True)
        row = await session.scalar(query)
        now = utc_now()
        if row is None or row.status != "pending" or row.next_attempt_at is None or row.next_attempt_at > now:
            return None
        webhook = await session.get(WebhookRow, row.webhook_id) if row.webhook_id is not None else None
        row.attempts += 1
        row.next_attempt_at = now + self._claim
        keys: Sequence[str | None] = ()
        if webhook is not None:
            is_old_valid = webhook.old_secret_expires_at is not None and webhook.old_secret_expires_at > now
            keys = (webhook.secret, webhook.old_secret if is_old_valid else None)
        return Message(
            id=row.id,
            project=row.project,
            event=row.event,
            url=row.url,
            format=row.format,
            body=row.body,
            attempt=row.attempts,
            target=row.webhook_id or row.url,
            secrets=tuple(key for key in keys if key is not None),
        )

    async def _disable(self, session: AsyncSession, webhook: WebhookRow, outcome: DeliveryOutcome) -> None:
        now = utc_now()
        if outcome.is_gone:
            reason = "The receiver responded with status 410 (Gone)."
        else:
            reason = f"Every attempt failed for {self._disable_days:g} days; the last one: {outcome.error}."
        webhook.enabled, webhook.disabled_reason = False, reason
        await end_pending(session, webhook.id)
        await announce_disabled(session, webhook, at=now)
        logger.warning(
            "Disabled %s of project %s. %s",
            webhook.id,
            webhook.project,
            reason,
            extra={"action": "webhook_disabled", "webhook": webhook.id},
        )


async def end_pending(session: AsyncSession, webhook_id: str) -> None:
    """End the messages to a webhook that is being disabled, except tests."""
    pending = (
        DeliveryRow.webhook_id == webhook_id,
        DeliveryRow.status == "pending",
        DeliveryRow.event != TEST_EVENT,
    )
    await session.execute(
        update(DeliveryRow).where(*pending).values(status="failed", error=_DISABLED, next_attempt_at=None)
    )


async def _lock_webhook(session: AsyncSession, webhook_id: str | None) -> WebhookRow | None:
    return None if webhook_id is None else await session.get(WebhookRow, webhook_id, with_for_update=True)
