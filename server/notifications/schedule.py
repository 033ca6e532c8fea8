"""Delays before a failed delivery is repeated, and the rule that disables a webhook."""

from __future__ import annotations

import random
from datetime import datetime, timedelta

# The delays after each failed attempt: ten attempts within about two days.
RETRY_SECONDS = (5.0, 30.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 43_200.0, 57_600.0)
JITTER = 0.2  # of a delay, so that the messages of an outage are not all repeated at the same time


def retry_delay(attempts: int, retry_after_seconds: float) -> float | None:
    """Seconds until the next attempt after this many failed ones; ``None`` if there is no further attempt."""
    if attempts > len(RETRY_SECONDS):
        return None
    delay = RETRY_SECONDS[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(delay, retry_after_seconds)


def has_failed_too_long(failing_since: datetime, now: datetime, days: float) -> bool:
    """Whether every attempt of a webhook has failed for this many days."""
    return now - failing_since >= timedelta(days=days)
