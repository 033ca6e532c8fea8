"""Runs of a worker from dispatch to their end, with real processes, a real engine and a real Valkey."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from server.database.access_tables import ProjectRow
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.service import processes_of_job
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from worker.attempt.final_line import exit_error
from worker.run.process_tree import ProcessTree
from zeta_core.contract.access import HubAccess
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.job import JobErrorEvidence


@pytest.fixture(scope="module")
def fleet(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallFleet]:
    """One engine and one worker for all tests of this file: none of them stops either."""
    with shared_valkey.client() as client:
        client.flushall()
    with small_fleet(
        tmp_path_factory.mktemp("fleet"), shared_valkey.url, project_hub=HubAccess.OPERATOR_TOKEN
    ) as fleet:
        fleet.start_engine()
        fleet.start_worker(ZETA_HUB="on", HF_TOKEN="hf_token", ZETA_JOB_ENV="EXTRA", EXTRA="given", OTHER="kept back")
        yield fleet


def test_a_queued_job_is_dispatched_run_and_stored_with_its_checkpoints(fleet: SmallFleet) -> None:
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


def test_a_run_saves_on_request_and_continues(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="100000")
    fleet.wait_for_step(job_id, 3)
    for number in (1, 2):
        fleet.request_save(job_id)
        wait_until(lambda number=number: fleet.job(job_id).fulfilled_save_request == number, 30, "the checkpoint")
    assert len(fleet.checkpoints(job_id)) == 2
    assert fleet.job(job_id).status == "running"
    fleet.request(job_id, "cancel")
    fleet.wait_for_status(job_id, "cancelled")
    fleet.check_events(job_id)


def test_cancel_ends_every_process_even_in_its_own_session_and_ignoring_sigterm(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="100000", child="stubborn")
    fleet.wait_for_step(job_id, 3)
    assert len(processes_of_job(job_id)) == 2
    fleet.request(job_id, "cancel")
    job = fleet.wait_for_status(job_id, "cancelled")
    assert not processes_of_job(job_id)
    assert (job.status_reason, job.requested_action, job.failures) == ("cancelled_by_user", None, 0)
    fleet.check_events(job_id)


def test_cancel_ends_a_run_that_never_checks_for_a_stop_file(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="3", then="hang")
    fleet.wait_for_step(job_id, 3)
    fleet.request(job_id, "cancel")
    assert fleet.wait_for_status(job_id, "cancelled").status_reason == "cancelled_by_user"
    assert not processes_of_job(job_id)


def test_a_run_that_is_loading_gets_sigterm_immediately(fleet: SmallFleet) -> None:
    job_id = fleet.submit(seconds_to_load="600")
    wait_until(lambda: processes_of_job(job_id), 60, "the run to be started")
    fleet.request(job_id, "pause")
    assert fleet.wait_for_status(job_id, "paused").status_reason == "paused_by_user"
    assert not processes_of_job(job_id)
    assert f"of {job_id} did not end" not in fleet.logs(), "the worker did not wait for a time limit"


def test_pause_saves_and_ends_the_run(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="100000")
    fleet.wait_for_step(job_id, 3)
    fleet.request(job_id, "pause")
    job = fleet.wait_for_status(job_id, "paused")
    assert (job.waiting_reason or {})["code"] == "paused"
    assert len(fleet.checkpoints(job_id)) == 1


def test_a_killed_run_is_restarted_from_its_newest_checkpoint(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="60", checkpoint_every="5", seconds_per_step="0.05")
    wait_until(lambda: fleet.checkpoints(job_id), 60, "a checkpoint")
    (tree,) = processes_of_job(job_id)
    os.kill(tree, signal.SIGKILL)
    job = fleet.wait_for_status(job_id, "succeeded")
    assert job.attempt == 2
    first, second = fleet.attempts(job_id)
    assert first.reason == "process_killed"
    assert (second.first_step or 0) > 5
    assert job.error is None
    retried = [event for event in fleet.events(job_id) if event.fields.get("reason") == "retrying"]
    assert retried[0].fields["error"]["evidence"]["signal"] == "SIGKILL"
    fleet.check_events(job_id)


def test_a_run_that_exits_silently_fails_with_its_exit_code_and_log(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="2", then="exit", max_retries=1)
    job = fleet.wait_for_status(job_id, "failed")
    assert (job.status_reason, job.attempt, job.failures) == ("train_error", 2, 2)
    assert job.error is not None
    assert job.error["evidence"]["exit_code"] == 7
    assert "attempt 2 begins" in job.error["evidence"]["log_tail"]


def test_the_environment_of_a_run_has_its_marks_and_no_secrets(fleet: SmallFleet) -> None:
    job_id = fleet.submit(steps="100000")
    fleet.wait_for_step(job_id, 1)
    (tree,) = processes_of_job(job_id)
    environment = psutil.Process(tree).environ()
    assert (environment["ZETA_JOB_ID"], environment["ZETA_ATTEMPT"]) == (job_id, "1")
    assert (environment["HF_TOKEN"], environment["EXTRA"], environment["CUDA_VISIBLE_DEVICES"]) == (
        "hf_token",
        "given",
        "",
    )
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert SECRET not in environment.values()
    assert {name for name in environment if name.startswith("ZETA_")} == {"ZETA_JOB_ID", "ZETA_ATTEMPT", "ZETA_RUN"}
    assert "OTHER" not in environment
    fleet.request(job_id, "cancel")
    fleet.wait_for_status(job_id, "cancelled")


def test_a_run_of_a_project_with_public_access_gets_no_token_of_the_hub(fleet: SmallFleet) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            limits = {"hub": HubAccess.PUBLIC}
            session.add(ProjectRow(name="default", created_by="key_test", created_at=utc_now(), limits=limits))

    fleet.loop.run(write())
    job_id = fleet.submit(steps="100000")
    fleet.wait_for_step(job_id, 1)
    (tree,) = processes_of_job(job_id)
    environment = psutil.Process(tree).environ()
    assert "hf_token" not in environment.values()
    assert Path(environment["HF_HOME"]).name == "public"
    fleet.request(job_id, "cancel")
    fleet.wait_for_status(job_id, "cancelled")


def test_a_long_step_may_finish_unless_the_worker_is_stopping(tmp_path: Path) -> None:
    deaf = "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); threading.Event().wait(2)"
    ends: list[JobErrorEvidence] = []
    for grace_only in (False, True):
        directory = tmp_path / f"{grace_only}"
        directory.mkdir()
        job_id = new_id("job")
        tree = ProcessTree(directory, job_id, 1, grace_seconds=0.2)
        tree.start((sys.executable, "-c", deaf), {"ZETA_JOB_ID": job_id, "ZETA_ATTEMPT": "1"})
        tree.stop("pause", grace_only=grace_only)
        wait_until(
            lambda tree=tree: tree.is_gone(has_ended=False, can_save=True, needs_seconds=60),
            30,
            "the run to end",
        )
        ends.append(exit_error(tree, has_journal=True).evidence)
    assert [(end.exit_code, end.signal) for end in ends] == [(0, None), (None, "SIGKILL")]
