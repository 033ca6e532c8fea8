"""Reporting failures of the artifact store to users."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager

from zeta_core.contract.errors import Unavailable

logger = logging.getLogger(__name__)


def storage_unavailable(error: OSError) -> Unavailable:
    """The error for a failing store. Details, such as the store's address, are only logged."""
    logger.warning("The artifact store failed: %s", error, extra={"action": "store"})
    return Unavailable(
        f"The artifact store does not respond ({brief_reason(error)}); try again later.", code="storage_unavailable"
    )


def brief_reason(error: OSError) -> str:
    """The operating system's words for an error, without the details that a bucket's errors add."""
    return "unknown error" if error.errno is None else os.strerror(error.errno)


@contextmanager
def storage_errors() -> Generator[None]:
    """Raise `Unavailable` for an `OSError` of the store; a missing object remains a `FileNotFoundError`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise storage_unavailable(error) from error
