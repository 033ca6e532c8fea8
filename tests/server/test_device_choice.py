"""Which GPUs and CPUs a job gets: the number it needs, and those that its earlier attempts used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fleet import SmallFleet, small_fleet
from tests.server.stepped_scheduler import SteppedScheduler, change, waiting_code


@pytest.fixture
def fleet(database_url: str | None, tmp_path: Path) -> Iterator[SmallFleet]:
    """A database without a running engine; the tests run the passes of the scheduler."""
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0", database_url) as fleet:
        yield fleet


def test_a_job_uses_one_slot_per_gpu_and_waits_for_them(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    change(fleet, fleet.submit(), spec={"resources": {"gpus": 1}}, priority=1)
    pair = fleet.submit()
    change(fleet, pair, spec={"resources": {"gpus": 2}})
    stepped.update_workers(box={"slots": 2, "kind": "cuda"})
    stepped.step()
    assert [message.slots for message in stepped.sent] == [[0]]
    assert waiting_code(fleet, pair) == "resources"


def test_a_started_job_keeps_its_choice_of_gpu_or_cpu(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    on_gpu, on_cpu = fleet.submit(), fleet.submit()
    not_there: dict[str, Any] = {"worker": None, "slots": None, "dispatched_at": None}
    stepped.update_workers(box={"kind": "cuda"})
    assert stepped.step() == [(on_gpu, "box")]
    change(fleet, on_gpu, attempt=1, **not_there)
    stepped.update_workers(box={"stopping": True}, plain=2)
    assert stepped.step() == [(on_cpu, "plain")]
    assert waiting_code(fleet, on_gpu) == "never_fits"
    change(fleet, on_cpu, attempt=1, **not_there)
    stepped.update_workers(box={"slots": 2, "kind": "cuda"}, plain={"stopping": True})
    assert sorted(stepped.step()) == sorted([(on_gpu, "box"), (on_cpu, "box")])
    decided = [(message.job_id, message.spec["resources"]) for message in stepped.sent]
    one, none = ({"gpus": gpus, "nodes": 1, "processes": None} for gpus in (1, 0))
    assert dict(decided) == {on_gpu: one, on_cpu: none}  # the latter on the box's CPU
    assert none.items() <= fleet.job(on_cpu).resolved_spec["resources"].items()


def test_a_started_job_waits_for_enough_cores(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    job_id = fleet.submit()
    change(fleet, job_id, attempt=1, resolved_spec_json={"threads": 4, "resources": {"gpus": 0}})
    stepped.update_workers(small={"cores": 2})
    assert stepped.step() == []
    reason = fleet.job(job_id).waiting_reason
    assert reason is not None
    assert (reason["code"], reason["details"]) == ("never_fits", {"threads": 4})
    assert "started with 4 threads" in reason["message"]
    of_another_job = fleet.submit(spec={"model": "m", "resume_from_checkpoint": f"{job_id}/step-4"})
    change(fleet, of_another_job, attempt=1, resolved_spec_json={"threads": 4, "resources": {"gpus": 0}})
    undecided = fleet.submit()
    change(fleet, undecided, attempt=1, resolved_spec_json={"threads": None, "resources": {"gpus": 0}})
    stepped.update_workers(small={"cores": 2, "slots": 2})
    assert stepped.step() == [(of_another_job, "small"), (undecided, "small")]
    stepped.update_workers(small={"cores": 2}, large={"cores": 4})
    assert stepped.step() == [(job_id, "large")]


def test_the_next_attempt_prefers_the_previous_device_kind(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    first, second = fleet.submit(), fleet.submit()
    for job_id in (first, second):
        change(fleet, job_id, attempt=1, resolved_spec_json={"device_kind": "cpu:old", "resources": {"gpus": 0}})
    stepped.update_workers(new={"slots": 4, "device_kind": "cpu:new"}, old={"device_kind": "cpu:old"})
    assert stepped.step() == [(first, "old"), (second, "new")]


def test_an_exact_job_waits_for_its_device_kind(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    spec = {"resources": {"gpus": 0, "exact": True}}
    started = {"attempt": 1, "spec": spec, "resolved_spec_json": {"device_kind": "cpu:old", **spec}}
    job_id, other = fleet.submit(), fleet.submit()
    change(fleet, job_id, **started)
    stepped.update_workers(new={"device_kind": "cpu:new"}, before={"device_kind": None, "slots": 2})
    assert stepped.step() == [(other, "before")]
    reason = fleet.job(job_id).waiting_reason or {}
    assert (reason["code"], reason["details"]) == ("never_fits", {"device_kind": "cpu:old"})
    assert "Waiting for a worker with device kind cpu:old (resources.exact is true)" in reason["message"]

    stepped.update_workers(
        new={"device_kind": "cpu:new"}, old={"device_kind": "cpu:old", "running": [("job_other", 1)]}
    )
    assert stepped.step() == []
    reason = fleet.job(job_id).waiting_reason or {}
    assert (reason["code"], reason["details"]) == ("resources", {"device_kind": "cpu:old"})
    assert "all such workers are busy" in reason["message"]

    stepped.update_workers(new={"device_kind": "cpu:new"}, old={"device_kind": "cpu:old"})
    assert stepped.step() == [(job_id, "old")]
    assert stepped.sent[-1].spec["resources"] == {
        "gpus": 0,
        "nodes": 1,
        "processes": None,
    }  # known to older workers


def test_an_exact_job_starts_only_where_device_kinds_are_known(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    new, resumed = fleet.submit(), fleet.submit()
    change(fleet, new, spec={"resources": {"exact": True}})
    change(
        fleet,
        resumed,
        spec={"resources": {"exact": True}, "resume_from_checkpoint": "job_1/step-4"},
        resolved_spec_json={"device_kind": "cpu:old"},
    )
    stepped.update_workers(before={"device_kind": None, "slots": 4})
    assert stepped.step() == []
    assert (waiting_code(fleet, new), waiting_code(fleet, resumed)) == ("worker_too_old", "worker_too_old")
    stepped.update_workers(box={"kind": "cuda", "device_kind": "cpu:old"})
    assert stepped.step() == [(new, "box")]
    stepped.update_workers(box={"kind": "cuda", "device_kind": "cpu:old", "slots": 2})
    assert stepped.step() == [(resumed, "box")]
    assert stepped.sent[-1].spec["resources"] == {"gpus": 0, "nodes": 1, "processes": None}
