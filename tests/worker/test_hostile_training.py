"""A training that runs arbitrary code reads no secret, touches nothing outside its sandbox and outlives nothing."""

import json
import os
from pathlib import Path

import psutil
import pytest

from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.waiting import wait_until
from zeta_core.contract.wire.run_directory import LOCK_FILE, PUBLISHED_FILE, RUN_FILE, run_directory
from zeta_core.system.sandbox import SandboxSupport
from zeta_core.system.sandbox.landlock import SIGNALS_ABI

HOSTILE_WORKER = Path(__file__).with_name("hostile_worker.py")
SECRET = "the-secret-of-the-operator"
pytestmark = pytest.mark.timeout(200)


@pytest.mark.extended
def test_a_hostile_training_reaches_nothing_and_outlives_nothing(
    fleet: SmallFleet, redis_url: str, tmp_path: Path, sandbox_support: SandboxSupport
) -> None:
    home = fleet.settings.home
    secrets = [home / "admin.key", home / "worker.secret", tmp_path / "private" / "id_rsa"]
    for file in secrets:
        file.parent.mkdir(exist_ok=True)
        file.write_text(SECRET)
        file.chmod(0o600)
    upload = home / "artifacts" / "files" / "file_of_another_job"
    upload.parent.mkdir(parents=True, exist_ok=True)
    upload.write_text(SECRET)

    bystander = fleet.start_worker("bystander")
    other_job = fleet.submit(steps="100000", seconds_per_step="0.05")
    fleet.wait_for_step(other_job, 2)
    other = home / "workers" / "bystander" / run_directory(other_job, 1)
    (victim,) = processes_of_job(other_job)
    worker = fleet.start_worker("attacked", program=HOSTILE_WORKER)
    limits, affinity = psutil.Process(worker.pid).rlimit(psutil.RLIMIT_NOFILE), os.sched_getaffinity(worker.pid)
    unreadable = [*secrets, home / "zeta.db", upload, other / "run.json", other / "train.log", Path("/etc/shadow")]
    unwritable = [home / "new", other / "stop", tmp_path / "new", Path("/usr/zeta"), Path("/dev/shm/../new")]
    job_id = fleet.submit(
        max_retries=0,
        worker=str(worker.pid),
        victim=str(victim),
        home=str(home),
        secret=str(secrets[0]),
        other=str(other),
        unreadable=json.dumps(list(map(str, unreadable))),
        unwritable=json.dumps(list(map(str, unwritable))),
        redis_port=redis_url.rpartition(":")[2].partition("/")[0],
    )
    job = fleet.wait_for_status(job_id, "failed")
    assert (job.status_reason, job.worker or "attacked") == ("train_error", "attacked"), fleet.logs()

    directory = home / "workers" / "attacked" / run_directory(job_id, 1)
    results: dict[str, str] = json.loads((directory / "attacks.json").read_text())
    allowed = expected_gaps(sandbox_support)
    assert [f"{name}: {result}" for name, result in results.items() if result.startswith("done")] == allowed
    assert len(results) > 30
    assert SECRET not in (directory / "attacks.json").read_text()

    escaped = int((directory / "escaped.pid").read_text())
    wait_until(lambda: not psutil.pid_exists(escaped), 20, "the escaped process to be ended")
    assert [worker.poll(), bystander.poll()] == [None, None], "both workers still run"
    assert psutil.Process(worker.pid).rlimit(psutil.RLIMIT_NOFILE) == limits
    assert os.sched_getaffinity(worker.pid) == affinity
    assert all(file.read_text() == SECRET and file.stat().st_mode & 0o777 == 0o600 for file in secrets)
    assert not any(path.exists() for path in unwritable)
    fleet.wait_for_step(other_job, fleet.attempts(other_job)[0].last_step or 2)
    assert psutil.pid_exists(victim)


def test_a_fork_bomb_ends_with_its_reason_and_leaves_nothing(
    fleet: SmallFleet, sandbox_support: SandboxSupport
) -> None:
    if not sandbox_support.limits_tasks:
        pytest.skip("another program already receives the notifications of system calls")
    fleet.start_worker("bystander")
    other_job = fleet.submit(steps="100000", seconds_per_step="0.05")
    fleet.wait_for_step(other_job, 2)
    worker = fleet.start_worker("attacked", program=HOSTILE_WORKER, ZETA_JOB_PROCESSES="200")
    job_id = fleet.submit(max_retries=3, bomb="yes")
    job = fleet.wait_for_status(job_id, "failed")
    assert (job.status_reason, job.attempt) == ("process_killed", 1), fleet.logs()
    assert job.error is not None
    assert job.error["code"] == "process_limit"
    assert "exceeded its limit of 200 processes and threads" in job.error["message"]
    assert "ZETA_JOB_PROCESSES" in job.error["hint"]
    assert not processes_of_job(job_id)
    assert worker.poll() is None
    fleet.wait_for_step(other_job, (fleet.attempts(other_job)[0].last_step or 2) + 5)


@pytest.mark.extended
def test_a_run_that_changes_its_files_is_ended_or_adopted_unchanged(fleet: SmallFleet) -> None:
    """After a restart, the worker would otherwise publish another job's output, or leave the processes alone."""
    worker = fleet.start_worker(ZETA_WORKER_SLOTS="3")
    changed, published, copied = jobs = [fleet.submit(steps="100000", seconds_per_step="0.05") for _ in range(3)]
    for job_id in jobs:
        fleet.wait_for_step(job_id, 2)
    worker.kill()
    worker.wait()
    runs = fleet.settings.home / "workers" / "w1"
    processes = {job_id: processes_of_job(job_id) for job_id in jobs}
    file = runs / run_directory(changed, 1) / RUN_FILE
    file.write_text(file.read_text().replace(f"{changed}/output", f"{published}/output"))
    (runs / run_directory(published, 1) / PUBLISHED_FILE).touch()
    lock = runs / run_directory(copied, 1) / LOCK_FILE
    recorded = lock.read_text()
    lock.write_text(recorded.translate(str.maketrans("123456789", "234567891")))  # in place, as a run would
    fleet.start_worker(ZETA_WORKER_SLOTS="3")
    for job_id in (changed, published):
        wait_until(lambda job_id=job_id: not set(processes[job_id]) & set(processes_of_job(job_id)), 60, "the end")
    assert f"{RUN_FILE} was changed after the run had been started" in fleet.logs()
    assert "it claims to have been published, but has processes" in fleet.logs()
    wait_until(lambda: "Adopted attempt" in fleet.logs(), 60, "the third run to be adopted")
    assert processes_of_job(copied) == processes[copied]


def expected_gaps(support: SandboxSupport) -> list[str]:
    """The attacks that succeed on this machine, because its kernel lacks a part of the sandbox."""
    gaps = list[str]()
    if support.landlock < SIGNALS_ABI:
        gaps += ["signal the worker: done: None", "signal the other job: done: None"]
    if not support.namespaces:
        gaps += ["reach Redis: done: None"]
    return gaps
