"""Limits the rate of requests of each project, in all server processes together.

A token bucket in this process rejects a flood without asking Redis. Requests that pass it are counted in Redis, in
windows of a minute: the rate is the count of the current window plus the part of the previous one that lies within the
last minute. While Redis is unavailable, each process limits its own requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from zeta_core.contract.errors import QuotaExceeded
from zeta_core.system.redis_access import RedisUnavailable

WINDOW_SECONDS = 60


class SharedCounters(Protocol):
    """Counters that all server processes share; see `server.engine.shared_counts`."""

    async def add(self, name: str, window: int, window_seconds: int) -> tuple[int, int]: ...

    async def remove(self, name: str, window: int) -> None: ...


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RequestRates:
    """A project may send its limit at once, and then continue at the rate of the limit."""

    def __init__(self, counts: SharedCounters, clock: Callable[[], float] = time.time) -> None:
        """``clock`` returns seconds since the epoch, which the servers of a service agree on."""
        self._counts = counts
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    async def count(self, project: str, per_minute: int) -> None:
        """Count one request. Raises `QuotaExceeded` with the time after which the next one is possible."""
        now = self._clock()
        if (wait := self._count_here(project, per_minute, now)) > 0:
            raise _rate_limit_error(project, per_minute, wait)
        window, elapsed = int(now // WINDOW_SECONDS), now % WINDOW_SECONDS
        try:
            count, earlier = await self._counts.add(project, window, WINDOW_SECONDS)
            if count + earlier * (1 - elapsed / WINDOW_SECONDS) > per_minute:
                await self._counts.remove(project, window)
                raise _rate_limit_error(project, per_minute, _seconds_until(per_minute, count - 1, earlier, elapsed))
        except RedisUnavailable:
            return

    def _count_here(self, project: str, per_minute: int, now: float) -> float:
        """Take a token of this process; returns the seconds until there is one, or 0."""
        bucket = self._buckets.setdefault(project, _Bucket(per_minute, now))
        refilled = bucket.tokens + max(0.0, now - bucket.filled_at) * per_minute / WINDOW_SECONDS
        bucket.tokens, bucket.filled_at = min(float(per_minute), refilled), now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * WINDOW_SECONDS / per_minute
        bucket.tokens -= 1
        return 0.0


def _seconds_until(per_minute: int, count: int, earlier: int, elapsed: float) -> float:
    """The time until one more request is possible, after ``count`` ones in this window and ``earlier`` before it."""
    if count < per_minute and earlier:
        return max(0.0, (1 - (per_minute - 1 - count) / earlier) * WINDOW_SECONDS - elapsed)
    return WINDOW_SECONDS - elapsed + max(0.0, 1 - (per_minute - 1) / max(1, count)) * WINDOW_SECONDS


def _rate_limit_error(project: str, per_minute: int, wait: float) -> QuotaExceeded:
    seconds = max(1, math.ceil(wait))
    return QuotaExceeded(
        f"Project {project!r} has reached its limit of {per_minute} requests per minute (max_requests_per_minute); "
        f"try again in {seconds} s.",
        code="rate_limited",
        retry_after_seconds=seconds,
    )
