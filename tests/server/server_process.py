"""A real server process without workers."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from migrations.upgrade import upgrade
from server.settings import ServerSettings
from tests.harness.children import stop_child
from tests.harness.forked_server import ForkedServer
from tests.harness.ports import free_loopback_port
from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until

REPOSITORY = Path(__file__).parents[2]
API_KEY = "the-admin-key-of-the-test"
SECRET = "the-worker-secret-of-the-test"
SPEC: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "max_position_embeddings": 64}},
    "dataset": {"builtin": "python-docs"},
    "max_steps": 4,
}


class ServerProcess:
    """A server with a fixed home and port, which can be stopped, killed and restarted."""

    def __init__(self, home: Path, redis_url: str, database_url: str | None = None, **variables: str) -> None:
        """Creates the home and the schema; `start` starts the process."""
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.port = free_loopback_port()
        self.settings = ServerSettings(home=home, database_url=database_url, worker_secret=SECRET, redis_url=redis_url)
        self.process: ForkedServer | None = None
        self.max_open_files: int | None = None  # the limit of this process, hard and soft
        self._environment = {
            **clean_environment(),
            "ZETA_HOME": str(home),
            "ZETA_PORT": str(self.port),
            "ZETA_REDIS_URL": redis_url,
            "ZETA_DATABASE_URL": database_url or "",
            "ZETA_API_KEY": API_KEY,
            "ZETA_WORKER_SECRET": SECRET,
            **variables,
        }
        upgrade(self.settings.database)

    @property
    def url(self) -> str:
        scheme = "https" if "ZETA_TLS_CERT" in self._environment else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        assert self.process is None
        self.process = ForkedServer(self._environment, self.home / "server.log", self.max_open_files)
        wait_until(self._answers, 60, "the server to answer")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait for the exit status."""
        assert self.process is not None
        status = stop_child(self.process, stop_signal=how)
        self.process = None
        return status

    def http(self, key: str | None = API_KEY) -> httpx.Client:
        """A client with the key; `verify` is off because loading certificates for plain HTTP takes long."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=False)

    def log(self) -> str:
        return (self.home / "server.log").read_text()

    def peak_memory_bytes(self) -> int:
        """The peak resident memory of the process (Linux)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the system does not report a process's peak memory")

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log()}"
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5, verify=False).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running_server(
    home: Path, redis_url: str, database_url: str | None = None, **variables: str
) -> Generator[ServerProcess]:
    """A started server until the block ends."""
    server = ServerProcess(home, redis_url, database_url, **variables)
    server.start()
    try:
        yield server
    finally:
        if server.process is not None:
            server.end()


def submit(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Submit `SPEC` with additional fields; returns the job."""
    response = http.post("/v1/jobs", json={**SPEC, **fields})
    assert response.status_code == 201, response.text
    return response.json()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, after checking its shape."""
    assert response.headers["x-request-id"], response.headers
    assert response.headers["content-type"] == "application/json", response.text
    body = response.json()
    assert list(body) == ["error"], body
    error = body["error"]
    assert list(error) == ["message", "type", "param", "code", "details"], error
    assert error["message"].endswith((".", ")", "?")), error
    assert error["type"]
    assert error["code"]
    for detail in error["details"]:
        assert list(detail) == ["param", "message", "code", "suggestion"], detail
    return error
