"""The settings of `zeta up`, and the environment of its child processes.

`zeta up` reads only the settings that it needs itself. The child processes inherit all other ``ZETA_*`` and environment
variables unchanged, so their settings need not be listed here.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from zeta.up.home import Home
from zeta_core.system.settings import PREFIX, ApiKey, DatabaseUrl, RedisUrl, Settings

DEFAULT_STOP_GRACE_SECONDS = 30.0
_SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD")
_SERVER_SECRETS = frozenset({"ZETA_API_KEY", "ZETA_DATABASE_URL", "ZETA_SERVE_API_KEY", "ZETA_TLS_KEY"})


class UpSettings(Settings):
    """The settings that `zeta up` itself needs; ``port`` 0 picks a free port."""

    host: str = "127.0.0.1"
    port: int = Field(8400, ge=0, le=65535)
    behind_proxy: bool = Field(False, description="only a reverse proxy with TLS reaches the service")
    tls_cert: Path | None = Field(None, description="PEM file of the certificate; default: no TLS")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key; default: no TLS")
    redis_url: RedisUrl | None = Field(None, description="default: a Valkey server started by `zeta up`")
    database_url: DatabaseUrl | None = Field(None, description="default: SQLite in ZETA_HOME")
    artifacts_url: str | None = Field(None, description="default: a folder in ZETA_HOME")
    api_key: ApiKey | None = Field(None, description="default: created at the first start, in admin.key")
    worker_secret: str | None = Field(None, description="default: created at the first start, in worker.secret")
    shared_worker_secret: bool = Field(True, description="not off with `zeta up`, whose worker uses the shared secret")
    worker_name: str | None = Field(None, description="default: this machine's name")
    hub: str = "on"
    stop_grace_seconds: float = Field(DEFAULT_STOP_GRACE_SECONDS, ge=0, allow_inf_nan=False)

    @field_validator("tls_cert", "tls_key")
    @classmethod
    def _absolute_path(cls, file: Path | None) -> Path | None:
        return None if file is None else file.absolute()  # the processes run in the home

    @field_validator("shared_worker_secret")
    @classmethod
    def _shared(cls, value: bool) -> bool:
        if not value:
            raise ValueError("`zeta up` starts a worker with the shared secret; unset it, or use `zeta server`")
        return value


class ShownSettings(UpSettings):
    """The settings of `zeta up` as `zeta config` shows them, also to a user without a home directory."""

    needs_home: ClassVar[bool] = False


def child_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """The ``ZETA_*`` variables that only child processes read, for display. Values are masked if the name suggests a
    secret.
    """
    own = {PREFIX + name.upper() for name in (*UpSettings.model_fields, "url", "project")}
    return {
        name: "***" if _SECRET.search(name) and not name.endswith("_FILE") else value
        for name, value in sorted(variables.items())
        if name.startswith(PREFIX) and name not in own
    }


def worker_name(settings: UpSettings) -> str:
    """The worker's name. It is stable across restarts, so that the worker finds its queue and its runs again."""
    return settings.worker_name or re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node()).strip("._-") or "local"


def child_environment(variables: Mapping[str, str], settings: UpSettings, port: int) -> dict[str, str]:
    """The environment of the server: the inherited variables, the effective settings, and paths of secret files."""
    home = Home(settings.home)
    child = dict(variables) | tls_variables(settings)
    child |= {
        "ZETA_HOME": str(settings.home),
        "ZETA_HOST": settings.host,
        "ZETA_PORT": str(port),
        "ZETA_HUB": settings.hub,
        "ZETA_WORKER_NAME": worker_name(settings),
        "ZETA_STOP_GRACE_SECONDS": f"{settings.stop_grace_seconds:g}",
        "PYTHONUNBUFFERED": "1",
    }
    for name, value, file in (
        ("ZETA_API_KEY", settings.api_key, home.admin_key),
        ("ZETA_WORKER_SECRET", settings.worker_secret, home.worker_secret),
        ("ZETA_REDIS_URL", settings.redis_url, home.redis_url),
    ):
        if value is None:
            child.pop(name, None)
            child[f"{name}_FILE"] = str(file)
    return child


def tls_variables(settings: UpSettings) -> dict[str, str]:
    """The variables that name the files of the certificate, for a process with another working directory."""
    files = {"ZETA_TLS_CERT": settings.tls_cert, "ZETA_TLS_KEY": settings.tls_key}
    return {name: str(file) for name, file in files.items() if file is not None}


def worker_environment(server: Mapping[str, str]) -> dict[str, str]:
    """The environment of the worker: that of the server without the secrets that only the server needs."""
    return {name: value for name, value in server.items() if name.removesuffix("_FILE") not in _SERVER_SECRETS}


def valkey_environment(server: Mapping[str, str]) -> dict[str, str]:
    """The environment of Valkey, which reads its configuration from a file: no setting of the service."""
    return {name: value for name, value in server.items() if not name.startswith(PREFIX)}
