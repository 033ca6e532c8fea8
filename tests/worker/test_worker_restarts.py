"""Workers that stop, are killed and come back; slots. Each test has its own worker."""

import pytest

from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.waiting import wait_until


def test_a_stopping_worker_hands_its_job_back_and_another_one_continues_it(fleet: SmallFleet) -> None:
    first = fleet.start_worker("w1")
    job_id = fleet.submit(steps="40", seconds_per_step="0.05")
    fleet.wait_for_step(job_id, 3)
    first.terminate()
    assert first.wait(60) == 0
    job = fleet.job(job_id)
    assert (job.status, job.status_reason, job.failures, job.lost_workers) == ("queued", "handed_back", 0, 0)
    assert not processes_of_job(job_id)
    fleet.start_worker("w2")
    job = fleet.wait_for_status(job_id, "succeeded")
    handed_back, second = fleet.attempts(job_id)
    assert (handed_back.reason, second.worker, second.reason) == ("handed_back", "w2", "completed")
    assert second.first_step == (handed_back.last_step or 0) + 1
    fleet.check_events(job_id)


@pytest.mark.extended
def test_a_worker_with_a_limited_time_hands_its_job_back_and_exits_with_0(fleet: SmallFleet) -> None:
    worker = fleet.start_worker("w1", ZETA_STOP_AFTER_SECONDS="4")
    job_id = fleet.submit(steps="4000", seconds_per_step="0.05")
    fleet.wait_for_step(job_id, 1)
    assert worker.wait(60) == 0
    job = fleet.job(job_id)
    assert (job.status, job.status_reason, job.failures, job.lost_workers) == ("queued", "handed_back", 0, 0)
    assert not processes_of_job(job_id)


def test_a_restarted_worker_adopts_the_run_of_its_killed_process(fleet: SmallFleet) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(steps="100", seconds_per_step="0.05", checkpoint_every="50")
    fleet.wait_for_step(job_id, 3)
    worker.kill()
    worker.wait()
    assert processes_of_job(job_id)
    fleet.start_worker()
    job = fleet.wait_for_status(job_id, "succeeded")
    assert (job.attempt, job.lost_workers, job.failures) == (1, 0, 0)
    fleet.check_events(job_id)


@pytest.mark.extended
def test_a_run_that_ended_without_its_worker_is_published_by_the_next_one(fleet: SmallFleet) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(steps="20", seconds_per_step="0.05")
    fleet.wait_for_step(job_id, 3)
    worker.kill()
    worker.wait()
    wait_until(lambda: not processes_of_job(job_id), 60, "the run to end")
    fleet.start_worker()
    assert fleet.wait_for_status(job_id, "succeeded").attempt == 1
    assert fleet.checkpoints(job_id) == ["final"]
    fleet.check_events(job_id)


def test_two_workers_with_the_same_name_and_home_are_refused(fleet: SmallFleet) -> None:
    fleet.start_worker("w1")
    wait_until(lambda: (fleet.settings.home / "workers/w1/worker.lock").exists(), 60, "the first worker's lock")
    assert fleet.start_worker("w1").wait(60) == 2
    assert "choose another name" in fleet.logs()


@pytest.mark.extended
def test_two_slots_run_two_jobs_and_the_third_job_waits(fleet: SmallFleet) -> None:
    fleet.start_worker(ZETA_WORKER_SLOTS="2")
    jobs = [fleet.submit(steps="100000") for _ in range(3)]
    for job_id in jobs[:2]:
        fleet.wait_for_step(job_id, 1)
    assert sorted((fleet.job(job_id).slots or [])[0] for job_id in jobs[:2]) == [0, 1]
    waiting = fleet.job(jobs[2])
    assert (waiting.status, (waiting.waiting_reason or {})["code"]) == ("queued", "workers_busy")
    fleet.request(jobs[0], "cancel")
    fleet.wait_for_step(jobs[2], 1)
    for job_id in jobs[1:]:
        fleet.request(job_id, "cancel")
        fleet.wait_for_status(job_id, "cancelled")
