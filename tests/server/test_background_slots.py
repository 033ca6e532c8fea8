"""Jobs that need no GPU: they run in background slots, and neither wait for the other jobs nor delay them."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.waiting import wait_until
from tests.server.stepped_scheduler import SteppedScheduler, change, waiting_code
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.wire.messages import KINDS_VERSION


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0") as fleet:
        yield fleet


def submit_export(fleet: SmallFleet) -> str:
    return fleet.submit(kind=JobKind.EXPORT, spec={"model": {"job": "job_1", "checkpoint": "final"}, "to": "merged"})


def test_an_export_starts_while_a_training_waits_for_the_only_slot(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    training, export = fleet.submit(), submit_export(fleet)
    stepped.update_workers(box={"slots": 1, "background_slots": 1, "running": [("job_other", 1)]})
    assert stepped.step() == [(export, "box")]
    (message,) = stepped.sent
    assert (message.job_kind, message.slots, message.processes) == (JobKind.EXPORT, [1], 1)
    assert "resources" not in message.spec
    assert waiting_code(fleet, training) == "workers_busy"


def test_an_export_leaves_the_gpus_to_trainings(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    export, training = submit_export(fleet), fleet.submit()
    stepped.update_workers(box={"slots": 1, "kind": "cuda", "background_slots": 1})
    assert sorted(stepped.step()) == sorted([(export, "box"), (training, "box")])
    slots = {message.job_id: message.slots for message in stepped.sent}
    assert slots == {training: [0], export: [1]}


def test_a_worker_runs_no_more_exports_than_it_has_background_slots(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    first, second = submit_export(fleet), submit_export(fleet)
    stepped.update_workers(box={"slots": 4, "background_slots": 1})
    assert stepped.step() == [(first, "box")]
    assert waiting_code(fleet, second) == "workers_busy"
    change(fleet, first, status="succeeded", worker=None, slots=None, dispatched_at=None)
    assert stepped.step() == [(second, "box")]


def test_an_export_behind_a_long_queue_starts_at_once(fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.scheduling.queue_pages.PAGE_JOBS", 2)
    stepped = SteppedScheduler(fleet)
    stepped.update_workers(box={"slots": 1, "background_slots": 1, "running": [("job_other", 1)]})
    for _ in range(5):
        fleet.submit()
    stepped.step()
    export = submit_export(fleet)
    assert stepped.step(queue_changed=False) == [(export, "box")]


def test_an_export_behind_a_long_queue_starts_when_its_back_off_ends(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.scheduling.queue_pages.PAGE_JOBS", 2)
    stepped = SteppedScheduler(fleet)
    stepped.update_workers(box={"slots": 1, "background_slots": 1, "running": [("job_other", 1)]})
    for _ in range(5):
        fleet.submit()
    export = submit_export(fleet)
    change(fleet, export, not_before=utc_now() + timedelta(seconds=0.5))
    assert stepped.step() == []
    wait_until(lambda: stepped.step(queue_changed=False) == [(export, "box")], 5, "the dispatch of the export")


def test_an_export_waits_for_a_worker_with_a_background_slot(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    export = submit_export(fleet)
    stepped.update_workers(box={"slots": 1, "contract_version": KINDS_VERSION - 1})
    assert stepped.step() == []
    assert waiting_code(fleet, export) == "worker_too_old"
    stepped.update_workers(box=1)
    stepped.step()
    reason = fleet.job(export).waiting_reason
    assert reason is not None
    assert (reason["code"], "ZETA_BACKGROUND_SLOTS" in reason["message"]) == ("never_fits", True)
