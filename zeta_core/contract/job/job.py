"""The job object that the API returns: its attempts, its error and its result."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from zeta_core.contract.job.evaluation import EvaluationResult
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.memory import MemoryParts
from zeta_core.contract.job.status import JobStatus, RequestedAction, StatusReason, WaitingCode
from zeta_core.contract.spec.resolved_spec import RecordedSpec


class _JobModel(BaseModel):
    """Read from a peer or from the database. Frozen; fields of a newer version are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class WaitingReason(_JobModel):
    code: WaitingCode
    message: str
    since: datetime
    details: dict[str, JsonValue] = {}
    estimated_start_at: datetime | None = Field(
        default=None,
        description="roughly when the job starts, from the remaining times and time limits of the jobs ahead; null if "
        "one of them is unknown",
    )

    def seconds_to_start(self, now: datetime) -> float | None:
        """The time until the estimated start; ``None`` without an estimate, and if the job is late."""
        if self.estimated_start_at is None or self.estimated_start_at <= now:
            return None
        return (self.estimated_start_at - now).total_seconds()


class Node(_JobModel):
    """One node of an attempt that runs on several workers."""

    node_rank: int
    worker: str
    state: str = Field(description="dispatched, claimed (fetches its inputs), prepared, running or released")
    address: str | None = Field(default=None, description="where the other nodes reach it; null until it is prepared")


class Attempt(_JobModel):
    attempt: int
    worker: str = Field(description="the worker; that of node 0 if there are several")
    nodes: list[Node] = Field(
        default=[], description="the nodes of an attempt that runs on several workers, by rank; else empty"
    )
    device_kind: str | None = Field(default=None, description="determines the kernels; null until the run begins")
    started_at: datetime
    finished_at: datetime | None = None
    reason: StatusReason | None = None
    first_step: int | None = None
    last_step: int | None = None


class JobErrorEvidence(_JobModel):
    exit_code: int | None = None
    signal: str | None = None
    rank: int | None = None
    node: int | None = None  # of a job on several hosts
    log_tail: str | None = None


class JobError(_JobModel):
    """Why a job failed, for people (``message``, ``hint``) and programs (``code``, ``patch`` of the spec)."""

    code: str
    message: str
    hint: str | None = None
    patch: dict[str, JsonValue] | None = None
    evidence: JobErrorEvidence = JobErrorEvidence()


class JobResult(_JobModel):
    """The metrics of a completed run. Losses are means per trained token in nats.

    ``memory`` was measured in the first process during the first step of the last attempt. It is null if that attempt
    trained no step, and with DeepSpeed, which manages its own memory. A batch has the numbers of its answered and its
    failed requests, and of their tokens. An evaluation has its scores in ``evaluation``, and its loss in ``eval_loss``.
    """

    train_loss: float | None = None
    eval_loss: float | None = None
    best_checkpoint: str | None = None
    tokens: int | None = None
    train_seconds: float | None = None
    memory: MemoryParts | None = None
    num_answered: int | None = None
    num_failed: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    evaluation: EvaluationResult | None = None


class Job(BaseModel):
    """The job object of the API."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["job"] = "job"
    kind: JobKind = Field(default=JobKind.TRAINING, description="training; export, batch or evaluation of a checkpoint")
    project: str
    created_by: str
    parent: str | None = None
    sweep: str | None = Field(default=None, description="the sweep that created the job")
    status: JobStatus
    status_reason: StatusReason | None = None
    requested_action: RequestedAction | None = None
    checkpoint_requested: bool = Field(default=False, description="a requested checkpoint is not stored yet")
    waiting_reason: WaitingReason | None = None
    queue_position: int | None = Field(default=None, description="1 is the next to start; null when not queued")
    entity_name: str | None = None
    spec: dict[str, Any]
    resolved_spec: RecordedSpec
    attempt: int = Field(description="the number of times the job was started; 0 before the first start")
    attempts: list[Attempt] = []
    max_retries: int
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: dict[str, JsonValue] | None = None
    worker: str | None = None
    result: JobResult | None = None
    error: JobError | None = Field(default=None, description="why the job failed; null until it has ended")
    warnings: list[dict[str, JsonValue]] = []
    checkpoints: int = 0
    final_checkpoint: str | None = None
    metadata: dict[str, str] = {}
