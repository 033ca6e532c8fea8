"""Jobs that need several slots of one worker, and the workers and GPUs that a job may use."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fleet import SmallFleet, small_fleet
from tests.server.stepped_scheduler import SteppedScheduler, change, waiting_code
from zeta_core.contract.access import ProjectLimits

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
GIGABYTE = 10**9


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0") as fleet:
        yield fleet


def submit(fleet: SmallFleet, **resources: Any) -> str:
    return fleet.submit(spec={"model": "m", "resources": resources})


def box(slots: int, num_busy: int = 0, **fields: Any) -> dict[str, Any]:
    """The heartbeat of a worker with GPUs, the first of them busy."""
    running = [(f"job_other_{number}", 1) for number in range(num_busy)]
    return {"slots": slots, "kind": "cuda", "name": H100, "running": running, **fields}


def reason(fleet: SmallFleet, job_id: str) -> dict[str, Any]:
    return fleet.job(job_id).waiting_reason or {}


def test_a_job_gets_as_many_gpus_of_one_worker_and_processes_as_it_requests(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = submit(fleet, gpus=4)
    stepped.update_workers(small=box(2), large=box(8, num_busy=3))
    assert stepped.step() == [(job_id, "large")]
    (message,) = stepped.sent
    assert (message.slots, message.processes, message.spec["resources"]) == (
        [3, 4, 5, 6],
        4,
        {"gpus": 4, "nodes": 1, "processes": None},
    )
    assert fleet.job(job_id).slots == [3, 4, 5, 6]


def test_all_gpus_means_those_of_one_worker_and_stays_the_same_number(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = submit(fleet, gpus="all")
    stepped.update_workers(plain=4)
    stepped.step()
    assert "no connected worker has such a GPU" in reason(fleet, job_id)["message"]
    stepped.update_workers(plain=4, gpus=box(3))
    assert stepped.step() == [(job_id, "gpus")]
    assert stepped.sent[-1].processes == 3
    assert stepped.sent[-1].spec["resources"] == {"gpus": 3, "nodes": 1, "processes": None}
    change(fleet, job_id, attempt=1, worker=None, slots=None, dispatched_at=None)
    stepped.update_workers(gpus={"stopping": True}, larger=box(8))
    assert stepped.step() == [(job_id, "larger")]
    assert stepped.sent[-1].slots == [0, 1, 2]


def test_each_process_on_a_cpu_takes_a_slot_up_to_all_of_the_worker(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    four, eight = submit(fleet, processes=4), submit(fleet, processes=8)
    stepped.update_workers(box=6)
    assert stepped.step() == [(four, "box")]
    assert reason(fleet, eight)["details"] == {"slots": 6, "free": 2, "worker": "box"}
    change(fleet, four, status="succeeded", worker=None, slots=None, dispatched_at=None)
    assert stepped.step() == [(eight, "box")]
    assert (stepped.sent[-1].slots, stepped.sent[-1].processes) == ([0, 1, 2, 3, 4, 5], 8)


def test_processes_without_a_number_of_gpus_get_one_gpu_each(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = submit(fleet, processes=2)
    stepped.update_workers(box=box(4))
    assert stepped.step() == [(job_id, "box")]
    assert stepped.sent[-1].spec["resources"] == {"gpus": 2, "nodes": 1, "processes": 2}


def test_slots_that_share_a_gpu_count_once_for_a_job(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    three, two = submit(fleet, gpus=3), submit(fleet, gpus=2)
    stepped.update_workers(box=box(4, num_busy=1, devices=["0", "1", "0", "1"]))
    assert stepped.step() == [(two, "box")]
    assert stepped.sent[-1].slots == [2, 1]
    assert reason(fleet, three)["details"] == {"gpus": 3, "largest": 2}


def test_a_wide_job_at_the_head_of_the_queue_is_not_overtaken_indefinitely(fleet: SmallFleet) -> None:
    """Narrow jobs behind it would otherwise take every slot as soon as it is free."""
    stepped = SteppedScheduler(fleet)
    wide = submit(fleet, gpus=3)
    narrow = [submit(fleet, gpus=1) for _ in range(2)]
    stepped.update_workers(box=box(4, num_busy=3))
    assert stepped.step() == []
    assert reason(fleet, wide)["details"] == {"gpus": 3, "free": 1, "worker": "box"}
    assert reason(fleet, narrow[0])["message"].startswith("1 free slot is reserved for jobs ahead in the queue")
    assert (waiting_code(fleet, wide), waiting_code(fleet, narrow[0])) == ("resources", "workers_busy")
    stepped.update_workers(box=box(4, num_busy=2))
    assert stepped.step() == []
    stepped.update_workers(box=box(4, num_busy=1))
    assert stepped.step() == [(wide, "box")]
    urgent = submit(fleet, gpus=1)
    change(fleet, urgent, priority=1)
    change(fleet, wide, status="succeeded", worker=None, slots=None, dispatched_at=None)
    stepped.update_workers(box=box(4, num_busy=1))
    assert [job_id for job_id, _ in stepped.step()] == [urgent, *narrow]


def test_each_waiting_wide_job_reserves_one_worker_and_leaves_the_others(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    wide, narrow = submit(fleet, gpus=4), submit(fleet, gpus=1)
    stepped.update_workers(one=box(4, num_busy=1), other=box(4, num_busy=2), plain=1)
    assert stepped.step() == [(narrow, "other")]
    assert reason(fleet, wide)["details"] == {"gpus": 4, "free": 3, "worker": "one"}


def test_a_job_of_a_project_at_its_limit_reserves_nothing(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, default_limits=ProjectLimits(max_running_jobs=1))
    running, wide = fleet.submit(), submit(fleet, gpus=4)
    stepped.update_workers(plain=1)
    assert stepped.step() == [(running, "plain")]
    narrow = submit(fleet, gpus=1)
    change(fleet, narrow, project="other")
    stepped.update_workers(plain=1, box=box(4, num_busy=1))
    assert stepped.step() == [(narrow, "box")]
    assert waiting_code(fleet, wide) == "resources"


def test_a_project_uses_at_most_its_number_of_gpus(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, default_limits=ProjectLimits(max_gpus=3))
    first, second, third = submit(fleet, gpus=2), submit(fleet, gpus=2), submit(fleet, gpus=1)
    stepped.update_workers(box=box(8))
    assert [job_id for job_id, _ in stepped.step()] == [first, third]
    assert waiting_code(fleet, second) == "quota"
    assert reason(fleet, second)["details"] == {"limit": 3, "needed": 2}
    assert "ZETA_PROJECT_MAX_GPUS" in reason(fleet, second)["message"]
    change(fleet, third, status="succeeded", worker=None, slots=None, dispatched_at=None)
    assert stepped.step() == []
    change(fleet, first, status="succeeded", worker=None, slots=None, dispatched_at=None)
    assert [job_id for job_id, _ in stepped.step()] == [second]


def test_a_job_above_the_limit_of_gpus_reserves_nothing(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, default_limits=ProjectLimits(max_gpus=3))
    wide, narrow = submit(fleet, gpus=4), submit(fleet, gpus=1)
    stepped.update_workers(box=box(4, num_busy=1))
    assert stepped.step() == [(narrow, "box")]
    assert waiting_code(fleet, wide) in ("workers_busy", "resources")


def test_model_memory_and_labels_restrict_the_choice(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    workers = {
        "old": box(2, name=A100, memory_bytes=40 * GIGABYTE, labels={"zone": "a"}),
        "new": box(2, name=H100, memory_bytes=80 * GIGABYTE, labels={"zone": "b"}),
    }
    stepped.update_workers(**workers)
    by_model = submit(fleet, gpu_model="a100")
    by_memory = submit(fleet, min_gpu_memory="80GB")
    by_label = submit(fleet, gpus=0, labels={"zone": "a"})
    nowhere = submit(fleet, gpu_model="H100", min_gpu_memory="90GB")
    unknown = submit(fleet, labels={"zone": "c"})
    part_of_a_word = submit(fleet, gpu_model="A10")
    assert stepped.step() == [(by_model, "old"), (by_memory, "new"), (by_label, "old")]
    assert {waiting_code(fleet, job_id) for job_id in (nowhere, unknown, part_of_a_word)} == {"never_fits"}
    assert "1 GPU of the model 'H100' with at least 90.0GB of memory" in reason(fleet, nowhere)["message"]
    assert "No connected worker has the labels zone=c" in reason(fleet, unknown)["message"]


def test_a_job_that_is_too_wide_learns_what_the_largest_worker_has(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = submit(fleet, gpus=8)
    stepped.update_workers(box=box(2), mixed={**box(4), "labels": {"a": "b"}})
    stepped.step()
    assert (reason(fleet, job_id)["code"], reason(fleet, job_id)["details"]) == (
        "never_fits",
        {"gpus": 8, "largest": 4},
    )
    assert "the largest connected worker, 'mixed', has 4; request at most 4" in reason(fleet, job_id)["message"]


def test_a_gpu_with_a_problem_is_not_assigned_and_the_reason_is_shown(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    problem = "Other programs use 8 GiB of its memory (process 7); it is assigned again when they have ended."
    one, two = submit(fleet, gpus=1), submit(fleet, gpus=2)
    stepped.update_workers(box=box(2, problems={0: problem}))
    assert stepped.step() == [(one, "box")]
    assert stepped.sent[-1].slots == [1]
    assert problem in reason(fleet, two)["message"]
    change(fleet, one, status="succeeded", worker=None, slots=None, dispatched_at=None)
    stepped.update_workers(box=box(2))
    assert stepped.step() == [(two, "box")]


def test_several_gpus_need_a_worker_whose_runs_accept_them(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    one, two = submit(fleet, gpus=1), submit(fleet, gpus=2)
    stepped.update_workers(old=box(4, contract_version=2))
    assert stepped.step() == [(one, "old")]
    assert waiting_code(fleet, two) == "worker_too_old"
