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


class _Topic:
    """The readers of one job; ``generation`` counts the notifications while there are any."""

    def __init__(self) -> None:
        self.subscriptions: set[Subscription] = set()
        self.generation = 0


class EventSignal:
    """Notifies within this process only; the events of other servers are found by polling the database."""

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}

    def notify(self, job_id: str) -> None:
        """Call after the commit that stored events of ``job_id``."""
        topic = self._topics.get(job_id)
        if topic is not None:
            topic.generation += 1
            for subscription in topic.subscriptions:
                subscription.notify()

    def generation(self, job_id: str) -> int:
        """A number that changes with each notification; 0 without subscriptions."""
        topic = self._topics.get(job_id)
        return topic.generation if topic is not None else 0

    @contextmanager
    def subscribe(self, job_id: str) -> Generator[Subscription]:
        """Subscribe first, then read the database, then wait; this order misses no event."""
        subscription = Subscription()
        topic = self._topics.setdefault(job_id, _Topic())
        topic.subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            topic.subscriptions.discard(subscription)
            if not topic.subscriptions:
                del self._topics[job_id]

    async def wait(self, job_id: str, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for new events of ``job_id``; returns whether there were any."""
        with self.subscribe(job_id) as subscription:
            return await subscription.wait(timeout)
