"""The manifest of a checkpoint, which lists its files and makes it verifiable."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

FileRole = Literal["weights", "adapter", "tokenizer", "config", "state", "results"]
CheckpointFormat = Literal["huggingface", "module", "adapter", "gguf", "results"]

FINAL_CHECKPOINT = "final"  # the name of the checkpoint that a completed job ends with
BEST_CHECKPOINT = "best"  # the name of the checkpoint with the lowest evaluation loss

_STEP = r"step-[0-9]{1,18}"
NAME_PATTERN = re.compile(rf"\A({_STEP}|{BEST_CHECKPOINT}|{FINAL_CHECKPOINT})\Z")


def checkpoint_step(name: str) -> int | None:
    """N of ``step-N``; ``None`` for ``best`` and ``final``."""
    return int(name.removeprefix("step-")) if re.fullmatch(_STEP, name) else None


def surplus_checkpoints(names: Iterable[str], save_total_limit: int) -> list[str]:
    """The ``step-N`` checkpoints to delete so that the newest ``save_total_limit`` remain, oldest first."""
    steps = sorted((step, name) for name in names if (step := checkpoint_step(name)) is not None)
    return [name for _, name in steps[: max(0, len(steps) - save_total_limit)]]


class ManifestFile(BaseModel):
    """One file of a checkpoint: ``path`` is relative to its directory, ``size`` is in bytes, ``sha256`` in hex."""

    model_config = ConfigDict(frozen=True, extra="allow")

    path: str
    size: int
    sha256: str
    role: FileRole

    @field_validator("path")
    @classmethod
    def inside(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
            raise ValueError(f"{path!r} is outside the checkpoint")
        return path


class Manifest(BaseModel):
    """``manifest.json``, written last. A checkpoint without one, or with different files, is invalid."""

    model_config = ConfigDict(frozen=True, extra="allow")

    contract_version: int = 1
    run_id: str
    name: str
    format: CheckpointFormat
    base_model: str | None = None
    step: int
    tokens: int
    metrics: dict[str, float] = {}
    device_kind: str | None = None  # the kind of the devices that computed it; older versions don't store it
    created_at: datetime
    files: list[ManifestFile]
