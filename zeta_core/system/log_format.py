"""The format of the logs of servers and workers: one line per message, without control characters and secrets.

Messages contain names and texts of users, and errors of libraries may quote URLs and headers. So characters that could
affect a terminal are escaped, and texts that look like secrets are masked. Tracebacks keep their lines.
"""

from __future__ import annotations

import logging
from typing import Any

from zeta_core.contract.printable import printable
from zeta_core.contract.secret_texts import masked


class OneLineFormatter(logging.Formatter):
    """Formats each message as one printable line without secrets."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return masked(printable(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return masked(printable(super().formatException(ei), keep="\n\t"))


def log_to_standard_error() -> None:
    """Configure the logging of this process: messages from level INFO on, in this format, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
