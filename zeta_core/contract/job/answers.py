"""The objects the API returns beside jobs, events and manifests: uploaded files, workers, and lists of anything."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from zeta_core.contract.wire.messages import DeviceReport

FilePurpose = Literal["dataset", "model"]
ItemT = TypeVar("ItemT")


class _Answer(BaseModel):
    """Frozen; a client keeps the fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="allow")


class StoredFile(_Answer):
    """An uploaded file; ``sha256`` is of its bytes, in hex, and two uploads of the same bytes are told apart by id."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    bytes: int
    sha256: str
    purpose: FilePurpose
    created_at: datetime


class Worker(_Answer):
    """A machine that trains: its slots (one per device) and which job runs in each."""

    name: str
    object: Literal["worker"] = "worker"
    host: str
    status: Literal["ready", "draining", "stopping", "gone"]
    draining: bool = Field(default=False, description="gets no job and hands back those it has, until undrained")
    disk_low: bool = Field(default=False, description="gets no job until its disk has room again")
    failing: dict[str, str] = Field(default={}, description="why loops and other components are failing, by component")
    num_dropped: int = Field(default=0, description="invalid entries removed from Redis since the worker was started")
    version: str
    started_at: datetime
    last_seen_at: datetime
    cores: int
    memory_bytes: int
    cpu_kind: str | None = Field(default=None, description="the device kind of a training without GPUs")
    labels: dict[str, str] = {}
    slots: list[DeviceReport]


class Page(_Answer, Generic[ItemT]):
    """One page of a list; ``after=<last_id>`` asks for the next one while ``has_more`` is true."""

    object: Literal["list"] = "list"
    data: list[ItemT]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Curves(_Answer):
    """A job's curves: arrays of equal length, ``null`` where a step has no such value; a step is an optimizer step.

    Each of a run's first 1000 steps is there (`STEPS_TOLD_EACH`), of later ones about one a second, whose ``loss`` and
    rewards are then means over the steps since the one before it.
    The last ones are empty where an older server does not tell them; ``peak_memory_bytes`` is of the first process.
    ``rewards_...`` are those of DPO (`ProgressLine.rewards`) over the pairs trained on; ``eval_...`` and ``perplexity``
    are over what is held out.
    """

    object: Literal["metrics"] = "metrics"
    step: list[int]
    loss: list[float | None]
    eval_loss: list[float | None]
    learning_rate: list[float | None]
    grad_norm: list[float | None]
    tokens: list[int | None]
    tokens_per_second: list[float | None]
    epoch: list[float | None]
    mfu: list[float | None] = []
    data_wait_share: list[float | None] = []
    checkpoint_blocked_share: list[float | None] = []
    peak_memory_bytes: list[int | None] = []
    perplexity: list[float | None] = []
    rewards_chosen: list[float | None] = []
    rewards_rejected: list[float | None] = []
    rewards_margin: list[float | None] = []
    rewards_accuracy: list[float | None] = []
    eval_rewards_chosen: list[float | None] = []
    eval_rewards_rejected: list[float | None] = []
    eval_rewards_margin: list[float | None] = []
    eval_rewards_accuracy: list[float | None] = []


class Health(_Answer):
    """The answer of ``/healthz`` and ``/readyz``; ``parts`` says of each part ``ok`` or what is wrong with it."""

    status: Literal["ok", "degraded", "unavailable"]
    version: str
    parts: dict[str, str] = {}


class DeletedObject(_Answer):
    """The answer to a DELETE."""

    id: str
    object: str
    deleted: Literal[True] = True
