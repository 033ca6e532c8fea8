"""Invalid entries in Redis: removed, counted, and logged once for each source."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class InvalidEntries:
    """The invalid entries of one source, such as a stream, counted since the process started."""

    def __init__(self, place: str) -> None:
        self.count = 0
        self._place = place

    def removed(self, reason: object) -> None:
        """Count a removed entry; the first is logged as a warning, later ones at debug level."""
        self.count += 1
        logger.log(
            logging.WARNING if self.count == 1 else logging.DEBUG,
            "Removed an invalid entry from %s in Redis: %s",
            self._place,
            str(reason).rstrip("."),
            extra={"action": "bad_message"},
        )
