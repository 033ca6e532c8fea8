"""The effect of each command on a job in each state, in one table for the server and the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from zeta_core.contract.job.status import JobStatus, RequestedAction, StatusReason

Command = Literal["cancel", "pause", "resume", "checkpoint", "delete", "rerun"]
COMMANDS: tuple[Command, ...] = get_args(Command)


FROM_START = "start"


class Rerun(BaseModel):
    """The body of ``POST /v1/jobs/{id}/rerun``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    patch: dict[str, JsonValue] = Field(default={}, description="a JSON merge patch of the submitted spec")
    from_: str = Field(
        default=FROM_START,
        alias="from",
        pattern=r"^(start|latest|best|final|step-\d+)$",
        description="'start', 'latest', or the name of a checkpoint such as 'step-100'",
    )


class Situation(StrEnum):
    """A job's status, refined by the requested action and by the reason why it is paused."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "running, pause requested"
    PAUSING_FOR_SWEEP = "running, wait for its sweep requested"
    CANCELLING = "running, cancel requested"
    PAUSED = "paused"
    PAUSED_FOR_DISK = "paused until the disk has space"
    PAUSED_FOR_SWEEP = "paused until its sweep compares its jobs"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Effect(StrEnum):
    """What an accepted command does, as the documentation describes it."""

    CANCEL = "cancelled immediately"
    REQUEST_CANCEL = "stopped; its stored checkpoints are kept"
    PAUSE = "paused immediately"
    REQUEST_PAUSE = "stopped after saving a checkpoint"
    KEEP_PAUSED = "stays paused even when the disk has space"
    QUEUE = "queued, to continue from its newest checkpoint"
    REQUEST_SAVE = "saves a checkpoint after its current step and continues"
    WITHDRAW_PAUSE = "the pause is withdrawn; if the run has already stopped, the job is queued again"
    NOTHING = "no change"
    DELETE = "deleted with its artifacts"
    RERUN = "a new job"


@dataclass(frozen=True)
class Accepted:
    """The command is carried out; ``status`` is the HTTP status."""

    status: int
    effect: Effect


@dataclass(frozen=True)
class Rejected:
    """HTTP 409: the job's state does not allow the command. ``sentence`` is a format with ``id`` and ``status``."""

    code: str
    sentence: str


_NOT_PAUSED = Rejected("job_not_paused", "Job {id} is {status}; only a paused job can be resumed.")
_NOT_RUNNING = Rejected(
    "job_not_running",
    "Job {id} is {status}; only a running job can save a checkpoint. `zeta checkpoints {id}` lists those that it has.",
)
_NOT_ENDED = Rejected("job_not_ended", "Job {id} is {status}; cancel it first, or wait until it has ended.")
_CANCELLING = Rejected("cancel_under_way", "Job {id} is being cancelled; `zeta rerun {id}` submits it again.")
_WAITS_FOR_SWEEP = Rejected(
    "waits_for_sweep",
    "Job {id} waits until the other jobs of its sweep have trained as many steps, and then continues or is eliminated; "
    "to train it now, submit it again with `zeta rerun {id} --from latest`.",
)
_ALREADY_PAUSED = Rejected("job_paused", "Job {id} is already paused; `zeta resume {id}` continues it.")


def _ended(done: str) -> Rejected:
    return Rejected(
        "job_ended",
        f"Job {{id}} is already {{status}}; only a job that has not ended can be {done}. "
        "`zeta rerun {id}` submits it again as a new job.",
    )


def _accepted(effect: Effect) -> Accepted:
    return Accepted(202, effect)


_RERUN = Accepted(201, Effect.RERUN)
_ENDED_JOB: dict[Command, Accepted | Rejected] = {
    "cancel": _ended("cancelled"),
    "pause": _ended("paused"),
    "resume": Rejected(
        "job_ended",
        "Job {id} is already {status}; only a paused job can be resumed. `zeta rerun {id} --from latest` continues it "
        "from its newest checkpoint as a new job.",
    ),
    "checkpoint": Rejected(
        "job_ended",
        "Job {id} is already {status} and saves no more checkpoints; `zeta checkpoints {id}` lists those that it has.",
    ),
    "delete": Accepted(200, Effect.DELETE),
    "rerun": _RERUN,
}

COMMAND_TABLE: dict[Situation, dict[Command, Accepted | Rejected]] = {
    Situation.QUEUED: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _accepted(Effect.PAUSE),
        "resume": _NOT_PAUSED,
        "checkpoint": _NOT_RUNNING,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.RUNNING: {
        "cancel": _accepted(Effect.REQUEST_CANCEL),
        "pause": _accepted(Effect.REQUEST_PAUSE),
        "resume": _NOT_PAUSED,
        "checkpoint": _accepted(Effect.REQUEST_SAVE),
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSING: {
        "cancel": _accepted(Effect.REQUEST_CANCEL),
        "pause": _accepted(Effect.NOTHING),
        "resume": _accepted(Effect.WITHDRAW_PAUSE),
        "checkpoint": _accepted(Effect.REQUEST_SAVE),
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSING_FOR_SWEEP: {
        "cancel": _accepted(Effect.REQUEST_CANCEL),
        "pause": _accepted(Effect.REQUEST_PAUSE),
        "resume": _WAITS_FOR_SWEEP,
        "checkpoint": _accepted(Effect.REQUEST_SAVE),
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.CANCELLING: {
        "cancel": _accepted(Effect.NOTHING),
        "pause": _CANCELLING,
        "resume": _CANCELLING,
        "checkpoint": _CANCELLING,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSED: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _ALREADY_PAUSED,
        "resume": _accepted(Effect.QUEUE),
        "checkpoint": _NOT_RUNNING,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSED_FOR_DISK: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _accepted(Effect.KEEP_PAUSED),
        "resume": _accepted(Effect.QUEUE),
        "checkpoint": _NOT_RUNNING,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSED_FOR_SWEEP: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _WAITS_FOR_SWEEP,
        "resume": _WAITS_FOR_SWEEP,
        "checkpoint": _NOT_RUNNING,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.SUCCEEDED: _ENDED_JOB,
    Situation.FAILED: _ENDED_JOB,
    Situation.CANCELLED: _ENDED_JOB,
}

_WHILE_RUNNING: dict[RequestedAction | None, Situation] = {
    None: Situation.RUNNING,
    "pause": Situation.PAUSING,
    "wait_for_sweep": Situation.PAUSING_FOR_SWEEP,
    "cancel": Situation.CANCELLING,
}


def job_situation(
    status: JobStatus, reason: StatusReason | None, requested_action: RequestedAction | None
) -> Situation:
    """The situation of a job, which determines the effect of commands."""
    if status == JobStatus.RUNNING:
        return _WHILE_RUNNING[requested_action]
    if status == JobStatus.PAUSED and reason == StatusReason.DISK_FULL:
        return Situation.PAUSED_FOR_DISK
    if status == JobStatus.PAUSED and reason == StatusReason.WAITS_FOR_SWEEP:
        return Situation.PAUSED_FOR_SWEEP
    return Situation(status.value)


def as_markdown() -> str:
    """The table as Markdown. A test compares it with the documentation."""
    lines = [f"| a job that is | {' | '.join(COMMANDS)} |", f"|---|{'---|' * len(COMMANDS)}"]
    for situation, answers in COMMAND_TABLE.items():
        cells = [
            f"{answer.status}: {answer.effect}" if isinstance(answer, Accepted) else f"409 `{answer.code}`"
            for answer in (answers[command] for command in COMMANDS)
        ]
        lines.append(f"| {situation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
