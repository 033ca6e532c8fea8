"""A job on two real workers with different addresses: its nodes start and end together, resume, and are adopted."""

import os
import signal
import subprocess
from typing import Any

import psutil
import pytest

from server.database.placements import unreleased_placements
from server.engine.nodes import ends
from tests.end_to_end.specs import tiny_job
from tests.harness.fleet import SmallFleet
from tests.harness.service import processes_of_job
from tests.harness.waiting import wait_until
from tests.worker.small_training import WEIGHTS_FILE, next_weights
from zeta_core.contract.wire.run_directory import checkpoint_key, log_key

ADDRESSES = {"a": "127.0.0.2", "b": "127.0.0.3"}


def start_workers(fleet: SmallFleet) -> dict[str, "subprocess.Popen[bytes]"]:
    return {name: start_worker(fleet, name) for name in ADDRESSES}


def start_worker(fleet: SmallFleet, name: str) -> "subprocess.Popen[bytes]":
    return fleet.start_worker(
        name,
        small=False,
        ZETA_WORKER_ADDRESS=ADDRESSES[name],
        ZETA_WORKER_SLOTS="2",
        ZETA_WARM_START="no",
        ZETA_STALL_MIN_SECONDS="20",  # after the first steps
    )


def two_by_two(**fields: Any) -> dict[str, Any]:
    """A job of two nodes with two processes each."""
    return tiny_job(**{"resources": {"nodes": 2, "processes": 2}, "batch_size": 1, **fields})


def num_unreleased(fleet: SmallFleet) -> int:
    async def read() -> int:
        async with fleet.database.read() as session:
            return len(await unreleased_placements(session))

    return fleet.loop.run(read())


def check_nothing_remains(fleet: SmallFleet, job_id: str) -> None:
    wait_until(lambda: num_unreleased(fleet) == 0, 60, "all slots to be released")
    wait_until(lambda: not processes_of_job(job_id), 30, "all processes to end")


def send_to_a_process(job_id: str, worker: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to the newest of the job's processes below this worker, which is one of the training processes."""
    below = {process.pid for process in psutil.Process(worker.pid).children(recursive=True)}
    os.kill(max(pid for pid in processes_of_job(job_id) if pid in below), number)


@pytest.mark.extended
def test_a_killed_node_ends_the_attempt_on_all_workers_and_the_next_one_resumes(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "END_SECONDS", 0.5)
    workers = {name: fleet.start_worker(name, ZETA_WORKER_ADDRESS=address) for name, address in ADDRESSES.items()}
    metadata = {"steps": "120", "seconds_per_step": "0.03", "checkpoint_every": "20"}
    job_id = fleet.submit(spec={"model": "m", "resources": {"nodes": 2}, "metadata": metadata})
    fleet.wait_for_step(job_id, 40)
    send_to_a_process(job_id, workers["b"], signal.SIGKILL)
    fleet.wait_for_status(job_id, "succeeded")
    first, second = fleet.attempts(job_id)
    assert (first.reason, second.reason) == ("process_killed", "completed")
    assert second.first_step in range(21, (first.last_step or 0) + 2, 20)
    weights = b""
    for step in range(1, 121):
        weights = next_weights(weights, step)
    assert (fleet.settings.artifacts / checkpoint_key(job_id, "final") / WEIGHTS_FILE).read_bytes() == weights
    check_nothing_remains(fleet, job_id)
    fleet.check_events(job_id)


@pytest.mark.extended
@pytest.mark.timeout(300)
def test_a_job_trains_on_two_workers_that_start_and_end_together(fleet: SmallFleet) -> None:
    start_workers(fleet)
    job_id = fleet.submit(spec=two_by_two(max_steps=4))
    job = fleet.wait_for_status(job_id, "succeeded", 240)
    assert job.resolved_spec.world_size == 4
    assert "final" in fleet.checkpoints(job_id)
    assert (fleet.settings.artifacts / log_key(job_id, 1)).is_file()
    check_nothing_remains(fleet, job_id)
    fleet.check_events(job_id)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_on_two_workers_survives_killed_and_frozen_processes_and_a_restarted_server(fleet: SmallFleet) -> None:
    workers = start_workers(fleet)
    job_id = fleet.submit(spec=two_by_two(max_steps=1_000_000, checkpointing_steps=20))
    fleet.wait_for_step(job_id, 30, 240)
    send_to_a_process(job_id, workers["b"], signal.SIGKILL)
    wait_until(lambda: fleet.job(job_id).attempt == 2, 120, "the second attempt")
    first = fleet.attempts(job_id)[0]
    wait_until(lambda: fleet.attempts(job_id)[1].first_step is not None, 240, "its first step")
    assert 0 < (fleet.attempts(job_id)[1].first_step or 0) <= (first.last_step or 0) + 1

    fleet.stop_engine()
    send_to_a_process(job_id, workers["b"], signal.SIGSTOP)
    fleet.start_engine()
    wait_until(lambda: fleet.job(job_id).attempt == 3, 240, "the third attempt")
    wait_until(lambda: fleet.attempts(job_id)[2].first_step is not None, 240, "its first step")

    fleet.request(job_id, "pause")
    fleet.wait_for_status(job_id, "paused", 120)
    assert fleet.job(job_id).status_reason == "paused_by_user"
    check_nothing_remains(fleet, job_id)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_was_killed_and_restarted_adopts_its_node(fleet: SmallFleet) -> None:
    workers = start_workers(fleet)
    resources = {"nodes": 2, "processes": 1}
    job_id = fleet.submit(spec=two_by_two(resources=resources, max_steps=1_000_000, checkpointing_steps=20))
    fleet.wait_for_step(job_id, 10, 240)
    workers["b"].kill()
    workers["b"].wait()
    start_worker(fleet, "b")
    wait_until(lambda: f"Adopted attempt 1 of {job_id}" in fleet.logs(), 60, "worker b to adopt its node")
    fleet.wait_for_step(job_id, (fleet.attempts(job_id)[0].last_step or 0) + 100, 120)
    fleet.request(job_id, "pause")
    fleet.wait_for_status(job_id, "paused", 120)
    (attempt,) = fleet.attempts(job_id)
    assert attempt.reason == "paused_by_user"
    check_nothing_remains(fleet, job_id)
