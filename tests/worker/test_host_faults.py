"""Workers on hosts with a network of their own that run one job: lost, drained and other hosts, and commands.

The runs are `small_training` processes, which need no torch. tests/end_to_end/test_host_faults.py has real runs.
"""

import hashlib
from collections.abc import Iterator

import pytest

from tests.end_to_end.host_fleet import HostFleet, SharedJob, running_host_fleet
from tests.end_to_end.specs import tiny_job
from tests.harness.fleet import SMALL_WORKER
from tests.harness.namespaces import Namespaces
from tests.harness.seaweedfs import SeaweedServer
from tests.worker.small_training import next_weights

HOSTS = ("a", "b", "c", "d")
SAVE_STEPS = 50
METADATA = {"steps": "1000000", "seconds_per_step": "0.05", "checkpoint_every": str(SAVE_STEPS)}
SPEC = tiny_job(resources={"nodes": 2}, metadata=METADATA)
pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, namespaces: Namespaces, object_store: SeaweedServer
) -> Iterator[HostFleet]:
    """Four hosts. The workers of ``a`` and ``b`` run."""
    folder = tmp_path_factory.mktemp("hosts")
    with running_host_fleet(folder, namespaces, object_store, HOSTS, program=[SMALL_WORKER]) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def endless(fleet: HostFleet) -> str:
    """A job that never ends by itself. Host ``a`` is its node 0."""
    return fleet.submit(SPEC)


@pytest.fixture
def running(fleet: HostFleet, endless: str) -> SharedJob:
    return SharedJob(fleet, endless, SAVE_STEPS)


def test_a_host_that_is_cut_off_ends_the_attempt_and_rejoins(fleet: HostFleet, running: SharedJob) -> None:
    host = fleet.hosts["b"]
    host.cut()
    try:
        running.wait_for_end("worker_lost")
        fleet.wait(lambda: not host.processes(), 60, "the host that is cut off to end its processes")
        fleet.wait(
            lambda: (fleet.job(running.job_id)["waiting_reason"] or {}).get("code") in ("never_fits", "no_worker"),
            60,
            "the job to wait for a second worker",
        )
        fleet.check_nothing_remains(running.job_id)
    finally:
        host.restore()
    running.check_next_attempt()


@pytest.mark.slow
def test_the_first_host_loses_its_power_and_restarts(fleet: HostFleet, running: SharedJob) -> None:
    fleet.hosts["a"].vanish()
    running.wait_for_end("worker_lost")
    fleet.wait(lambda: not fleet.hosts["b"].processes(), 60, "the other host to end its processes")
    fleet.hosts["a"].start()
    running.check_next_attempt()


def test_draining_one_worker_hands_the_job_back_after_a_save(fleet: HostFleet, running: SharedJob) -> None:
    fleet.command("/v1/workers/b/drain")
    running.wait_for_end("handed_back")
    fleet.check_nothing_remains(running.job_id)
    assert fleet.job(running.job_id)["status"] == "queued"
    fleet.command("/v1/workers/b/undrain")
    running.check_next_attempt(lost_steps=0)


def test_a_paused_job_continues_where_it_stopped_and_can_be_cancelled(fleet: HostFleet, running: SharedJob) -> None:
    fleet.command(f"/v1/jobs/{running.job_id}/pause")
    fleet.wait_for_status(running.job_id, "paused")
    running.wait_for_end("paused_by_user")
    fleet.check_nothing_remains(running.job_id)
    fleet.command(f"/v1/jobs/{running.job_id}/resume")
    running.check_next_attempt(lost_steps=0)
    fleet.command(f"/v1/jobs/{running.job_id}/cancel")
    fleet.wait_for_status(running.job_id, "cancelled")
    fleet.check_nothing_remains(running.job_id)


def test_a_time_limit_ends_all_nodes_with_a_checkpoint(fleet: HostFleet) -> None:
    job_id = fleet.submit({**SPEC, "time_limit_seconds": 5})
    job = fleet.wait_for_status(job_id, "failed")
    assert job["status_reason"] == "time_limit"
    assert job["checkpoints"]
    fleet.check_nothing_remains(job_id)


@pytest.mark.slow
def test_an_elastic_job_continues_from_the_bucket_on_other_hosts(fleet: HostFleet) -> None:
    """Hosts ``a`` and ``b`` are lost, ``c`` continues alone, and ``d`` joins it."""
    metadata = {**METADATA, "steps": "600"}
    job_id = fleet.submit({**SPEC, "elastic": {"min_nodes": 1, "max_nodes": 2}, "metadata": metadata})
    fleet.wait_for_step(job_id, 1, SAVE_STEPS + 20)
    for name in ("a", "b"):
        fleet.hosts[name].vanish()
    fleet.hosts["c"].start()
    fleet.wait_for_step(job_id, 2)
    fleet.command(f"/v1/jobs/{job_id}/pause")
    fleet.wait_for_status(job_id, "paused")
    fleet.hosts["d"].start()
    fleet.wait(lambda: fleet.ready_workers() == ["c", "d"], 60, "the fourth host")
    fleet.command(f"/v1/jobs/{job_id}/resume")
    attempts = fleet.wait_for_status(job_id, "succeeded", 200)["attempts"]
    nodes = [[node["worker"] for node in attempt["nodes"]] or [attempt["worker"]] for attempt in attempts]
    assert nodes == [["a", "b"], ["c"], ["c", "d"]]
    assert attempts[1]["first_step"] > SAVE_STEPS
    assert attempts[2]["first_step"] == attempts[1]["last_step"] + 1
    weights = b""
    for step in range(1, 601):
        weights = next_weights(weights, step)
    (file,) = fleet.get(f"/v1/jobs/{job_id}/checkpoints/final")["files"]
    assert file["sha256"] == hashlib.sha256(weights).hexdigest()
    fleet.check_nothing_remains(job_id)
