"""The services that the benchmarks of the server compare: this project's server without workers, and its peer.

Each runs in its own process, with a real Valkey and, if requested, a real PostgreSQL that flushes to disk.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.http_load import request_bytes, run_load
from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.postgres import PostgresServer
from tests.harness.service import clean_environment
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import API_KEY, REPOSITORY, SPEC, ServerProcess

DatabaseKind = Literal["sqlite", "postgresql"]
JOB = {**SPEC, "entity_name": "benchmark", "metadata": {"team": "a"}}
HEADERS = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
START_SECONDS = 60.0


@dataclass(frozen=True)
class Databases:
    """URLs of new databases, and the folder of the benchmark."""

    folder: Path
    kind: DatabaseKind
    server: PostgresServer | None
    stack: ExitStack

    def new_url(self) -> str | None:
        """The URL of a new PostgreSQL database; ``None`` for SQLite, where the server creates its file."""
        return None if self.server is None else self.stack.enter_context(self.server.fresh_database())


@contextmanager
def databases(kind: DatabaseKind) -> Generator[Databases]:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    folder.chmod(0o755)  # PostgreSQL may run as another account
    server: PostgresServer | None = None
    try:
        with ExitStack() as stack:
            if kind == "postgresql":
                (folder / "postgres").mkdir()
                server = PostgresServer(folder / "postgres", durable=True)
                server.start()
                stack.callback(server.stop)
            yield Databases(folder, kind, server, stack)
    finally:
        shutil.rmtree(folder)


@contextmanager
def zeta_server(folder: Path, database_url: str | None) -> Generator[ServerProcess]:
    """This project's server, with its own Valkey and no worker."""
    valkey = ValkeyServer(folder / "valkey")
    valkey.start()
    try:
        server = ServerProcess(folder / "home", valkey.url, database_url)
        server.start()
        try:
            yield server
        finally:
            server.end()
    finally:
        valkey.stop()


@contextmanager
def minimal_service(folder: Path, database_url: str | None) -> Generator[int]:
    """The peer of `benchmarks.minimal_service`; yields its port."""
    if database_url is None:
        url = f"sqlite+aiosqlite:///{folder / 'peer.db'}"
    else:
        url = database_url.replace("postgresql://", "postgresql+psycopg://")
    port = free_loopback_port()
    command = [sys.executable, "-m", "benchmarks.minimal_service", url, str(port)]
    environment = {**clean_environment(), "PYTHONPATH": str(REPOSITORY)}
    process = start_child(command, log_file=folder / "peer.log", environment=environment)
    try:
        wait_until(lambda: _answers(port), START_SECONDS, "the minimal service to answer")
        yield port
    finally:
        stop_child(process, stop_signal=signal.SIGTERM)


def submission(fields: Mapping[str, Any] | None = None) -> bytes:
    """A request that submits a job with these additional fields."""
    return request_bytes("POST", "/v1/jobs", HEADERS, json.dumps({**JOB, **(fields or {})}).encode())


def _answers(port: int) -> bool:
    try:
        run_load(port, lambda _: request_bytes("GET", "/healthz", {}), clients=1, total=1)
    except OSError:
        return False
    return True
