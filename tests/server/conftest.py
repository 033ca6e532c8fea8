"""Fixtures: one server for all tests of a file that neither stop nor break it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from migrations.upgrade import upgrade
from server.database.connections import Database
from tests.harness.valkey import ValkeyServer
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess, running_server
from zeta_core.system.database_url import sqlite_url


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url) as process:
        yield process


@pytest.fixture(scope="module")
def rows(server: ServerProcess) -> Rows:
    return Rows(server.settings)


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of a PostgreSQL database; ``None`` is SQLite in the home of the test."""
    return str(request.getfixturevalue("postgres_url")) if request.param == "postgresql" else None


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.extended)])
def module_database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of a PostgreSQL database for all tests of a file; ``None`` is SQLite in the home of their server."""
    if request.param == "sqlite":
        yield None
        return
    with request.getfixturevalue("postgres_server").fresh_database() as url:
        yield str(url)


@pytest.fixture
async def database(database_url: str | None, tmp_path: Path) -> AsyncIterator[Database]:
    """An open database of either kind with the current schema, for tests of functions that need no server."""
    url = database_url or sqlite_url(tmp_path / "zeta.db")
    await asyncio.to_thread(upgrade, url)
    database = Database(url)
    yield database
    await database.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
