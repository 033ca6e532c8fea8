"""Determines the last journal line of an attempt whose run did not write one itself."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from worker.run.memory_watch import Excess
from worker.run.process_tree import ProcessTree
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import REASON_SENTENCES, STOP_ENDS, JobStatus, StatusReason
from zeta_core.contract.wire.run_directory import DISK_FULL_EXIT, LOG_FILE
from zeta_core.system.oom_kills import count_oom_kills, oom_kill_error, out_of_memory_error
from zeta_core.system.sandbox.task_limit import exceeded_limit

LOG_TAIL_BYTES = 4000
NEVER_STARTED = "The worker stopped before it started the training process."
UNKNOWN_STATUS = (
    "The training process ended without a final status. "
    "Its exit status is unknown, because {reason}; see the end of its log."
)
WORKER_RESTARTED = "its worker was restarted while it ran"
FORK_SERVER_GONE = "the worker's fork server, which had started it, exited before it"


def final_line(tree: ProcessTree, worker_line: StatusLine | None, *, has_journal: bool) -> StatusLine:
    """The last line of a run that has ended: from its stop request, else ``worker_line``, else its exit status."""
    if tree.stop_action is not None:
        status, reason = STOP_ENDS[tree.stop_action]
        return StatusLine(status=status, reason=reason)
    if worker_line is not None:
        return worker_line
    if not tree.was_started:
        return StatusLine(status=JobStatus.QUEUED, reason=StatusReason.HANDED_BACK, message=NEVER_STARTED)
    if (limit := exceeded_limit(tree.directory)) is not None:
        return _process_limit_line(tree, limit)
    error = exit_error(tree, has_journal=has_journal)
    return disk_full_line(error.message) if error.code == StatusReason.DISK_FULL else _failed_with(error)


def launch_failure_line(error: BaseException) -> StatusLine:
    """The last line if the run directory couldn't be created or the program couldn't be started."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full_line(f"{REASON_SENTENCES[StatusReason.DISK_FULL]} ({error})")
    return failure_line(StatusReason.LAUNCH_FAILED, f"The training process could not be started: {error}")


def exit_error(tree: ProcessTree, *, has_journal: bool) -> JobError:
    """The error of a run without a final status, from the exit status of its ``tree``; its code is a `StatusReason`.

    ``has_journal`` means that its journal has lines.
    """
    status = tree.exit_status
    evidence = JobErrorEvidence(exit_code=status, log_tail=_log_tail(tree.directory / LOG_FILE))
    if status is None:
        # The signal is unknown, so only an OOM kill in our own control group can be attributed to the run.
        if count_oom_kills().increased_count(tree.oom_kills) == "group":
            error = oom_kill_error(tree.directory, tree.oom_kills, evidence)
            if error is not None:
                return error
        message = UNKNOWN_STATUS.format(reason=WORKER_RESTARTED if tree.was_adopted else FORK_SERVER_GONE)
        return JobError(code=StatusReason.PROCESS_KILLED, message=message, evidence=evidence)
    if status < 0:
        name = signal.Signals(-status).name
        evidence = evidence.model_copy(update={"exit_code": None, "signal": name})
        if status == -signal.SIGKILL:
            error = oom_kill_error(tree.directory, tree.oom_kills, evidence)
            if error is not None:
                return error
        message = f"The training process was killed by {name}."
        return JobError(code=StatusReason.PROCESS_KILLED, message=message, evidence=evidence)
    if status == DISK_FULL_EXIT:
        message = REASON_SENTENCES[StatusReason.DISK_FULL]
        return JobError(code=StatusReason.DISK_FULL, message=message, evidence=evidence)
    reason = StatusReason.TRAIN_ERROR if has_journal else StatusReason.LAUNCH_FAILED
    message = f"The training process ended with exit code {status} without reporting an error; see the end of its log."
    return JobError(code=reason, message=message, evidence=evidence)


def failure_line(
    reason: StatusReason, message: str, *, log_tail: str | None = None, rank: int | None = None
) -> StatusLine:
    evidence = JobErrorEvidence(log_tail=log_tail, rank=rank)
    return _failed_with(JobError(code=reason, message=message, evidence=evidence))


def memory_limit_line(directory: Path, excess: Excess) -> StatusLine:
    """The last line of the run in ``directory``, which was ended because it exceeded its memory limit."""
    figures = {"memory_used_bytes": excess.used_bytes, "memory_limit_bytes": excess.limit_bytes}
    error = out_of_memory_error(directory, excess.message, JobErrorEvidence.model_validate(figures))
    return _failed_with(error)


def _process_limit_line(tree: ProcessTree, limit: int) -> StatusLine:
    """The last line of a run that was killed because it exceeded its number of processes and threads."""
    error = JobError(
        code="process_limit",
        message=f"The run exceeded its limit of {limit:,} processes and threads and was ended.",
        hint="Use fewer processes, such as num_workers; a larger ZETA_JOB_PROCESSES on the worker allows more.",
        evidence=JobErrorEvidence(signal="SIGKILL", log_tail=_log_tail(tree.directory / LOG_FILE)),
    )
    return StatusLine(status=JobStatus.FAILED, reason=StatusReason.PROCESS_KILLED, message=error.message, error=error)


def disk_full_line(message: str) -> StatusLine:
    """The last line for a full disk, which is not a failure: the job continues once space is available."""
    status, reason = STOP_ENDS["disk"]
    return StatusLine(status=status, reason=reason, message=message)


def _failed_with(error: JobError) -> StatusLine:
    reason = StatusReason(error.code)
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=error.message, error=error)


def _log_tail(file: Path) -> str | None:
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
