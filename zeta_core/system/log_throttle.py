"""Limits repeated log messages to one per minute and source."""

from __future__ import annotations

import logging
import time
from collections import Counter

LOG_SECONDS = 60.0


class LogThrottle:
    """Logs at most one message a minute per source; the next one gives the number of suppressed messages."""

    def __init__(self, logger: logging.Logger, *, action: str) -> None:
        """``action`` is the ``action`` field of the log records."""
        self._logger = logger
        self._action = action
        self._logged_at: dict[str, float] = {}  # monotonic
        self._num_omitted: Counter[str] = Counter()

    def log(self, source: str, level: int, message: str, error: BaseException | None = None) -> None:
        """Log ``message`` and the traceback of ``error``, unless a message of this source was logged recently."""
        now = time.monotonic()
        if now - self._logged_at.get(source, float("-inf")) < LOG_SECONDS:
            self._num_omitted[source] += 1
            return
        self._logged_at[source] = now
        num_omitted = self._num_omitted.pop(source, 0)
        more = f" ({num_omitted} more since the last report)" if num_omitted else ""
        self._logger.log(level, "%s%s", message, more, exc_info=error, extra={"action": self._action})
