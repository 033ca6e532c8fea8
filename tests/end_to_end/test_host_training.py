"""Real training on several hosts that share only a bucket, compared with training on one host."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.host_fleet import HostFleet, running_host_fleet
from tests.end_to_end.specs import PYTHON_REFERENCE, as_jsonl, tiny_job
from tests.harness.namespaces import Namespaces
from tests.harness.seaweedfs import SeaweedServer
from tests.zeta_core.parallel.test_parallel import why_no_deepspeed

SAVE_STEPS, NUM_STEPS = 50, 400
pytestmark = [pytest.mark.extended, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, namespaces: Namespaces, object_store: SeaweedServer
) -> Iterator[HostFleet]:
    """Four hosts. The workers of ``a`` and ``b`` run."""
    folder = tmp_path_factory.mktemp("hosts")
    with running_host_fleet(folder, namespaces, object_store, names=("a", "b", "c", "d")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def uploaded(fleet: HostFleet) -> dict[str, str]:
    """A dataset that is stored only in the bucket."""
    with fleet.server.http() as http:
        files = {"file": ("data.jsonl", as_jsonl(PYTHON_REFERENCE[:40_000]))}
        response = http.post("/v1/files", files=files, data={"purpose": "dataset"}).raise_for_status()
    return {"file": response.json()["id"]}


def job_on(nodes: int, processes: int, **fields: Any) -> dict[str, Any]:
    resources = {"nodes": nodes, "processes": processes}
    strategy = {} if "use_deepspeed" in fields else {"use_fsdp": True}
    return tiny_job(resources=resources, batch_size=2, lr_scheduler="constant", **strategy, **fields)


def weights(fleet: HostFleet, job_id: str) -> dict[str, str]:
    """The SHA-256 of each file of the final weights."""
    files = fleet.get(f"/v1/jobs/{job_id}/checkpoints/final")["files"]
    found = {file["path"]: file["sha256"] for file in files if file["role"] == "weights"}
    assert found
    return found


def test_two_hosts_that_share_only_a_bucket_give_the_bits_of_one(fleet: HostFleet, uploaded: dict[str, str]) -> None:
    jobs: list[str] = []
    for nodes, processes in ((2, 2), (1, 4)):
        jobs.append(fleet.submit(job_on(nodes, processes, dataset=uploaded, max_steps=4)))
        (attempt,) = fleet.wait_for_status(jobs[-1], "succeeded", 200)["attempts"]
        assert [node["worker"] for node in attempt["nodes"]] == (["a", "b"] if nodes == 2 else [])
        fleet.check_nothing_remains(jobs[-1])
    assert weights(fleet, jobs[0]) == weights(fleet, jobs[1])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # each host compiles DeepSpeed's communication
@pytest.mark.skipif(why_no_deepspeed() is not None, reason="DeepSpeed cannot run here")
def test_a_zero_job_on_two_hosts_continues_from_the_bucket_with_the_bits_of_one(
    fleet: HostFleet, uploaded: dict[str, str]
) -> None:
    """The run is paused and continues; every host then fetches the shards of all processes from the bucket."""
    fields: dict[str, Any] = {"dataset": uploaded, "max_steps": 80, "use_deepspeed": 2}
    paused = fleet.submit(job_on(2, 2, **fields))
    fleet.wait_for_step(paused, 1)
    fleet.command(f"/v1/jobs/{paused}/pause")
    fleet.wait_for_status(paused, "paused", 120)
    fleet.check_nothing_remains(paused)
    fleet.command(f"/v1/jobs/{paused}/resume")
    first, second = fleet.wait_for_status(paused, "succeeded", 300)["attempts"]
    assert [[node["worker"] for node in attempt["nodes"]] for attempt in (first, second)] == [["a", "b"]] * 2
    assert second["first_step"] == first["last_step"] + 1
    on_one = fleet.submit(job_on(1, 4, **fields))
    fleet.wait_for_status(on_one, "succeeded", 300)
    assert weights(fleet, paused) == weights(fleet, on_one)


@pytest.mark.slow
def test_an_elastic_job_trains_on_the_same_samples_on_other_hosts(fleet: HostFleet, uploaded: dict[str, str]) -> None:
    """Hosts ``a`` and ``b`` are lost, ``c`` continues alone, and ``d`` joins it: 4, 2, and 4 processes."""
    fields: dict[str, Any] = {"dataset": uploaded, "max_steps": NUM_STEPS, "checkpointing_steps": SAVE_STEPS}
    undisturbed = fleet.submit(job_on(2, 2, **fields))
    fleet.wait_for_status(undisturbed, "succeeded", 300)
    job_id = fleet.submit(job_on(2, 2, elastic={"min_nodes": 1, "max_nodes": 2}, **fields))
    fleet.wait_for_step(job_id, 1, SAVE_STEPS + 20)
    for name in ("a", "b"):
        fleet.hosts[name].vanish()
    fleet.hosts["c"].start()
    fleet.wait_for_step(job_id, 2, 2 * SAVE_STEPS + 20)
    fleet.command(f"/v1/jobs/{job_id}/pause")
    fleet.wait_for_status(job_id, "paused")
    fleet.hosts["d"].start()
    fleet.wait(lambda: fleet.ready_workers() == ["c", "d"], 60, "the fourth host")
    fleet.command(f"/v1/jobs/{job_id}/resume")
    attempts = fleet.wait_for_status(job_id, "succeeded", 300)["attempts"]
    nodes = [[node["worker"] for node in attempt["nodes"]] or [attempt["worker"]] for attempt in attempts]
    assert nodes == [["a", "b"], ["c"], ["c", "d"]]
    assert attempts[1]["first_step"] > SAVE_STEPS
    assert attempts[2]["first_step"] == attempts[1]["last_step"] + 1
    found, expected = (fleet.get(f"/v1/jobs/{each}/metrics?max_points=10000") for each in (job_id, undisturbed))
    assert found["step"] == expected["step"] == list(range(1, NUM_STEPS + 1))
    assert found["tokens"] == expected["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-3)  # only the order of sums differs
    fleet.check_nothing_remains(job_id)
