"""Limits the rate of requests of each project with token buckets, one per project and server process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from zeta_core.contract.errors import QuotaExceeded

SECONDS = 60.0


@dataclass
class _Bucket:
    tokens: float
    filled_at: float  # monotonic


class RequestRates:
    """A project may send its limit at once, and then continue at the rate of the limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def count(self, project: str, per_minute: int) -> None:
        """Count one request. Raises `QuotaExceeded` with the time after which the next one is possible."""
        now = self._clock()
        bucket = self._buckets.setdefault(project, _Bucket(per_minute, now))
        refilled = bucket.tokens + (now - bucket.filled_at) * per_minute / SECONDS
        bucket.tokens, bucket.filled_at = min(float(per_minute), refilled), now
        if bucket.tokens < 1:
            wait = math.ceil((1 - bucket.tokens) * SECONDS / per_minute)
            raise QuotaExceeded(
                f"Project {project!r} has sent its limit of {per_minute} requests per minute "
                f"(max_requests_per_minute); try again in {wait} s.",
                code="rate_limited",
                retry_after_seconds=wait,
            )
        bucket.tokens -= 1
