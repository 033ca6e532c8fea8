"""The test harness behaves as the other tests assume."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.harness.clocks import AdjustableClock, build_library
from tests.harness.disks import SmallDisk, can_mount
from tests.harness.ports import free_loopback_port
from tests.harness.postgres import PostgresServer
from tests.harness.tcp_relay import TcpRelay
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until


def test_wait_until_returns_the_value_or_reports_the_timeout() -> None:
    values = iter(["", "", "here"])
    assert wait_until(lambda: next(values), 5, "a word") == "here"
    with pytest.raises(AssertionError, match=r"waited 0\.2 s for a word; the last value was ''"):
        wait_until(str, 0.05, "a word")


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", free_loopback_port())):
        pass


def test_valkey_keeps_acknowledged_writes_when_it_is_killed(own_valkey: ValkeyServer) -> None:
    with own_valkey.client() as client:
        client.set("greeting", "hello")
        own_valkey.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("greeting")
        own_valkey.start()
        assert client.get("greeting") == "hello"


def test_the_shared_valkey_is_empty_and_listens_on_loopback(redis_url: str, shared_valkey: ValkeyServer) -> None:
    with shared_valkey.client() as client:
        assert client.dbsize() == 0
        client.set("left", "behind")
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.mark.parametrize("visit", [1, 2])
def test_each_test_gets_an_empty_postgresql_database(postgres_url: str, visit: int) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE seen (visit integer)")
        connection.execute("INSERT INTO seen VALUES (%s)", (visit,))
        assert connection.execute("SELECT visit FROM seen").fetchall() == [(visit,)]


def test_postgresql_runs_unprivileged_and_requires_a_password(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        assert psutil.Process(int(row[0])).uids().effective != 0
    port = postgres_server.port
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(f"postgresql://postgres:wrong@127.0.0.1:{port}/postgres")


def test_a_cut_connection_delivers_its_data_when_it_heals(own_valkey: ValkeyServer) -> None:
    relay = TcpRelay(own_valkey.port)
    try:
        with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"
            relay.cut()
            client.sendall(b"PING\r\n")
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(100)
            client.settimeout(5)
            relay.restore()
            assert client.recv(100) == b"+PONG\r\n"
    finally:
        relay.close()


def test_a_clock_jumps_under_a_running_process(tmp_path: Path) -> None:
    library = build_library(tmp_path)
    if library is None:
        pytest.skip("a jumping clock needs Linux and a C compiler")
    clock = AdjustableClock(tmp_path / "clock", library)
    script = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", script], env=clock.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        readings: list[tuple[float, float]] = []
        for seconds in (0, -3600, 7200):
            clock.jump(seconds)
            print("now", file=process.stdin, flush=True)
            wall, monotonic = process.stdout.readline().split()
            readings.append((float(wall), float(monotonic)))
        process.stdin.close()
    (first, began), (second, _), (third, ended) = readings
    assert round((second - first) / 60) == -60
    assert round((third - second) / 60) == 180
    assert ended - began < 60


def test_a_full_disk_rejects_writes_until_space_is_freed(tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("mounting a small disk needs root on Linux")
    disk = SmallDisk(tmp_path / "disk", megabytes=2)
    try:
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.directory / "file").write_bytes(b"x")
        disk.free()
        assert (disk.directory / "file").write_bytes(b"x") == 1
    finally:
        disk.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal exists only on Linux")
def test_a_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys\n"
        "from tests.harness.valkey import ValkeyServer\n"
        "server = ValkeyServer(pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.port, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        (server,) = psutil.Process(parent.pid).children()
        socket.create_connection(("127.0.0.1", port)).close()
        os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_running(), 10, "the server to end with its parent")
