"""What a training says while it runs: lines of its journal, and the events that readers see.

A *journal line* is written by the training process (and, for the end, by its worker) to ``events.jsonl``; it is known
by (job, attempt, line from 1). An *event* is a stored line, or a sentence of the server's own, with its ``seq``.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter
from typing_extensions import TypeAliasType

from zeta_core.contract.job.advice import Patch
from zeta_core.contract.job.data_report import DataReport
from zeta_core.contract.job.job import JobError, JobResult
from zeta_core.contract.job.status import JobStatus, StatusReason
from zeta_core.contract.spec.rate_search import RateSearch
from zeta_core.contract.spec.resolved_spec import RecordedSpec

EventType = Literal["status", "progress", "log", "checkpoint", "sample", "warning", "error"]

Phase = Literal[
    "fetching", "loading_data", "loading_model", "finding_learning_rate", "training", "evaluating", "saving"
]


LOSS_WINDOW_STEPS = 50  # of `recent_loss`
STEPS_TOLD_EACH = 1000  # a short run's curve is whole, and a long one's events are bounded


def utc_now() -> datetime:
    return datetime.now(UTC)


class _Line(BaseModel):
    """Fields every line has; unknown fields of a newer version are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    created_at: datetime = Field(default_factory=utc_now)


class StatusLine(_Line):
    """A change of the attempt's own state.

    ``running`` is said once when training begins (with ``resolved_spec``: every default that was decided on the
    worker); each other status ends the attempt, is the journal's last line, and is published by the worker only when
    nothing of the attempt is left.
    """

    type: Literal["status"] = "status"
    status: JobStatus
    reason: StatusReason | None = None
    message: str | None = None
    resolved_spec: RecordedSpec | None = None
    result: JobResult | None = None
    error: JobError | None = None


class StepFigures(BaseModel):
    """One optimizer step's own figures, by the names that `ProgressLine` has for those of several."""

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int
    epoch: float | None = None
    tokens: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    rewards: dict[str, float] | None = None


class ProgressLine(_Line):
    """Where the training is. A step is an optimizer step; ``tokens`` are those trained on since the run's start.

    ``loss`` is the mean over the tokens of the steps since the last progress line, in nats; ``steps``, where they are
    several, has each of them with its own figures, up to the run's step `STEPS_TOLD_EACH`. ``recent_loss`` is the mean
    over the tokens of the last `LOSS_WINDOW_STEPS` steps of the attempt: how long a line took does not change it, so it
    can be compared between runs. ``learning_rate`` is the rate of the update of ``step``. ``eval_loss`` is the mean
    over the held-out tokens, and ``perplexity`` e to the power of it; ``memory`` maps a device to the bytes used at
    most. ``mfu`` (model FLOPs utilization, null where the device's peak is not known) and the shares are from 0 to 1:
    ``data_wait_share`` and ``checkpoint_blocked_share`` of the time since the last line. ``memory_parts`` are bytes of
    weights, gradients, optimizer and activations, in an attempt's first line.
    While data is read, ``documents`` are those tokenized so far and ``share`` (0 to 1) is how much of it was read.
    While the learning rate is looked for, ``share`` is how much of that is done; what it computes is no step.
    With method ``dpo`` a loss is the mean over pairs, and ``rewards`` are means too: ``chosen``, ``rejected``, their
    ``margin``, and ``accuracy``, the share of pairs whose chosen answer has the higher one.
    """

    type: Literal["progress"] = "progress"
    phase: Phase
    documents: int | None = None
    share: float | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    tokens: int | None = None
    loss: float | None = None
    recent_loss: float | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    data_wait_share: float | None = None
    checkpoint_blocked_share: float | None = None
    eta_seconds: float | None = None
    memory: dict[str, int] | None = None
    rewards: dict[str, float] | None = None
    memory_parts: dict[str, int] | None = None
    steps: list[StepFigures] | None = None


class LogLine(_Line):
    """One sentence of the trainer's own (the full text of the processes is ``train.log``), with its figures."""

    type: Literal["log"] = "log"
    level: Literal["info", "warning", "error"] = "info"
    message: str
    data: DataReport | RateSearch | None = None


class CheckpointLine(_Line):
    """A checkpoint that is complete: readers can download it from the moment they see this."""

    type: Literal["checkpoint"] = "checkpoint"
    name: str
    step: int
    metrics: dict[str, float] = {}
    bytes: int = 0


class SampleLine(_Line):
    type: Literal["sample"] = "sample"
    step: int
    prompt: str
    text: str


class WarningLine(_Line):
    """Something to know, while the run goes on; ``patch`` is a JSON merge patch of the spec, ``evidence`` figures."""

    type: Literal["warning"] = "warning"
    code: str
    message: str
    hint: str | None = None
    patch: Patch | None = None
    evidence: dict[str, JsonValue] | None = None
    stacks: str | None = None  # of a training that stood still: where its processes were, as faulthandler writes it


class ErrorLine(_Line):
    type: Literal["error"] = "error"
    code: str
    message: str
    hint: str | None = None
    patch: Patch | None = None


JournalLine = Annotated[
    StatusLine | ProgressLine | LogLine | CheckpointLine | SampleLine | WarningLine | ErrorLine,
    Field(discriminator="type"),
]
JOURNAL_LINE: TypeAdapter[JournalLine] = TypeAdapter(JournalLine)


class _StoredEvent(BaseModel):
    """The fields of every event. ``seq`` counts from 1 within its job, without gaps."""

    model_config = ConfigDict(frozen=True, extra="allow")

    seq: int
    attempt: int
    created_at: datetime


class StatusEvent(_StoredEvent, StatusLine):
    pass


class ProgressEvent(_StoredEvent, ProgressLine):
    pass


class LogEvent(_StoredEvent, LogLine):
    pass


class CheckpointEvent(_StoredEvent, CheckpointLine):
    pass


class SampleEvent(_StoredEvent, SampleLine):
    pass


class WarningEvent(_StoredEvent, WarningLine):
    pass


class ErrorEvent(_StoredEvent, ErrorLine):
    pass


class UntypedEvent(_StoredEvent):
    """An event whose further fields are in ``model_extra``.

    The server sends stored events unchanged in this form. A client gets it for a type, or a value of a typed field,
    that only a newer server knows.
    """

    type: str


_TypedEvent = Annotated[
    StatusEvent | ProgressEvent | LogEvent | CheckpointEvent | SampleEvent | WarningEvent | ErrorEvent,
    Field(discriminator="type"),
]
Event = TypeAliasType("Event", Annotated[_TypedEvent | UntypedEvent, Field(union_mode="left_to_right")])
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
