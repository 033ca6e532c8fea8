"""Two servers on one database and one Redis: no work is done twice, and either may stop at any time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import connections
from server.database.connections import Database
from server.database.service_identity import identify_service
from server.database.transitions import lock_job
from server.engine.engine import Engine
from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from zeta_core.contract.wire.messages import SERVER_GROUP, SERVER_STREAM
from zeta_core.contract.wire.run_directory import PUBLISHED_FILE


@pytest.fixture
def fleet(database_url: str | None, tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url, database_url) as fleet:
        fleet.start_engine()
        yield fleet


@pytest.mark.extended
def test_two_servers_process_every_job_line_and_command_once(fleet: SmallFleet, shared_valkey: ValkeyServer) -> None:
    async def open_second() -> tuple[Database, Engine]:
        database = Database(fleet.settings.database)  # separate connections, like another process
        engine = Engine(database, fleet.settings, await identify_service(database))
        await engine.claim()
        engine.start()
        return database, engine

    async def close(database: Database, engine: Engine) -> None:
        await engine.stop()
        await database.close()

    second = fleet.loop.run(open_second())
    for name in ("w1", "w2"):
        fleet.start_worker(name, ZETA_WORKER_SLOTS="2")
    jobs = [fleet.submit(steps="60", checkpoint_every="10") for _ in range(6)]
    endless = [fleet.submit(steps="100000") for _ in range(2)]
    for job_id, action in zip(endless, ("pause", "cancel"), strict=True):
        fleet.wait_for_step(job_id, 2)
        fleet.request(job_id, action)
    fleet.wait_for_status(endless[0], "paused")
    fleet.wait_for_status(endless[1], "cancelled")
    last = [fleet.submit(steps="60", checkpoint_every="10") for _ in range(4)]
    fleet.wait_for_step(last[0], 2)
    with shared_valkey.client() as client:
        assert _readers(client) == 2
        fleet.loop.run(close(*second))  # the other server takes over its messages
        for job_id in (*jobs, *last):
            fleet.wait_for_status(job_id, "succeeded", 60)
        assert _readers(client) == 1
    for job_id in (*jobs, *endless, *last):
        assert [attempt.attempt for attempt in fleet.attempts(job_id)] == [1]
        fleet.check_events(job_id)
    started = [file.parent for file in fleet.settings.home.glob(f"**/runs/*/*/{PUBLISHED_FILE}")]
    wait_until(lambda: len(started) == 12, 1, "one run directory for each job")


def _readers(client: "redis.Redis") -> int:
    groups: list[dict[str, object]] = list(client.xinfo_groups(SERVER_STREAM))  # pyright: ignore[reportArgumentType]
    (group,) = [group for group in groups if group["name"] == SERVER_GROUP]
    return int(str(group["consumers"]))


@pytest.mark.extended
def test_a_server_frozen_in_a_transaction_blocks_others_only_for_seconds(
    postgres_url: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = "BEGIN; SET LOCAL lock_timeout = '500ms'; SET LOCAL idle_in_transaction_session_timeout = '3s'"
    monkeypatch.setattr(connections, "POSTGRES_BEGIN", short)
    with small_fleet(tmp_path, redis_url, postgres_url) as fleet:
        fleet.start_engine()
        job_id = fleet.submit(steps="3")

        async def lock_and_vanish() -> AsyncSession:
            session = AsyncSession(Database(fleet.settings.database)._writer)  # pyright: ignore[reportPrivateUsage]
            await lock_job(session, job_id)
            return session

        vanished = fleet.loop.run(lock_and_vanish())
        fleet.start_worker()
        fleet.wait_for_status(job_id, "succeeded")
        assert [attempt.attempt for attempt in fleet.attempts(job_id)] == [1]
        with pytest.raises(DBAPIError):
            fleet.loop.run(vanished.commit())
