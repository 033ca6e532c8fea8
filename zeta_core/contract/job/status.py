"""The states of a job, its transitions between them, and the reasons of its waits and ends."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset({*ENDED, JobStatus.PAUSED, JobStatus.QUEUED}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class StatusReason(StrEnum):
    """Why a job reached its state. The ends come first, then the reasons of a job that will go on."""

    COMPLETED = "completed"
    CANCELLED_BY_USER = "cancelled_by_user"
    TRAIN_ERROR = "train_error"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE_LOSS = "non_finite_loss"
    INVALID_DATA = "invalid_data"
    INVALID_MODEL = "invalid_model"
    TIME_LIMIT = "time_limit"
    DISK_FULL = "disk_full"
    WORKER_LOST = "worker_lost"
    LAUNCH_FAILED = "launch_failed"
    PROCESS_KILLED = "process_killed"
    STALLED = "stalled"
    PAUSED_BY_USER = "paused_by_user"
    RESUMED = "resumed"
    HANDED_BACK = "handed_back"
    RETRYING = "retrying"


REASON_SENTENCES: dict[StatusReason, str] = {
    StatusReason.COMPLETED: "The training reached its last step and its final checkpoint is stored.",
    StatusReason.CANCELLED_BY_USER: "The job was cancelled on request.",
    StatusReason.TRAIN_ERROR: "The training process ended with an error; see `error` and the end of the log.",
    StatusReason.OUT_OF_MEMORY: "Memory ran out; use a smaller batch_size with a larger gradient_accumulate_every, "
    "a shorter seq_len, or use_activation_checkpointing.",
    StatusReason.NON_FINITE_LOSS: "The loss or a gradient was not finite; lower learning_rate or max_grad_norm.",
    StatusReason.INVALID_DATA: "The data cannot be trained on; `error` names the file and the line.",
    StatusReason.INVALID_MODEL: "The model cannot be built or loaded; `error` says what is wrong with it.",
    StatusReason.TIME_LIMIT: "The job used up its time_limit_seconds; rerun it with a larger one: from its "
    "newest checkpoint it goes on where it stopped.",
    StatusReason.DISK_FULL: "No room was left on the disk for a checkpoint.",
    StatusReason.WORKER_LOST: "The worker that ran the job was lost more often than is allowed.",
    StatusReason.LAUNCH_FAILED: "The training process could not be started.",
    StatusReason.PROCESS_KILLED: "The training process was killed by a signal from outside.",
    StatusReason.STALLED: "The training made no step for far longer than its steps take; its log shows where it was.",
    StatusReason.PAUSED_BY_USER: "The job was paused on request; `zeta resume` lets it go on.",
    StatusReason.RESUMED: "The job was resumed.",
    StatusReason.HANDED_BACK: "The worker handed the job back: it stops, is drained, or could not be heard.",
    StatusReason.RETRYING: "The last attempt failed; the job is tried again.",
}


class WaitingCode(StrEnum):
    """Why a job is not running yet."""

    NO_WORKER = "no_worker"
    WORKERS_BUSY = "workers_busy"
    RESOURCES = "resources"
    NEVER_FITS = "never_fits"
    QUOTA = "quota"
    RETRY_BACKOFF = "retry_backoff"
    PAUSED = "paused"
    DISK = "disk"
    WORKER_TOO_OLD = "worker_too_old"
    HANDING_OVER = "handing_over"


WAITING_SENTENCES: dict[WaitingCode, str] = {
    WaitingCode.NO_WORKER: "No worker is connected; start one with `zeta worker`.",
    WaitingCode.WORKERS_BUSY: "Every slot is taken; the job starts when one is free.",
    WaitingCode.RESOURCES: "The free slots are too few for this job's resources; it waits for more of them.",
    WaitingCode.NEVER_FITS: "No connected worker is large enough for this job's resources; ask for fewer gpus or "
    "connect a larger worker.",
    WaitingCode.QUOTA: "The project runs as many jobs as it may at once (ZETA_PROJECT_MAX_RUNNING); the job starts "
    "when one of them ends.",
    WaitingCode.RETRY_BACKOFF: "The last attempt failed; the next one starts after a pause.",
    WaitingCode.PAUSED: "The job is paused; `zeta resume` queues it again.",
    WaitingCode.DISK: "The disk is nearly full; the job goes on when there is room.",
    WaitingCode.WORKER_TOO_OLD: "The connected workers are too old for this job; upgrade them.",
    WaitingCode.HANDING_OVER: "A worker was chosen and is starting the job.",
}

RequestedAction = Literal["cancel", "pause"]

# Why a running training is told to end, the less urgent first; a more urgent order replaces an earlier one. It saves
# first, but for `cancel`, and for `disk` where there is no room. `disk` is also said by a training that finds none.
StopAction = Literal["hand_back", "disk", "pause", "time_limit", "cancel"]
STOP_ACTIONS: tuple[StopAction, ...] = get_args(StopAction)

STOP_ENDS: dict[StopAction, tuple[JobStatus, StatusReason]] = {
    "hand_back": (JobStatus.QUEUED, StatusReason.HANDED_BACK),
    "disk": (JobStatus.PAUSED, StatusReason.DISK_FULL),
    "pause": (JobStatus.PAUSED, StatusReason.PAUSED_BY_USER),
    "time_limit": (JobStatus.FAILED, StatusReason.TIME_LIMIT),
    "cancel": (JobStatus.CANCELLED, StatusReason.CANCELLED_BY_USER),
}
