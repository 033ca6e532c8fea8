"""A service under attack: ``zeta up``, or a server and a worker, with everything that is observed about it.

Its responses, logs and artifacts, the files that its processes open, and the duration of other requests are observed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.end_to_end.hostile_requests import CANARY, CANARY_FILE, SPEC
from tests.harness.children import start_child, stop_child
from tests.harness.file_opens import FileObserver, Rules, observed_files
from tests.harness.service import clean_environment, running_service
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import API_KEY, REPOSITORY, SECRET, running_server

PICKLED = Path("/tmp/zeta-hostile-pickle")
BYSTANDER_SECONDS = 1.0  # longer on a machine with more running processes than processors
BYSTANDERS = ("/healthz", "/v1/jobs?limit=5", "/v1/files?limit=5", "/v1/workers")
KINDS = ("zeta up", "a server and a worker")
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc", "/sys", "/dev", "/etc/ssl", "/etc/passwd", "/etc/group"),
    *("/etc/ld.so.cache", "/etc/nsswitch.conf", "/etc/hosts", "/etc/resolv.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/localtime", "/etc/timezone", "/etc/mime.types", "/etc/services", "/etc/protocols", "/etc/os-release"),
    *("/etc/debian_version", "/etc/machine-id", "/etc/ld.so.preload", "/etc/alternatives"),
    "/etc/locale.alias",
)
_SMALL_BYTES = 8 << 20  # of a file that is searched for secrets


@dataclass(frozen=True)
class Target:
    """Where the service is, and its processes that others descend from."""

    home: Path
    port: int
    api_key: str
    logs: str  # a pattern in the home
    roots: list[int]

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30)


@dataclass
class Attacked:
    """The service under attack, and what was observed."""

    target: Target
    secrets: list[bytes]
    observer: FileObserver | None  # None without root
    faults: list[str] = field(default_factory=list[str])
    slowest_seconds: float = 0.0

    def check(self, name: str, status: int, content: bytes) -> None:
        """Record a server error, and a secret in a response."""
        if status >= 500:
            self.faults.append(f"{name}: {status} {content[:300]!r}")
        self.faults += [f"{name}: the response contains a secret" for secret in self.secrets if secret in content]

    def send(self, name: str, method: str, path: str, **options: Any) -> httpx.Response | None:
        with self.target.http() as http:
            try:
                response = http.request(method, path, timeout=120, **options)
            except (httpx.InvalidURL, httpx.RemoteProtocolError, httpx.LocalProtocolError, UnicodeError):
                return None  # the client can't send it; `exchange` sends raw bytes
        self.check(name, response.status_code, response.content)
        return response

    def exchange(self, name: str, request: bytes) -> None:
        """Send raw bytes, and read until the server closes the connection or is silent for a moment."""
        received = b""
        with closing(socket.create_connection(("127.0.0.1", self.target.port), 10)) as connection:
            with suppress(OSError):
                connection.sendall(request)
            connection.settimeout(0.3)
            with suppress(OSError):
                while chunk := connection.recv(65536):
                    received += chunk
        for response in received.split(b"HTTP/1.1 ")[1:]:
            self.check(name, int(response[:3]), response)

    def validate(self, name: str, **fields: Any) -> None:
        self.send(name, "POST", "/v1/jobs/validate", json={**SPEC, **fields})

    def upload(self, name: str, filename: str, content: bytes, purpose: str) -> str | None:
        """The id of an uploaded file; ``None`` if it was rejected."""
        files = {"file": (filename, content)}
        response = self.send(name, "POST", "/v1/files", files=files, data={"purpose": purpose})
        return response.json()["id"] if response is not None and response.status_code == 201 else None

    @contextmanager
    def watched(self) -> Generator[None]:
        """Send other requests during the block; at its end, everything that was observed must be harmless."""
        ended = threading.Event()
        bystander = threading.Thread(target=self._send_other_requests, args=(ended,))
        self.faults.clear()
        self.slowest_seconds = 0.0
        bystander.start()
        try:
            yield
        finally:
            ended.set()
            bystander.join()
        self.faults += self._found_in_files()
        if self.observer is not None:
            self.faults += self.observer.findings()
        assert not self.faults, "\n".join(dict.fromkeys(self.faults))
        assert not PICKLED.exists(), "a pickle was loaded"
        assert self.slowest_seconds < BYSTANDER_SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))

    def _send_other_requests(self, ended: threading.Event) -> None:
        number = 0
        with self.target.http() as http:
            while not ended.wait(0.1):
                number += 1
                started = time.monotonic()
                with suppress(httpx.TransportError):
                    http.get(BYSTANDERS[number % len(BYSTANDERS)], timeout=10)
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)

    def _found_in_files(self) -> Iterator[str]:
        """Secrets in the logs, the artifacts and the run directories, and control characters in the logs."""
        logs = list(self.target.home.glob(self.target.logs))
        artifacts = [path for path in (self.target.home / "artifacts").rglob("*") if path.is_file()]
        runs = [path for path in (self.target.home / "workers").glob("*/runs/*/*/*") if path.is_file()]
        for path in (*logs, *artifacts, *runs):
            with suppress(FileNotFoundError):
                content = path.read_bytes() if path.stat().st_size < _SMALL_BYTES else b""
                yield from (f"{path} contains a secret" for secret in self.secrets if secret in content)
                if path in logs and b"\x1b" in content:
                    yield f"{path} contains a control character"


@contextmanager
def attacked_service(kind: str, folder: Path) -> Generator[Attacked]:
    """Start a service of this kind in ``folder``, with canaries around it, and observe it until the block ends."""
    PICKLED.unlink(missing_ok=True)
    user = folder / "user"  # the home directory of the account
    canaries = [Path(CANARY_FILE), user / ".ssh" / "id_rsa", user / ".zeta" / "admin.key", folder / "admin.key"]
    for file in canaries:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(CANARY)
    for name in ("temporary", "barriers"):
        (folder / name).mkdir()
    settings = {
        "ZETA_HUB": "off",
        "ZETA_CHECK_SECONDS": "20",
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "HOME": str(user),
        "TMPDIR": str(folder / "temporary"),
    }
    start: Callable[[Path, dict[str, str]], Any] = _zeta_up if kind == KINDS[0] else _server_and_worker
    with ExitStack() as stack:
        target, secrets = stack.enter_context(start(folder, settings))
        secrets += [CANARY.encode(), Path("/etc/passwd").read_bytes().splitlines()[0]]
        observer = None
        if sys.platform == "linux" and os.geteuid() == 0:
            rules = _rules(folder, target.roots, canaries)
            observer = stack.enter_context(observed_files(folder, rules))
        try:
            yield Attacked(target, secrets, observer)
        finally:
            Path(CANARY_FILE).unlink()


def _rules(folder: Path, roots: list[int], canaries: Sequence[Path]) -> Rules:
    prefixes = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)}
    return Rules(
        roots=roots,
        readable=[*_SYSTEM, *prefixes, str(REPOSITORY)],
        writable=[str(folder / name) for name in ("home", "temporary", "valkey")],
        canaries=list(map(str, canaries)),
        testers=[os.getpid()],
        barriers=str(folder / "barriers"),
    )


@contextmanager
def _zeta_up(folder: Path, settings: dict[str, str]) -> Generator[tuple[Target, list[bytes]]]:
    home = folder / "home"
    with running_service(home, settings=settings) as service:
        secrets = [(home / name).read_bytes().strip() for name in ("admin.key", "worker.secret", "redis.url")]
        yield Target(home, service.port, service.api_key, "logs/*", [service.process.pid]), secrets


@contextmanager
def _server_and_worker(folder: Path, settings: dict[str, str]) -> Generator[tuple[Target, list[bytes]]]:
    """The server and the worker share a folder of artifacts, as on a fleet with a network file system."""
    valkey, home = ValkeyServer(folder / "valkey"), folder / "home"
    with ExitStack() as stack:
        valkey.start()
        stack.callback(valkey.stop)
        server = stack.enter_context(running_server(home, valkey.url, **settings))
        environment = {
            **clean_environment(),
            **settings,
            "PYTHONPATH": str(REPOSITORY),
            "ZETA_HOME": str(home),
            "ZETA_REDIS_URL": valkey.url,
            "ZETA_WORKER_SECRET": SECRET,
            "ZETA_WORKER_NAME": "attacked",
        }
        log = home / "worker.log"
        worker = start_child([sys.executable, "-m", "worker"], log_file=log, environment=environment)
        stack.callback(stop_child, worker, stop_signal=signal.SIGTERM, timeout_seconds=40)
        target = Target(home, server.port, API_KEY, "*.log", [server.pid, worker.pid])
        with target.http() as http:
            wait_until(lambda: bool(http.get("/v1/workers").json()["data"]), 100, "the worker")
        yield target, [API_KEY.encode(), SECRET.encode()]
