"""Notifies waiting readers when this process has stored new events of a job.

A notification wakes every reader of the job, and each wake-up costs CPU time that a training on the same machine
could use. So the more readers a job has, the longer its notifications are collected: for 2 ms with one reader, and
for 0.2 s with a hundred.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

READER_SECONDS = 0.002  # between two notifications, for each reader
MAX_PACE_SECONDS = 0.5


class Subscription:
    """Remembers a notification until the next `wait`, so that none is lost between a read and a wait."""

    def __init__(self) -> None:
        self._changed = False
        self._waiter: asyncio.Future[None] | None = None

    def notify(self) -> None:
        self._changed = True
        self._end_wait()

    async def wait(self, timeout: float) -> bool:
        """Wait for a notification since the last call, for up to ``timeout`` seconds; returns whether there was one.

        Only one task waits at a time.
        """
        if not self._changed:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout, self._end_wait)  # `asyncio.timeout` takes three times as long
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        changed, self._changed = self._changed, False
        return changed

    def _end_wait(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Topic:
    """The readers of one job; ``generation`` counts the notifications since the first of them subscribed."""

    def __init__(self) -> None:
        self.subscriptions: set[Subscription] = set()
        self.generation = 0
        self._notified_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def notify(self) -> None:
        """Notify all readers, at once or when the pace allows it."""
        self.generation += 1
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        pace_seconds = min(READER_SECONDS * len(self.subscriptions), MAX_PACE_SECONDS)
        due_at = self._notified_at + pace_seconds
        if loop.time() >= due_at:
            self._notify_now()
        else:
            self._timer = loop.call_at(due_at, self._notify_now)

    def _notify_now(self) -> None:
        self._timer = None
        self._notified_at = asyncio.get_running_loop().time()
        for subscription in self.subscriptions:
            subscription.notify()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class EventSignal:
    """Notifies within this process only; the events of other servers are found by polling the database."""

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}

    def notify(self, job_id: str) -> None:
        """Call in the event loop, after the commit that stored events of ``job_id``."""
        topic = self._topics.get(job_id)
        if topic is not None:
            topic.notify()

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
                topic.close()
                del self._topics[job_id]
