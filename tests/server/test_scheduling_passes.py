"""Scheduling over several passes and servers: recent use, reservations, cached inputs, estimates, one scheduler."""

import asyncio
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, insert, select

from server.database.connections import Database
from server.database.recent_use import RecentUse, RecentUseRow, recent_use
from server.database.tables import AttemptRow, JobRow
from server.engine import scheduler
from server.engine.scheduling import turn as scheduling_turns
from server.engine.scheduling.input_keys import input_keys
from server.engine.scheduling.turn import scheduling_turn
from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.service import ZETA, clean_environment
from tests.harness.simulated_worker import SimulatedWorker, progress
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import SECRET, running_server, submit
from tests.server.stepped_scheduler import SteppedScheduler, change, waiting_code
from zeta_core.contract.job.events import utc_now

NO_REDIS = "redis://127.0.0.1:1/0"
HALF_LIFE_SECONDS = 3600.0


@pytest.fixture
def fleet(database_url: str | None, tmp_path: Path) -> Iterator[SmallFleet]:
    """A database without a running engine; the tests run the passes of the scheduler."""
    with small_fleet(tmp_path, NO_REDIS, database_url) as fleet:
        yield fleet


def running(fleet: SmallFleet, worker: str, slots: list[int], *, project: str = "default", **values: Any) -> str:
    """A running job on these slots."""
    job_id = fleet.submit(spec={"model": "m", "resources": {"gpus": len(slots)}})
    resolved = {"resources": {"gpus": len(slots), "nodes": 1}}
    started: dict[str, Any] = {"status": "running", "attempt": 1, "resolved_spec_json": resolved}
    change(fleet, job_id, project=project, worker=worker, slots=slots, **started, **values)
    return job_id


def stored_use(fleet: SmallFleet) -> Mapping[str, RecentUse]:
    async def read() -> Mapping[str, RecentUse]:
        async with fleet.database.read() as session:
            return await recent_use(session)

    return fleet.loop.run(read())


def estimate(fleet: SmallFleet, job_id: str) -> datetime | None:
    text = (fleet.job(job_id).waiting_reason or {})["estimated_start_at"]
    return None if text is None else datetime.fromisoformat(text)


def test_the_use_of_slots_is_sampled_and_the_other_project_comes_first(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet, half_life_seconds=HALF_LIFE_SECONDS)
    busy = running(fleet, "box", [0, 1], project="busy")
    stepped.update_workers(box={"slots": 3, "running": [(busy, 1), (busy, 1)]})
    stepped.step()
    assert list(stored_use(fleet)) == ["busy"]

    async def set_back() -> None:
        async with fleet.database.write() as session:
            row = await session.get_one(RecentUseRow, "busy")
            row.mean_slots, row.updated_at = 4.0, utc_now() - timedelta(seconds=HALF_LIFE_SECONDS)

    fleet.loop.run(set_back())
    stepped.step()
    assert stored_use(fleet)["busy"].mean_slots == pytest.approx(3.0, abs=0.01)  # half of 4, and half of 2
    old, new = fleet.submit(), fleet.submit()
    change(fleet, old, project="busy")
    change(fleet, new, project="other")
    assert stepped.step() == [(new, "box")]
    assert waiting_code(fleet, old) == "workers_busy"


def test_a_waiting_job_has_an_estimate_while_the_end_of_its_slots_is_known(
    fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ESTIMATE_SECONDS", 0.0)
    stepped = SteppedScheduler(fleet)
    first = running(fleet, "box", [0], progress={"step": 1, "eta_seconds": 7200.0})
    timed = running(fleet, "box", [1])
    change(fleet, timed, spec={"model": "m", "time_limit_seconds": 7200, "resources": {"gpus": 1}})

    async def record_attempt() -> None:
        async with fleet.database.write() as session:
            known = {"worker": "box", "incarnation": "first", "started_at": utc_now()}
            session.add(AttemptRow(job_id=timed, attempt=1, ran_seconds=3600.0, **known))

    fleet.loop.run(record_attempt())
    box = {"slots": 2, "kind": "cuda", "running": [(first, 1), (timed, 1)]}
    wide = fleet.submit(spec={"model": "m", "resources": {"gpus": 2}})
    behind = fleet.submit(spec={"model": "m", "resources": {"gpus": 1}})
    stepped.update_workers(box=box)
    assert stepped.step() == []
    start = estimate(fleet, wide)
    assert start is not None
    assert abs((start - utc_now()).total_seconds() - 7200) < 60
    assert estimate(fleet, behind) is None, "the length of the job ahead is unknown"
    since = (fleet.job(wide).waiting_reason or {})["since"]
    change(fleet, first, progress={"step": 2, "eta_seconds": 7195.0})
    stepped.step()
    assert estimate(fleet, wide) == start, "it is about the same"
    change(fleet, first, progress={"step": 2, "eta_seconds": 60.0})
    stepped.step()
    changed = estimate(fleet, wide)
    assert changed is not None
    assert abs((changed - utc_now()).total_seconds() - 3600) < 60
    change(fleet, timed, spec={"model": "m", "resources": {"gpus": 1}})
    stepped.step()
    assert estimate(fleet, wide) is None
    assert (fleet.job(wide).waiting_reason or {})["since"] == since


def test_a_job_with_a_time_limit_fills_reserved_slots_meanwhile(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    first = running(fleet, "box", [0], progress={"eta_seconds": 3600.0})
    wide = fleet.submit(spec={"model": "m", "resources": {"gpus": 2}})
    too_long, short = (
        fleet.submit(spec={"model": "m", "time_limit_seconds": limit, "resources": {"gpus": 1}})
        for limit in (3600, 1800)
    )
    stepped.update_workers(box={"slots": 2, "kind": "cuda", "running": [(first, 1)]})
    assert stepped.step() == [(short, "box")]
    assert (waiting_code(fleet, wide), waiting_code(fleet, too_long)) == ("resources", "workers_busy")


def test_a_dispatch_names_the_inputs_and_their_holder_is_preferred(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    spec = {"model": "org/model", "dataset": {"file": "file_1"}}
    keys = sorted(input_keys("default", "org/model", {"file": "file_1"}))
    job_id = fleet.submit(spec=spec)
    stepped.update_workers(empty=8, holder={"slots": 2, "cached_inputs": keys})
    assert stepped.step() == [(job_id, "holder")]
    assert stepped.sent[-1].inputs == keys


def test_a_pass_that_cannot_place_a_job_costs_the_same_for_a_long_queue(fleet: SmallFleet) -> None:
    """There are free slots, but no waiting job can use them."""
    stepped = SteppedScheduler(fleet)
    job_id = fleet.submit(spec={"model": "m", "resources": {"gpus": 1}})
    stepped.update_workers(plain=4, box={"slots": 1, "kind": "cuda", "running": [("job_other", 1)]})
    stepped.step()
    engine = fleet.database._reader.sync_engine  # pyright: ignore[reportPrivateUsage]
    nothing_changed = partial(stepped.step, queue_changed=False)
    short = _statements(engine, nothing_changed)
    row = fleet.job(job_id)

    async def fill() -> None:
        async with fleet.database.write() as session:
            columns = {column.key: getattr(row, column.key) for column in JobRow.__mapper__.column_attrs}
            await session.execute(insert(JobRow), [{**columns, "id": f"job_{number}"} for number in range(1000)])

    fleet.loop.run(fill())
    for _ in range(2):
        stepped.step()
    assert _statements(engine, nothing_changed) == short
    assert not any("time_limit_seconds" in text and "LIMIT" in text for text in short), "no page was read"


def test_a_pass_starts_many_jobs_with_as_many_statements_as_two(fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(fleet)
    stepped.update_workers(first=1, second=40)
    fleet.submit()
    assert len(stepped.step()) == 1
    engine = fleet.database._writer.sync_engine  # pyright: ignore[reportPrivateUsage]
    counts: list[int] = []
    for num_jobs in (2, 30):
        for _ in range(num_jobs):
            fleet.submit()
        counts.append(len(_statements(engine, stepped.step)))
    assert len(stepped.sent) == 1 + 2 + 30
    assert counts[1] <= counts[0]


def _statements(engine: Engine, act: Callable[[], object]) -> list[str]:
    """The SQL that is executed meanwhile."""
    found: list[str] = []

    def note(*arguments: Any) -> None:
        found.append(str(arguments[2]))

    event.listen(engine, "before_cursor_execute", note)
    act()
    event.remove(engine, "before_cursor_execute", note)
    return found


def test_only_one_of_several_servers_schedules_at_a_time(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling_turns, "WAIT_SECONDS", 0.3)
    with small_fleet(tmp_path, NO_REDIS, postgres_url) as fleet:
        stepped = SteppedScheduler(fleet)
        job_id = fleet.submit()
        stepped.update_workers(box=1)

        async def pass_during_the_turn_of_another_server() -> None:
            other = Database(fleet.settings.database)  # separate connections, like another process
            async with scheduling_turn(other) as turn:
                assert turn is not None
                await turn.keep()
                await stepped.scheduler.one_pass()
            await other.close()

        fleet.loop.run(pass_during_the_turn_of_another_server())
        assert stepped.sent == []
        assert stepped.step() == [(job_id, "box")]


def test_two_servers_take_turns_and_start_every_job_once(tmp_path: Path, postgres_url: str) -> None:
    with small_fleet(tmp_path, NO_REDIS, postgres_url) as fleet:
        both = [SteppedScheduler(fleet), SteppedScheduler(fleet)]
        jobs = [fleet.submit() for _ in range(8)]
        for number, job_id in enumerate(jobs):
            change(fleet, job_id, project="ab"[number % 2])
        for stepped in both:
            stepped.update_workers(box=6)

        async def pass_together() -> None:
            await asyncio.gather(*(stepped.scheduler.one_pass() for stepped in both))

        fleet.loop.run(pass_together())
        sent = [message for stepped in both for message in stepped.sent]
        assert sorted(message.job_id for message in sent) == sorted(jobs[:6])
        assert min(len(stepped.sent) for stepped in both) == 0, "the second one had nothing left to place"

        async def waiting() -> list[str]:
            async with fleet.database.read() as session:
                return list(await session.scalars(select(JobRow.id).where(JobRow.worker.is_(None))))

        assert sorted(fleet.loop.run(waiting())) == sorted(jobs[6:])


@pytest.mark.extended
def test_users_see_why_and_roughly_when_a_job_starts(tmp_path: Path, shared_valkey: ValkeyServer) -> None:
    with (
        running_server(tmp_path / "home", shared_valkey.second_url) as server,
        shared_valkey.client(shared_valkey.second_url) as client,
        server.http() as admin,
    ):
        worker = SimulatedWorker(client, SECRET, "w1")
        body = {"project": "other", "name": "k", "scopes": ["submit"]}
        key = admin.post("/v1/keys", json=body).raise_for_status().json()["key"]
        admin_job = submit(admin)["id"]

        def dispatched() -> bool:
            worker.send_heartbeat()
            return worker.num_dispatched() > 0

        wait_until(dispatched, 20, "the first job to be dispatched")
        assert worker.claim(admin_job).granted
        worker.publish(admin_job, 1, progress(1, total_steps=100, eta_seconds=7000.0))
        with server.http(key) as http:
            job_id = submit(http)["id"]

            def reason() -> dict[str, Any] | None:
                worker.send_heartbeat((admin_job, 1))
                found = http.get(f"/v1/jobs/{job_id}").json()["waiting_reason"]
                return found if found["estimated_start_at"] else None

            found = wait_until(reason, 30, "an estimate of the start")
            assert found is not None
            assert found["code"] == "workers_busy"
            left = (datetime.fromisoformat(found["estimated_start_at"]) - utc_now()).total_seconds()
            assert 6000 < left < 7000
            job = http.get(f"/v1/jobs/{job_id}")
            assert job.json()["queue_position"] == 1
            assert admin_job not in job.text, "jobs of other projects are confidential"
        with httpx.Client(base_url=server.url, timeout=30) as browser:
            browser.post("/login", data={"key": key})
            assert "Starts in about 1 h 5" in browser.get(f"/jobs/{job_id}").text
        environment = {**clean_environment(), "ZETA_URL": server.url, "ZETA_API_KEY": key}
        command = [ZETA, "job", job_id]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
        assert re.search("estimated start +in about 1 h 5", shown), shown
        assert re.search("queue position +1", shown), shown
