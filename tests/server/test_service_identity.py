"""Two services on one Redis, artifact store or copied database: the second one refuses to start."""

import asyncio
import math
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from migrations.upgrade import upgrade
from server.database.connections import Database
from server.database.service_identity import identify_service
from server.engine.database_claim import EXPIRY_SECONDS, RENEW_SECONDS
from tests.harness.postgres import PostgresServer
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import ServerProcess, running_server


def service_id(url: str) -> str:
    """The service id of the database, as determined by a server at its start."""

    async def identify() -> str:
        database = Database(url)
        try:
            return await identify_service(database)
        finally:
            await database.close()

    return asyncio.run(identify())


def startup_error(server: ServerProcess) -> str:
    """The error message of a server that refuses to start."""
    with pytest.raises(AssertionError, match="the server ended with 2"):
        server.start()
    return server.log()


def readyz(server: ServerProcess) -> dict[str, Any]:
    return httpx.get(f"{server.url}/readyz", verify=False, timeout=30).json()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database that two homes can share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.db"
    return str(request.getfixturevalue("postgres_url"))


def test_a_copied_database_gets_a_new_service_id_and_a_renamed_one_keeps_it(tmp_path: Path) -> None:
    first, second, copy = (tmp_path / f"{name}.db" for name in ("first", "second", "copy"))
    upgrade(f"sqlite:///{first}")
    original = service_id(f"sqlite:///{first}")
    assert service_id(f"sqlite:///{first}") == original
    shutil.copy2(first, copy)
    copied = service_id(f"sqlite:///{copy}")
    assert copied != original
    assert service_id(f"sqlite:///{copy}") == copied
    first.rename(second)
    assert service_id(f"sqlite:///{second}") == original


@pytest.mark.extended
def test_a_copied_postgresql_database_gets_a_new_service_id(postgres_server: PostgresServer) -> None:
    with postgres_server.fresh_database() as url, postgres_server.fresh_database() as other:
        upgrade(url)
        original, name = service_id(url), url.rpartition("/")[2]
        copy = other.rpartition("/")[2]
        with psycopg.connect(postgres_server.url("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{copy}"'.encode())
            connection.execute(f'CREATE DATABASE "{copy}" TEMPLATE "{name}"'.encode())
        assert service_id(other) != original
        assert service_id(url) == original


@pytest.mark.extended
def test_a_second_service_on_one_redis_refuses_to_start(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "first", redis_url) as first:
        second = ServerProcess(tmp_path / "second", redis_url)
        message = startup_error(second)
        assert "ZETA_REDIS_URL is database 0 of 127.0.0.1:" in message
        assert f"in use by service {service_id(first.settings.database)} on" in message
        assert "Give each service its own Redis database" in message
        first.end(signal.SIGKILL)
        second.process = None
        second.start()  # the claim of a killed service expires
        second.end()
        first.start()  # a service that stops releases its claim


@pytest.mark.extended
def test_a_copy_using_the_originals_store_refuses_to_start(tmp_path: Path, redis_url: str) -> None:
    store = {"ZETA_ARTIFACTS_URL": str(tmp_path / "store")}
    with running_server(tmp_path / "original", redis_url, **store) as server:
        original = service_id(server.settings.database)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    message = startup_error(ServerProcess(tmp_path / "copy", redis_url, **store))
    assert f"which belongs to service {original}" in message
    assert f"start it once with ZETA_ARTIFACTS_TAKE_OVER={original}" in message
    with running_server(tmp_path / "copy", redis_url, **store, ZETA_ARTIFACTS_TAKE_OVER=original):
        pass
    with running_server(tmp_path / "copy", redis_url, **store):
        pass
    assert f"which belongs to service {service_id(f'sqlite:///{tmp_path}/copy/zeta.db')}" in startup_error(
        ServerProcess(tmp_path / "original", redis_url, **store)
    )


@pytest.mark.extended
def test_a_copied_home_takes_over_its_own_store_but_not_a_linked_one(tmp_path: Path, redis_url: str) -> None:
    with running_server(tmp_path / "original", redis_url):
        pass
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    with running_server(tmp_path / "copy", redis_url) as server:
        assert "its owner is now this service" in server.log()
    (tmp_path / "original/artifacts").rename(tmp_path / "large-disk")
    (tmp_path / "original/artifacts").symlink_to(tmp_path / "large-disk")
    with running_server(tmp_path / "original", redis_url):
        pass
    subprocess.run(["cp", "-a", tmp_path / "original", tmp_path / "clone"], check=True)
    assert "ZETA_ARTIFACTS_TAKE_OVER=" in startup_error(ServerProcess(tmp_path / "clone", redis_url))


@pytest.mark.extended
def test_a_server_on_another_redis_rejects_a_database_in_use(
    tmp_path: Path, redis_url: str, own_valkey: ValkeyServer, database_url: str
) -> None:
    first = ServerProcess(tmp_path / "first", redis_url, database_url)
    second = ServerProcess(tmp_path / "second", own_valkey.url, database_url)
    first.start()
    try:
        message = startup_error(second)
        second.process = None
        assert "ZETA_DATABASE_URL is " in message
        assert f"with Redis database 0 of {redis_url.split('/')[2]}; this server has another ZETA_REDIS_URL" in message
        assert f"Redis database 0 of 127.0.0.1:{own_valkey.port}. Give every server" in message
        assert message.count("ZETA_DATABASE_URL") == 1, "one error, without a traceback"
        assert not (tmp_path / "second/artifacts/service.json").exists()

        first.end(signal.SIGKILL)
        first.start()  # the same Redis knows the claim of a server that crashed
        first.end(signal.SIGKILL)
        second.start()  # takes over after the claim has expired
        second_log = startup_error(first)
        first.process = None
        assert f"with Redis database 0 of 127.0.0.1:{own_valkey.port}; this server" in second_log

        second.end()
        first.start()  # a server that stops releases its claim
        assert readyz(first)["status"] == "ok"
    finally:
        for server in (first, second):
            if server.process is not None:
                server.end()


@pytest.mark.extended
def test_a_server_keeps_its_database_when_its_redis_loses_all_data(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    with running_server(tmp_path / "home", own_valkey.url) as server:
        with own_valkey.client() as client:
            client.flushall()
        wait_for_renewal(server)
        assert readyz(server)["status"] == "ok"
        server.end(signal.SIGKILL)
        with own_valkey.client() as client:
            client.flushall()
        server.start()
        assert readyz(server)["status"] == "ok"


def claim_of(server: ServerProcess) -> str | None:
    """The claim that is stored in a server's SQLite database."""
    with closing(sqlite3.connect(server.settings.database.removeprefix("sqlite:///"))) as connection:
        return connection.execute("SELECT claim FROM service").fetchone()[0]


def wait_for_renewal(server: ServerProcess) -> None:
    """Wait until the server's claim has changed."""
    before = claim_of(server)
    wait_until(lambda: claim_of(server) not in (None, before), 30, "the claim to be renewed")


@pytest.mark.extended
def test_a_server_keeps_its_database_during_an_outage_of_its_redis(
    tmp_path: Path, redis_url: str, own_valkey: ValkeyServer
) -> None:
    with running_server(tmp_path / "first", own_valkey.url, f"sqlite:///{tmp_path}/shared.db") as first:
        own_valkey.stop()
        for _ in range(math.ceil(EXPIRY_SECONDS / RENEW_SECONDS)):
            wait_for_renewal(first)
        second = ServerProcess(tmp_path / "second", redis_url, first.settings.database)
        assert "which is in use by the server on" in startup_error(second)
        own_valkey.start()
        wait_until(lambda: readyz(first)["status"] == "ok", 60, "the first server to recover")


@pytest.mark.extended
def test_a_server_cut_off_from_redis_does_not_block_others(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    relay = TcpRelay(own_valkey.port)
    with (
        closing(relay),
        running_server(
            tmp_path / "first", f"redis://127.0.0.1:{relay.port}/0", f"sqlite:///{tmp_path}/shared.db"
        ) as first,
    ):
        relay.cut()
        for _ in range(2):
            wait_for_renewal(first)
        with running_server(tmp_path / "second", own_valkey.url, first.settings.database) as second:
            wait_for_renewal(first)
            assert readyz(second)["status"] == "ok"


@pytest.mark.extended
def test_a_server_started_without_redis_does_not_claim_a_database_in_use(
    tmp_path: Path, redis_url: str, own_valkey: ValkeyServer
) -> None:
    database_url = f"sqlite:///{tmp_path}/shared.db"
    own_valkey.stop()
    with (
        running_server(tmp_path / "first", redis_url, database_url) as first,
        running_server(tmp_path / "second", own_valkey.url, database_url) as second,
    ):
        own_valkey.start()
        wait_until(lambda: "which is in use by the server on" in str(readyz(second)), 60, "the refusal")
        assert "which is in use by the server on" not in str(readyz(first))
        first.end()
        wait_until(lambda: "which is in use by the server on" not in str(readyz(second)), 60, "the takeover")
