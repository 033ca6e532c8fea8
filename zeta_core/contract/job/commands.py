"""What each command does to a job in each state: the one table that the server obeys and the documentation shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from zeta_core.contract.job.status import JobStatus, RequestedAction, StatusReason

Command = Literal["cancel", "pause", "resume", "delete", "rerun"]
COMMANDS: tuple[Command, ...] = get_args(Command)


FROM_START = "start"


class Rerun(BaseModel):
    """What ``POST /v1/jobs/{id}/rerun`` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    patch: dict[str, JsonValue] = Field(default={}, description="a JSON merge patch over the spec as it was sent")
    from_: str = Field(
        default=FROM_START,
        alias="from",
        pattern=r"^(start|latest|best|final|step-\d+)$",
        description="'start', 'latest', or the name of a checkpoint such as 'step-100'",
    )


class Situation(StrEnum):
    """A job's status, told apart by what was already asked of it and by what a paused one waits for."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "running, pause requested"
    CANCELLING = "running, cancel requested"
    PAUSED = "paused"
    PAUSED_FOR_DISK = "paused until the disk has room"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Effect(StrEnum):
    """What an accepted command does; the words are those of the documentation."""

    CANCEL = "cancelled at once"
    ORDER_CANCEL = "told to end; what it has stored stays"
    PAUSE = "paused at once"
    ORDER_PAUSE = "told to save a checkpoint and to free its device"
    HOLD = "stays paused, also when the disk has room"
    QUEUE = "queued, to go on from its newest checkpoint"
    WITHDRAW_PAUSE = "the pause is withdrawn; a training that has stopped for it already is queued again"
    NOTHING = "the same answer again"
    DELETE = "deleted with its artifacts"
    RERUN = "a new job"


@dataclass(frozen=True)
class Accepted:
    """The command is obeyed, with this HTTP status."""

    status: int
    effect: Effect


@dataclass(frozen=True)
class Refused:
    """HTTP 409: the state has no such move. ``sentence`` takes the job's ``id`` and ``status``."""

    code: str
    sentence: str


_NOT_PAUSED = Refused("job_not_paused", "Job {id} is {status}; only a paused job can be resumed.")
_NOT_ENDED = Refused("job_not_ended", "Job {id} is {status}; cancel it first, or wait for its end.")
_CANCELLING = Refused("cancel_under_way", "Job {id} is being cancelled; `zeta rerun {id}` starts it again.")
_ALREADY_PAUSED = Refused("job_paused", "Job {id} is paused already; `zeta resume {id}` lets it go on.")


def _ended(done: str) -> Refused:
    return Refused(
        "job_ended",
        f"Job {{id}} is {{status}} already; only a job that has not ended can be {done}. "
        "`zeta rerun {id}` makes a new one of it.",
    )


def _accepted(effect: Effect) -> Accepted:
    return Accepted(202, effect)


_RERUN = Accepted(201, Effect.RERUN)
_OF_AN_ENDED_JOB: dict[Command, Accepted | Refused] = {
    "cancel": _ended("cancelled"),
    "pause": _ended("paused"),
    "resume": _ended("resumed"),
    "delete": Accepted(200, Effect.DELETE),
    "rerun": _RERUN,
}

ANSWERS: dict[Situation, dict[Command, Accepted | Refused]] = {
    Situation.QUEUED: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _accepted(Effect.PAUSE),
        "resume": _NOT_PAUSED,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.RUNNING: {
        "cancel": _accepted(Effect.ORDER_CANCEL),
        "pause": _accepted(Effect.ORDER_PAUSE),
        "resume": _NOT_PAUSED,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSING: {
        "cancel": _accepted(Effect.ORDER_CANCEL),
        "pause": _accepted(Effect.NOTHING),
        "resume": _accepted(Effect.WITHDRAW_PAUSE),
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.CANCELLING: {
        "cancel": _accepted(Effect.NOTHING),
        "pause": _CANCELLING,
        "resume": _CANCELLING,
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSED: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _ALREADY_PAUSED,
        "resume": _accepted(Effect.QUEUE),
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.PAUSED_FOR_DISK: {
        "cancel": _accepted(Effect.CANCEL),
        "pause": _accepted(Effect.HOLD),
        "resume": _accepted(Effect.QUEUE),
        "delete": _NOT_ENDED,
        "rerun": _RERUN,
    },
    Situation.SUCCEEDED: _OF_AN_ENDED_JOB,
    Situation.FAILED: _OF_AN_ENDED_JOB,
    Situation.CANCELLED: _OF_AN_ENDED_JOB,
}

_WHILE_RUNNING: dict[RequestedAction | None, Situation] = {
    None: Situation.RUNNING,
    "pause": Situation.PAUSING,
    "cancel": Situation.CANCELLING,
}


def situation_of(status: JobStatus, reason: StatusReason | None, requested_action: RequestedAction | None) -> Situation:
    """Where a job stands, as far as commands are concerned."""
    if status == JobStatus.RUNNING:
        return _WHILE_RUNNING[requested_action]
    if status == JobStatus.PAUSED and reason == StatusReason.DISK_FULL:
        return Situation.PAUSED_FOR_DISK
    return Situation(status.value)


def as_markdown() -> str:
    """The table for the documentation (a test holds it there)."""
    lines = [f"| a job that is | {' | '.join(COMMANDS)} |", f"|---|{'---|' * len(COMMANDS)}"]
    for situation, answers in ANSWERS.items():
        cells = [
            f"{answer.status}: {answer.effect}" if isinstance(answer, Accepted) else f"409 `{answer.code}`"
            for answer in (answers[command] for command in COMMANDS)
        ]
        lines.append(f"| {situation} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
