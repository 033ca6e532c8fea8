"""A service on several machines: a server, and hosts that share nothing with it but Redis and a bucket.

    host 1 (worker, home) ---.
    host 2 (worker, home) ----- network --- this machine: server, Valkey, SeaweedFS
    host 3 (worker, home) ---'

Hosts are network namespaces. Their workers use the address of the route to Redis, and the ports of `PORTS`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.chaos.processes import TrainingProcess, training_processes
from tests.harness.children import start_child, stop_child
from tests.harness.disks import SmallDisk, can_mount
from tests.harness.namespaces import Namespaces
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.service import clean_environment
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.job.status import ENDED

PORTS = range(29400, 29410)
DISK_MEGABYTES = 256
LIMITS = {
    "ZETA_LEASE_SECONDS": "40",
    "ZETA_SELF_STOP_SECONDS": "20",
    "ZETA_STALL_MIN_SECONDS": "60",  # longer than the time after which a silent node is lost
    "ZETA_STOP_GRACE_SECONDS": "20",
    "ZETA_DISK_MIN_FREE_BYTES": str(16 * 2**20),
}


class Host:
    """A machine with a worker of four slots and, if the system allows it, a small disk of its own."""

    def __init__(
        self,
        name: str,
        number: int,
        folder: Path,
        namespaces: Namespaces,
        variables: dict[str, str],
        program: Sequence[str | Path],
    ) -> None:
        """``program`` are the arguments of Python that run the worker."""
        self.name = name
        self.address = namespaces.addresses[number]
        self.home = folder / name
        self.log_file = folder / f"{name}.log"
        self.worker: subprocess.Popen[bytes] | None = None
        self.disk = SmallDisk(self.home, DISK_MEGABYTES) if can_mount() else None
        self.home.mkdir(exist_ok=True)
        self._namespaces, self._number, self._program = namespaces, number, program
        self._environment = {
            **clean_environment(),
            **variables,
            "PYTHONPATH": str(REPOSITORY),
            "ZETA_HOME": str(self.home),
            "ZETA_WORKER_NAME": name,
            "ZETA_WORKER_SLOTS": "4",
            "ZETA_PORTS": f"{PORTS[0]}-{PORTS[-1]}",
            "ZETA_WARM_START": "no",
        }

    def start(self) -> None:
        command = (*self._namespaces.command(self._number), sys.executable, *self._program)
        self.worker = start_child(
            command, log_file=self.log_file, environment=self._environment, stop_signal=signal.SIGKILL
        )

    def end(self, how: signal.Signals) -> None:
        """End the worker, without its runs."""
        if self.worker is not None:
            stop_child(self.worker, stop_signal=how)
            self.worker = None

    def vanish(self) -> None:
        """Lose all processes at once, as if the power failed."""
        self.end(signal.SIGKILL)
        while left := self.processes():
            for found in left:
                with suppress(ProcessLookupError):
                    os.kill(found.process.pid, signal.SIGKILL)

    def processes(self) -> list[TrainingProcess]:
        return training_processes(self.home)

    def cut(self) -> None:
        self._namespaces.cut(self._number)

    def restore(self) -> None:
        self._namespaces.restore(self._number)

    def partial_files(self, job_id: str) -> list[Path]:
        """What is left of unfinished checkpoints of the job."""
        outputs = self.home.glob(f"workers/*/runs/{job_id}/output/*")
        return [path for path in outputs if path.is_dir() and not NAME_PATTERN.match(path.name)]

    def close(self) -> None:
        self.restore()
        self.vanish()
        if self.disk is not None:
            self.disk.close()


class HostFleet:
    """The service of `running_host_fleet`."""

    def __init__(self, server: ServerProcess, bucket: str, object_store: SeaweedServer, hosts: Sequence[Host]) -> None:
        self.server = server
        self.hosts = {host.name: host for host in hosts}
        self._bucket, self._object_store = bucket, object_store

    def submit(self, spec: dict[str, Any]) -> str:
        with self.server.http() as http:
            response = http.post("/v1/jobs", json=spec)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def command(self, path: str) -> None:
        with self.server.http() as http:
            http.post(path).raise_for_status()

    def get(self, path: str) -> Any:
        with self.server.http() as http:
            return http.get(path).raise_for_status().json()

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
        return job

    def log(self, job_id: str) -> str:
        """The log of all attempts and nodes."""
        with self.server.http() as http:
            return http.get(f"/v1/jobs/{job_id}/logs").raise_for_status().text

    def wait(self, reached: Callable[[], Any], seconds: float, what: str) -> Any:
        try:
            return wait_until(reached, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def wait_for_status(self, job_id: str, status: str, seconds: float = 90) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            job = self.job(job_id)
            assert job["status"] == status or job["status"] not in ENDED, f"{job}\n{self.logs()}"
            return job if job["status"] == status else None

        found: dict[str, Any] = self.wait(reached, seconds, f"{job_id} to be {status}")
        return found

    def wait_for_step(self, job_id: str, attempt: int, step: int = 0) -> dict[str, Any]:
        """Wait until this attempt runs and has made the step, by default any; returns the attempt."""

        def reached() -> dict[str, Any] | None:
            job = self.job(job_id)
            assert job["status"] not in ENDED, f"{job}\n{self.logs()}"
            found = next((each for each in job["attempts"] if each["attempt"] == attempt), None)
            return found if found is not None and (found["last_step"] or -1) >= step else None

        found: dict[str, Any] = self.wait(reached, 120, f"step {step} of attempt {attempt} of {job_id}")
        return found

    def ready_workers(self) -> list[str]:
        """The workers that accept jobs."""
        return [worker["name"] for worker in self.get("/v1/workers")["data"] if worker["status"] == "ready"]

    def check_nothing_remains(self, job_id: str) -> None:
        """Wait until no process, slot and part of a file belongs to the job any more."""

        def remains() -> list[object]:
            workers = [worker for worker in self.get("/v1/workers")["data"] if worker["status"] != "gone"]
            slots = [slot for worker in workers for slot in worker["slots"] if slot["busy"]]
            nodes = [node for attempt in self.job(job_id)["attempts"] for node in attempt["nodes"]]
            hosts = self.hosts.values()
            return [
                *(slot for slot in slots if slot["job_id"] == job_id),
                *(node for node in nodes if node["state"] != "released"),
                *(found for host in hosts for found in host.processes() if found.job_id == job_id),
                *(path for host in hosts for path in host.partial_files(job_id)),
            ]

        try:
            wait_until(lambda: not remains(), 60, f"nothing to remain of {job_id}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {remains()}\n{self.logs()}") from None
        uploads = self._object_store.client().list_multipart_uploads(Bucket=self._bucket)
        assert "Uploads" not in uploads, uploads

    def logs(self) -> str:
        logs = [self.server.home / "server.log", *(host.log_file for host in self.hosts.values())]
        return "\n".join(f"--- {log}\n{log.read_text()[-4000:]}" for log in logs if log.exists())


class SharedJob:
    """A job that several tests share, during one of them. ``attempt`` is the attempt that runs when the test begins."""

    def __init__(self, fleet: HostFleet, job_id: str, save_steps: int) -> None:
        """Wait until the attempt has made enough steps to have stored a checkpoint; it saves every ``save_steps``."""
        self.job_id = job_id
        self._fleet, self._save_steps = fleet, save_steps
        self.attempt = max(1, int(fleet.job(job_id)["attempt"]))
        first = int(fleet.wait_for_step(job_id, self.attempt)["first_step"])
        fleet.wait_for_step(job_id, self.attempt, (first // save_steps + 1) * save_steps + 20)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        hosts = self._fleet.hosts.values()
        (found,) = [
            found
            for host in hosts
            for found in host.processes()
            if (found.job_id, found.rank) == (self.job_id, str(rank))
        ]
        os.kill(found.process.pid, number)

    def wait_for_end(self, reason: str) -> None:
        """Wait until the attempt has ended for this reason."""

        def ended() -> str | None:
            found: str | None = self._fleet.job(self.job_id)["attempts"][self.attempt - 1]["reason"]
            return found

        assert self._fleet.wait(ended, 90, "the attempt to end") == reason, self._fleet.logs()

    def check_next_attempt(self, *, lost_steps: int | None = None) -> None:
        """Wait for a step of the next attempt, which runs alone and repeats at most this number of steps."""
        resumed = self._fleet.wait_for_step(self.job_id, self.attempt + 1)
        ended = self._fleet.job(self.job_id)["attempts"][self.attempt - 1]
        limit = self._save_steps + 50 if lost_steps is None else lost_steps
        assert 0 <= ended["last_step"] + 1 - resumed["first_step"] <= limit, (ended, resumed)
        processes = [found for host in self._fleet.hosts.values() for found in host.processes()]
        assert {found.attempt for found in processes if found.job_id == self.job_id} == {self.attempt + 1}

    def warning(self) -> str:
        """The message of the warning about the failed attempt."""
        warnings = self._fleet.job(self.job_id)["warnings"]
        return next(
            str(each["message"])
            for each in warnings
            if each["code"] == "attempt_failed" and each["evidence"]["attempt"] == self.attempt
        )


@contextmanager
def running_host_fleet(
    folder: Path,
    namespaces: Namespaces,
    object_store: SeaweedServer,
    names: Sequence[str],
    *,
    program: Sequence[str | Path] = ("-m", "worker"),
) -> Generator[HostFleet]:
    """A server and hosts with these names until the block ends. The workers of the first two hosts are started.

    ``program`` are the arguments of Python that run a worker.
    """
    with ExitStack() as closing:
        valkey = ValkeyServer(folder / "valkey")
        closing.callback(valkey.stop)
        valkey.start()
        redis, store = (TcpRelay(port, address=namespaces.gateway) for port in (valkey.port, object_store.port))
        closing.callback(redis.close)
        closing.callback(store.close)
        bucket = object_store.new_bucket()
        shared = {**LIMITS, "ZETA_ARTIFACTS_URL": f"s3://{bucket}/zeta"}
        server = ServerProcess(folder / "server", valkey.url, None, **shared, **object_store.environment())
        server.start()
        closing.callback(lambda: server.process and server.end(signal.SIGKILL))
        variables = {
            **shared,
            **object_store.environment(f"http://{namespaces.gateway}:{store.port}"),
            "ZETA_REDIS_URL": f"redis://{namespaces.gateway}:{redis.port}/0",
            "ZETA_WORKER_SECRET": SECRET,
        }
        hosts: list[Host] = []
        for number, name in enumerate(names):
            hosts.append(Host(name, number, folder, namespaces, variables, program))
            closing.callback(hosts[-1].close)
        for host in hosts[:2]:
            host.start()
        yield HostFleet(server, bucket, object_store, hosts)
