"""Runs that a restarted worker adopts: requests and time limits apply as for runs that it started itself."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import pytest

from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.waiting import wait_until
from worker.attempt.final_line import exit_error
from worker.run.process_tree import ProcessTree
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.status import STOP_ACTIONS, StopAction
from zeta_core.contract.wire.run_directory import PROCESS_FILE, STOP_FILE

GRACE_SECONDS = 1.0
Origin = Literal["started", "adopted", "adopted without a process file"]
# Records the time of SIGTERM, and continues.
IGNORES_SIGTERM = """
import pathlib, signal, sys, threading, time
folder = pathlib.Path(sys.argv[-1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "sigterm").write_text(str(time.monotonic())))
(folder / "ready").touch()
while True: threading.Event().wait(60)
"""
# Its first process ends at SIGTERM; its child doesn't.
LEAVES_A_CHILD = f"""
import subprocess, sys, threading
subprocess.Popen([sys.executable, "-c", {IGNORES_SIGTERM!r}, sys.argv[-1]], start_new_session=True)
threading.Event().wait(60)
"""


@dataclass
class EndingRun:
    """A run that ignores stop requests, and the times of SIGTERM, SIGKILL and its end."""

    origin: Origin
    action: StopAction | None
    tree: ProcessTree
    began: float
    killed_at: float | None = None
    is_gone: bool = False

    def step(self) -> None:
        self.is_gone = self.tree.is_gone(has_ended=self.action is None, can_save=True)
        if self.killed_at is None and not self.tree.processes.alive():
            self.killed_at = time.monotonic()

    @property
    def sigterm_after_seconds(self) -> float:
        return float((self.tree.directory / "sigterm").read_text()) - self.began

    @property
    def killed_after_seconds(self) -> float:
        assert self.killed_at is not None
        return self.killed_at - self.began


@pytest.fixture
def started() -> Iterator[list[ProcessTree]]:
    """The started runs, which are killed after the test."""
    trees: list[ProcessTree] = []
    yield trees
    for tree in trees:
        tree.kill()
        wait_until(lambda tree=tree: tree.is_gone(has_ended=True, can_save=False), 30, "the end")


def start_run(folder: Path, started: list[ProcessTree], origin: Origin, program: str = IGNORES_SIGTERM) -> ProcessTree:
    """Start a run, as seen by the worker that started it or by a restarted worker."""
    folder.mkdir(parents=True)
    job_id = new_id("job")
    first = ProcessTree(folder, job_id, 1, GRACE_SECONDS)
    first.start((sys.executable, "-c", program), {"ZETA_JOB_ID": job_id, "ZETA_ATTEMPT": "1"})
    started.append(first)
    wait_until((folder / "ready").exists, 30, "the run to be ready")
    if origin == "started":
        return first
    if origin == "adopted without a process file":
        (folder / PROCESS_FILE).unlink()
    adopted = ProcessTree(folder, job_id, 1, GRACE_SECONDS)
    adopted.adopt()
    return adopted


def step_all(endings: list[EndingRun]) -> bool:
    for ending in endings:
        ending.step()
    return all(ending.is_gone for ending in endings)


def test_every_stop_request_is_enforced_on_adopted_and_started_runs(tmp_path: Path, started: list[ProcessTree]) -> None:
    endings: list[EndingRun] = []
    for origin in get_args(Origin):
        for action in (*STOP_ACTIONS, None):  # None: it keeps running after its last line
            tree = start_run(tmp_path / f"{origin}-{action}", started, origin)
            if action is not None:
                tree.stop(action)
            endings.append(EndingRun(origin, action, tree, time.monotonic()))
            endings[-1].step()
    wait_until(lambda: step_all(endings), 60, "every run to be gone")
    for ending in endings:
        case = f"{ending.origin}, {ending.action}"
        assert GRACE_SECONDS - 0.1 <= ending.sigterm_after_seconds < ending.killed_after_seconds, case
        assert ending.killed_after_seconds >= 2 * GRACE_SECONDS - 0.1, case


def test_a_stop_request_from_before_the_restart_is_enforced_after_it(
    tmp_path: Path, started: list[ProcessTree]
) -> None:
    first = start_run(tmp_path / "run", started, "started")
    requested_at = time.monotonic()
    first.stop("pause")
    adopted = ProcessTree(first.directory, first.job_id, 1, GRACE_SECONDS)
    adopted.adopt()
    assert adopted.stop_action == "pause"
    ending = EndingRun("adopted", "pause", adopted, requested_at)
    wait_until(lambda: step_all([ending]), 60, "the run to be gone")
    assert ending.sigterm_after_seconds >= GRACE_SECONDS - 0.1


@pytest.mark.parametrize(
    ("age_seconds", "gets_sigterm"), [(7.0, False), (30.0, True), (1e9, True), (-1e6, False)], ids=str
)
def test_the_grace_period_counts_from_the_request_across_restarts(
    tmp_path: Path, started: list[ProcessTree], age_seconds: float, gets_sigterm: bool
) -> None:
    first = start_run(tmp_path / "run", started, "started")
    first.stop("pause")
    at = time.time() - age_seconds
    os.utime(first.directory / STOP_FILE, (at, at))
    adopted = ProcessTree(first.directory, first.job_id, 1, 20.0)
    adopted.adopt()
    adopted.is_gone(has_ended=False, can_save=True)
    if gets_sigterm:
        wait_until((first.directory / "sigterm").exists, 30, "SIGTERM to arrive")
    adopted.is_gone(has_ended=False, can_save=True)
    assert (first.directory / "sigterm").exists() == gets_sigterm
    assert adopted.processes.alive(), "it was killed without time to save after SIGTERM"


def test_processes_that_outlive_the_first_one_of_an_adopted_run_are_ended(
    tmp_path: Path, started: list[ProcessTree]
) -> None:
    adopted = start_run(tmp_path / "run", started, "adopted", LEAVES_A_CHILD)
    assert len(adopted.processes.alive()) == 2
    (leader,) = [process for process in adopted.processes.alive() if process.ppid() == os.getpid()]
    leader.kill()
    leader.wait(30)
    wait_until(lambda: adopted.is_gone(has_ended=False, can_save=True), 30, "the child to be ended")
    assert (tmp_path / "run/sigterm").exists(), "it got SIGTERM before it was killed"


def test_an_adopted_run_that_ends_silently_is_reported_with_its_log(tmp_path: Path, started: list[ProcessTree]) -> None:
    adopted = start_run(tmp_path / "run", started, "adopted", f"print('the reason', flush=True)\n{IGNORES_SIGTERM}")
    adopted.processes.alive()[0].kill()
    wait_until(lambda: adopted.is_gone(has_ended=False, can_save=True), 30, "the run to be gone")
    error = exit_error(adopted, has_journal=True)
    assert error.code == "process_killed"
    assert "exit status is unknown, because its worker was restarted" in error.message
    assert (error.evidence.exit_code, error.evidence.signal, error.evidence.log_tail) == (None, None, "the reason\n")


@pytest.mark.extended
def test_every_command_ends_a_hanging_run_of_a_restarted_worker(fleet: SmallFleet) -> None:
    worker = fleet.start_worker(ZETA_WORKER_SLOTS="4")
    hanging: dict[str, Any] = {"steps": "3", "then": "hang"}
    spec = {"model": "m", "dataset": {"builtin": "python-docs"}, "metadata": hanging, "time_limit_seconds": 15}
    cancelled, paused, drained = (fleet.submit(**hanging) for _ in range(3))
    limited = fleet.submit(spec=spec)
    jobs = (cancelled, paused, drained, limited)
    stopped: list[psutil.Process] = []
    for job_id in jobs:
        fleet.wait_for_step(job_id, 3)
        stopped += map(psutil.Process, processes_of_job(job_id))
    worker.kill()
    worker.wait()
    for process in stopped:
        process.suspend()  # like a hang in a driver: neither a stop file nor SIGTERM has an effect
    fleet.start_worker(ZETA_WORKER_SLOTS="4")
    wait_until(lambda: fleet.logs().count("Adopted attempt") == len(jobs), 60, "the runs to be adopted")
    fleet.request(cancelled, "cancel")
    fleet.request(paused, "pause")
    assert fleet.wait_for_status(cancelled, "cancelled").status_reason == "cancelled_by_user"
    assert fleet.wait_for_status(paused, "paused").status_reason == "paused_by_user"
    assert fleet.wait_for_status(limited, "failed").status_reason == "time_limit"
    fleet.drain("w1")
    job = fleet.wait_for_status(drained, "queued")
    assert (job.status_reason, job.attempt, job.failures, job.lost_workers) == ("handed_back", 1, 0, 0)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in stopped)
    for job_id in jobs:
        fleet.check_events(job_id)


@pytest.mark.extended
def test_a_stopping_worker_ends_a_hanging_adopted_run(fleet: SmallFleet) -> None:
    worker = fleet.start_worker()
    job_id = fleet.submit(steps="3", then="hang")
    fleet.wait_for_step(job_id, 3)
    worker.kill()
    worker.wait()
    (tree,) = map(psutil.Process, processes_of_job(job_id))
    tree.suspend()
    restarted = fleet.start_worker()
    wait_until(lambda: "Adopted attempt" in fleet.logs(), 60, "the run to be adopted")
    restarted.send_signal(signal.SIGTERM)
    assert restarted.wait(60) == 0
    assert not processes_of_job(job_id)
    assert fleet.wait_for_status(job_id, "queued").status_reason == "handed_back"


@pytest.mark.extended
def test_the_watchdog_ends_a_stalled_adopted_run(fleet: SmallFleet) -> None:
    short: dict[str, Any] = {"ZETA_STALL_MIN_SECONDS": "2", "ZETA_STALL_FACTOR": "2"}
    worker = fleet.start_worker(**short)
    job_id = fleet.submit(steps="3", then="hang", max_retries=0)
    fleet.wait_for_step(job_id, 3)
    worker.kill()
    worker.wait()
    fleet.start_worker(**short)
    assert fleet.wait_for_status(job_id, "failed").status_reason == "stalled"
    assert not processes_of_job(job_id)
