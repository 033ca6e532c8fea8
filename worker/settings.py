"""The worker's settings: read once at its entry point from ``ZETA_*``, then handed on as one frozen object."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from zeta_core.system.settings import FleetSettings

MEBIBYTE = 2**20
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


class WorkerSettings(FleetSettings):
    """What ``zeta worker`` needs."""

    worker_name: str = Field(default_factory=lambda: _NOT_IN_NAME.sub("-", socket.gethostname()) or "worker")
    worker_slots: int | None = Field(default=None, ge=1, le=1024, description="unset: one per visible GPU, or 1")
    worker_labels: dict[str, str] = Field(default={}, description="name=value, with commas between them")
    stop_grace_seconds: float = Field(default=30, ge=0, description="what a training gets for saving when stopped")
    stall_factor: float = Field(
        default=20, ge=2, description="a training without a step for so many times its median step is ended"
    )
    stall_min_seconds: float = Field(default=300, gt=0, description="... but for no less than this")
    disk_min_free_bytes: int = Field(
        default=512 * MEBIBYTE, ge=0, description="with less free, trainings save and pause until there is room"
    )
    log_max_bytes: int = Field(
        default=64 * MEBIBYTE, ge=1024, description="of a job's log; beyond it only its end is kept"
    )
    journal_max_lines: int = Field(
        default=100_000, ge=100, description="of an attempt; beyond it only what matters is told"
    )
    check_memory_bytes: int = Field(
        default=4096 * MEBIBYTE, ge=1024 * MEBIBYTE, description="what the process that checks specs may allocate"
    )
    job_memory_bytes: int | None = Field(
        default=None,
        ge=256 * MEBIBYTE,
        description="of all processes of a job on this worker; unset: a job over its slots' share of the machine is "
        "ended only where the machine runs out of memory",
    )
    cache_max_bytes: int = Field(default=20 * 1024 * MEBIBYTE, ge=0, description="what was used longest ago goes first")
    job_env: tuple[str, ...] = Field(default=(), description="names of further variables that trainings are given")
    cuda_visible_devices: str | None = Field(default=None, description="CUDA_VISIBLE_DEVICES: these GPUs are offered")

    @classmethod
    def of_this_process(cls, **overrides: object) -> WorkerSettings:
        """The settings in this process's own environment. Raises `InvalidSettings`."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return cls.from_environment(os.environ, **{"cuda_visible_devices": visible, **overrides})

    @field_validator("worker_name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.match(value):
            raise ValueError("it must be letters, digits, '.', '_' and '-', at most 100 of them")
        return value

    @field_validator("worker_labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if not all(name.strip() and separator for name, separator, _ in pairs):
            raise ValueError("it must be name=value, with commas between them")
        return {name.strip(): text.strip() for name, _, text in pairs}

    @field_validator("job_env", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @property
    def root(self) -> Path:
        """This worker's own folder: its run directories lie here, and several workers may share one home."""
        return self.home / "workers" / self.worker_name


_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._-]|^[._-]+")
