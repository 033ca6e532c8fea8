"""The fleet under test: every part of the service as real processes that faults can break.

    users -> servers (two on PostgreSQL, one on SQLite) -> database
                 |                \\
                 `-> Valkey <------ artifact store        the store and each host's home are separate small disks,
                        ^             ^                   if the system allows mounting them
    a relay per host ->  |             |
                     hosts: a worker of two slots each, with its runs

Nothing is simulated: servers are ``python -m server``, and workers run the worker's `main` with real Celery. Time
limits are short, set by the usual settings.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.chaos.databases import FaultyDatabase
from tests.chaos.processes import TrainingProcess, training_processes
from tests.chaos.training import WITNESS_DIRECTORY
from tests.harness.children import start_child
from tests.harness.clocks import AdjustableClock, build_library
from tests.harness.disks import SmallDisk, can_mount
from tests.harness.service import clean_environment
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess

WORKER_COMMAND = (sys.executable, "-P", "-m", "tests.chaos.worker")
SLOTS = 2
LEASE_SECONDS = 15.0
SELF_STOP_SECONDS = 9.0
STALL_SECONDS = 15.0
SHORT_LIMITS = {
    "ZETA_CLAIM_SECONDS": "5",
    "ZETA_LEASE_SECONDS": str(LEASE_SECONDS),
    "ZETA_SELF_STOP_SECONDS": str(SELF_STOP_SECONDS),
    "ZETA_STALL_MIN_SECONDS": str(STALL_SECONDS),
    "ZETA_STOP_GRACE_SECONDS": "20",
    "ZETA_DISK_MIN_FREE_BYTES": str(16 * 2**20),
}
COMMAND_SECONDS = 60.0
HOME_MEGABYTES, STORE_MEGABYTES = 192, 512


class Host:
    """A machine with a worker: its home, its connection to Redis, its clock and its processes."""

    def __init__(
        self,
        name: str,
        folder: Path,
        valkey: ValkeyServer,
        clock: AdjustableClock | None,
        limits: Mapping[str, str],
        *,
        small_disk: bool,
        store: Path,
        address: str,
    ) -> None:
        """``address`` is a loopback address at which the workers of other hosts reach this one."""
        self.name = name
        self.home = folder / "home"
        self.relay = TcpRelay(valkey.port)
        self.clock = clock
        self.disk = SmallDisk(self.home, HOME_MEGABYTES) if small_disk else None
        self.home.mkdir(parents=True, exist_ok=True)
        self.worker: subprocess.Popen[bytes] | None = None
        self._log_file = folder / "worker.log"
        self._environment = {
            **clean_environment(),
            **limits,
            **({**clock.environment, "ZETA_JOB_ENV": " ".join(clock.environment)} if clock else {}),
            "PYTHONPATH": str(REPOSITORY),
            "ZETA_HOME": str(self.home),
            "ZETA_ARTIFACTS_URL": str(store),
            "ZETA_REDIS_URL": f"redis://127.0.0.1:{self.relay.port}/0",
            "ZETA_WORKER_SECRET": SECRET,
            "ZETA_WORKER_NAME": name,
            "ZETA_WORKER_SLOTS": str(SLOTS),
            "ZETA_WORKER_ADDRESS": address,
        }

    def start(self) -> None:
        assert self.worker is None, "already started"
        self.worker = start_child(
            WORKER_COMMAND, log_file=self._log_file, environment=self._environment, stop_signal=signal.SIGKILL
        )

    def end(self, how: signal.Signals, timeout_seconds: float = 60) -> None:
        """Send the worker a signal and wait until it exits; its runs are not affected."""
        assert self.worker is not None, "not started"
        self.worker.send_signal(how)
        self.worker.wait(timeout_seconds)
        self.worker = None

    def training_processes(self) -> list[TrainingProcess]:
        return training_processes(self.home)

    def vanish(self) -> None:
        """Lose the machine: all its processes are killed, and its disk is not used again."""
        if self.worker is not None:
            self.end(signal.SIGKILL)
        while left := self.training_processes():
            for found in left:
                found.process.kill()

    def close(self) -> None:
        self.relay.restore()
        self.vanish()
        self.relay.close()
        if self.disk is not None:
            self.disk.close()


class Fleet:
    """The fleet of `running_fleet`. ``hosts`` are in service; ``gone`` are lost, and examined at the end."""

    def __init__(
        self,
        folder: Path,
        database: FaultyDatabase,
        valkey: ValkeyServer,
        limits: Mapping[str, str],
        closing: ExitStack,
    ) -> None:
        self.folder = folder
        self.database = database
        self.valkey = valkey
        self.cancelled: set[str] = set()  # jobs that a fault cancelled
        self.gone: list[Host] = []
        self.hosts: list[Host] = []
        self.servers: list[ServerProcess] = []
        self.clocks: dict[str, AdjustableClock] = {}
        self._limits = limits
        self._closing = closing
        self._small_disks = can_mount()
        self._clock_library = build_library(folder)
        self.store = folder / "artifacts"
        self.store_disk = SmallDisk(self.store, STORE_MEGABYTES) if self._small_disks else None
        if self.store_disk is not None:
            closing.callback(self.store_disk.close)
        self.store.mkdir(exist_ok=True)
        (folder / WITNESS_DIRECTORY).mkdir()

    def start(self, *, num_servers: int, num_hosts: int) -> None:
        for number in range(1, num_servers + 1):
            self.add_server(f"server-{number}")
        for _ in range(num_hosts):
            self.add_host()

    def add_server(self, name: str) -> None:
        variables = {**self._limits, **self._clock_of(name), "ZETA_ARTIFACTS_URL": str(self.store)}
        server = ServerProcess(self.folder / name, self.valkey.url, self.database.url, **variables)
        self._closing.callback(_end_server, server)
        self.servers.append(server)
        server.start()

    def add_host(self) -> Host:
        """Start a new machine with an unused name."""
        number = len(self.hosts) + len(self.gone) + 1
        name = f"host-{number}"
        folder = self.folder / name
        folder.mkdir()
        self._clock_of(name)
        host = Host(
            name,
            folder,
            self.valkey,
            self.clocks.get(name),
            self._limits,
            small_disk=self._small_disks,
            store=self.store,
            address=f"127.0.1.{number}",
        )
        self._closing.callback(host.close)
        self.hosts.append(host)
        host.start()
        return host

    def retire(self, host: Host) -> None:
        """Remove a lost host from service."""
        self.hosts.remove(host)
        self.gone.append(host)

    def command(self, path: str) -> None:
        """POST an operator's command to each server until one responds, even with 404 or 409."""

        def is_answered() -> bool:
            for server in self.servers:
                with contextlib.suppress(httpx.TransportError), server.http() as http:
                    if http.post(path).status_code < 500:
                        return True
            return False

        wait_until(is_answered, COMMAND_SECONDS, f"an answer to POST {path}")

    def training_processes(self) -> list[TrainingProcess]:
        """Every process of every run of this fleet."""
        return training_processes(self.folder)

    def run_directories(self) -> list[Path]:
        return sorted(self.folder.glob("host-*/home/workers/*/runs/*/attempt-*"))

    def logs(self, last_lines: int = 60) -> str:
        """The last lines of all server and worker logs, without successful requests."""
        found: list[str] = []
        for file in sorted([*self.folder.glob("*/server.log"), *self.folder.glob("*/worker.log")]):
            lines = [
                line for line in file.read_text(errors="replace").splitlines() if "was answered with 2" not in line
            ]
            found += [f"--- {file}", *lines[-last_lines:]]
        return "\n".join(found)

    def _clock_of(self, name: str) -> Mapping[str, str]:
        """The environment that gives a process the clock of this name; empty if clocks aren't supported."""
        if self._clock_library is None:
            return {}
        self.clocks[name] = AdjustableClock(self.folder / f"{name}.clock", self._clock_library)
        return self.clocks[name].environment


@contextmanager
def running_fleet(
    folder: Path, database: FaultyDatabase, *, num_hosts: int = 2, limits: Mapping[str, str] = SHORT_LIMITS
) -> Generator[Fleet]:
    """A running fleet on ``database`` until the block ends; only its folder is kept.

    ``limits`` are settings of both servers and workers.
    """
    with ExitStack() as closing:
        valkey = ValkeyServer(folder / "valkey")
        closing.callback(valkey.stop)
        valkey.start()
        fleet = Fleet(folder, database, valkey, limits, closing)
        fleet.start(num_servers=2 if database.takes_several_servers else 1, num_hosts=num_hosts)
        yield fleet


def _end_server(server: ServerProcess) -> None:
    if server.process is not None:
        server.end(signal.SIGKILL)
