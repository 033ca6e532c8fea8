"""Fixtures: one server for all tests of a file that neither stop nor break it."""

from collections.abc import Iterator

import httpx
import pytest

from tests.harness.valkey import ValkeyServer
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess, running_server


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
