"""Wakes whoever waits for new events of a job that this process stored."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager


class Subscription:
    """Remembers a notification that came while nobody was waiting, so that none falls between a read and a wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def wait(self, timeout: float) -> bool:
        """Whether something was stored since the last call, waiting up to ``timeout`` seconds for it."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class EventSignal:
    """Notifications of this process only: another server's events are seen by reading the database now and then."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, set[Subscription]] = {}

    def notify(self, job_id: str) -> None:
        """Call after the commit that stored events of ``job_id``."""
        for subscription in self._subscriptions.get(job_id, ()):
            subscription.notify()

    @contextmanager
    def subscribe(self, job_id: str) -> Generator[Subscription]:
        """Subscribe, then read the database, then wait: nothing stored after the read goes unnoticed."""
        subscription = Subscription()
        self._subscriptions.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            others = self._subscriptions[job_id]
            others.discard(subscription)
            if not others:
                del self._subscriptions[job_id]

    async def wait(self, job_id: str, timeout: float) -> bool:
        """Whether events of ``job_id`` were stored within ``timeout`` seconds from now."""
        with self.subscribe(job_id) as subscription:
            return await subscription.wait(timeout)
