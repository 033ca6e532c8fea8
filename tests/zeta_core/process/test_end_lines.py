"""Which of several ends explains how a run of several processes or nodes ended."""

from __future__ import annotations

from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.process.end_lines import cause_of

SUCCEEDED = StatusLine(status=JobStatus.SUCCEEDED, reason=StatusReason.COMPLETED)
HANDED_BACK = StatusLine(status=JobStatus.QUEUED, reason=StatusReason.HANDED_BACK)
DISK_FULL = StatusLine(status=JobStatus.PAUSED, reason=StatusReason.DISK_FULL)


def failed(reason: StatusReason, message: str, signal: str | None = None) -> StatusLine:
    error = JobError(code=reason, message=message, evidence=JobErrorEvidence(signal=signal))
    return StatusLine(status=JobStatus.FAILED, reason=reason, message=message, error=error)


LOST_CONNECTION = failed(
    StatusReason.TRAIN_ERROR, "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.6]:4312"
)
INVALID_DATA = failed(StatusReason.INVALID_DATA, "line 3 is not JSON")
KILLED = failed(StatusReason.PROCESS_KILLED, "Rank 3 was killed by SIGKILL from outside.", "SIGKILL")


def test_the_first_failure_that_is_not_a_consequence_is_the_cause() -> None:
    # Each line explains the end if only those before it are missing.
    ends = [DISK_FULL, KILLED, INVALID_DATA, LOST_CONNECTION, HANDED_BACK, SUCCEEDED]
    for number, expected in enumerate(ends):
        assert cause_of(ends[number:][::-1]) is expected


def test_a_node_that_hands_the_job_back_explains_lost_connections_of_others() -> None:
    assert cause_of([LOST_CONNECTION, HANDED_BACK], across_nodes=True) is HANDED_BACK
    assert cause_of([LOST_CONNECTION, HANDED_BACK, KILLED], across_nodes=True) is KILLED
    assert cause_of([LOST_CONNECTION, SUCCEEDED], across_nodes=True) is LOST_CONNECTION
