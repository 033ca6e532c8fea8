"""How a job continues after each kind of end of an attempt; on the database, without Redis."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from server.database.tables import AttemptRow, JobRow
from server.database.transitions import StatusChange, change_status, lock_job
from server.engine.apply_journal import apply_batch
from server.engine.attempt_claims import answer_claim
from server.engine.endings import MAX_LOST_WORKERS, backoff_seconds, lose_worker
from server.engine.job_monitor import resume_paused_by_disk
from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.simulated_worker import checkpoint, progress, status
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.wire.messages import Claim, JournalBatch


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0") as fleet:
        yield fleet


def start(fleet: SmallFleet, job_id: str) -> int:
    """Assign the job and claim it, like scheduler and worker do; returns the attempt."""

    async def claim() -> int:
        async with fleet.database.write() as session:
            job = await session.get_one(JobRow, job_id)
            job.worker, job.slots, job.not_before = "w", [0], None
            claim = Claim(job_id=job_id, attempt=job.attempt + 1, worker="w", incarnation="i")
        async with fleet.database.write() as session:
            assert (await answer_claim(session, claim)).granted
        return claim.attempt

    return fleet.loop.run(claim())


def run_attempt(fleet: SmallFleet, job_id: str, *lines: dict[str, Any]) -> JobRow:
    """Start the next attempt and apply all lines of its journal."""
    apply_lines(fleet, job_id, start(fleet, job_id), *lines)
    return fleet.job(job_id)


def apply_lines(fleet: SmallFleet, job_id: str, attempt: int, *lines: dict[str, Any]) -> None:
    """Apply all lines of the running attempt's journal."""

    async def write() -> None:
        async with fleet.database.write() as session:
            batch = JournalBatch(job_id=job_id, attempt=attempt, worker="w", first_line=1, lines=list(lines))
            assert (await apply_batch(session, batch)).ack.stored_line == len(lines)

    fleet.loop.run(write())


def request(fleet: SmallFleet, job_id: str, action: str | None) -> None:
    """Set the action that a user has requested."""

    async def write() -> None:
        async with fleet.database.write() as session:
            (await session.get_one(JobRow, job_id)).requested_action = action

    fleet.loop.run(write())


def resume(fleet: SmallFleet, job_id: str) -> None:
    """Queue a paused job, like a user or the engine does."""

    async def write() -> None:
        async with fleet.database.write() as session:
            job = await session.get_one(JobRow, job_id)
            queued = StatusChange(JobStatus.QUEUED, StatusReason.RESUMED)
            assert await change_status(session, job, queued, expect={JobStatus.PAUSED}, attempt=job.attempt)

    fleet.loop.run(write())


def set_ran_seconds(fleet: SmallFleet, job_id: str, attempt: int, seconds: float) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            (await session.get_one(AttemptRow, (job_id, attempt))).ran_seconds = seconds

    fleet.loop.run(write())


def spec(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "dataset": {"builtin": "python-docs"}, **fields}


def lose_worker_of(fleet: SmallFleet, job_id: str) -> JobRow:
    start(fleet, job_id)

    async def write() -> None:
        async with fleet.database.write() as session:
            job = await lock_job(session, job_id)
            assert job is not None
            await lose_worker(session, job, message="It is gone.")

    fleet.loop.run(write())
    return fleet.job(job_id)


@pytest.mark.parametrize("reason", ["train_error", "process_killed", "launch_failed"])
def test_process_failures_are_retried_up_to_max_retries(fleet: SmallFleet, reason: str) -> None:
    job_id = fleet.submit(max_retries=1)
    job = run_attempt(fleet, job_id, progress(1), status("failed", reason=reason, message="It broke."))
    assert (job.status, job.status_reason, job.failures) == ("queued", "retrying", 1)
    assert job.not_before is None  # the first retry does not wait
    attempt = start(fleet, job_id)
    job = fleet.job(job_id)
    assert (job.status, job.error) == ("running", None)  # only an ended job has an error
    (warning,) = job.warnings
    assert (warning["code"], warning["message"]) == ("attempt_failed", "Attempt 1 failed: It broke.")
    assert warning["evidence"] == {"attempt": 1, "code": reason}
    apply_lines(fleet, job_id, attempt, status("failed", reason=reason, message="It broke."))
    job = fleet.job(job_id)
    assert (job.status, job.status_reason, job.attempt, len(job.warnings)) == ("failed", reason, 2, 1)
    assert job.error is not None
    assert (job.error["code"], job.error["message"]) == (reason, "It broke.")
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == [reason, reason]
    fleet.check_events(job_id)


@pytest.mark.parametrize("reason", ["invalid_data", "invalid_model", "non_finite_loss", "time_limit"])
def test_failures_that_would_repeat_are_not_retried(fleet: SmallFleet, reason: str) -> None:
    job_id = fleet.submit()
    job = run_attempt(fleet, job_id, status("failed", reason=reason))
    assert (job.status, job.status_reason, job.attempt) == ("failed", reason, 1)


@pytest.mark.parametrize("code", ["cannot_resume", "cannot_train"])
def test_train_errors_caused_by_the_spec_are_not_retried(fleet: SmallFleet, code: str) -> None:
    job_id = fleet.submit()
    job = run_attempt(fleet, job_id, status("failed", reason="train_error", error={"code": code, "message": "No."}))
    assert (job.status, job.status_reason, job.attempt) == ("failed", "train_error", 1)
    assert (job.error or {})["code"] == code


def test_out_of_memory_is_retried_only_once(fleet: SmallFleet) -> None:
    job_id = fleet.submit()
    assert run_attempt(fleet, job_id, status("failed", reason="out_of_memory")).status == "queued"
    assert run_attempt(fleet, job_id, status("failed", reason="out_of_memory")).status == "failed"


def test_a_job_that_cannot_fit_is_not_retried_and_keeps_its_patch(fleet: SmallFleet) -> None:
    job_id = fleet.submit()
    error = {
        "code": "cannot_fit",
        "message": "It needs more.",
        "patch": {"batch_size": 1},
        "evidence": {"needed_bytes": 9},
    }
    job = run_attempt(fleet, job_id, status("failed", reason="out_of_memory", error=error))
    assert (job.status, job.error and job.error["patch"]) == ("failed", {"batch_size": 1})
    assert job.error is not None
    assert job.error["evidence"]["needed_bytes"] == 9


def test_a_full_disk_pauses_the_job_up_to_max_retries(
    fleet: SmallFleet,
) -> None:
    job_id = fleet.submit(max_retries=1)
    job = run_attempt(fleet, job_id, status("paused", reason="disk_full", message="4 MiB are free."))
    assert (job.status, job.status_reason, job.failures) == ("paused", "disk_full", 0)
    assert (job.waiting_reason or {})["code"] == "disk"
    resume(fleet, job_id)
    job = run_attempt(fleet, job_id, status("failed", reason="disk_full", message="No space."))
    assert (job.status, job.status_reason, job.failures, job.error) == ("paused", "disk_full", 1, None)
    resume(fleet, job_id)
    job = run_attempt(fleet, job_id, status("failed", reason="disk_full", message="No space."))
    assert (job.status, job.status_reason, (job.error or {})["message"]) == ("failed", "disk_full", "No space.")


def test_a_job_that_a_full_disk_pauses_again_waits_longer(fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = fleet.submit()
    for attempt in (1, 2, 3, 4):
        run_attempt(fleet, job_id, status("paused", reason="disk_full", message="The bucket is full."))
        if attempt < 4:
            resume(fleet, job_id)
    paused_at = utc_now()
    monkeypatch.setattr("server.engine.job_monitor.utc_now", lambda: paused_at + timedelta(seconds=60))
    assert fleet.loop.run(resume_paused_by_disk(fleet.database)) == []
    monkeypatch.setattr("server.engine.job_monitor.utc_now", lambda: paused_at + timedelta(seconds=90))
    assert fleet.loop.run(resume_paused_by_disk(fleet.database)) == [job_id]


@pytest.mark.parametrize(
    ("action", "end"), [(None, ("queued", "resumed")), ("cancel", ("cancelled", "cancelled_by_user"))]
)
def test_a_paused_run_follows_the_latest_request(fleet: SmallFleet, action: str | None, end: tuple[str, str]) -> None:
    job_id = fleet.submit()
    attempt = start(fleet, job_id)
    request(fleet, job_id, action)
    apply_lines(fleet, job_id, attempt, checkpoint(3), status("paused", reason="paused_by_user"))
    job = fleet.job(job_id)
    assert (job.status, job.status_reason, job.requested_action) == (*end, None)
    assert fleet.attempts(job_id)[0].reason == "paused_by_user"
    assert job.failures == 0


def test_a_job_without_time_left_ends_for_any_end_of_its_attempt(fleet: SmallFleet) -> None:
    job_id = fleet.submit(spec=spec(time_limit_seconds=10))
    run_attempt(fleet, job_id, status("failed", reason="process_killed"))
    assert fleet.job(job_id).status == "queued"
    attempt = start(fleet, job_id)
    set_ran_seconds(fleet, job_id, attempt, 11.0)
    apply_lines(fleet, job_id, attempt, status("queued", reason="handed_back"))
    job = fleet.job(job_id)
    assert (job.status, job.status_reason, (job.error or {})["code"]) == ("failed", "time_limit", "time_limit")
    assert fleet.attempts(job_id)[1].reason == "handed_back"


def test_a_cancel_precedes_the_time_limit_which_precedes_a_pause(fleet: SmallFleet) -> None:
    for action, end in (("pause", "failed"), ("cancel", "cancelled")):
        job_id = fleet.submit()
        attempt = start(fleet, job_id)
        request(fleet, job_id, action)
        apply_lines(fleet, job_id, attempt, status("failed", reason="time_limit"))
        assert fleet.job(job_id).status == end


def test_back_off_starts_at_the_second_failure_and_resets_at_a_checkpoint(fleet: SmallFleet) -> None:
    job_id = fleet.submit()
    run_attempt(fleet, job_id, status("failed", reason="process_killed"))
    assert run_attempt(fleet, job_id, status("failed", reason="process_killed")).not_before is not None
    job = run_attempt(fleet, job_id, checkpoint(5), status("failed", reason="process_killed"))
    assert (job.failures, job.not_before) == (1, None)
    assert [backoff_seconds(failures) for failures in (1, 2, 3, 4, 9)] == [0, 5, 20, 80, 300]


def test_queued_events_report_where_the_next_attempt_continues(fleet: SmallFleet) -> None:
    job_id = fleet.submit()
    run_attempt(fleet, job_id, status("failed", reason="process_killed", message="It was killed."))
    run_attempt(fleet, job_id, checkpoint(5), status("queued", reason="handed_back", message="The worker stops."))
    lose_worker_of(fleet, job_id)
    other = fleet.submit(spec=spec(resume_from_checkpoint="job_1/step-8"))
    run_attempt(fleet, other, status("paused", reason="disk_full"))
    resume(fleet, other)
    sentences = [
        event.fields["message"]
        for event in (*fleet.events(job_id), *fleet.events(other))
        if event.fields.get("status") == "queued"
    ]
    assert sentences == [
        "It was killed. There is no checkpoint yet, so the next attempt starts at the first step.",
        "The worker stops. The next attempt continues from step-5.",
        "It is gone. The next attempt continues from step-5.",
        "The job was resumed. The next attempt continues from job_1/step-8.",
    ]


def test_a_hand_back_does_not_count_as_a_failure(fleet: SmallFleet) -> None:
    job_id = fleet.submit(max_retries=0)
    for _ in range(3):
        job = run_attempt(fleet, job_id, status("queued", reason="handed_back"))
        assert (job.status, job.status_reason, job.failures, job.not_before) == ("queued", "handed_back", 0, None)


def test_lost_workers_have_a_separate_limit(fleet: SmallFleet) -> None:
    job_id = fleet.submit(max_retries=0)
    for _ in range(MAX_LOST_WORKERS):
        job = lose_worker_of(fleet, job_id)
        assert (job.status, job.status_reason, job.failures) == ("queued", "retrying", 0)
    job = lose_worker_of(fleet, job_id)
    assert (job.status, job.status_reason) == ("failed", "worker_lost")
    assert {attempt.reason for attempt in fleet.attempts(job_id)} == {"worker_lost"}


@pytest.mark.parametrize(
    "line", [status("failed", reason="process_killed"), status("failed", reason="invalid_data"), status("queued")]
)
@pytest.mark.parametrize(("action", "end"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_users_request_takes_precedence_over_a_retry(
    fleet: SmallFleet, line: dict[str, Any], action: str, end: str
) -> None:
    job_id = fleet.submit()
    attempt = start(fleet, job_id)
    request(fleet, job_id, action)
    apply_lines(fleet, job_id, attempt, line)
    job = fleet.job(job_id)
    assert (job.status, job.requested_action, job.error) == (end, None, None)


def test_limited_events_are_dropped_above_the_limit_with_one_warning(
    fleet: SmallFleet,
) -> None:
    job_id = fleet.submit()
    attempt = start(fleet, job_id)
    lines = [*(progress(step) for step in range(1, 6)), checkpoint(5), progress(6), status("succeeded")]

    async def write() -> None:
        async with fleet.database.write() as session:
            batch = JournalBatch(job_id=job_id, attempt=attempt, worker="w", first_line=1, lines=lines)
            applied = await apply_batch(session, batch, max_events=3)
            assert (applied.ack.stored_line, applied.attempt_ended) == (len(lines), True)

    fleet.loop.run(write())
    events = fleet.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events] == [
        "status", "progress", "progress", "progress", "warning", "checkpoint", "status",
    ]  # fmt: skip
    job = fleet.job(job_id)
    assert (job.warnings[0]["code"], len(job.warnings)) == ("events_cut", 1)
    assert (job.progress or {})["step"] == 6


def test_success_stores_the_result_and_keeps_earlier_warnings(fleet: SmallFleet) -> None:
    job_id = fleet.submit()
    error = {"code": "out_of_memory", "message": "Memory ran out.", "hint": "Halve it.", "patch": {"batch_size": 2}}
    run_attempt(fleet, job_id, status("failed", reason="out_of_memory", error=error))
    result = {"train_loss": 1.5, "tokens": 10}
    job = run_attempt(fleet, job_id, progress(1, loss=2.0), progress(2), status("succeeded", result=result))
    assert (job.status, job.status_reason, job.error) == ("succeeded", "completed", None)
    assert (job.warnings[0]["hint"], job.warnings[0]["patch"]) == ("Halve it.", {"batch_size": 2})
    assert (job.result or {})["train_loss"] == 1.5
    assert (job.progress or {})["loss"] == 2.0  # values that a line omits are kept
    assert job.finished_at is not None
    assert fleet.end_counts() == {"completed": 1}  # the failed attempt doesn't count
