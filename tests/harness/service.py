"""The whole service as a user starts it: ``zeta up`` as a real process with its own home and port."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until

ZETA = Path(sys.executable).parent / "zeta"
START_SECONDS = 100.0


@dataclass(frozen=True)
class Service:
    """A running service: its home, its port, and the process of ``zeta up``."""

    home: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    def http(self) -> httpx.Client:
        """A plain HTTP client with the key, as a user's script would use."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=30)

    def environment(self) -> dict[str, str]:
        """The environment in which the ``zeta`` command uses this service."""
        return {**clean_environment(), "ZETA_URL": self.url, "ZETA_API_KEY": self.api_key, "ZETA_HOME": str(self.home)}

    def command(self, *words: str, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``zeta WORDS`` against this service, and wait for its end."""
        return subprocess.run(
            [str(ZETA), *words],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def log(self) -> str:
        """The output of the service's processes, for the message of a failing test."""
        files = [self.home / "up.out", *sorted((self.home / "logs").glob("*"))]
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in files if file.exists()
        )


@contextmanager
def running_service(
    home: Path, *, port: int | None = None, settings: dict[str, str] | None = None
) -> Generator[Service]:
    """Run ``zeta up`` on ``home`` until the block ends. It starts when the service responds and has a worker."""
    home.mkdir(parents=True, exist_ok=True)
    port = port or free_loopback_port()
    environment = {**clean_environment(), **(settings or {})}
    process = start_child(
        [ZETA, "up", "--home", home, "--port", str(port)], log_file=home / "up.out", environment=environment
    )
    service = Service(home, port, process)

    def ready() -> bool:
        assert process.poll() is None, f"zeta up ended with {process.returncode}:\n{service.log()}"
        return (home / "admin.key").exists() and _has_a_worker(service)

    try:
        wait_until(ready, START_SECONDS, "zeta up to have a worker")
        yield service
    finally:
        stop_child(process, stop_signal=signal.SIGINT, timeout_seconds=40)


def clean_environment() -> dict[str, str]:
    """This process's environment without ``ZETA_*``, so that settings of the machine don't affect tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ZETA_")}  # noqa: TID251


def wait_for_end(client: httpx.Client, job_id: str, timeout_seconds: float = 120) -> dict[str, Any]:
    """Wait until the job has ended, and return the job object."""

    def ended() -> dict[str, Any] | None:
        job = client.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until(ended, timeout_seconds, f"{job_id} to end") or {}


def processes_of_job(job_id: str) -> list[int]:
    """The processes on this machine with the job's id in their environment (Linux)."""
    mark = f"ZETA_JOB_ID={job_id}".encode()
    found: list[int] = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                environment = (directory / "environ").read_bytes()
            except OSError:
                continue  # it ended, or belongs to another user
            if mark in environment.split(b"\0"):
                found.append(int(directory.name))
    return found


def parse_sse(text: str) -> list[dict[str, Any]]:
    """The events of an event stream: the JSON data of each, with ``sse_id`` and ``sse_event``."""
    events: list[dict[str, Any]] = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields = [line.partition(":") for line in block.split("\n") if line and not line.startswith(":")]
        named = {name: value.removeprefix(" ") for name, _, value in fields}
        if "event" in named:
            data = json.loads(named["data"]) if named.get("data") else {}
            events.append({**data, "sse_id": named.get("id"), "sse_event": named["event"]})
    return events


def _has_a_worker(service: Service) -> bool:
    try:
        with service.http() as client:
            response = client.get("/v1/workers", timeout=5)
            return response.status_code == 200 and len(response.json()["data"]) > 0
    except httpx.TransportError:
        return False
