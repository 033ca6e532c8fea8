"""The progress of a job: journal lines that a run writes, and the events that readers receive.

A *journal line* is written to ``events.jsonl`` by the training process, or by its worker at the end. It is identified
by the job, the attempt and the number of the line, from 1. An *event* is a stored line, or a message of the server,
with its ``seq``.
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
from zeta_core.contract.spec.range_test import RangeTest
from zeta_core.contract.spec.resolved_spec import RecordedSpec

EventType = Literal["status", "progress", "log", "checkpoint", "sample", "warning", "error"]

Phase = Literal[
    "fetching",
    "loading_data",
    "loading_model",
    "finding_learning_rate",
    "training",
    "evaluating",
    "saving",
    "answering",  # the requests of a batch
]


LOSS_WINDOW_STEPS = 50  # of `recent_loss`
MAX_READABLE_PERPLEXITY = 1_000_000  # larger ones are not shown to people
NUM_DETAILED_STEPS = 1000  # the first steps of a run, which are all reported; later ones are combined


def utc_now() -> datetime:
    return datetime.now(UTC)


class _Line(BaseModel):
    """The fields of every line. Unknown fields of a newer version are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    created_at: datetime = Field(default_factory=utc_now)


class StatusLine(_Line):
    """A change of the attempt's status.

    ``running`` is reported once, when the run begins; ``resolved_spec`` then contains every default that was
    chosen on the worker. Any other status ends the attempt and is the journal's last line. The worker publishes it
    when all processes of the attempt have ended. ``trace_parent``, in the first event of a job, is the W3C trace
    context of the request that created it, if the server exports traces.
    """

    type: Literal["status"] = "status"
    status: JobStatus
    reason: StatusReason | None = None
    message: str | None = None
    resolved_spec: RecordedSpec | None = None
    result: JobResult | None = None
    error: JobError | None = None
    trace_parent: str | None = None


StoredNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]  # that of a column of the database


class StepFigures(BaseModel):
    """The metrics of one optimizer step, named as in `ProgressLine`, which may cover several steps."""

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int
    epoch: float | None = None
    tokens: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    token_accuracy: float | None = None
    rewards: dict[str, float] | None = None


class ProgressLine(_Line):
    """The progress of the run. A step is an optimizer step; ``tokens`` counts the trained tokens of the whole run.

    ``loss`` is the mean in nats over the tokens of the steps since the last progress line. If there are several,
    ``steps`` contains the metrics of each of them, up to step `NUM_DETAILED_STEPS` of the run. ``recent_loss`` is the
    mean over the tokens of the last `LOSS_WINDOW_STEPS` steps of the attempt. It does not depend on the interval
    between lines, so it can be compared between runs. ``learning_rate`` is the rate of the update at ``step``.
    ``eval_loss`` is the mean over the held-out tokens, and ``perplexity`` is e to the power of it. ``token_accuracy``
    is the share of the trained tokens, and ``eval_token_accuracy`` of the held-out tokens, to which the model gives the
    highest probability; both are null if the model returns no logits, and if preferences are learned. ``memory`` maps
    a device to its peak memory in bytes. ``mfu`` is the model FLOPs utilization, null if the device's peak is unknown.
    ``data_wait_share`` and ``checkpoint_blocked_share`` are shares of the time since the last line. All shares and
    ``mfu`` are between 0 and 1. ``memory_parts``, in an attempt's first line, are the bytes of weights, gradients,
    optimizer state and activations.

    The worker adds the usage of its machine: the mean utilization of the job's GPUs there, the memory in use on the
    fullest of them, and the usage of its cores and memory by all programs.

    While data is read, ``documents`` counts the tokenized documents, and ``share`` is the share of the data that was
    read. During a range test, ``share`` is the completed share of it, and no steps are counted.
    In a batch, ``step`` counts the requests with a result, and ``num_failed`` those of them with an error.
    In an evaluation, ``documents`` counts the evaluated documents, and ``share`` is the share of them, over all models.
    With the methods ``dpo``, ``kto`` and ``orpo``, a loss is the mean over pairs or labeled answers. ``rewards`` are
    means, too: ``chosen`` (or desirable), ``rejected`` (or undesirable), their ``margin``, and ``accuracy``, the share
    of pairs whose chosen answer has the higher reward. With ``kto``, an answer counts in ``accuracy`` if its reward is
    above (desirable) or below (undesirable) beta times ``kl``, the estimated divergence from the reference model.
    """

    type: Literal["progress"] = "progress"
    phase: Phase
    documents: int | None = None
    share: float | None = None
    step: StoredNumber | None = None
    total_steps: int | None = None
    epoch: float | None = None
    tokens: int | None = None
    loss: float | None = None
    recent_loss: float | None = None
    token_accuracy: float | None = None
    eval_loss: float | None = None
    eval_token_accuracy: float | None = None
    perplexity: float | None = None  # at most e^700, which a float can represent
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
    gpu_utilization: float | None = None
    gpu_memory_bytes: int | None = None
    worker_cpu: float | None = None
    worker_memory_bytes: int | None = None
    steps: list[StepFigures] | None = None
    num_failed: int | None = None


class LogLine(_Line):
    """A message of the trainer, with its data. The complete output of the processes is in ``train.log``."""

    type: Literal["log"] = "log"
    level: Literal["info", "warning", "error"] = "info"
    message: str
    data: DataReport | RangeTest | None = None


class CheckpointLine(_Line):
    """A checkpoint that is complete and can be downloaded. ``request`` is the number of the request that it fulfils."""

    type: Literal["checkpoint"] = "checkpoint"
    name: str
    step: StoredNumber
    metrics: dict[str, float] = {}
    bytes: int = Field(default=0, ge=0, le=2**63 - 1)
    request: StoredNumber | None = None


class SampleLine(_Line):
    """Text that the model generated for a held-out prompt."""

    type: Literal["sample"] = "sample"
    step: int
    prompt: str
    text: str


class WarningLine(_Line):
    """A problem that does not end the run. ``patch`` is a JSON merge patch of the spec."""

    type: Literal["warning"] = "warning"
    code: str
    message: str
    hint: str | None = None
    patch: Patch | None = None
    evidence: dict[str, JsonValue] | None = None
    stacks: str | None = None  # of a stalled run: the stacks of its processes, as faulthandler writes them


class ErrorLine(_Line):
    """The error that ends the attempt."""

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
LINE_MODELS = (
    StatusLine,
    ProgressLine,
    LogLine,
    CheckpointLine,
    SampleLine,
    WarningLine,
    ErrorLine,
)  # one for each type of event


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


def describe_perplexity(value: float) -> str:
    """A perplexity for people: a model that has not learned yet can have one with hundreds of digits."""
    return f"{value:.4g}" if value < MAX_READABLE_PERPLEXITY else f"over {MAX_READABLE_PERPLEXITY:,}"
