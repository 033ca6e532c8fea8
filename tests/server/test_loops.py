"""The loops of a server survive invalid entries, a misbehaving Redis and a database failover."""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
import redis
from psycopg import sql
from sqlalchemy import text

from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.non_redis_server import non_redis_server
from tests.harness.postgres import PostgresServer
from tests.harness.simulated_worker import SimulatedWorker, progress
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import SPEC, error_of, running_server, submit
from zeta_core.contract.wire.messages import (
    LAST_STREAM_ID,
    SERVER_STREAM,
    WORKERS_HASH,
    Claim,
    StopRequest,
    worker_stream,
)
from zeta_core.contract.wire.signatures import derive_key, sign

KEY = derive_key(SECRET, "w")
CLAIM = Claim(job_id="job_1", attempt=1, worker="w", incarnation="i")
STOP_REQUEST = StopRequest(job_id="job_1", attempt=1, action="cancel")


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url) as fleet:
        fleet.start_engine()
        yield fleet


def num_dropped(fleet: SmallFleet, source: str) -> int:
    assert fleet.engine is not None
    return fleet.engine.dropped.counts[source]


def signed_message(**changes: Any) -> dict[Any, Any]:
    return {**sign(CLAIM, KEY, channel=SERVER_STREAM), **changes}


POISON: dict[str, dict[Any, Any]] = {
    "bytes that are not UTF-8": {b"\xc3": b"\x28"},
    "a body that is not UTF-8": signed_message(body=b"\xc3\x28"),
    "a signature that is not ASCII": signed_message(signature="ünsigniert"),
    "a signature that is not UTF-8": signed_message(signature=b"\x80" * 64),
    "no signature": {"body": "{}"},
    "a signed message that is not for servers": {**sign(STOP_REQUEST, KEY, channel=SERVER_STREAM)},
}


def test_invalid_entries_are_removed_counted_and_logged_once(
    fleet: SmallFleet, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    for fields in POISON.values():
        client.xadd(SERVER_STREAM, fields)
    client.hset(WORKERS_HASH, mapping={"deep": "[" * 100_000, "bytes": b"\xff", b"\xfe": "{}", "number": "5"})
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1
    wait_until(lambda: num_dropped(fleet, "heartbeats") >= 4, 30, "the heartbeats to be counted")
    assert num_dropped(fleet, "stream") == len(POISON)
    assert client.xlen(SERVER_STREAM) == 0
    wait_until(lambda: set(client.hkeys(WORKERS_HASH)) == {"simulated"}, 30, "the hash to be clean")
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {record.exc_info for record in records} == {None}, caplog.text
    causes = Counter(record.getMessage().partition(" in Redis: ")[0] for record in records)
    # One for each source and cause.
    assert causes == {"Rejected a message from stream": 2, "Rejected a message from heartbeats": 2}, caplog.text
    assert fleet.engine is not None
    assert fleet.engine.dropped.rejected.total() == len(POISON) + 4
    assert fleet.engine is not None
    assert fleet.engine.loops.troubles() == {}


@pytest.mark.parametrize("key", [SERVER_STREAM, worker_stream("simulated")])
def test_a_redis_key_of_the_wrong_type_is_removed(fleet: SmallFleet, client: redis.Redis, key: str) -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    client.delete(key)
    client.set(key, "not what it should be")
    batch = worker.batch(job_id, 1, progress(1))

    def is_answered() -> bool:
        with suppress(redis.ResponseError):
            worker.send(batch)
        return client.type(worker_stream(worker.name)) == "stream" and client.type(key) != "string"

    wait_until(is_answered, 30, "the server to answer")


def test_heartbeats_that_are_not_a_hash_are_removed(fleet: SmallFleet, client: redis.Redis) -> None:
    client.set(WORKERS_HASH, "not what it should be")
    wait_until(lambda: client.type(WORKERS_HASH) != "string", 30, "the key to be removed")
    worker = SimulatedWorker(client, SECRET)
    worker.start(fleet, fleet.submit())


def test_a_stream_that_is_full_is_recreated(fleet: SmallFleet, client: redis.Redis) -> None:
    worker = SimulatedWorker(client, SECRET)
    job_id = fleet.submit()
    worker.start(fleet, job_id)
    client.xadd(SERVER_STREAM, {"nonsense": "1"}, id=LAST_STREAM_ID.decode())
    wait_until(lambda: num_dropped(fleet, "stream") == 1, 30, "the entry to be removed")
    wait_until(lambda: _takes_entries(client), 30, "the stream to take entries")
    assert worker.publish(job_id, 1, progress(1)).stored_line == 1


def _takes_entries(client: redis.Redis) -> bool:
    try:
        return bool(client.xadd(SERVER_STREAM, {"nonsense": "2"}))
    except redis.ResponseError:
        return False


@pytest.mark.extended
@pytest.mark.parametrize(
    "response", [b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>", b":one\r\n", b"*1\r\n$-7\r\n\xff", b"-LOADING x\r\n"]
)
def test_nonsense_from_redis_is_a_recoverable_outage(tmp_path: Path, own_valkey: ValkeyServer, response: bytes) -> None:
    with running_server(tmp_path / "home", own_valkey.url) as server, server.http() as http:

        def ready() -> dict[str, Any]:
            return http.get("/readyz").json()

        wait_until(lambda: ready()["status"] == "ok", 30, "the server to be ready")
        own_valkey.kill()
        with non_redis_server(own_valkey.port, response):
            wait_until(
                lambda: {"loop messages", "loop heartbeats"} <= set(ready()["parts"]), 30, "both loops to be reported"
            )
            assert ready()["parts"]["loop messages"].startswith("failing since 20")
            job = http.post("/v1/jobs", json=SPEC)
            assert job.status_code == 201
        own_valkey.start()
        wait_until(lambda: ready()["status"] == "ok", 60, "the server to be ready again")
        with own_valkey.client() as client:
            client.xadd(SERVER_STREAM, {b"\xf0": b"\x28"})
        wait_until(
            lambda: 'dropped_messages_total{place="stream"} 1' in http.get("/metrics").text, 30, "it to be counted"
        )
        # A loop that runs rarely may use a connection from before the outage once more, and fails once more then.
        wait_until(lambda: "zeta_failing_loops 0.0" in http.get("/metrics").text, 30, "no loop to be failing")
        assert "Traceback" not in server.log()


@pytest.mark.extended
def test_a_read_only_database_is_unavailable_until_it_is_writable(
    tmp_path: Path, redis_url: str, postgres_server: PostgresServer
) -> None:
    with postgres_server.fresh_database() as url:
        name = url.rpartition("/")[2]
        with running_server(tmp_path / "home", redis_url, url) as server, server.http() as http:
            job = http.post("/v1/jobs", json=SPEC).json()
            assert http.get("/readyz").status_code == 200
            with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as admin:
                admin.execute(_alter(name, "SET default_transaction_read_only = on"))
                _end_sessions(admin, name)
                wait_until(lambda: http.get("/readyz").status_code == 503, 30, "the server not to be ready")
                for path, body in (("/v1/jobs", SPEC), (f"/v1/jobs/{job['id']}/cancel", None)):
                    response = http.post(path, json=body)
                    assert (response.status_code, error_of(response)["code"]) == (503, "database_unavailable")
                    assert response.headers["retry-after"]
                admin.execute(_alter(name, "RESET default_transaction_read_only"))
            wait_until(lambda: http.get("/readyz").status_code == 200, 30, "the server to be ready")
            assert http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
            assert "Traceback" not in server.log()


@pytest.mark.extended
def test_a_read_only_sqlite_file_is_not_ready(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server, server.http() as http:
        assert http.get("/readyz").status_code == 200
        with closing(sqlite3.connect(server.home / "zeta.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            wait_until(lambda: http.get("/readyz").status_code == 503, 30, "the server not to be ready")
            assert http.get("/v1/jobs").status_code == 200  # readers do not wait
            other.execute("ROLLBACK")
        wait_until(lambda: http.get("/readyz").status_code == 200, 30, "the server to be ready")
        assert http.post("/v1/jobs", json=SPEC).status_code == 201


def _alter(name: str, change: LiteralString) -> sql.Composed:
    return sql.SQL("ALTER DATABASE {} " + change).format(sql.Identifier(name))


def _end_sessions(admin: psycopg.Connection[Any], name: str) -> None:
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])


@pytest.mark.extended
@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced"])
def test_a_deleted_sqlite_file_accepts_no_jobs(tmp_path: Path, redis_url: str, fate: str) -> None:
    with running_server(tmp_path / "home", redis_url) as server, server.http() as http:
        kept = submit(http)
        file, away = server.home / "zeta.db", tmp_path / "away.db"
        file.rename(away)
        if fate == "replaced":
            file.write_bytes(away.read_bytes())
        if fate == "deleted":
            away.unlink()
        response = http.post("/v1/jobs", json=SPEC)
        assert (response.status_code, error_of(response)["code"]) == (503, "database_unavailable")
        assert http.get(f"/v1/jobs/{kept['id']}").status_code == 503
        wait_until(lambda: http.get("/readyz").status_code == 503, 30, "the server to be not ready")
        wait_until(lambda: "deleted, moved or replaced" in server.log(), 30, "a loop to log the reason")
        assert file.exists() == (fate == "replaced"), "no empty database is created"
        if fate == "moved":
            away.rename(file)
            wait_until(lambda: http.get("/readyz").status_code == 200, 30, "the server to be ready again")
            assert http.get(f"/v1/jobs/{kept['id']}").json()["id"] == kept["id"]


def test_no_session_state_outlives_a_postgresql_transaction(
    tmp_path: Path, redis_url: str, postgres_server: PostgresServer
) -> None:
    with postgres_server.fresh_database() as url, small_fleet(tmp_path, redis_url, url) as fleet:

        async def sessions() -> list[tuple[int, str]]:
            seen: list[tuple[int, str]] = []
            for _ in range(8):  # more often than psycopg's default before it prepares a statement
                async with fleet.database.read() as session:
                    prepared = await session.scalar(text("SELECT count(*) FROM pg_prepared_statements"))
                    seen.append((int(prepared or 0), str(await session.scalar(text("SHOW lock_timeout")))))
                connection: Any = await fleet.database._reader.raw_connection()  # pyright: ignore[reportPrivateUsage]
                cursor = await connection.driver_connection.execute("SHOW lock_timeout")
                seen.append((0, "outside " + str((await cursor.fetchone())[0])))
                connection.close()
            return seen

        assert set(fleet.loop.run(sessions())) == {(0, "10s"), (0, "outside 0")}


@pytest.mark.extended
def test_the_date_style_of_the_database_does_not_matter(
    tmp_path: Path, redis_url: str, postgres_server: PostgresServer
) -> None:
    with postgres_server.fresh_database() as url:
        with psycopg.connect(url, autocommit=True) as connection:
            name = connection.info.dbname
            connection.execute(sql.SQL("ALTER DATABASE {} SET datestyle = 'SQL, DMY'").format(sql.Identifier(name)))
        with running_server(tmp_path, redis_url, url) as server, server.http() as http:
            job = submit(http)
            assert http.get(f"/v1/jobs/{job['id']}").json()["created_at"] == job["created_at"]
