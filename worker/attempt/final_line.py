"""Determines the last journal line of an attempt whose training did not write one itself."""

from __future__ import annotations

import errno
from pathlib import Path

from worker.training.memory_watch import Excess
from worker.training.process_tree import Training
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, STOP_ENDS, JobStatus, StatusReason
from zeta_core.system.oom_kills import out_of_memory_error

NEVER_STARTED = "The worker stopped before it started the training."


def final_line(training: Training, known: StatusLine | None, *, has_journal: bool) -> StatusLine:
    """The last line of an ended ``training``: from its stop request, else ``known``, else from its exit status."""
    if training.stop_action is not None:
        status, reason = STOP_ENDS[training.stop_action]
        return StatusLine(status=status, reason=reason)
    if known is not None:
        return known
    if not training.was_started:
        return StatusLine(status=JobStatus.QUEUED, reason=StatusReason.HANDED_BACK, message=NEVER_STARTED)
    reason, error = training.failure(has_journal=has_journal)
    return disk_full(error.message) if reason == StatusReason.DISK_FULL else _failed(reason, error)


def not_launched(error: BaseException) -> StatusLine:
    """The last line if the run directory couldn't be created or the program couldn't be started."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(f"{REASON_SENTENCES[StatusReason.DISK_FULL]} ({error})")
    return failed(StatusReason.LAUNCH_FAILED, f"The training could not be started: {error}")


def failed(reason: StatusReason, message: str, *, log_tail: str | None = None) -> StatusLine:
    return _failed(reason, JobError(code=reason, message=message, evidence=JobErrorEvidence(log_tail=log_tail)))


def over_memory(directory: Path, excess: Excess) -> StatusLine:
    """The last line of the training in ``directory``, which was ended because it exceeded its memory limit."""
    figures = {"memory_used_bytes": excess.used_bytes, "memory_limit_bytes": excess.limit_bytes}
    error = out_of_memory_error(directory, excess.message, JobErrorEvidence.model_validate(figures))
    return _failed(StatusReason.OUT_OF_MEMORY, error)


def disk_full(message: str) -> StatusLine:
    """The last line for a full disk, which is not a failure: the job continues once space is available."""
    status, reason = STOP_ENDS["disk"]
    return StatusLine(status=status, reason=reason, message=message)


def _failed(reason: StatusReason, error: JobError) -> StatusLine:
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=error.message, error=error)
