"""Notifies waiting readers when this process has stored new events of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager


class Subscription:
    """Remembers a notification until the next `wait`, so that none is lost between a read and a wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def wait(self, timeout: float) -> bool:
        """Wait for a notification since the last call, for up to ``timeout`` seconds; returns whether there was one."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class EventSignal:
    """Notifies within this process only; the events of other servers are found by polling the database."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, set[Subscription]] = {}

    def notify(self, job_id: str) -> None:
        """Call after the commit that stored events of ``job_id``."""
        for subscription in self._subscriptions.get(job_id, ()):
            subscription.notify()

    @contextmanager
    def subscribe(self, job_id: str) -> Generator[Subscription]:
        """Subscribe first, then read the database, then wait; this order misses no event."""
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
        """Wait up to ``timeout`` seconds for new events of ``job_id``; returns whether there were any."""
        with self.subscribe(job_id) as subscription:
            return await subscription.wait(timeout)
