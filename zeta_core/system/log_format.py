"""The format of the logs of servers and workers: one line per message, without control characters and secrets.

Messages contain names and texts of users, and errors of libraries may quote URLs and headers. So characters that could
affect a terminal are escaped, and texts that look like secrets are masked. Tracebacks keep their lines.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from zeta_core.contract.printable import printable

MASK = "***"
_SECRETS = re.compile(
    r"(?P<before>\bBearer\s+|://[^\s:/@]*:)(?P<secret>[^\s@'\"]+)(?P<after>@?)"  # a header; the password of a URL
    r"|\bzeta_[A-Za-z0-9_-]{20,}"  # an API key
    r"|\bhf_[A-Za-z0-9]{20,}"  # a token of the Hugging Face Hub
)


def masked(text: str) -> str:
    """``text`` with `MASK` in place of API keys, bearer tokens, tokens of the Hub and passwords in URLs."""

    def mask(match: re.Match[str]) -> str:
        before = match["before"]
        if before is None:
            return MASK
        if before.startswith("://") and not match["after"]:
            return match[0]  # the port of a URL without a password
        return f"{before}{MASK}{match['after']}"

    return _SECRETS.sub(mask, text)


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
