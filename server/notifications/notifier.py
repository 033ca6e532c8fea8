"""Sends due messages, several at a time, in tasks of their own.

`SendingCapacity` bounds how many of them go to one destination, to one project, and to receivers that don't respond.
Nothing else waits for a message: not a job, and no other receiver.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.notifications.delivery_log import DeliveryLog
from server.notifications.email_sender import EmailSender
from server.notifications.http_sender import DeliveryOutcome, HttpSender
from server.notifications.messages import Message
from server.notifications.sending_capacity import MAX_SENDING, Destination, SendingCapacity
from server.settings import ServerSettings

IDLE_SECONDS = 1.0
REMOVAL_SECONDS = 3600.0
LOOKUP_THREADS = 256  # more than `MAX_SENDING`: a lookup may take longer than its message's time limit

logger = logging.getLogger(__name__)


class Notifier:
    """``one_pass`` is the pass of a background loop; ``wake`` starts the next one."""

    def __init__(self, database: Database, settings: ServerSettings, wake: Callable[[], None]) -> None:
        limit = settings.webhook_seconds
        # Threads of their own: looking up a name and SMTP block, and nothing else may wait for them.
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup")
        self._mails = ThreadPoolExecutor(MAX_SENDING, thread_name_prefix="e-mail")
        self._http = HttpSender(settings.allowed_networks, limit, self._lookups)
        self._email = EmailSender(settings.smtp_url, settings.smtp_from, limit, self._mails)
        self._log = DeliveryLog(database, limit_seconds=limit, disable_days=settings.webhook_disable_days)
        self._wake = wake
        self._capacity = SendingCapacity()
        self._tasks: set[asyncio.Task[None]] = set()
        self._removed_at = float("-inf")  # monotonic
        self._is_stopping = False

    async def one_pass(self) -> None:
        """Start sending the due messages for which there is capacity."""
        is_removal_due = time.monotonic() - self._removed_at > REMOVAL_SECONDS
        if is_removal_due and not await self._log.remove_old():
            self._removed_at = time.monotonic()
        if self._capacity.num_free <= 0 or self._is_stopping:
            return
        messages = await self._log.claim(self._capacity)
        if self._is_stopping:
            return
        for message in messages:
            destination = Destination.of(message.project, message.url, message.format)
            self._capacity.take(message.target, destination)
            task = asyncio.create_task(self._send(message), name=f"send-{message.id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel the messages that are being sent. They are sent again after the next start."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._http.close()
        for executor in (self._lookups, self._mails):
            executor.shutdown(wait=False, cancel_futures=True)

    async def _send(self, message: Message) -> None:
        failed = True
        try:
            outcome = await self._outcome(message)
            failed = outcome.error is not None
            await self._log.record(message, outcome)
        except DatabaseUnavailable:
            pass  # the message is sent again when the claim ends
        except Exception:
            logger.exception("Recording %s failed; it is sent again.", message.id, extra={"action": "notification"})
        finally:
            self._capacity.release(message.target, failed=failed)
            self._wake()

    async def _outcome(self, message: Message) -> DeliveryOutcome:
        """Send the message. A defect of this server is a failed attempt, so it is not repeated without end."""
        sender = self._email if message.format == "email" else self._http
        try:
            return await sender.send(message)
        except Exception as error:
            logger.exception("Sending %s failed.", message.id, extra={"action": "notification"})
            return DeliveryOutcome(
                f"the server could not send the message ({type(error).__name__}); its log has the details"
            )
