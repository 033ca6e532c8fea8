"""Fixtures for the tests of every package."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from playwright.sync_api import Browser

from tests.harness.browser import BrowserUnavailable, running_browser
from tests.harness.gpus import count_gpus
from tests.harness.namespaces import Namespaces, NamespacesUnavailable, network_namespaces
from tests.harness.npm_packages import NpmUnavailable
from tests.harness.page_inspector import PageInspector
from tests.harness.postgres import PostgresServer, PostgresUnavailable
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.valkey import ValkeyServer

# Settings of the developer's shell that would change the behaviour of the code under test or the servers it uses.
FOREIGN = (
    *("ZETA_", "AWS_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_", "WANDB_", "MLFLOW_", "TORCH_LOGS"),
    *("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CUBLAS_WORKSPACE_CONFIG"),
)
PROXIES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "FTP_PROXY"})
RANKS = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})


def pytest_configure() -> None:
    """Clear this process's environment before any test module reads it; children inherit the remaining variables."""
    os.umask(0o022)  # programs that the tests copy are run by other accounts
    for name in list(os.environ):  # noqa: TID251 - the tests' own environment
        if name.startswith(FOREIGN) or name.upper() in PROXIES or name in RANKS:
            del os.environ[name]  # noqa: TID251


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU on machines without one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and count_gpus() == 0:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine's driver shows none"))


@pytest.fixture(scope="module")  # not longer, because Playwright's event loop prevents ``asyncio.run`` in this thread
def chromium() -> Iterator[Browser]:
    """Debian's Chromium without a window; skips the test on a machine without it."""
    try:
        with running_browser() as browser:
            yield browser
    except BrowserUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def inspector(pytestconfig: pytest.Config) -> PageInspector:
    """Checks pages with axe-core; skips the test if it can't be downloaded."""
    assert pytestconfig.cache is not None
    try:
        return PageInspector(pytestconfig.cache.mkdir("npm"))
    except NpmUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Namespaces]:
    """Four hosts with a network of their own; skips the test where they can't be created."""
    try:
        with network_namespaces(4) as hosts:
            yield hosts
    except NamespacesUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """The S3 server of the session. Tests use buckets of their own."""
    server = SeaweedServer(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def shared_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """The Valkey server of the session. Tests use `redis_url`, which is empty at the start of each test."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def redis_url(shared_valkey: ValkeyServer) -> str:
    """The URL of a real, empty Redis that tests must not stop (use `own_valkey` for that)."""
    with shared_valkey.client() as client:
        client.flushall()
    return shared_valkey.url


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A started Valkey server for a single test, which may kill, stop and start it."""
    server = ValkeyServer(tmp_path / "valkey")
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The PostgreSQL server of the session. Tests use `postgres_url`."""
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other accounts
    try:
        try:
            server = PostgresServer(directory)
            server.start()
        except PostgresUnavailable as error:
            pytest.skip(str(error))
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    with postgres_server.fresh_database() as url:
        yield url


@pytest.fixture
def client(shared_valkey: ValkeyServer, redis_url: str) -> "Iterator[redis.Redis]":
    """A client for `redis_url`."""
    with shared_valkey.client() as connected:
        yield connected
