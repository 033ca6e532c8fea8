"""Sends due messages, several at a time, in tasks of their own.

A slow receiver occupies one of `MAX_SENDING` places, because only one message at a time is sent to each target, and a
project occupies at most `MAX_PER_PROJECT` of them. Nothing else waits for a message: not a job, and no other receiver.
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
from server.notifications.http_sender import HttpSender, Outcome
from server.notifications.messages import Message
from server.settings import ServerSettings

MAX_SENDING = 64
MAX_PER_PROJECT = 16
IDLE_SECONDS = 1.0
REMOVAL_SECONDS = 3600.0

logger = logging.getLogger(__name__)


class Notifier:
    """``one_pass`` is the pass of a background loop; ``wake`` starts the next one."""

    def __init__(self, database: Database, settings: ServerSettings, wake: Callable[[], None]) -> None:
        limit = settings.webhook_seconds
        # Threads of its own: looking up a name and SMTP block, and nothing else may wait for them.
        self._executor = ThreadPoolExecutor(MAX_PER_PROJECT, thread_name_prefix="notifications")
        self._http = HttpSender(settings.allowed_networks, limit, self._executor)
        self._email = EmailSender(settings.smtp_url, settings.smtp_from, limit, self._executor)
        self._log = DeliveryLog(database, limit_seconds=limit, disable_days=settings.webhook_disable_days)
        self._wake = wake
        self._sending: dict[str, str] = {}  # the projects of messages that are being sent, by target
        self._tasks: set[asyncio.Task[None]] = set()
        self._removed_at = float("-inf")  # monotonic
        self._is_stopping = False

    async def one_pass(self) -> None:
        """Start sending the due messages for which there are free places."""
        if time.monotonic() - self._removed_at > REMOVAL_SECONDS:
            await self._log.remove_old()
            self._removed_at = time.monotonic()
        num_free = MAX_SENDING - len(self._sending)
        if num_free <= 0 or self._is_stopping:
            return
        messages = await self._log.claim(self._sending, max_messages=num_free, max_per_project=MAX_PER_PROJECT)
        if self._is_stopping:
            return
        for message in messages:
            self._sending[message.target] = message.project
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
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _send(self, message: Message) -> None:
        try:
            await self._log.record(message, await self._outcome(message))
        except DatabaseUnavailable:
            pass  # the message is sent again when the claim ends
        except Exception:
            logger.exception("Recording %s failed; it is sent again.", message.id, extra={"action": "notification"})
        finally:
            self._sending.pop(message.target, None)
            self._wake()

    async def _outcome(self, message: Message) -> Outcome:
        """Send the message. A defect of this server is a failed attempt, so it is not repeated without end."""
        sender = self._email if message.format == "email" else self._http
        try:
            return await sender.send(message)
        except Exception as error:
            logger.exception("Sending %s failed.", message.id, extra={"action": "notification"})
            return Outcome(f"the server could not send the message ({type(error).__name__}); its log has the details")
