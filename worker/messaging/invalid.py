"""Invalid entries in Redis: removed, counted, and logged at most once a minute for each source."""

from __future__ import annotations

import logging
import time

from zeta_core.system.outage import error_text

LOG_SECONDS = 60.0

logger = logging.getLogger(__name__)


class InvalidEntries:
    """The invalid entries of one source, such as a stream, counted since the process started."""

    def __init__(self, place: str) -> None:
        self.count = 0
        self._place = place
        self._num_logged = 0  # the value of `count` at the last report
        self._logged_at = float("-inf")  # monotonic

    def removed(self, reason: BaseException) -> None:
        """Count a removed entry, and log it unless one was logged within the last minute."""
        self.count += 1
        now = time.monotonic()
        if now - self._logged_at < LOG_SECONDS:
            return
        further = self.count - self._num_logged - 1
        self._num_logged, self._logged_at = self.count, now
        more = f" ({further} more since the last report)" if further else ""
        logger.warning(
            "Removed an invalid entry from %s in Redis%s: %s",
            self._place,
            more,
            error_text(reason),
            extra={"action": "bad_message"},
        )
