"""A real job on two hosts with a network of their own, without a common folder, and its faults.

The tests share one job of two nodes with two processes each. Each test expects it to run, breaks something, and
checks that the attempt ends with the right reason and that the next one continues from the last stored checkpoint.
"""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.host_fleet import HostFleet, SharedJob, running_host_fleet
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
    folder = tmp_path_factory.mktemp("hosts")
    with running_host_fleet(folder, namespaces, object_store, names=("a", "b")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def endless(fleet: HostFleet) -> str:
    """A job that never ends by itself. Its ranks 0 and 1 are on host ``a``, and 2 and 3 on ``b``."""
    return fleet.submit(job_on(2, 2, max_steps=1_000_000, checkpointing_steps=SAVE_STEPS))


@pytest.fixture
def running(fleet: HostFleet, endless: str) -> SharedJob:
    return SharedJob(fleet, endless, SAVE_STEPS)


def test_a_frozen_rank_is_named_with_the_stacks_of_the_others(fleet: HostFleet, running: SharedJob) -> None:
    running.signal_rank(3, signal.SIGSTOP)
    running.wait_for_end("stalled")
    assert "Node 1 (b): The run stalled" in running.warning()
    assert "No response from rank 3, process" in running.warning()
    running.check_next_attempt()
    log = fleet.log(running.job_id)
    for rank in range(3):
        assert f"--- Stacks of rank {rank}, process" in log


def test_a_rank_killed_while_no_server_runs_ends_the_attempt_afterwards(fleet: HostFleet, running: SharedJob) -> None:
    fleet.server.end(signal.SIGKILL)
    running.signal_rank(1, signal.SIGKILL)
    fleet.server.start()
    running.wait_for_end("process_killed")
    assert "Rank 1 was killed by SIGKILL" in running.warning()
    running.check_next_attempt()


def test_a_full_disk_of_one_host_pauses_the_job_until_there_is_space(fleet: HostFleet, running: SharedJob) -> None:
    disk = fleet.hosts["b"].disk
    if disk is None:
        pytest.skip("a small disk can't be mounted here")
    disk.fill()
    fleet.wait_for_status(running.job_id, "paused")
    running.wait_for_end("disk_full")
    fleet.check_nothing_remains(running.job_id)
    disk.free()
    running.check_next_attempt()
