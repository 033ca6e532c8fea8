"""The deployment files match the code: commands, settings, secrets and time limits.

No container runs here. Each file is parsed as its own tool parses it, every command and setting is checked against the
real ones, and Redis is started with the command and the generated secrets of the compose file.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import redis
import yaml

import server.settings
import worker.settings
from tests.harness.children import start_child, stop_child
from tests.harness.deployment import (
    ROOT,
    SECRETS_IN_CONTAINER,
    ZETA,
    compose,
    dockerfile,
    environment_of,
    existing_settings,
    image_environment,
    make_secrets,
    redis_command,
    secret_folder,
    systemd_unit,
    unit_environment,
)
from tests.harness.ports import free_loopback_port
from tests.harness.valkey import client_without_retries
from tests.harness.waiting import wait_until
from zeta_core.system.settings import PREFIX

OUR_SERVICES = ("migrate", "server", "worker")


def seconds(text: str) -> int:
    assert text.endswith("s"), text
    return int(text[:-1])


# --- Commands and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_each_container_runs_an_existing_zeta_command(service: str) -> None:
    program, *arguments = compose()["services"][service]["command"]
    assert program == "zeta"
    subprocess.run([ZETA, *arguments, "--help"], check=True, capture_output=True, timeout=60)


def test_the_image_and_the_unit_run_existing_zeta_commands() -> None:
    (command,) = [json.loads(text) for word, text in dockerfile() if word == "CMD"]
    assert command == ["zeta", "server"]
    (entrypoint,) = [json.loads(text) for word, text in dockerfile() if word == "ENTRYPOINT"]
    assert entrypoint == ["tini", "-s", "--"], "the guard of a run outlives its parent for a moment"
    program, *arguments = shlex.split(systemd_unit()["Service"]["ExecStart"])
    assert Path(program).name == "zeta"
    for words in (command[1:], arguments):
        subprocess.run([ZETA, *words, "--help"], check=True, capture_output=True, timeout=60)


def test_every_setting_in_a_deployment_file_exists() -> None:
    names = {name for service in OUR_SERVICES for name in compose()["services"][service]["environment"]}
    names |= image_environment().keys() | unit_environment().keys()
    assert {name for name in names if name.startswith(PREFIX)} - existing_settings() == set()


def test_the_generated_secrets_are_valid_settings_of_each_container(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    at_server = server.settings.ServerSettings.from_environment(environment_of("server", tmp_path))
    at_migrate = server.settings.DatabaseSettings.from_environment(environment_of("migrate", tmp_path))
    at_worker = worker.settings.WorkerSettings.from_environment(environment_of("worker", tmp_path))
    assert at_server.database == at_migrate.database
    assert at_server.database.startswith("postgresql://zeta:")
    assert at_server.worker_secret == at_worker.worker_secret
    assert at_server.redis_url == at_worker.redis_url
    assert at_server.api_key is not None
    assert at_server.artifacts == Path("/artifacts")
    assert (at_server.host, at_server.port) == ("0.0.0.0", 8400)
    assert at_server.behind_proxy, "the port is published on loopback only"


# --- Secrets ----------------------------------------------------------------------------------------------------------


def test_deployment_files_contain_no_secrets() -> None:
    for name, service in compose()["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|KEY|TOKEN|DATABASE_URL|REDIS_URL", variable):
                is_file = variable.endswith("_FILE") and value.startswith(f"{SECRETS_IN_CONTAINER}/")
                assert is_file or value is None or re.fullmatch(r"\$\{\w+:-\}", value), (name, variable)


def test_a_worker_gets_neither_the_database_url_nor_the_api_key(tmp_path: Path) -> None:
    make_secrets(tmp_path)
    assert secret_folder("worker") == "worker"
    assert {file.name for file in (tmp_path / "worker").iterdir()} == {"redis_url", "worker_secret"}
    assert not {"ZETA_DATABASE_URL_FILE", "ZETA_API_KEY_FILE"} & compose()["services"]["worker"]["environment"].keys()


def test_secrets_are_generated_once_and_a_given_key_is_used(tmp_path: Path) -> None:
    make_secrets(tmp_path, ZETA_API_KEY="of-my-own")
    first = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    make_secrets(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == first
    assert (tmp_path / "server/api_key").read_text() == "of-my-own\n"
    other = tmp_path / "other"
    make_secrets(other)
    assert (other / "redis/password").read_text() != (tmp_path / "redis/password").read_text()


def test_redis_of_the_compose_file_requires_a_password_and_persists_data(tmp_path: Path) -> None:
    secrets, data, port = tmp_path / "secrets", tmp_path / "data", free_loopback_port()
    make_secrets(secrets)
    data.mkdir()
    command = redis_command(secrets, data, port)
    url = (secrets / "worker/redis_url").read_text().strip().replace("@redis:6379", f"@127.0.0.1:{port}")
    child = start_child(command, log_file=tmp_path / "log")
    try:
        with client_without_retries(url) as client:
            wait_until(lambda: responds(client), 20, "Redis to respond")
            client.set("kept", "yes")
            stop_child(child, stop_signal=signal.SIGKILL)
            child = start_child(command, log_file=tmp_path / "log")
            wait_until(lambda: responds(client), 20, "Redis to respond again")
            assert client.get("kept") == "yes"
        with (
            client_without_retries(f"redis://127.0.0.1:{port}/0") as unauthenticated,
            pytest.raises(redis.AuthenticationError),
        ):
            unauthenticated.get("kept")
    finally:
        stop_child(child, stop_signal=signal.SIGTERM)


def responds(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


# --- Services, volumes and time limits --------------------------------------------------------------------------------


def test_the_compose_file_starts_every_service_in_order() -> None:
    services = compose()["services"]
    assert set(services) == {"secrets", "redis", "postgres", "migrate", "server", "worker"}
    assert services["server"]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert services["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    for name in ("redis", "postgres", "server"):
        assert services[name]["healthcheck"]["test"]
    assert services["worker"]["shm_size"] == "8gb"
    assert services["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert all(services[name]["init"] is True for name in (*OUR_SERVICES, "redis", "postgres"))


def test_every_volume_is_declared_and_every_mounted_file_exists() -> None:
    declared = set(compose()["volumes"])
    mounts = [text for service in compose()["services"].values() for text in service.get("volumes", [])]
    named = {text.split(":")[0] for text in mounts if re.match(r"\w", text)}
    assert named == declared
    for text in mounts:
        if text.startswith("./"):
            assert (ROOT / text.split(":")[0]).is_file()


def test_the_cpu_variant_removes_the_gpus_of_existing_services() -> None:
    changed = compose("deploy/compose.cpu.yml")["services"]
    assert changed.keys() <= compose()["services"].keys()
    assert {name for name, service in compose()["services"].items() if "build" in service} == changed.keys()
    assert "deploy" in changed["worker"]
    assert changed["worker"]["deploy"] is None


def test_stop_timeouts_exceed_the_grace_period_of_trainings() -> None:
    at_worker = compose()["services"]["worker"]
    assert seconds(at_worker["stop_grace_period"]) >= int(at_worker["environment"]["ZETA_STOP_GRACE_SECONDS"]) + 15
    unit = systemd_unit()["Service"]
    assert int(unit["TimeoutStopSec"]) >= int(unit_environment()["ZETA_STOP_GRACE_SECONDS"]) + 30
    assert unit["KillMode"] == "mixed"
    assert unit["OOMPolicy"] == "continue"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    unit = tmp_path / "zeta.service"
    unit.write_text((ROOT / "deploy/zeta.service").read_text().replace("/opt/zeta/bin/zeta", str(ZETA)))
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_has_two_stages_and_runs_as_an_unprivileged_user() -> None:
    words = [word for word, _ in dockerfile()]
    assert words.count("FROM") == 2
    last_stage = dockerfile()[len(words) - 1 - words[::-1].index("FROM") :]
    assert [text for word, text in last_stage if word == "USER"] == ["zeta"]
    assert "HEALTHCHECK" in dict(last_stage)
    for word, text in dockerfile():
        assert word != "ADD"
        if word == "COPY" and "--from" not in text:
            assert all((ROOT / source).exists() for source in text.split()[:-1])


def test_every_image_that_is_downloaded_is_pinned_by_its_digest() -> None:
    """Otherwise a registry, or whoever publishes there, decides what runs."""
    services = compose()["services"]
    images = [service["image"] for service in services.values() if "build" not in service]
    from_compose = services["server"]["build"]["args"]["PYTHON_IMAGE"]
    (in_dockerfile,) = [text for word, text in dockerfile() if word == "ARG" and text.startswith("PYTHON_IMAGE=")]
    assert len(images) == 3
    for image in (*images, from_compose):
        assert re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[a-z]+:[\w.-]+@sha256:[0-9a-f]{64}\}", image), image
    assert f"${{{in_dockerfile.replace('=', ':-')}}}" == from_compose
    stages = [text.split() for word, text in dockerfile() if word == "FROM"]
    assert stages == [["${PYTHON_IMAGE}", "AS", "build"], ["${PYTHON_IMAGE}"]]
    assert "syntax=" not in (ROOT / "Dockerfile").read_text(), "BuildKit would download that image"
    for file in (ROOT / "deploy").rglob("*.y*ml"):
        for image in re.findall(r"^\s*-?\s*image:\s*(.*)", file.read_text(), re.MULTILINE):
            assert image == "zeta", f"{file.name}: the overlay sets the digest of this image only"
    (ours,) = yaml.safe_load((ROOT / "deploy/kubernetes/kustomization.yaml").read_text())["images"]
    assert re.fullmatch("sha256:[0-9a-f]{64}", ours["digest"])


def test_the_build_context_contains_the_distribution() -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert given >= {"zeta", "zeta_core", "server", "worker", "migrations"}
    assert given >= {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / path).exists() for path in given)
