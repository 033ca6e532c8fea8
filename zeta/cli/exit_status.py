"""The exit statuses of the `zeta` command. Scripts rely on them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeta_core.contract.job.job import Job


class ExitStatus(IntEnum):
    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2
    CANCELLED = 3
    UNREACHABLE = 4
    INTERRUPTED = 130  # 128 + SIGINT, the shells' convention


def exit_status_of_job(job: Job) -> ExitStatus:
    """The exit status of a command that waited for this job, which has ended."""
    return {"succeeded": ExitStatus.SUCCEEDED, "cancelled": ExitStatus.CANCELLED}.get(
        str(job.status), ExitStatus.FAILED
    )
