"""A worker's trainings from hand-over to their end: real worker processes, real trainings, a real engine and Valkey."""

from tests.harness.fleet import Bench


def test_a_queued_job_is_handed_over_run_and_stored_with_its_checkpoints(fleet: Bench) -> None:
    fleet.start_worker()
    job_id = fleet.submit(steps="6", checkpoint_every="2")
    job = fleet.wait_for_status(job_id, "succeeded")
    assert (job.status_reason, job.attempt, job.worker, job.slots) == ("completed", 1, None, None)
    assert job.result is not None
    assert job.result["tokens"] == 48
    assert job.resolved_spec["micro_batch_size"] == 1
    assert fleet.checkpoints(job_id) == ["final", "step-2", "step-4", "step-6"]
    (attempt,) = fleet.attempts(job_id)
    assert (attempt.worker, attempt.reason, attempt.first_step, attempt.last_step) == ("w1", "completed", 1, 6)
    fleet.check_events(job_id)
    log = fleet.settings.artifacts / f"jobs/{job_id}/logs/attempt-1.log"
    assert log.read_text() == "attempt 1 begins\nthe last line of the log\n"
