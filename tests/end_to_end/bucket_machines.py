"""A server and a worker on machines of their own, which share only the bucket of a real S3 server."""

import json
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.harness.children import start_child, stop_child
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.service import ZETA, clean_environment
from tests.server.server_process import REPOSITORY, SECRET, ServerProcess


class Machines:
    """A server and a worker with homes of their own, which use one bucket."""

    def __init__(
        self, folder: Path, redis_url: str, object_store: SeaweedServer, worker_url: str | None = None
    ) -> None:
        """``worker_url`` is the address at which the worker finds the store, if it is another one."""
        self.object_store = object_store
        self.bucket = object_store.new_bucket()
        location = {"ZETA_ARTIFACTS_URL": f"s3://{self.bucket}/zeta"}
        self.variables = {**object_store.environment(), **location}
        self._worker_variables = {**object_store.environment(worker_url), **location}
        self.worker_home = folder / "worker"
        self.worker_log = folder / "worker.log"
        self.server = ServerProcess(folder / "server", redis_url, None, **self.variables)
        self._redis_url = redis_url
        self._worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        environment = {
            **clean_environment(),
            **self._worker_variables,
            "PYTHONPATH": str(REPOSITORY),
            "ZETA_HOME": str(self.worker_home),
            "ZETA_REDIS_URL": self._redis_url,
            "ZETA_WORKER_SECRET": SECRET,
            "ZETA_WORKER_NAME": "elsewhere",
        }
        command = [sys.executable, "-m", "worker"]
        self._worker = start_child(command, log_file=self.worker_log, environment=environment)

    def end_worker(self, how: signal.Signals) -> None:
        assert self._worker is not None
        stop_child(self._worker, stop_signal=how)
        self._worker = None

    def stored_keys(self) -> list[str]:
        return [key.removeprefix("zeta/") for key in self.object_store.keys(self.bucket)]

    def differences(self) -> list[dict[str, Any]]:
        """The result of `zeta artifacts check` with hashes, on the server's machine."""
        done = subprocess.run(
            [ZETA, "artifacts", "check", "--hash", "--json", "--home", self.server.home],
            env={**clean_environment(), **self.variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not done.stderr, done.stderr
        differences: list[dict[str, Any]] = json.loads(done.stdout)["differences"]
        assert done.returncode == bool(differences)
        return differences

    def logs(self) -> str:
        return f"{self.server.log()}\n{self.worker_log.read_text()}"

    @contextmanager
    def running(self) -> Generator[httpx.Client]:
        self.server.start()
        try:
            self.start_worker()
            with self.server.http() as http:
                yield http
        finally:
            if self._worker is not None:
                self.end_worker(signal.SIGTERM)
            if self.server.process is not None:
                self.server.end()
