"""Starts the services of the compose file in order, with its commands, its settings and generated secrets.

Only addresses and folders are replaced, and PostgreSQL's image by an embedded PostgreSQL.
"""

import signal
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.harness.children import start_child, stop_child
from tests.harness.deployment import ZETA, compose, environment_of, make_secrets, redis_command
from tests.harness.ports import free_loopback_port
from tests.harness.waiting import wait_until

STOP_SECONDS = 30  # stop_grace_period of the server


@contextmanager
def running(
    command: list[str | Path], log_file: Path, environment: dict[str, str]
) -> Generator["subprocess.Popen[bytes]"]:
    child = start_child(command, log_file=log_file, environment=environment)
    try:
        yield child
    finally:
        stop_child(child, stop_signal=signal.SIGTERM, timeout_seconds=STOP_SECONDS)


def is_ready(url: str, child: "subprocess.Popen[bytes]", log_file: Path) -> bool:
    assert child.poll() is None, log_file.read_text()
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:  # not listening yet
        return False


@pytest.mark.extended
@pytest.mark.timeout(180)
def test_the_compose_services_connect_and_stop_cleanly(tmp_path: Path, postgres_url: str) -> None:
    secrets, artifacts = tmp_path / "secrets", tmp_path / "artifacts"
    redis_port, api_port = free_loopback_port(), free_loopback_port()
    make_secrets(secrets)
    (secrets / "server/database_url").write_text(postgres_url)
    for folder in ("server", "worker"):
        file = secrets / folder / "redis_url"
        file.write_text(file.read_text().replace("@redis:6379", f"@127.0.0.1:{redis_port}"))
    for folder in (artifacts, tmp_path / "redis", tmp_path / "data"):
        folder.mkdir()

    def environment(service: str) -> dict[str, str]:
        home = tmp_path / f"{service}-home"
        home.mkdir(exist_ok=True)
        here = {"PATH": str(ZETA.parent), "HOME": str(home), "ZETA_HOME": str(home), "HF_HOME": str(home / "hf")}
        here |= {"ZETA_HOST": "127.0.0.1", "ZETA_PORT": str(api_port)}
        there = environment_of(service, secrets) | here
        return {key: value.replace("/artifacts", str(artifacts)) for key, value in there.items()} | (
            {"ZETA_DATA_ROOT": str(tmp_path / "data")} if "ZETA_DATA_ROOT" in there else {}
        )

    def command(service: str) -> list[str | Path]:
        return [ZETA, *compose()["services"][service]["command"][1:]]

    def log(service: str) -> Path:
        return tmp_path / f"{service}.log"

    url = f"http://127.0.0.1:{api_port}"
    with ExitStack() as services:
        start = services.enter_context
        start(running(redis_command(secrets, tmp_path / "redis", redis_port), log("redis"), {}))
        done = subprocess.run(
            command("migrate"), env=environment("migrate"), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        server = start(running(command("server"), log("server"), environment("server")))
        wait_until(lambda: is_ready(url, server, log("server")), 60, "the server to be ready")
        worker = start(running(command("worker"), log("worker"), environment("worker")))

        key = (secrets / "server/api_key").read_text().strip()

        def workers() -> list[str]:
            assert worker.poll() is None, log("worker").read_text()
            response = httpx.get(f"{url}/v1/workers", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200, response.text
            return [known["name"] for known in response.json()["data"]]

        assert wait_until(workers, 60, "the worker to announce itself") == ["worker-1"]
        for child in (worker, server):
            assert stop_child(child, stop_signal=signal.SIGTERM, timeout_seconds=STOP_SECONDS) == 0
