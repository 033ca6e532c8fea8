"""A Redis that fails over: a Valkey server, its replica, and three Sentinel processes with a password of their own."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.valkey import ValkeyServer, client_without_retries, valkey_binary
from tests.harness.waiting import wait_until

MASTER, USER, PASSWORD, SENTINEL_PASSWORD = "main", "zeta", "p/w:#?", "of the sentinels"
DOWN_MILLISECONDS, FAILOVER_MILLISECONDS = 1_000, 5_000
NUM_SENTINELS, QUORUM = 3, 2


class MonitoredValkey:
    """``url`` is that for ZETA_REDIS_URL, with the login of the ACL user `USER`."""

    def __init__(self, directory: Path) -> None:
        acl = ("--user", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all")
        self.master = ValkeyServer(directory / "master", *acl)
        self.replica = ValkeyServer(
            directory / "replica",
            *acl,
            "--replicaof",
            "127.0.0.1",
            str(self.master.port),
            "--repl-diskless-sync-delay",
            "0",
        )
        self.sentinel_ports = [free_loopback_port() for _ in range(NUM_SENTINELS)]
        self._directory = directory
        self._sentinels: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        login, secret = f"{USER}:{quote(PASSWORD, safe='')}", quote(SENTINEL_PASSWORD)
        return f"redis+sentinel://{login}@{hosts}/3?master={MASTER}&sentinel_password={secret}"

    def start(self) -> None:
        """Start all processes, and return when the sentinels know each other and the replica is in sync."""
        self.master.start()
        self.replica.start()
        with self.replica.client() as replica:
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up", 30, "the replica")
        for number, port in enumerate(self.sentinel_ports):
            file = self._directory / f"sentinel-{number}.conf"
            file.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {self._directory}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {self.master.port} {QUORUM}\n"
                f"sentinel down-after-milliseconds {MASTER} {DOWN_MILLISECONDS}\n"
                f"sentinel failover-timeout {MASTER} {FAILOVER_MILLISECONDS}\n"
                f'requirepass "{SENTINEL_PASSWORD}"\nsentinel sentinel-pass "{SENTINEL_PASSWORD}"\n'
            )
            command: list[str | Path] = [valkey_binary(), file, "--sentinel"]
            self._sentinels.append(start_child(command, log_file=self._directory / f"sentinel-{number}.log"))
        wait_until(self._is_monitored, 60, "the sentinels to know each other and the replica")

    def kill_sentinel(self) -> None:
        """Kill the first sentinel, whose address every client asks first."""
        self._sentinels[0].kill()

    def stop(self) -> None:
        for sentinel in self._sentinels:
            stop_child(sentinel, stop_signal=signal.SIGTERM)
        for server in (self.replica, self.master):
            server.stop()

    def _is_monitored(self) -> bool:
        for port in self.sentinel_ports:
            try:
                with client_without_retries(f"redis://:{quote(SENTINEL_PASSWORD)}@127.0.0.1:{port}/0") as client:
                    state: Any = client.sentinel_master(MASTER)
            except redis.ConnectionError:
                return False
            if (state["num-other-sentinels"], state["num-slaves"]) != (NUM_SENTINELS - 1, 1):
                return False
        return True
