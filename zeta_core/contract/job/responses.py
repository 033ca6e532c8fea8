"""The objects that the API returns, except jobs, events and manifests."""

from __future__ import annotations

from datetime import datetime
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from zeta_core.contract.job.machine_usage import GpuUsage, MachineUsage

FilePurpose = Literal["dataset", "model", "batch"]
ItemT = TypeVar("ItemT")


class _Response(BaseModel):
    """Frozen. A client keeps the fields of a newer server."""

    model_config = ConfigDict(frozen=True, extra="allow")


class StoredFile(_Response):
    """An uploaded file. ``sha256`` is the hex digest of its content; uploads of the same content differ in ``id``."""

    id: str
    object: Literal["file"] = "file"
    filename: str
    bytes: int
    sha256: str
    purpose: FilePurpose
    created_at: datetime


class FileUse(_Response):
    """A job whose model saw a file: its own data or model if ``base`` is null, else through the job ``base``."""

    id: str
    object: Literal["file_use"] = "file_use"
    entity_name: str | None = None
    status: str
    created_at: datetime
    base: str | None = Field(default=None, description="the job that it continues from, which saw the file")
    checkpoints: list[str] = Field(default=[], description="names of the job's stored checkpoints")


class ServedModelReport(_Response):
    """A model that a worker has loaded to answer requests. ``ready`` is false while it is being loaded.

    ``requests`` is the number of requests that it is answering. Adapters with an equal ``base``, which is a hash, are
    served by one process that holds their base once; the base itself has the same hash if it is served.
    """

    model: str
    project: str
    base: str | None = None
    ready: bool
    requests: int = 0


class DeviceReport(_Response):
    """One slot of a worker: a GPU (or an instance of one, with MIG), or a share of the CPU of a host without GPUs.

    Slots with the same ``device`` share a GPU. A job that needs a slot ends its ``served`` models.
    """

    slot: int
    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    device_kind: str | None = None  # see `device_kind`; older workers don't report it
    device: str | None = Field(default=None, description="the GPU's number or UUID, as in CUDA_VISIBLE_DEVICES")
    is_mig: bool = Field(default=False, description="it is a MIG instance, which can't be combined with other GPUs")
    problem: str | None = Field(default=None, description="why the GPU is not assigned to jobs now")
    job_id: str | None = None
    attempt: int | None = None
    served: list[ServedModelReport] = Field(default=[], description="the models that answer requests")


class WorkerSlot(DeviceReport):
    """A slot as the API shows it: the job of another project is not named."""

    busy: bool = Field(default=False, description="whether a job occupies the slot, even if it is not shown")


class Worker(_Response):
    """A machine that runs jobs: its slots (one per device), and the job in each slot."""

    name: str
    object: Literal["worker"] = "worker"
    host: str
    status: Literal["ready", "draining", "stopping", "gone"]
    draining: bool = Field(default=False, description="gets no new jobs and hands back its jobs, until it is undrained")
    disk_low: bool = Field(default=False, description="gets no new jobs until its disk has free space again")
    failing: dict[str, str] = Field(default={}, description="why loops and other components are failing, by component")
    num_dropped: int = Field(default=0, description="invalid entries removed from Redis since the worker was started")
    clock_ahead_seconds: float | None = Field(
        default=None,
        description="by how much its clock is ahead of the server's, accurate to a few seconds; beyond 60 s in either "
        "direction, its messages are rejected, and it gets no jobs",
    )
    has_own_secret: bool = Field(default=False, description="was added with a secret of its own")
    version: str
    started_at: datetime
    last_seen_at: datetime
    cores: int
    memory_bytes: int
    usage: MachineUsage | None = Field(
        default=None, description="the usage of the machine now; null if it is not known, as for an older worker"
    )
    cpu_kind: str | None = Field(default=None, description="the device kind of a run without GPUs")
    sandbox: str | None = Field(
        default=None, description="what confines runs to their own files; none: the machine has no such means; off"
    )
    labels: dict[str, str] = {}
    slots: list[WorkerSlot]
    background_slots: list[WorkerSlot] = Field(
        default=[], description="slots for jobs that need no GPU, such as exports"
    )

    @property
    def listed_slots(self) -> list[WorkerSlot]:
        """The slots, and the background slots that a job occupies."""
        return [*self.slots, *(slot for slot in self.background_slots if slot.busy)]

    @property
    def gpu_usage(self) -> dict[str, GpuUsage]:
        """The usage of each GPU now, by its device, as far as it is known."""
        return {gpu.device: gpu for gpu in self.usage.gpus} if self.usage is not None else {}


class Page(_Response, Generic[ItemT]):
    """One page of a list. While ``has_more`` is true, ``after=<next_after>`` requests the next page."""

    object: Literal["list"] = "list"
    data: list[ItemT]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
    next_after: str | None = Field(
        default=None, description="the `after` of the next page: last_id, or a longer text in a sorted list of jobs"
    )


class Curves(_Response):
    """A job's training curves: arrays of equal length, one entry per optimizer step, ``null`` without a value.

    Each of the first 1000 steps of a run (`NUM_DETAILED_STEPS`) has its own entry. Later, there is about one entry per
    second, whose ``loss`` and rewards are means over the steps since the previous entry. Fields with a default are
    empty if an older server does not send them. ``peak_memory_bytes`` is that of the first process. ``gpu_utilization``
    is the mean over the job's GPUs on its first worker, ``gpu_memory_bytes`` the memory in use on the fullest of them,
    and ``worker_...`` the usage of that worker's machine by all programs. ``rewards_...`` are the rewards
    (`ProgressLine.rewards`) of the trained answers; ``eval_...`` and ``perplexity`` refer to the held-out data.
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
    gpu_utilization: list[float | None] = []
    gpu_memory_bytes: list[int | None] = []
    worker_cpu: list[float | None] = []
    worker_memory_bytes: list[int | None] = []
    perplexity: list[float | None] = []
    token_accuracy: list[float | None] = []
    eval_token_accuracy: list[float | None] = []
    rewards_chosen: list[float | None] = []
    rewards_rejected: list[float | None] = []
    rewards_margin: list[float | None] = []
    rewards_accuracy: list[float | None] = []
    eval_rewards_chosen: list[float | None] = []
    eval_rewards_rejected: list[float | None] = []
    eval_rewards_margin: list[float | None] = []
    eval_rewards_accuracy: list[float | None] = []


class Health(_Response):
    """The response of ``/healthz`` and ``/readyz``. ``parts`` maps each component to ``ok`` or to its fault."""

    status: Literal["ok", "degraded", "unavailable"]
    version: str
    parts: dict[str, str] = {}


class LoginLink(_Response):
    """An address that logs a browser in with an API key. It works once, until ``expires_at``."""

    object: Literal["login_link"] = "login_link"
    url: str
    expires_at: datetime


class DeletedObject(_Response):
    """The response to a DELETE request."""

    id: str
    object: str
    deleted: Literal[True] = True
