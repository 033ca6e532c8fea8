"""Stop requests of the engine (time limit, drained worker), and jobs that resume when a disk has space."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from server.database.tables import AttemptRow, DrainRow, JobRow
from server.engine import stop_requests
from server.engine.engine import Engine
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, checkpoint, progress, status
from tests.harness.waiting import wait_until
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.wire.messages import SAVE_VERSION, SaveRequest, StopRequest


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url) as fleet:
        fleet.start_engine()
        yield fleet


def spec(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "dataset": {"builtin": "python-docs"}, **fields}


def receive_stop_request(worker: SimulatedWorker, job_id: str) -> str:
    request = worker.receive(StopRequest, job_id)
    assert isinstance(request, StopRequest)
    return request.action


def engine_of(fleet: SmallFleet) -> Engine:
    assert fleet.engine is not None
    return fleet.engine


def change(fleet: SmallFleet, row: type[Any], key: Any, **values: Any) -> None:
    async def write() -> None:
        async with fleet.database.write() as session:
            found = await session.get_one(row, key)
            for name, value in values.items():
                setattr(found, name, value)

    fleet.loop.run(write())


def test_a_job_fails_at_its_time_limit_over_all_attempts(
    fleet: SmallFleet, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "RECORD_SECONDS", 0.1)
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit(spec=spec(time_limit_seconds=60))
    worker.start(fleet, job_id)

    def stored_seconds() -> float:
        worker.send_heartbeat((job_id, 1))
        return fleet.attempts(job_id)[0].ran_seconds or 0.0

    wait_until(lambda: stored_seconds() > 0.3, 15, "the running time to be stored")
    worker.publish(job_id, 1, progress(3), status("failed", reason="process_killed"))
    change(fleet, AttemptRow, (job_id, 1), ran_seconds=59.0)  # as if the first attempt had run that long
    worker.start(fleet, job_id, 2)
    fleet.stop_engine()  # the running time outlasts the server
    fleet.start_engine()
    worker.send_heartbeat((job_id, 2))
    assert receive_stop_request(worker, job_id) == "time_limit"
    fleet.request(job_id, "cancel")  # a user's request takes precedence
    wait_until(lambda: receive_stop_request(worker, job_id) == "cancel", 15, "the cancel to replace it")
    fleet.request(job_id, "pause")
    worker.publish(job_id, 1, progress(5), status("failed", reason="time_limit"), attempt=2)
    job = fleet.job(job_id)
    assert (job.status, job.status_reason, job.attempt) == ("failed", "time_limit", 2)
    fleet.check_events(job_id)


def test_a_clock_jump_affects_neither_running_nor_backed_off_jobs(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit(spec=spec(time_limit_seconds=3600))
    worker.start(fleet, job_id)
    worker.send_heartbeat((job_id, 1))
    wait_until(lambda: fleet.attempts(job_id)[0].ran_seconds is not None, 15, "the engine to count its time")
    # The same effect as setting the clock two hours ahead.
    change(fleet, AttemptRow, (job_id, 1), started_at=utc_now() - timedelta(hours=2))
    for step in range(1, 4):
        worker.send_heartbeat((job_id, 1))
        fleet.wake()
        worker.publish(job_id, step, progress(step))
    assert not [message for message in worker.receive_all() if isinstance(message, StopRequest)]
    worker.publish(job_id, 4, status("queued", reason="handed_back"))
    change(fleet, JobRow, job_id, not_before=utc_now() + timedelta(hours=2))
    worker.start(fleet, job_id, 2)


def test_a_drained_worker_hands_its_job_back_and_gets_no_new_ones(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)

    async def drain(draining: bool) -> None:
        async with fleet.database.write() as session:
            if draining:
                session.add(DrainRow(worker=worker.name, created_by="key_test", created_at=utc_now()))
            else:
                await session.delete(await session.get_one(DrainRow, worker.name))

    fleet.loop.run(drain(True))
    worker.send_heartbeat((job_id, 1))
    assert receive_stop_request(worker, job_id) == "hand_back"
    worker.publish(job_id, 1, progress(3), status("queued", reason="handed_back"))
    worker.incarnation = "restarted"

    def explained() -> str:
        worker.send_heartbeat()
        fleet.wake()
        return str((fleet.job(job_id).waiting_reason or {}).get("message"))

    wait_until(lambda: "drained" in explained(), 20, "the reason to wait")
    assert fleet.job(job_id).worker is None
    fleet.loop.run(drain(False))
    worker.start(fleet, job_id, 2)
    assert fleet.job(job_id).failures == 0


@pytest.mark.extended
def test_a_job_paused_by_a_full_disk_resumes_automatically(
    fleet: SmallFleet, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.job_monitor.DISK_PAUSE_SECONDS", 0.0)
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    worker.disk_low = True
    worker.send_heartbeat((job_id, 1))
    wait_until(lambda: engine_of(fleet).workers()[0].disk_low, 15, "the server to know")
    worker.publish(job_id, 1, progress(3), status("paused", reason="disk_full", message="4 MiB are free."))
    other = fleet.submit()

    def waits() -> dict[str, str]:
        worker.send_heartbeat()
        fleet.wake()
        return {name: str((fleet.job(name).waiting_reason or {}).get("code")) for name in (job_id, other)}

    wait_until(lambda: waits() == {job_id: "disk", other: "disk"}, 20, "both to wait for the disk")
    assert fleet.job(job_id).status == "paused"
    worker.disk_low = False
    worker.start(fleet, job_id, 2)
    resumed = [event.fields for event in fleet.events(job_id) if event.fields.get("reason") == "resumed"]
    assert "Disk space is available again" in resumed[0]["message"]
    fleet.check_events(job_id)


# --- Requests to save a checkpoint ------------------------------------------------------------------------------------


def receive_save_request(worker: SimulatedWorker, job_id: str) -> tuple[int, int]:
    """The attempt and the number of the next request."""
    request = worker.receive(SaveRequest, job_id)
    assert isinstance(request, SaveRequest)
    return request.attempt, request.number


def test_a_save_request_is_repeated_until_a_checkpoint_names_it(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit(spec=spec())
    worker.start(fleet, job_id)
    change(fleet, JobRow, job_id, num_save_requests=1)
    assert [receive_save_request(worker, job_id) for _ in range(2)] == [(1, 1), (1, 1)]
    worker.publish(job_id, 1, progress(5), checkpoint(5))
    assert fleet.job(job_id).fulfilled_save_request == 0, "a periodic checkpoint may be older than the request"
    worker.publish(job_id, 3, {**checkpoint(6), "request": 1})
    assert fleet.job(job_id).fulfilled_save_request == 1
    worker.receive_all()
    change(fleet, JobRow, job_id, num_save_requests=2)
    assert receive_save_request(worker, job_id) == (1, 2), "a new number after the first one was fulfilled"


def test_the_next_attempt_fulfils_a_save_request_that_a_crash_left(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit(spec=spec())
    worker.start(fleet, job_id)
    change(fleet, JobRow, job_id, num_save_requests=1)
    worker.publish(job_id, 1, progress(5), status("failed", reason="process_killed"))
    worker.start(fleet, job_id, 2)
    assert receive_save_request(worker, job_id) == (2, 1)
    worker.publish(job_id, 1, progress(6), status("succeeded"), attempt=2)
    assert fleet.job(job_id).fulfilled_save_request == 1, "the job has ended with its final checkpoint"


def test_an_older_worker_gets_no_save_request(fleet: SmallFleet, client: "redis.Redis") -> None:
    worker = SimulatedWorker(client, SECRET, contract_version=SAVE_VERSION - 1)
    job_id = fleet.submit(spec=spec())
    worker.start(fleet, job_id)
    change(fleet, JobRow, job_id, num_save_requests=1)
    fleet.request(job_id, "cancel")
    assert receive_stop_request(worker, job_id) == "cancel"
    assert not [message for message in worker.receive_all() if isinstance(message, SaveRequest)]
