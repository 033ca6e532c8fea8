"""One fault per test, with short time limits: the reaction of the worker and its runs, and the result of the job.

The limits are scaled down: the lease is 6 s instead of 120 s, and runs stop themselves after 4.5 s and have exited
after 5.85 s. Each test checks the weights, which show whether a step was skipped or repeated.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness.clocks import AdjustableClock, build_library
from tests.harness.disks import SmallDisk, can_mount
from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.service import processes_of_job
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.worker.small_training import WEIGHTS_FILE, next_weights
from zeta_core.contract.job.events import JOURNAL_LINE, StatusLine

LEASE_SECONDS = 6.0
SHORT: dict[str, Any] = {"ZETA_LEASE_SECONDS": f"{LEASE_SECONDS:g}"}
DAY_SECONDS = 86_400


@pytest.fixture
def fleet(tmp_path: Path, own_valkey: ValkeyServer) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, own_valkey.url, lease_seconds=LEASE_SECONDS) as fleet:
        fleet.start_engine()
        yield fleet


@pytest.fixture
def relay(own_valkey: ValkeyServer) -> Iterator[TcpRelay]:
    """The network between one worker and Redis."""
    relay = TcpRelay(own_valkey.port)
    yield relay
    relay.close()


def start_worker_behind(relay: TcpRelay, fleet: SmallFleet, name: str = "w1") -> None:
    fleet.start_worker(name, ZETA_REDIS_URL=f"redis://127.0.0.1:{relay.port}/0", **SHORT)


def check_finished(fleet: SmallFleet, job_id: str, *, steps: int, attempts: list[str]) -> None:
    """Check that the job succeeded after these attempts, with each step trained once and each event stored once."""
    job = fleet.wait_for_status(job_id, "succeeded")
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == attempts, fleet.logs()
    weights = b""
    for step in range(1, steps + 1):
        weights = next_weights(weights, step)
    assert (fleet.settings.artifacts / f"jobs/{job_id}/checkpoints/final/{WEIGHTS_FILE}").read_bytes() == weights
    fleet.check_events(job_id)
    assert job.failures == 0


def check_ended_before_the_next(fleet: SmallFleet, job_id: str) -> None:
    """Check that the first run had ended by itself before the next attempt started."""
    wait_until(lambda: fleet.job(job_id).attempt == 2, 60, "the next attempt")
    journal = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1/events.jsonl"
    last = JOURNAL_LINE.validate_json(journal.read_text().splitlines()[-1])
    assert isinstance(last, StatusLine)
    assert last.reason == "handed_back"
    assert last.created_at < fleet.attempts(job_id)[1].started_at, "the next attempt started while the first one ran"


@pytest.mark.extended
def test_a_run_cut_off_from_the_server_ends_before_its_next_attempt_starts(fleet: SmallFleet, relay: TcpRelay) -> None:
    start_worker_behind(relay, fleet)
    job_id = fleet.submit(steps="240", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 25)
    relay.cut()
    before = int((fleet.job(job_id).progress or {})["step"])
    wait_until(lambda: journal_steps(fleet, job_id) > before + 30, 60, "the run to continue without Redis")
    relay.restore()
    fleet.wait_for_step(job_id, before + 30)
    assert fleet.job(job_id).attempt == 1

    relay.cut()
    fleet.start_worker("w2", **SHORT)
    (training,) = processes_of_job(job_id)
    wait_until(lambda: training not in processes_of_job(job_id), 60, "the run to end by itself")
    check_ended_before_the_next(fleet, job_id)
    relay.restore()
    check_finished(fleet, job_id, steps=240, attempts=["worker_lost", "completed"])
    assert "Lost contact with worker w1" in str([event.fields for event in fleet.events(job_id)])


@pytest.mark.extended
def test_a_run_without_a_worker_ends_itself_even_if_it_hangs(fleet: SmallFleet) -> None:
    worker = fleet.start_worker(ZETA_WORKER_SLOTS="2", **SHORT)
    hanging = fleet.submit(steps="3", then="hang")
    fleet.wait_for_step(hanging, 3)
    running = fleet.submit(steps="160", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(running, 25)
    worker.kill()
    worker.wait()
    fleet.start_worker("w2", ZETA_WORKER_SLOTS="2", **SHORT)
    for job_id in (running, hanging):
        check_ended_before_the_next(fleet, job_id)
    check_finished(fleet, running, steps=160, attempts=["worker_lost", "completed"])
    fleet.wait_for_step(hanging, 3)
    fleet.request(hanging, "cancel")
    fleet.wait_for_status(hanging, "cancelled")


@pytest.mark.extended
def test_a_worker_restarted_in_another_home_leaves_its_old_run_to_end_itself(fleet: SmallFleet, tmp_path: Path) -> None:
    elsewhere: dict[str, Any] = {**SHORT, "ZETA_ARTIFACTS_URL": str(fleet.settings.artifacts)}
    worker = fleet.start_worker(**SHORT)
    job_id = fleet.submit(steps="160", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 25)
    worker.kill()
    worker.wait()
    fleet.start_worker(ZETA_HOME=str(tmp_path / "other"), **elsewhere)
    (training,) = processes_of_job(job_id)
    wait_until(lambda: training not in processes_of_job(job_id), 60, "the run to end by itself")
    check_ended_before_the_next(fleet, job_id)
    namesake = fleet.start_worker(ZETA_HOME=str(tmp_path / "third"), **elsewhere)
    check_finished(fleet, job_id, steps=160, attempts=["worker_lost", "completed"])
    assert namesake.wait(60) == 2, "the second worker of the same name must exit"
    assert "choose another name" in fleet.logs()


@pytest.mark.extended
def test_a_host_frozen_for_longer_than_the_lease_does_not_continue_its_run(fleet: SmallFleet) -> None:
    worker = fleet.start_worker(**SHORT)
    job_id = fleet.submit(steps="160", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 25)
    (training,) = processes_of_job(job_id)
    for process in (worker.pid, training):
        os.kill(process, signal.SIGSTOP)
    fleet.start_worker("w2", **SHORT)
    wait_until(lambda: fleet.job(job_id).attempt == 2, 60, "the next attempt")
    before = journal_steps(fleet, job_id)
    alive = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1/alive"
    contact = alive.read_text()
    os.kill(worker.pid, signal.SIGCONT)
    wait_until(
        lambda: training not in processes_of_job(job_id) or alive.read_text() != contact,
        60,
        "a contact recorded by the worker",
    )
    with suppress(ProcessLookupError):
        os.kill(training, signal.SIGCONT)
    wait_until(lambda: training not in processes_of_job(job_id), 60, "the run to end")
    assert journal_steps(fleet, job_id) <= before + 1, "it continued beside the next attempt"
    check_finished(fleet, job_id, steps=160, attempts=["worker_lost", "completed"])


@pytest.mark.extended
def test_a_long_redis_outage_hands_runs_back_and_they_resume_afterwards(
    fleet: SmallFleet, own_valkey: ValkeyServer
) -> None:
    fleet.start_worker(**SHORT)
    job_id = fleet.submit(steps="120", seconds_per_step="0.05", checkpoint_every="50")
    fleet.wait_for_step(job_id, 25)
    own_valkey.kill()
    wait_until(lambda: not processes_of_job(job_id), 60, "the run to end by itself")
    own_valkey.start()
    check_finished(fleet, job_id, steps=120, attempts=["handed_back", "completed"])
    assert fleet.job(job_id).lost_workers == 0
    first, second = fleet.attempts(job_id)
    assert second.first_step == (first.last_step or 0) + 1


@pytest.mark.extended
def test_a_stalled_run_logs_its_stacks_and_is_retried(fleet: SmallFleet) -> None:
    fleet.start_worker(ZETA_STALL_MIN_SECONDS="1", ZETA_STALL_FACTOR="2")
    job_id = fleet.submit(steps="3", then="hang", max_retries=1)  # too few to know the time of a step
    job = fleet.wait_for_status(job_id, "failed")
    assert (job.status_reason, job.failures) == ("stalled", 2)
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == ["stalled", "stalled"]
    assert not processes_of_job(job_id)
    warning = job.warnings[0]
    assert warning["code"] == "stalled"
    assert "no step for" in warning["message"]
    assert "its processes were idle" in warning["message"]
    assert "small_training.py" in warning["stacks"]
    assert "in run" in warning["stacks"]
    log = (fleet.settings.artifacts / f"jobs/{job_id}/logs/attempt-1.log").read_text()
    assert "--- Stacks of process" in log
    fleet.check_events(job_id)


@pytest.mark.extended
def test_a_wall_clock_that_jumps_by_a_day_has_no_effect(fleet: SmallFleet, tmp_path: Path) -> None:
    library = build_library(tmp_path)
    if library is None:
        pytest.skip("needs Linux and a C compiler, for an adjustable clock")
    clock = AdjustableClock(tmp_path / "clock", library)
    variables: dict[str, Any] = {**SHORT, **clock.environment, "ZETA_JOB_ENV": " ".join(clock.environment)}
    fleet.start_worker(ZETA_STALL_MIN_SECONDS="3", **variables)
    job_id = fleet.submit(steps="200", seconds_per_step="0.05", checkpoint_every="50")
    for step, seconds in ((20, DAY_SECONDS), (60, -DAY_SECONDS), (100, 0)):
        fleet.wait_for_step(job_id, step)
        clock.jump(seconds)
    check_finished(fleet, job_id, steps=200, attempts=["completed"])


@pytest.mark.extended
def test_a_full_disk_pauses_the_job_until_space_is_free_again(fleet: SmallFleet, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("needs the permission to mount a small disk")
    disk = SmallDisk(tmp_path / "disk", 64)
    worker = fleet.start_worker(
        ZETA_HOME=str(disk.directory),
        ZETA_ARTIFACTS_URL=str(fleet.settings.artifacts),
        ZETA_DISK_MIN_FREE_BYTES=str(16 * 2**20),
    )
    try:
        job_id = fleet.submit(steps="100", seconds_per_step="0.05", checkpoint_every="10")
        fleet.wait_for_step(job_id, 15)
        ballast = disk.directory / "ballast"
        ballast.write_bytes(bytes(56 * 2**20))
        job = fleet.wait_for_status(job_id, "paused")
        assert (job.status_reason, (job.waiting_reason or {})["code"]) == ("disk_full", "disk")
        saved = fleet.attempts(job_id)[0].last_step or 0
        assert f"step-{saved}" in fleet.checkpoints(job_id)
        ballast.unlink()
        fleet.wait_for_step(job_id, saved + 3, 60)
        assert fleet.attempts(job_id)[1].first_step == saved + 1
        disk.fill()  # completely: nothing can be written, but nothing is lost
        fleet.wait_for_status(job_id, "paused")
        disk.free()
        wait_until(lambda: fleet.job(job_id).status != "paused", 90, "the job to continue")
        check_finished(fleet, job_id, steps=100, attempts=["disk_full", "disk_full", "completed"])
    finally:
        worker.kill()
        worker.wait()
        disk.close()


def test_a_worker_killed_before_starting_the_run_hands_the_attempt_back(fleet: SmallFleet) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(seconds_to_load="60")
    wait_until(lambda: processes_of_job(job_id), 60, "the run")
    worker.kill()
    worker.wait()
    for training in processes_of_job(job_id):
        os.kill(training, signal.SIGKILL)
    run = fleet.settings.home / f"workers/w1/runs/{job_id}"
    for file in (run / "attempt-1").iterdir():  # like a worker that had only written run.json
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name not in ("run.json", "alive"):
            file.unlink()
    shutil.copytree(run / "attempt-1", run / "attempt-7")
    (run / "attempt-7/run.json").write_text('{"job_id": "job_')  # an older worker was killed while writing it
    shutil.copytree(run / "attempt-1", run / "attempt-8", ignore=shutil.ignore_patterns("run.json"))
    fleet.start_worker()
    wait_until(lambda: fleet.job(job_id).attempt == 2, 60, "the next attempt")
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == ["handed_back", None]
    job = fleet.job(job_id)
    assert (job.failures, job.lost_workers) == (0, 0)


def journal_steps(fleet: SmallFleet, job_id: str) -> int:
    journal = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1/events.jsonl"
    return journal.read_text().count('"progress"')
