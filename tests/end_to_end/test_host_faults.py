"""A job on two hosts with a network of their own, without a common folder: faults, commands, and other hosts.

Most tests share one job of two nodes with two processes each. Each test expects it to run, breaks something, and
checks that the attempt ends with the right reason and that the next one continues from the last stored checkpoint.
"""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.host_fleet import HostFleet, running_host_fleet
from tests.end_to_end.specs import tiny_job
from tests.harness.namespaces import Namespaces
from tests.harness.seaweedfs import SeaweedServer

SAVE_STEPS = 100
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def job_on(nodes: int, processes: int, **fields: Any) -> dict[str, Any]:
    resources = {"nodes": nodes, "processes": processes}
    return tiny_job(**{"resources": resources, "batch_size": 2, "use_fsdp": True, "max_retries": 20, **fields})


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, namespaces: Namespaces, object_store: SeaweedServer
) -> Iterator[HostFleet]:
    """Four hosts. The workers of ``a`` and ``b`` run."""
    folder = tmp_path_factory.mktemp("hosts")
    with running_host_fleet(folder, namespaces, object_store, names=("a", "b", "c", "d")) as fleet:
        for name in ("a", "b"):
            fleet.hosts[name].start()
        yield fleet


@pytest.fixture(scope="module")
def endless(fleet: HostFleet) -> str:
    """A job that never ends by itself. Its ranks 0 and 1 are on host ``a``, and 2 and 3 on ``b``."""
    return fleet.submit(job_on(2, 2, max_steps=1_000_000, checkpointing_steps=SAVE_STEPS))


class Running:
    """The shared job during one test; ``attempt`` is the number of the attempt that runs when the test begins."""

    def __init__(self, fleet: HostFleet, job_id: str) -> None:
        self.job_id = job_id
        self._fleet = fleet
        self.attempt = max(1, int(fleet.job(job_id)["attempt"]))
        first = int(fleet.wait_for_step(job_id, self.attempt)["first_step"])
        fleet.wait_for_step(job_id, self.attempt, (first // SAVE_STEPS + 1) * SAVE_STEPS + 20)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        hosts = self._fleet.hosts.values()
        (found,) = [
            found
            for host in hosts
            for found in host.processes()
            if (found.job_id, found.rank) == (self.job_id, str(rank))
        ]
        os.kill(found.process.pid, number)

    def wait_for_end(self, reason: str) -> None:
        """Wait until the attempt has ended for this reason."""

        def ended() -> str | None:
            found: str | None = self._fleet.job(self.job_id)["attempts"][self.attempt - 1]["reason"]
            return found

        assert self._fleet.wait(ended, 90, "the attempt to end") == reason, self._fleet.logs()

    def check_next_attempt(self, *, lost_steps: int = SAVE_STEPS + 50) -> None:
        """Wait for a step of the next attempt, which repeats at most this number of steps, and runs alone."""
        resumed = self._fleet.wait_for_step(self.job_id, self.attempt + 1)
        ended = self._fleet.job(self.job_id)["attempts"][self.attempt - 1]
        assert 0 <= ended["last_step"] + 1 - resumed["first_step"] <= lost_steps, (ended, resumed)
        processes = [found for host in self._fleet.hosts.values() for found in host.processes()]
        assert {found.attempt for found in processes if found.job_id == self.job_id} == {self.attempt + 1}

    def warning(self) -> str:
        """The message of the warning about the failed attempt."""
        warnings = self._fleet.job(self.job_id)["warnings"]
        return next(
            str(each["message"])
            for each in warnings
            if each["code"] == "attempt_failed" and each["evidence"]["attempt"] == self.attempt
        )


@pytest.fixture
def running(fleet: HostFleet, endless: str) -> Running:
    return Running(fleet, endless)


def test_a_frozen_rank_is_named_with_the_stacks_of_the_others(fleet: HostFleet, running: Running) -> None:
    running.signal_rank(3, signal.SIGSTOP)
    running.wait_for_end("stalled")
    assert "Node 1 (b): The run stalled" in running.warning()
    assert "No response from rank 3, process" in running.warning()
    running.check_next_attempt()
    log = fleet.log(running.job_id)
    for rank in range(3):
        assert f"--- Stacks of rank {rank}, process" in log


def test_a_rank_killed_while_no_server_runs_ends_the_attempt_afterwards(fleet: HostFleet, running: Running) -> None:
    fleet.server.end(signal.SIGKILL)
    running.signal_rank(1, signal.SIGKILL)
    fleet.server.start()
    running.wait_for_end("process_killed")
    assert "Rank 1 was killed by SIGKILL" in running.warning()
    running.check_next_attempt()


def test_a_full_disk_of_one_host_pauses_the_job_until_there_is_space(fleet: HostFleet, running: Running) -> None:
    disk = fleet.hosts["b"].disk
    if disk is None:
        pytest.skip("a small disk can't be mounted here")
    disk.fill()
    fleet.wait_for_status(running.job_id, "paused")
    running.wait_for_end("disk_full")
    fleet.check_nothing_remains(running.job_id)
    disk.free()
    running.check_next_attempt()


def test_a_host_that_is_cut_off_ends_the_attempt_and_rejoins(fleet: HostFleet, running: Running) -> None:
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


def test_the_first_host_loses_its_power_and_restarts(fleet: HostFleet, running: Running) -> None:
    fleet.hosts["a"].vanish()
    running.wait_for_end("worker_lost")
    fleet.wait(lambda: not fleet.hosts["b"].processes(), 60, "the other host to end its processes")
    fleet.hosts["a"].start()
    running.check_next_attempt()


def test_draining_one_worker_hands_the_job_back_after_a_save(fleet: HostFleet, running: Running) -> None:
    fleet.command("/v1/workers/b/drain")
    running.wait_for_end("handed_back")
    fleet.check_nothing_remains(running.job_id)
    assert fleet.job(running.job_id)["status"] == "queued"
    fleet.command("/v1/workers/b/undrain")
    running.check_next_attempt(lost_steps=0)


def test_a_paused_job_continues_where_it_stopped_and_can_be_cancelled(fleet: HostFleet, running: Running) -> None:
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
    job_id = fleet.submit(job_on(2, 2, max_steps=1_000_000, checkpointing_steps=1_000_000, time_limit_seconds=60))
    job = fleet.wait_for_status(job_id, "failed", 200)
    assert (job["status_reason"], job["checkpoints"]) == ("time_limit", 1)
    fleet.check_nothing_remains(job_id)


def test_two_hosts_without_a_common_folder_give_the_weights_of_one(fleet: HostFleet) -> None:
    digests: list[list[tuple[str, str]]] = []
    for nodes, processes in ((2, 2), (1, 4)):
        job_id = fleet.submit(job_on(nodes, processes))
        fleet.wait_for_status(job_id, "succeeded", 200)
        files = fleet.get(f"/v1/jobs/{job_id}/checkpoints/final")["files"]
        digests.append([(file["path"], file["sha256"]) for file in files if file["role"] == "weights"])
        fleet.check_nothing_remains(job_id)
    assert digests[0] == digests[1]
    assert digests[0]


def test_an_elastic_job_continues_on_other_hosts_with_the_same_samples(fleet: HostFleet) -> None:
    """Hosts ``a`` and ``b`` are lost, ``c`` continues alone, and ``d`` joins it: 4, 2, and 4 processes."""
    fields: dict[str, Any] = {"max_steps": 500, "checkpointing_steps": SAVE_STEPS, "lr_scheduler": "constant"}
    straight = fleet.submit(job_on(2, 2, **fields))
    fleet.wait_for_status(straight, "succeeded", 200)
    job_id = fleet.submit(job_on(2, 2, elastic={"min_nodes": 1, "max_nodes": 2}, **fields))
    fleet.wait_for_step(job_id, 1, SAVE_STEPS + 20)
    for name in ("a", "b"):
        fleet.hosts[name].vanish()
    fleet.hosts["c"].start()
    fleet.wait_for_step(job_id, 2, 2 * SAVE_STEPS + 20)
    fleet.command(f"/v1/jobs/{job_id}/pause")
    fleet.wait_for_status(job_id, "paused")
    fleet.hosts["d"].start()
    fleet.wait(lambda: len(ready_workers(fleet)) == 2, 60, "the fourth host")
    fleet.command(f"/v1/jobs/{job_id}/resume")
    attempts = fleet.wait_for_status(job_id, "succeeded", 200)["attempts"]
    nodes = [[node["worker"] for node in attempt["nodes"]] or [attempt["worker"]] for attempt in attempts]
    assert nodes == [["a", "b"], ["c"], ["c", "d"]]
    found, expected = (fleet.get(f"/v1/jobs/{each}/metrics") for each in (job_id, straight))
    assert found["step"] == expected["step"] == list(range(1, 501))
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-3)  # only the order of sums differs
    fleet.check_nothing_remains(job_id)


def ready_workers(fleet: HostFleet) -> list[str]:
    return [worker["name"] for worker in fleet.get("/v1/workers")["data"] if worker["status"] == "ready"]
