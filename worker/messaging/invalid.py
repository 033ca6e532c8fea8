"""Entries in Redis that are not valid messages: removed, counted, and logged once for each place."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class InvalidEntries:
    """Those of one place, such as a stream. They are counted over the life of the process."""

    def __init__(self, place: str) -> None:
        self.count = 0
        self._place = place

    def removed(self, reason: object) -> None:
        """Call for each; the first is a warning, and the others are for whoever debugs."""
        self.count += 1
        logger.log(
            logging.WARNING if self.count == 1 else logging.DEBUG,
            "Removed an invalid entry from %s in Redis: %s",
            self._place,
            str(reason).rstrip("."),
            extra={"action": "bad_message"},
        )
