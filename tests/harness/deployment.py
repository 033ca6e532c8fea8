"""The deployment files as their own tools parse them: the compose file, the Dockerfile and the systemd unit."""

import configparser
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.harness.valkey import valkey_binary
from zeta_core.system.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
ZETA = Path(sys.executable).with_name("zeta")
SECRETS_IN_CONTAINER = "/run/zeta"


class ComposeLoader(yaml.SafeLoader):
    """YAML with compose's tag ``!reset``, which removes a value of an earlier file."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)  # pyright: ignore[reportUnknownLambdaType]


def existing_settings() -> set[str]:
    """The environment variables that the settings classes read, including the ``…_FILE`` forms of secrets."""
    for module in ("server.settings", "worker.settings", "zeta.server_lookup", "zeta.up.settings"):
        importlib.import_module(module)
    classes: list[type[Settings]] = [Settings]
    for known in classes:
        classes += known.__subclasses__()
    names = {PREFIX + field.upper() for known in classes for field in known.model_fields}
    return names | {f"{PREFIX}{secret.upper()}_FILE" for known in classes for secret in known.secrets}


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    return yaml.load((ROOT / name).read_text(), ComposeLoader)


def dockerfile() -> list[tuple[str, str]]:
    """The instructions in order, each with its text on one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in words]


def systemd_unit() -> configparser.RawConfigParser:
    class Repeated(dict[str, Any]):
        """Collects the values of repeated keys such as ``Environment=``, one per line."""

        def __setitem__(self, key: str, value: Any) -> None:
            if key in self and isinstance(value, list):
                value = [*self[key], *value]
            super().__setitem__(key, value)

    unit = configparser.RawConfigParser(strict=False, dict_type=Repeated, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((ROOT / "deploy/zeta.service").read_text())
    return unit


def unit_environment() -> dict[str, str]:
    lines = systemd_unit()["Service"]["Environment"].splitlines()
    return dict(line.split("=", 1) for line in lines)


def image_environment() -> dict[str, str]:
    pairs = [shlex.split(text) for word, text in dockerfile() if word == "ENV"]
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def make_secrets(directory: Path, **environment: str) -> None:
    script = ROOT / "deploy/make-secrets.sh"
    subprocess.run(["sh", script, directory], check=True, env={"PATH": os.defpath, **environment}, timeout=30)


def environment_of(service: str, secrets: Path) -> dict[str, str]:
    """The environment of a container's process, with the secrets in a local folder instead of the volume."""
    own = {key: value for key, value in compose()["services"][service]["environment"].items() if value is not None}
    folder = f"{secrets / secret_folder(service)}"
    interpolated = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for key, value in own.items()}
    return image_environment() | {k: v.replace(SECRETS_IN_CONTAINER, folder) for k, v in interpolated.items()}


def secret_folder(service: str) -> str:
    """The folder of `make-secrets.sh` that a service mounts (``migrate`` mounts the server's)."""
    (volume,) = [
        text.split(":")[0] for text in compose()["services"][service]["volumes"] if f":{SECRETS_IN_CONTAINER}" in text
    ]
    (folder,) = [
        text.split(":")[1].removeprefix("/secrets/")
        for text in compose()["services"]["secrets"]["volumes"]
        if text.startswith(f"{volume}:")
    ]
    return folder


def redis_command(secrets: Path, data: Path, port: int) -> list[str | Path]:
    """The compose file's Redis command, with loopback addresses and local folders."""
    program, *arguments = compose()["services"]["redis"]["command"]
    assert program == "redis-server"
    folder = str(secrets / secret_folder("redis"))
    command: list[str | Path] = [valkey_binary(), *(word.replace(SECRETS_IN_CONTAINER, folder) for word in arguments)]
    return [*command, "--bind", "127.0.0.1", "--port", str(port), "--dir", data]
