"""Handling of failing loops, shared by server and workers: describing errors and giving up.

A process waits for the end of an outage of Redis, the database or a disk. Any other failure is a defect. If it
persists, the process exits with `EXIT_STATUS`, and its supervisor starts a new one.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

from zeta_core.contract.printable import printable

EXIT_STATUS = 70  # EX_SOFTWARE of sysexits.h; systemd and Docker restart the process because it isn't 0
GIVE_UP_SECONDS = 600.0
MAX_TEXT_LENGTH = 300

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OngoingFailure:
    """The reason why a component is failing, and since when."""

    since: datetime
    reason: str

    def __str__(self) -> str:
        return f"failing since {self.since.isoformat(timespec='seconds')}: {self.reason}"


def error_text(error: BaseException) -> str:
    """The first line of the error's message, or else its type; never raises, even if the error's ``__str__`` does."""
    kind = type(error).__name__
    try:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    except Exception:  # noqa: BLE001 - __str__ may be defined by any library
        return f"{kind} (its message could not be read)"
    text = printable(line[:MAX_TEXT_LENGTH]).rstrip(".")
    return text or kind


def give_up(reason: str) -> NoReturn:
    """Log ``reason`` and exit immediately, with all threads, so that the supervisor starts a new process.

    Other components handle this like a crash, without loss of data.
    """
    logger.critical("%s Exiting with status %d to be restarted.", reason, EXIT_STATUS, extra={"action": "give_up"})
    logging.shutdown()
    os._exit(EXIT_STATUS)
