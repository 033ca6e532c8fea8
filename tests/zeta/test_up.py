"""`zeta up` as a real process: one per home; it restarts its children, and leaves no process behind."""

import json
import os
import signal
import stat
import subprocess
from pathlib import Path

import httpx
import pytest
import redis
from redis.exceptions import NoPermissionError

from tests.harness.certificates import self_signed
from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.service import ZETA, Service, clean_environment, running_service
from tests.harness.valkey import ValkeyServer
from tests.harness.waiting import wait_until
from zeta.up.home import Home, UpState
from zeta.up.valkey import Valkey

ADMINISTRATION = (
    *(
        "CONFIG GET *",
        "CONFIG SET dir /tmp",
        "MODULE LIST",
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "SHUTDOWN",
    ),
    *("EVAL return(1) 0", "FUNCTION LIST", "REPLICAOF 127.0.0.1 1", "SAVE", "MONITOR", "ACL LIST", "CLIENT LIST"),
)
pytestmark = pytest.mark.timeout(240)


def zeta(
    *words: str | Path, environment: dict[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ZETA, *words],
        cwd=folder,
        env=environment or clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def state_of(service: Service) -> UpState:
    state = Home(service.home).running()
    assert state is not None
    return state


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def children_of(service: Service) -> dict[str, int]:
    """The running children. During a restart, the state still contains the old process."""
    return {name: pid for name, pid in state_of(service).children.items() if is_alive(pid)}


def variables_of(pid: int) -> set[str]:
    """The names of the process's environment variables."""
    return {entry.partition("=")[0] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")}


@pytest.mark.extended
def test_zeta_up_restarts_its_children_and_stops_them_in_order(tmp_path: Path) -> None:
    with running_service(tmp_path / "home") as service:
        wait_until(lambda: state_of(service).state == "ready", 30, "zeta up to be ready")
        state = state_of(service)
        assert (state.url, state.pid) == (service.url, service.process.pid)
        for secret in ("admin.key", "worker.secret", "redis.url"):
            assert stat.S_IMODE((service.home / secret).stat().st_mode) == 0o600
        visible = Path(f"/proc/{state.children['valkey']}/cmdline").read_bytes()
        assert (service.home / "redis.url").read_text().split("@")[0].removeprefix("redis://:").encode() not in visible

        only_for_the_server = {"ZETA_API_KEY", "ZETA_API_KEY_FILE", "ZETA_DATABASE_URL", "ZETA_DATABASE_URL_FILE"}
        assert "ZETA_API_KEY_FILE" in variables_of(state.children["server"])
        assert not variables_of(state.children["worker"]) & only_for_the_server
        assert not any(name.startswith("ZETA_") for name in variables_of(state.children["valkey"]))

        second = zeta("up", "--home", service.home, "--port", str(free_loopback_port()))
        assert second.returncode == 1
        assert str(service.process.pid) in second.stderr
        assert service.url in second.stderr

        for name in ("valkey", "server", "worker"):
            before = state_of(service).children[name]
            os.kill(before, signal.SIGKILL)
            wait_until(lambda before=before, name=name: children_of(service).get(name, before) != before, 30,
                       f"another {name}")  # fmt: skip
        with service.http() as http:
            wait_until(lambda: _workers(http), 60, "the service to work again")
        found = zeta("status", "--home", service.home, "--json")
        assert json.loads(found.stdout)["processes"] == state_of(service).children

        children = children_of(service)
        assert set(children) == {"valkey", "server", "worker"}
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0, service.log()
        assert not any(is_alive(pid) for pid in children.values())
        assert not (service.home / "up.json").exists()
    assert zeta("status", "--home", service.home).returncode == 4


@pytest.mark.extended
def test_the_children_of_a_killed_zeta_up_exit_and_its_home_is_reusable(tmp_path: Path) -> None:
    with running_service(tmp_path / "home") as service:
        key, children = service.api_key, children_of(service)
        service.process.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in children.values()), 20, "the children to exit")
    with running_service(tmp_path / "home") as service:
        assert service.api_key == key


@pytest.mark.extended
def test_a_detached_zeta_up_runs_with_a_given_redis_until_zeta_down(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    home = tmp_path / "home"
    environment = clean_environment() | {"ZETA_REDIS_URL": own_valkey.url, "ZETA_HOME": str(home)}
    started = zeta("up", "--detach", "--port", "0", environment=environment)
    try:
        assert started.returncode == 0, started.stderr
        state = Home(home).running()
        assert state is not None
        assert state.url is not None
        assert state.url in started.stdout
        assert set(state.children) == {"server", "worker"}
        assert zeta("jobs", environment=environment).returncode == 0  # found through the home, with its key
        assert json.loads(zeta("status", "--json", environment=environment).stdout)["ready"] is True
        again = zeta("up", "--detach", "--port", "0", environment=environment)
        assert again.returncode == 1
        assert state.url in again.stderr
    finally:
        stopped = zeta("down", environment=environment)
    assert stopped.returncode == 0, stopped.stderr
    assert not any(is_alive(pid) for pid in (state.pid, *state.children.values()))
    assert zeta("down", environment=environment).returncode == 0


@pytest.mark.extended
def test_zeta_up_with_a_certificate_speaks_https_with_its_own_commands(
    tmp_path: Path, own_valkey: ValkeyServer
) -> None:
    pair = self_signed(tmp_path, "DNS:train.example.org")  # this machine reaches the server as 127.0.0.1
    environment = clean_environment() | {"ZETA_REDIS_URL": own_valkey.url, "ZETA_HOME": str(tmp_path / "home")}
    files = {"ZETA_TLS_CERT": pair.certificate.name, "ZETA_TLS_KEY": pair.key.name}
    started = zeta("up", "--detach", "--port", "0", environment=environment | files, folder=tmp_path)
    try:
        assert started.returncode == 0, started.stderr
        state = Home(tmp_path / "home").running()
        assert state is not None
        assert state.url is not None
        assert state.url.startswith("https://127.0.0.1:")
        assert f"dashboard  {state.url}/" in started.stdout
        assert "ZETA_TLS_KEY" not in variables_of(state.children["worker"])
        listed = zeta("workers", environment=environment)  # found through the home, with its certificate
        assert listed.returncode == 0, listed.stderr
        named = zeta("jobs", environment=environment | {"ZETA_URL": state.url})
        assert named.returncode == 0, named.stderr
        with httpx.Client(verify=pair.trust()) as http:
            response = http.get(f"{state.url}/healthz", extensions={"sni_hostname": "train.example.org"})
        assert response.status_code == 200
    finally:
        stopped = zeta("down", environment=environment)
    assert stopped.returncode == 0, stopped.stderr


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    environment = clean_environment() | {"ZETA_HOME": str(tmp_path), "ZETA_TLS_CERT": "server.pem"}
    refused = zeta("up", "--port", "0", environment=environment)
    assert refused.returncode == 2
    assert "ZETA_TLS_CERT is set without ZETA_TLS_KEY" in refused.stderr


@pytest.mark.parametrize("command", [("up", "--port", "0"), ("server", "--port", "0"), ("worker",)])
def test_a_home_to_which_every_user_can_write_is_rejected(tmp_path: Path, command: tuple[str, ...]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    environment = clean_environment() | {"ZETA_HOME": str(home), "ZETA_WORKER_SECRET": "x" * 40}
    refused = zeta(*command, environment=environment)
    assert refused.returncode == 2
    assert f"{str(home)!r}, and every user of this machine can write to it (mode 0777)" in refused.stderr
    assert "run `chmod o-w` on it" in refused.stderr
    assert list(home.iterdir()) == []


@pytest.mark.extended
def test_a_child_that_fails_to_start_is_reported_with_its_message(tmp_path: Path) -> None:
    environment = clean_environment() | {"ZETA_MAX_UPLOAD_BYTES": "many"}
    done = zeta("up", "--home", tmp_path / "home", "--port", str(free_loopback_port()), environment=environment)
    assert done.returncode == 1
    assert "ZETA_MAX_UPLOAD_BYTES" in done.stderr
    assert "Traceback" not in done.stderr
    assert Home(tmp_path / "home").running() is None


@pytest.mark.parametrize("name", ['a "quoted" \\ name', "new\nline", "Ü#%25?x=1", "all * of [runs]", "[!a]*\\[b"])
def test_valkey_stores_its_data_in_a_home_of_any_name(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path / name)
    home.create()
    valkey = Valkey(home, free_loopback_port())
    process = start_child(valkey.command, log_file=tmp_path / "valkey.log")
    try:
        wait_until(valkey.is_ready, 30, "Valkey to be ready")
        assert (home.valkey / "appendonlydir").is_dir()
        with redis.Redis.from_url(home.redis_url.read_text().strip()) as client:
            client.xadd("zeta:server", {"body": "x"})
            for command in ADMINISTRATION:
                with pytest.raises(NoPermissionError):
                    client.execute_command(*command.split())
            assert client.xlen("zeta:server") == 1
        with (
            redis.Redis.from_url(f"redis://127.0.0.1:{valkey.port}") as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
    finally:
        stop_child(process, stop_signal=signal.SIGTERM)


@pytest.mark.extended
@pytest.mark.parametrize("url", ["postgresql://u@127.0.0.1:1/z?connection_limit=1", "sqlite:////proc/none/zeta.db"])
def test_an_unusable_database_url_is_one_sentence_and_exit_status_2(tmp_path: Path, url: str) -> None:
    environment = clean_environment() | {"ZETA_DATABASE_URL": url, "ZETA_WORKER_SECRET": "s"}
    for command in (["migrate"], ["server", "--port", "0"], ["up", "--port", str(free_loopback_port())]):
        done = zeta(*command, "--home", tmp_path / "home", environment=environment)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "sqlalche.me" not in done.stderr


def _workers(http: httpx.Client) -> bool:
    try:
        response = http.get("/v1/workers")
    except httpx.TransportError:
        return False
    return response.status_code == 200 and any(worker["status"] == "ready" for worker in response.json()["data"])
