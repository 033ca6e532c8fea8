"""A worker exits with status 70 if a defect persists or if it hangs, but not because of an outage of Redis."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from tests.harness.fleet import REPOSITORY, SmallFleet, small_fleet
from tests.harness.service import clean_environment
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from zeta_core.contract.wire.messages import worker_stream
from zeta_core.contract.wire.run_directory import STOP_FILE, run_directory
from zeta_core.system.durable_files import PART_SUFFIX
from zeta_core.system.outage import EXIT_STATUS

# A guard with short limits, and the loop, step or main thread that the argument names. It ends itself with status 0
# after ten times as many ticks as each limit has.
PROGRAM = """
import logging, sys, threading
from worker.threads import ProcessGuard, GuardLimits
from worker.threads import RetryingThread, Outage
from zeta_core.system.redis_access import RedisUnavailable

class Mute(Exception):
    def __str__(self): raise RuntimeError

logging.basicConfig(level=logging.INFO)
case, ended, num_ticks = sys.argv[1], threading.Event(), 0

def one_pass():
    if case == "defect": raise KeyError("x")
    if case == "unreadable defect": raise Mute
    if case == "exit of a library": sys.exit(3)
    if case == "outage": raise RedisUnavailable("connection refused")
    if case == "hanging loop": threading.Event().wait()
    if case == "long pass":
        while not loop.stopped.wait(0.01): loop.mark_progress()
    loop.stopped.wait(0.01)

def progress():
    global num_ticks
    num_ticks += 1
    if num_ticks > 200: ended.set()
    return 0 if case == "hanging main thread" else num_ticks

loop, step = RetryingThread("the loop", "The loop fails", one_pass), Outage("The step fails", name="the step")
if case == "defect of a step": step.begin(ValueError("y"))
if case == "stopped loop":
    loop.outage.begin(KeyError("x"))
    loop.stopped.set()
loop.start()
hang_seconds = 100 if case == "outage" else 0.2  # the pauses between failing passes are longer
limits = GuardLimits(give_up_seconds=0.2, hang_seconds=hang_seconds, tick_seconds=0.01)
ProcessGuard([loop], [step], progress, limits).start()
ended.wait()
"""


def run_case(case: str) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PROGRAM, case]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("defect", "the loop has been failing for 0.2 s: failing since"),
        ("unreadable defect", "Mute (see the worker's log)"),
        ("exit of a library", "SystemExit (see the worker's log)"),
        ("defect of a step", "the step has been failing for 0.2 s"),
        ("hanging loop", "The thread the loop has been hanging for 0.2 s"),
        ("hanging main thread", "The thread main has been hanging for 0.2 s"),
    ],
)
def test_a_lasting_defect_or_hang_exits_with_the_reason(case: str, reason: str) -> None:
    done = run_case(case)
    assert done.returncode == EXIT_STATUS, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("CRITICAL"), done.stderr
    assert reason in last
    if "hanging" in case:
        assert "most recent call first" in done.stderr, "the log shows where it hangs"


@pytest.mark.extended
@pytest.mark.parametrize("case", ["outage", "long pass", "stopped loop", "no failure"])
def test_outages_long_passes_and_stopped_threads_end_no_worker(case: str) -> None:
    done = run_case(case)
    assert done.returncode == 0, done.stderr


@pytest.mark.extended
def test_a_hanging_worker_exits_and_the_next_one_adopts_its_run(fleet: SmallFleet) -> None:
    worker = fleet.start_worker(hang_seconds=3)
    job_id = fleet.submit(steps="100000", seconds_per_step="0.05")
    fleet.wait_for_step(job_id, 3)
    fifo = fleet.settings.home / "workers" / "w1" / run_directory(job_id, 1) / f"{STOP_FILE}{PART_SUFFIX}"
    os.mkfifo(fifo)  # writing the stop request hangs, as it does on a network file system whose server is down
    fleet.request(job_id, "pause")
    assert worker.wait(60) == EXIT_STATUS
    log = (fleet.folder / "w1.log").read_text()
    assert "The thread main has been hanging" in log
    fifo.unlink()
    fleet.start_worker()
    job = fleet.wait_for_status(job_id, "paused")
    assert (job.attempt, job.status_reason) == (1, "paused_by_user")
    fleet.check_events(job_id)


@pytest.mark.extended
def test_the_heartbeat_reports_failing_threads_and_dropped_entries(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    with small_fleet(tmp_path, own_valkey.url) as fleet, redis.Redis.from_url(own_valkey.url) as client:
        engine = fleet.start_engine()
        fleet.start_worker()
        wait_until(lambda: engine.is_alive("w1"), 60, "the worker to start")
        for number in range(3):
            client.xadd(worker_stream("w1"), {"body": f"not a message {number}"})
        wait_until(lambda: engine.workers()[0].num_dropped == 3, 60, "the worker to report the dropped entries")
        client.acl_setuser("default", enabled=True, commands=["-xread"])
        failing = wait_until(lambda: engine.workers()[0].failing, 60, "the worker to report the failure")
        assert list(failing) == ["link-receive"]
        assert "failing since" in failing["link-receive"]
        assert "xread" in failing["link-receive"]
        client.acl_setuser("default", enabled=True, commands=["+xread"])
        wait_until(lambda: not engine.workers()[0].failing, 60, "the worker to report that it recovered")
        log = (fleet.folder / "w1.log").read_text()
        assert log.count("Removed an invalid entry") == 1
