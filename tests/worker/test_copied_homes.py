"""A restored backup, a cloned home and a renamed one: a worker touches its own home's runs and no others."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.service import clean_environment, processes_of_job
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from worker.run import processes
from worker.run.launch import start_run
from worker.run.processes import RunProcesses
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.wire.run_directory import LOCK_FILE

LEASE_SECONDS = 6.0
SHORT: dict[str, Any] = {"ZETA_LEASE_SECONDS": f"{LEASE_SECONDS:g}"}
WAITS = (sys.executable, "-c", "import threading; print('ready', flush=True); threading.Event().wait(60)")


@pytest.fixture
def redis_urls(own_valkey: ValkeyServer) -> tuple[str, str]:
    """The URLs of two databases of one Redis server, for two services."""
    return own_valkey.url, own_valkey.second_url


def copy_database(original: Path, copy: Path) -> None:
    with closing(sqlite3.connect(original)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def running_job(production: SmallFleet) -> tuple[str, int]:
    """Start a job in production; returns its id and the id of its training process."""
    job_id = production.submit(steps="100000", seconds_per_step="0.05", checkpoint_every="20")
    production.wait_for_step(job_id, 25)
    (training,) = processes_of_job(job_id)
    return job_id, training


def check_undisturbed(production: SmallFleet, job_id: str, training: int) -> None:
    """Check that the job continues in the same process, and ends when it is cancelled."""
    step = int((production.job(job_id).progress or {})["step"])
    production.wait_for_step(job_id, step + 10)
    assert training in processes_of_job(job_id)
    assert (production.job(job_id).attempt, production.job(job_id).warnings) == (1, [])
    production.request(job_id, "cancel")
    assert production.wait_for_status(job_id, "cancelled").attempt == 1
    production.check_events(job_id)


@pytest.mark.extended
def test_a_restored_backup_beside_production_does_not_touch_its_runs(
    tmp_path: Path, redis_urls: tuple[str, str]
) -> None:
    with small_fleet(tmp_path / "production", redis_urls[0]) as production:
        production.start_engine()
        production.start_worker()
        job_id, training = running_job(production)
        home = tmp_path / "restored" / "home"
        home.mkdir(parents=True)
        copy_database(production.settings.home / "zeta.db", home / "zeta.db")
        shutil.copytree(production.settings.artifacts, home / "artifacts")
        with small_fleet(tmp_path / "restored", redis_urls[1], lease_seconds=LEASE_SECONDS) as restored:
            restored.start_engine()
            restored.start_worker(**SHORT)
            wait_until(lambda: restored.job(job_id).attempt == 2, 60, "the second attempt in the copy")
            wait_until(lambda: len(processes_of_job(job_id)) == 2, 60, "both to train")
            restored.request(job_id, "cancel")
            restored.wait_for_status(job_id, "cancelled")
            assert processes_of_job(job_id) == [training]
            assert f"{job_id} is also running in another home" in restored.logs()
            assert f"process {training} (attempt 1, in {production.settings.home}" in restored.logs()
        check_undisturbed(production, job_id, training)


@pytest.mark.extended
@pytest.mark.parametrize("is_marked", [True, False])
def test_a_cloned_home_neither_adopts_nor_changes_the_runs_of_the_original(
    tmp_path: Path, redis_urls: tuple[str, str], *, is_marked: bool
) -> None:
    with small_fleet(tmp_path / "production", redis_urls[0]) as production:
        production.start_engine()
        production.start_worker()
        job_id, training = running_job(production)
        shutil.copytree(production.settings.home, tmp_path / "clone" / "home")
        copied = tmp_path / "clone" / "home"
        copy_database(production.settings.home / "zeta.db", copied / "zeta.db")
        if not is_marked:  # like the run of an older worker
            (copied / f"workers/w1/runs/{job_id}/attempt-1/{LOCK_FILE}").write_bytes(b"")
        with small_fleet(tmp_path / "clone", redis_urls[1], lease_seconds=LEASE_SECONDS) as clone:
            clone.start_engine()
            clone.start_worker(**SHORT)
            wait_until(lambda: clone.job(job_id).attempt == 2, 60, "the second attempt in the clone")
            clone.request(job_id, "cancel")
            clone.wait_for_status(job_id, "cancelled")
            assert "was copied from another home" in clone.logs()
            assert "Adopted attempt" not in clone.logs()
            assert [attempt.reason for attempt in clone.attempts(job_id)] == ["worker_lost", "cancelled_by_user"]
        check_undisturbed(production, job_id, training)


@pytest.mark.extended
def test_a_renamed_home_adopts_its_own_runs(fleet: SmallFleet, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    store: dict[str, Any] = {"ZETA_ARTIFACTS_URL": str(fleet.settings.artifacts)}
    worker = fleet.start_worker(ZETA_HOME=str(first), **store)
    job_id = fleet.submit(steps="3", then="hang")
    fleet.wait_for_step(job_id, 3)
    worker.kill()
    worker.wait()
    first.rename(second)
    fleet.start_worker(ZETA_HOME=str(second), **store)
    wait_until(lambda: "Adopted attempt" in fleet.logs(), 60, "the run to be adopted")
    assert processes_of_job(job_id)
    fleet.request(job_id, "cancel")
    assert fleet.wait_for_status(job_id, "cancelled").attempt == 1
    assert not processes_of_job(job_id)


@pytest.mark.extended
def test_a_restored_worker_folder_counts_as_another_folder(fleet: SmallFleet, tmp_path: Path) -> None:
    worker = fleet.start_worker()
    lock = fleet.settings.home / "workers/w1/worker.lock"
    wait_until(lambda: lock.exists() and lock.read_text(), 60, "the first worker's lock")
    identity = lock.read_text().split()[0]
    worker.terminate()
    worker.wait(60)
    lock.write_text(f"{identity}\n")  # the format of an older worker
    worker = fleet.start_worker()
    wait_until(lambda: len(lock.read_text().split()) > 1, 60, "the identity to be recorded")
    assert lock.read_text().split()[0] == identity
    worker.kill()
    worker.wait(60)
    shutil.copytree(fleet.settings.home / "workers", tmp_path / "copy" / "workers")
    fleet.start_worker(ZETA_HOME=str(tmp_path / "copy"), ZETA_ARTIFACTS_URL=str(fleet.settings.artifacts))
    copy = tmp_path / "copy/workers/w1/worker.lock"
    wait_until(lambda: copy.read_text().split()[0] != identity, 60, "a new name of the copied folder")


def test_an_attempt_number_reused_by_a_restored_database_starts_from_scratch(fleet: SmallFleet) -> None:
    fleet.start_worker()
    job_id = fleet.submit(steps="4")
    directory = fleet.settings.home / f"workers/w1/runs/{job_id}/attempt-1"
    fleet.stop_engine()
    directory.mkdir(parents=True)
    (directory / "events.jsonl").write_text('{"type": "log", "message": "of the attempt before the restore"}\n')
    (directory / "published").touch()
    fleet.start_engine()
    fleet.wait_for_status(job_id, "succeeded")
    assert "before the restore" not in str([event.fields for event in fleet.events(job_id)])
    assert list(directory.parent.glob("superseded-attempt-1-*/events.jsonl"))


# --- Which processes belong to a run directory -----------------------------------------------------------------------


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes in this list are killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(30)


def pids(found: list[psutil.Process]) -> list[int]:
    return [process.pid for process in found]


def test_a_mark_follows_a_renamed_run_directory_but_not_a_copy(
    tmp_path: Path, ended: list[subprocess.Popen[bytes]]
) -> None:
    job_id = new_id("job")
    directory = tmp_path / f"home/workers/w1/runs/{job_id}/attempt-1"
    directory.mkdir(parents=True)
    process = start_run(WAITS, directory, {"ZETA_JOB_ID": job_id, "ZETA_ATTEMPT": "1"})
    ended.append(process)
    wait_until(lambda: (directory / "train.log").read_bytes(), 30, "the run to be ready")
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    (tmp_path / "home").rename(tmp_path / "renamed")
    identity = directory.relative_to(tmp_path / "home")
    renamed, copy = (RunProcesses.from_directory(tmp_path / name / identity) for name in ("renamed", "copy"))
    assert renamed is not None
    assert copy is not None
    assert (pids(renamed.alive()), pids(renamed.lock_holders())) == ([process.pid], [process.pid])
    assert (copy.alive(), copy.lock_holders()) == ([], [])
    assert (processes.is_copied(renamed.directory), processes.is_copied(copy.directory)) == (False, True)
    assert (renamed.in_other_homes(tmp_path / "renamed"), len(copy.in_other_homes(tmp_path / "copy"))) == ([], 1)
    later = RunProcesses(renamed.directory.with_name("attempt-2"), job_id, 2)
    assert pids(later.earlier_attempts(tmp_path / "renamed")) == [process.pid]
    assert later.earlier_attempts(tmp_path / "copy") == []


@pytest.mark.parametrize("holds", ["working directory", "lock"])
def test_a_run_of_an_older_worker_belongs_to_its_working_directory_or_lock(
    tmp_path: Path, ended: list[subprocess.Popen[bytes]], holds: str
) -> None:
    job_id = new_id("job")
    directory = tmp_path / f"home/workers/w1/runs/{job_id}/attempt-1"
    directory.mkdir(parents=True)
    lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    process = subprocess.Popen(
        WAITS,
        env={**clean_environment(), "ZETA_JOB_ID": job_id, "ZETA_ATTEMPT": "1"},
        cwd=directory if holds == "working directory" else tmp_path,
        pass_fds=(lock,) if holds == "lock" else (),
        stdout=subprocess.PIPE,
    )
    os.close(lock)
    ended.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    original, copy = (
        RunProcesses.from_directory(tmp_path / name / directory.relative_to(tmp_path / "home"))
        for name in ("home", "copy")
    )
    assert original is not None
    assert copy is not None
    assert pids(original.alive()) == [process.pid]
    assert copy.alive() == []
