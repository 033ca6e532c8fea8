"""The exit statuses of the `zeta` command. Scripts rely on them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from zeta_core.contract.errors import InvalidRequest, InvalidSettings, MalformedRequest, Unavailable, ZetaError

if TYPE_CHECKING:
    from zeta_core.contract.job.job import Job


class Exit(IntEnum):
    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2
    CANCELLED = 3
    UNREACHABLE = 4
    INTERRUPTED = 130  # 128 + SIGINT, the shells' convention


def exit_of_error(error: ZetaError) -> Exit:
    """2 for invalid input (arguments, spec, settings), 4 for an unreachable service, 1 for everything else."""
    if error.code == "unreachable" or (isinstance(error, Unavailable) and error.code == Unavailable.code):
        return Exit.UNREACHABLE
    if isinstance(error, InvalidRequest | MalformedRequest | InvalidSettings):
        return Exit.USAGE
    return Exit.FAILED


def exit_of_job(job: Job) -> Exit:
    """The exit status of a command that waited for this job, which has ended."""
    return {"succeeded": Exit.SUCCEEDED, "cancelled": Exit.CANCELLED}.get(str(job.status), Exit.FAILED)
