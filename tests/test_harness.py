"""The real parts do what the other tests rely on."""

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

from tests.harness.ports import free_loopback_port
from tests.harness.postgres import PostgresServer
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until


def test_waiting_returns_the_answer_and_says_what_did_not_come() -> None:
    answers = iter(["", "", "here"])
    assert wait_until(lambda: next(answers), 5, "a word") == "here"
    with pytest.raises(AssertionError, match=r"waited 0\.05 s for a word; the last answer was ''"):
        wait_until(str, 0.05, "a word")


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", free_loopback_port())):
        pass


def test_valkey_keeps_what_it_acknowledged_when_it_is_killed(own_valkey: ValkeyServer) -> None:
    with own_valkey.client() as client:
        client.set("greeting", "hello")
        own_valkey.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("greeting")
        own_valkey.start()
        assert client.get("greeting") == "hello"


def test_the_shared_valkey_is_empty_for_each_test_and_listens_on_loopback_only(
    redis_url: str, shared_valkey: ValkeyServer
) -> None:
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


def test_postgresql_does_not_run_as_root_and_asks_for_its_password(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        assert psutil.Process(int(row[0])).uids().effective != 0
    port = postgres_server.port
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(f"postgresql://postgres:wrong@127.0.0.1:{port}/postgres")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_server_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
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
