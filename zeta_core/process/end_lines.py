"""The last line of a run's journal, by how the run ended."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.status import REASON_SENTENCES, STOP_ENDS, JobStatus, StatusReason, StopAction
from zeta_core.failures import TrainingFailed, explain

END_FILE = "rank-{}.end"  # in the run directory: the final status line of one of several ranks

# The errors of torch's process groups (gloo, NCCL and their store) when another process has exited.
_CONNECTION_ERROR = re.compile(
    r"gloo/|NCCL|Connection (closed|reset) by peer|Broken pipe|DistNetworkError|DistBackendError|DistStoreError"
)


def line_for_error(error: BaseException) -> StatusLine:
    """The status line for ``error``. A full disk is not a failure: the job continues when there is space."""
    with suppress(OSError):  # the journal needs its last line even if the log cannot be written
        traceback.print_exception(error, file=sys.stderr)
    reason, explanation = explain(error)
    if reason is StatusReason.DISK_FULL:
        status, reason = STOP_ENDS["disk"]
        message = explanation.message
        if not isinstance(error, TrainingFailed):
            message = f"{REASON_SENTENCES[reason]} ({message})"
        return StatusLine(status=status, reason=reason, message=message)
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=explanation.message, error=explanation)


def handed_back() -> StatusLine:
    status, reason = STOP_ENDS["hand_back"]
    message = "Lost contact with the worker, so the training ended before another worker could start it again."
    return StatusLine(status=status, reason=reason, message=message)


def line_if_interrupted(line: StatusLine, requested: StopAction | None) -> StatusLine:
    """The status line of a run that SIGTERM ended where it could not stop by itself, such as in a compiler.

    SIGTERM reaches every process of the run. Errors of interrupted processes are not failures of the job, but an error
    with a specific code still is.
    """
    if requested is None or line.reason is not StatusReason.TRAIN_ERROR:
        return line
    if line.error is not None and line.error.code != StatusReason.TRAIN_ERROR:
        return line
    return ended_by_sigterm(requested)


def ended_by_sigterm(requested: StopAction) -> StatusLine:
    status, reason = STOP_ENDS[requested]
    return StatusLine(status=status, reason=reason, message=f"{REASON_SENTENCES[reason]} (Ended by SIGTERM.)")


def is_lost_connection(end: StatusLine) -> bool:
    """Whether the line is the error of a connection to another process, which has probably exited."""
    if end.error is None or end.reason is not StatusReason.TRAIN_ERROR:
        return False
    return _CONNECTION_ERROR.search(end.error.message) is not None


def cause_of(ends: Sequence[StatusLine], *, across_nodes: bool = False) -> StatusLine:
    """The line that explains how a run of several processes ended, from the lines of all ranks or of all nodes.

    If one of them fails, the others lose their connections to it and fail as well, so errors of connections count less.
    On one node, they count more than a stop, because elastic stops the other ranks after a failure. A node that was
    stopped, however, is the reason why others lose their connections. Of equal causes, the earliest counts.
    """

    def precedence(end: StatusLine) -> int:
        if end.reason is StatusReason.DISK_FULL:
            return 0
        if end.error is not None and end.error.evidence.signal is not None:
            return 1
        if end.error is not None:
            return 2 if not is_lost_connection(end) else 5 if across_nodes else 3
        return 6 if end.status is JobStatus.SUCCEEDED else 4

    return min(ends, key=lambda end: (precedence(end), end.created_at))
