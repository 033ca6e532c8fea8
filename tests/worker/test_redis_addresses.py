"""Every form of ZETA_REDIS_URL carries a job from the server to a worker and back, on a real Valkey."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.harness.children import start_child, stop_child
from tests.harness.fleet import small_fleet
from tests.harness.valkey import ValkeyServer, valkey_binary
from tests.harness.waiting import wait_until


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A Valkey that listens only on a UNIX socket, in a folder with a space. (Paths of pytest are too long.)"""
    with tempfile.TemporaryDirectory(prefix="redis ") as folder:
        path = Path(folder) / "r.sock"
        command: list[str | Path] = [
            valkey_binary(),
            "--port",
            "0",
            "--unixsocket",
            path,
            "--dir",
            folder,
            "--save",
            "",
        ]
        process: subprocess.Popen[bytes] = start_child(command, log_file=Path(folder) / "valkey.log")
        wait_until(path.is_socket, 30, "the socket")
        try:
            yield path
        finally:
            stop_child(process, stop_signal=signal.SIGTERM)


def run_a_job(folder: Path, url: str) -> None:
    with small_fleet(folder, url) as fleet:
        fleet.start_engine()
        fleet.start_worker()
        assert fleet.wait_for_status(fleet.submit(steps="3"), "succeeded").attempt == 1


@pytest.mark.extended
def test_a_unix_socket_and_another_database(tmp_path: Path, socket_path: Path) -> None:
    quoted = str(socket_path).replace(" ", "%20")
    run_a_job(tmp_path, f"unix://{quoted}?db=5")
    with redis.Redis(unix_socket_path=str(socket_path)) as client:
        assert set(client.info("keyspace")) == {"db5"}


@pytest.mark.extended
@pytest.mark.parametrize("form", ["redis://{login}@127.0.0.1:{port}/7", "redis://{login}@127.0.0.1:{port}?db=7"])
def test_a_user_with_a_special_password_and_another_database(
    tmp_path: Path, own_valkey: ValkeyServer, form: str
) -> None:
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "us@er", "on", ">p/w:#?% ü", "~*", "&*", "+@all")
        client.execute_command("ACL", "SETUSER", "default", "off")
        run_a_job(tmp_path, form.format(login="us%40er:p%2Fw%3A%23%3F%25%20%C3%BC", port=own_valkey.port))
    with redis.Redis(port=own_valkey.port, username="us@er", password="p/w:#?% ü") as client:
        assert set(client.info("keyspace")) == {"db7"}
