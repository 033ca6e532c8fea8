"""Redis may lose its data or be unavailable: no event is lost or duplicated, and runs continue."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until


@pytest.fixture
def own_fleet(tmp_path: Path, own_valkey: ValkeyServer) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, own_valkey.url) as fleet:
        fleet.start_engine()
        yield fleet


@pytest.mark.extended
def test_flushall_during_a_run_neither_loses_nor_duplicates_events(
    fleet: SmallFleet, redis_url: str, shared_valkey: ValkeyServer
) -> None:
    fleet.start_worker()
    job_id = fleet.submit(steps="80", seconds_per_step="0.05", checkpoint_every="20")
    fleet.wait_for_step(job_id, 10)
    with shared_valkey.client() as client:
        for step in (20, 30, 40):
            client.flushall()
            fleet.wait_for_step(job_id, step)
    job = fleet.wait_for_status(job_id, "succeeded")
    assert (job.attempt, job.failures, job.lost_workers) == (1, 0, 0)
    assert fleet.checkpoints(job_id) == ["final", "step-40", "step-60", "step-80"]
    steps = [event.fields["step"] for event in fleet.events(job_id) if event.type == "progress"]
    assert steps == list(range(1, 81))
    fleet.check_events(job_id)


@pytest.mark.extended
def test_a_job_survives_an_outage_of_redis(own_fleet: SmallFleet, own_valkey: ValkeyServer) -> None:
    own_fleet.start_worker()
    running = own_fleet.submit(steps="60", seconds_per_step="0.05", checkpoint_every="30")
    own_fleet.wait_for_step(running, 5)
    own_valkey.kill()
    waiting = own_fleet.submit(steps="3")
    engine = own_fleet.engine
    assert engine is not None
    wait_until(lambda: not engine.redis_ok, 60, "the server to notice the outage")
    wait_until(
        lambda: "Redis" in ((own_fleet.job(waiting).waiting_reason or {}).get("message") or ""), 60, "the reason"
    )
    wait_until(lambda: (own_fleet.settings.artifacts / f"jobs/{running}/checkpoints/step-30").is_dir(), 60, "step-30")
    assert own_fleet.job(running).status == "running"
    own_valkey.start()
    assert own_fleet.wait_for_status(running, "succeeded").attempt == 1
    assert own_fleet.wait_for_status(waiting, "succeeded", 60).attempt == 1
    own_fleet.check_events(running)
    own_fleet.check_events(waiting)


@pytest.mark.extended
def test_a_job_survives_an_emptied_redis_and_a_restarted_server(
    own_fleet: SmallFleet, own_valkey: ValkeyServer
) -> None:
    own_fleet.start_worker()
    job_id = own_fleet.submit(steps="100", seconds_per_step="0.05")
    own_fleet.wait_for_step(job_id, 5)
    own_fleet.stop_engine()
    with own_valkey.client() as client:
        client.flushall()
    own_valkey.restart()
    own_fleet.start_engine()
    own_fleet.wait_for_step(job_id, 20)
    assert own_fleet.wait_for_status(job_id, "succeeded").attempt == 1
    own_fleet.check_events(job_id)
