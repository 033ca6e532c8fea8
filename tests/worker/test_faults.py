"""One fault each, with the limits set short: what the worker and its trainings do, and what the job becomes.

The limits are the real ones scaled down: a lease of 6 s where 120 are the default, trainings that stop themselves at
4.5 s and are gone at 5.85 s. Each test looks at the weights, in which a step that was left out or made twice shows.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness.clocks import Clock, build_library
from tests.harness.disks import SmallDisk, can_mount
from tests.harness.fleet import Bench, bench
from tests.harness.network import Line
from tests.harness.service import marked_processes
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.worker.small_training import WEIGHTS_FILE, trained
from zeta_core.contract.job.events import JOURNAL_LINE, StatusLine

LEASE_SECONDS = 6.0
SHORT: dict[str, Any] = {"ZETA_LEASE_SECONDS": f"{LEASE_SECONDS:g}"}
DAY_SECONDS = 86_400


@pytest.fixture
def fleet(tmp_path: Path, own_valkey: ValkeyServer) -> Iterator[Bench]:
    with bench(tmp_path, own_valkey.url, lease_seconds=LEASE_SECONDS) as made:
        made.start_engine()
        yield made


@pytest.fixture
def line(own_valkey: ValkeyServer) -> Iterator[Line]:
    """The network between one worker and Redis."""
    made = Line(own_valkey.port)
    yield made
    made.close()


def start_worker_behind(line: Line, fleet: Bench, name: str = "w1") -> None:
    fleet.start_worker(name, ZETA_REDIS_URL=f"redis://127.0.0.1:{line.port}/0", **SHORT)


def check_finished(fleet: Bench, job_id: str, *, steps: int, attempts: list[str]) -> None:
    """Succeeded after attempts that ended for these reasons, with every step made once and every event stored once."""
    job = fleet.wait_for_status(job_id, "succeeded")
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == attempts, fleet.logs()
    weights = b""
    for step in range(1, steps + 1):
        weights = trained(weights, step)
    assert (fleet.settings.artifacts / f"jobs/{job_id}/checkpoints/final/{WEIGHTS_FILE}").read_bytes() == weights
    fleet.check_events(job_id)
    assert job.failures == 0


def check_ended_before_the_next(fleet: Bench, job_id: str) -> None:
    """The first training had said its last word, by itself, when the next attempt was started."""
    wait_until(lambda: fleet.job(job_id).attempt == 2, 60, "the next attempt")
    journal = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1/events.jsonl"
    last = JOURNAL_LINE.validate_json(journal.read_text().splitlines()[-1])
    assert isinstance(last, StatusLine)
    assert last.reason == "handed_back"
    assert last.created_at < fleet.attempts(job_id)[1].started_at, "the server started it while it still ran"


def test_a_cut_off_worker_s_training_has_ended_before_it_is_started_elsewhere_and_a_short_cut_changes_nothing(
    fleet: Bench, line: Line
) -> None:
    start_worker_behind(line, fleet)
    job_id = fleet.submit(steps="240", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 25)
    line.cut()
    made = int((fleet.job(job_id).progress or {})["step"])
    wait_until(lambda: journal_steps(fleet, job_id) > made + 30, 60, "the training to go on without Redis")
    line.heal()
    fleet.wait_for_step(job_id, made + 30)
    assert fleet.job(job_id).attempt == 1

    line.cut()
    fleet.start_worker("w2", **SHORT)
    (training,) = marked_processes(job_id)
    wait_until(lambda: training not in marked_processes(job_id), 60, "the training to end by itself")
    check_ended_before_the_next(fleet, job_id)
    line.heal()
    check_finished(fleet, job_id, steps=240, attempts=["worker_lost", "completed"])
    assert "Lost contact with worker w1" in str([event.fields for event in fleet.events(job_id)])


def test_a_training_whose_worker_vanished_for_ever_ends_by_itself_even_where_it_hangs(fleet: Bench) -> None:
    worker = fleet.start_worker(ZETA_WORKER_SLOTS="2", **SHORT)
    going = fleet.submit(steps="160", seconds_per_step="0.05", checkpoint_every="20")
    hanging = fleet.submit(steps="3", then="hang")
    fleet.wait_for_step(going, 25)
    fleet.wait_for_step(hanging, 3)
    worker.kill()
    worker.wait()
    fleet.start_worker("w2", **SHORT)
    for job_id in (going, hanging):
        check_ended_before_the_next(fleet, job_id)
    check_finished(fleet, going, steps=160, attempts=["worker_lost", "completed"])
    fleet.wait_for_step(hanging, 3)
    fleet.request(hanging, "cancel")
    fleet.wait_for_status(hanging, "cancelled")


def test_a_worker_back_in_another_folder_knows_nothing_of_what_it_left_which_ends_before_it_is_started_again(
    fleet: Bench, tmp_path: Path
) -> None:
    elsewhere: dict[str, Any] = {**SHORT, "ZETA_ARTIFACTS_URL": str(fleet.settings.artifacts)}
    worker = fleet.start_worker(**SHORT)
    job_id = fleet.submit(steps="160", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 25)
    worker.kill()
    worker.wait()
    fleet.start_worker(ZETA_HOME=str(tmp_path / "other"), **elsewhere)
    (training,) = marked_processes(job_id)
    wait_until(lambda: training not in marked_processes(job_id), 60, "the training to end by itself")
    check_ended_before_the_next(fleet, job_id)
    namesake = fleet.start_worker(ZETA_HOME=str(tmp_path / "third"), **elsewhere)
    check_finished(fleet, job_id, steps=160, attempts=["worker_lost", "completed"])
    assert namesake.wait(60) == 2, "two workers of one name take each other's messages"
    assert "choose another name" in fleet.logs()


def test_a_host_that_was_frozen_for_longer_than_the_lease_does_no_more_of_what_went_on_elsewhere(fleet: Bench) -> None:
    worker = fleet.start_worker(**SHORT)
    job_id = fleet.submit(steps="160", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 25)
    (training,) = marked_processes(job_id)
    for process in (worker.pid, training):
        os.kill(process, signal.SIGSTOP)
    fleet.start_worker("w2", **SHORT)
    wait_until(lambda: fleet.job(job_id).attempt == 2, 60, "the next attempt")
    made = journal_steps(fleet, job_id)
    alive = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1/alive"
    told = alive.read_text()
    os.kill(worker.pid, signal.SIGCONT)
    wait_until(lambda: training not in marked_processes(job_id) or alive.read_text() != told, 60, "the worker's word")
    with suppress(ProcessLookupError):
        os.kill(training, signal.SIGCONT)
    wait_until(lambda: training not in marked_processes(job_id), 60, "the training to end")
    assert journal_steps(fleet, job_id) <= made + 1, "it trained on beside its successor"
    check_finished(fleet, job_id, steps=160, attempts=["worker_lost", "completed"])


def test_redis_away_for_longer_than_trainings_wait_hands_them_back_and_they_go_on_when_it_returns(
    fleet: Bench, own_valkey: ValkeyServer
) -> None:
    fleet.start_worker(**SHORT)
    job_id = fleet.submit(steps="120", seconds_per_step="0.05", checkpoint_every="50")
    fleet.wait_for_step(job_id, 25)
    own_valkey.kill()
    wait_until(lambda: not marked_processes(job_id), 60, "the training to end by itself")
    own_valkey.start()
    check_finished(fleet, job_id, steps=120, attempts=["handed_back", "completed"])
    assert fleet.job(job_id).lost_workers == 0
    first, second = fleet.attempts(job_id)
    assert second.first_step == (first.last_step or 0) + 1


def test_a_training_that_stands_still_tells_where_and_is_ended_and_tried_again(fleet: Bench) -> None:
    fleet.start_worker(ZETA_STALL_MIN_SECONDS="1", ZETA_STALL_FACTOR="2")
    job_id = fleet.submit(steps="3", then="hang", max_retries=1)  # so few that its pace is not known
    job = fleet.wait_for_status(job_id, "failed")
    assert (job.status_reason, job.failures) == ("stalled", 2)
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == ["stalled", "stalled"]
    assert not marked_processes(job_id)
    warning = job.warnings[0]
    assert warning["code"] == "stalled"
    assert "no step for" in warning["message"]
    assert "its processes did nothing" in warning["message"]
    assert "small_training.py" in warning["stacks"]
    assert "in run" in warning["stacks"]
    log = (fleet.settings.artifacts / f"jobs/{job_id}/logs/attempt-1.log").read_text()
    assert "--- Stacks of process" in log
    fleet.check_events(job_id)


def test_a_wall_clock_that_jumps_by_a_day_changes_nothing(fleet: Bench, tmp_path: Path) -> None:
    library = build_library(tmp_path)
    if library is None:
        pytest.skip("needs Linux and a C compiler, for a clock that can be moved")
    clock = Clock(tmp_path / "clock", library)
    variables: dict[str, Any] = {**SHORT, **clock.environment, "ZETA_JOB_ENV": " ".join(clock.environment)}
    fleet.start_worker(ZETA_STALL_MIN_SECONDS="3", **variables)
    job_id = fleet.submit(steps="200", seconds_per_step="0.05", checkpoint_every="50")
    for step, seconds in ((20, DAY_SECONDS), (60, -DAY_SECONDS), (100, 0)):
        fleet.wait_for_step(job_id, step)
        clock.jump(seconds)
    check_finished(fleet, job_id, steps=200, attempts=["completed"])


def test_a_disk_that_fills_pauses_the_job_which_goes_on_by_itself_when_there_is_room(
    fleet: Bench, tmp_path: Path
) -> None:
    if not can_mount():
        pytest.skip("needs a small disk of its own, which this account cannot mount")
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
        disk.fill()  # to the last byte: nothing can be written, and nothing is lost
        fleet.wait_for_status(job_id, "paused")
        disk.free()
        wait_until(lambda: fleet.job(job_id).status != "paused", 90, "the job to go on")
        check_finished(fleet, job_id, steps=100, attempts=["disk_full", "disk_full", "completed"])
    finally:
        worker.kill()
        worker.wait()
        disk.close()


def test_a_worker_killed_before_it_had_started_the_training_hands_the_attempt_back(fleet: Bench) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(seconds_to_load="60")
    wait_until(lambda: marked_processes(job_id), 60, "the training")
    worker.kill()
    worker.wait()
    for training in marked_processes(job_id):
        os.kill(training, signal.SIGKILL)
    run = fleet.settings.home / f"workers/w1/runs/{job_id}"
    for file in (run / "attempt-1").iterdir():  # as if it had come as far as run.json
        if file.name not in ("run.json", "alive"):
            file.unlink()
    shutil.copytree(run / "attempt-1", run / "attempt-7")
    (run / "attempt-7/run.json").write_text('{"job_id": "job_')  # an older worker was killed in the middle of it
    shutil.copytree(run / "attempt-1", run / "attempt-8", ignore=shutil.ignore_patterns("run.json"))
    fleet.start_worker()
    wait_until(lambda: fleet.job(job_id).attempt == 2, 60, "the next attempt")
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == ["handed_back", None]
    job = fleet.job(job_id)
    assert (job.failures, job.lost_workers) == (0, 0)


def journal_steps(fleet: Bench, job_id: str) -> int:
    journal = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1/events.jsonl"
    return journal.read_text().count('"progress"')
