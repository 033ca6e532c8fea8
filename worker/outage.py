"""Tells of a trouble that lasts when it begins and when it is over, and of nothing in between."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class Outage:
    """Logs the beginning and the end of an outage of one line, and nothing in between."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._under_way = False

    def began(self, error: BaseException, *, with_traceback: bool = False) -> None:
        if not self._under_way:
            logger.warning(
                "%s: %s. Trying again until it is back.",
                self._what,
                str(error).rstrip("."),
                exc_info=error if with_traceback else None,
                extra={"action": "outage"},
            )
        self._under_way = True

    def ended(self) -> None:
        if self._under_way:
            logger.info("%s: it is back.", self._what, extra={"action": "outage_over"})
        self._under_way = False
