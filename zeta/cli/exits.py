"""The exit statuses, which scripts rely on."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from zeta_core.contract.errors import InvalidRequest, InvalidSettings, MalformedRequest, Unavailable, ZetaError

if TYPE_CHECKING:
    from zeta_core.contract.job import Job


class Exit(IntEnum):
    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2
    CANCELLED = 3
    UNREACHABLE = 4
    INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def exit_of_error(error: ZetaError) -> Exit:
    """2 for what the user typed or wrote in a file, 4 for a service that is not there, 1 for the rest."""
    if error.code == "unreachable" or (isinstance(error, Unavailable) and error.code == Unavailable.code):
        return Exit.UNREACHABLE
    if isinstance(error, InvalidRequest | MalformedRequest | InvalidSettings):
        return Exit.USAGE
    return Exit.FAILED


def exit_of_job(job: Job) -> Exit:
    """How an ended job ends the command that waited for it."""
    return {"succeeded": Exit.SUCCEEDED, "cancelled": Exit.CANCELLED}.get(str(job.status), Exit.FAILED)
