"""The states of a job, the transitions between them, and the reasons why a job waits or ended."""

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
UNFINISHED = frozenset(JobStatus) - ENDED

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset({*ENDED, JobStatus.PAUSED, JobStatus.QUEUED}),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class StatusReason(StrEnum):
    """Why a job is in its state. The reasons of ended jobs come first, then those of jobs that continue."""

    COMPLETED = "completed"
    CANCELLED_BY_USER = "cancelled_by_user"
    TRAIN_ERROR = "train_error"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE_LOSS = "non_finite_loss"
    INVALID_DATA = "invalid_data"
    INVALID_MODEL = "invalid_model"
    EXPORT_REJECTED = "export_rejected"
    TIME_LIMIT = "time_limit"
    DISK_FULL = "disk_full"
    WORKER_LOST = "worker_lost"
    LAUNCH_FAILED = "launch_failed"
    PROCESS_KILLED = "process_killed"
    STALLED = "stalled"
    NODE_LOST = "node_lost"
    NODES_NOT_READY = "nodes_not_ready"
    ELIMINATED = "eliminated"
    PAUSED_BY_USER = "paused_by_user"
    WAITS_FOR_SWEEP = "waits_for_sweep"
    RESUMED = "resumed"
    HANDED_BACK = "handed_back"
    RETRYING = "retrying"


REASON_SENTENCES: dict[StatusReason, str] = {
    StatusReason.COMPLETED: "The run completed its last step, and its final checkpoint is stored.",
    StatusReason.CANCELLED_BY_USER: "The job was cancelled on request.",
    StatusReason.TRAIN_ERROR: "The training process failed; see `error` and the end of the log.",
    StatusReason.OUT_OF_MEMORY: "Memory ran out; use a smaller batch_size with a larger gradient_accumulate_every, "
    "a shorter seq_len, or use_activation_checkpointing.",
    StatusReason.NON_FINITE_LOSS: "The loss or a gradient was not finite; lower learning_rate or max_grad_norm.",
    StatusReason.INVALID_DATA: "The data is invalid; `error` names the file and the line.",
    StatusReason.INVALID_MODEL: "The model cannot be built or loaded; `error` has the reason.",
    StatusReason.EXPORT_REJECTED: "The exported files do not answer like the checkpoint; `error` has the difference.",
    StatusReason.TIME_LIMIT: "The job reached its time_limit_seconds; rerun it from its newest checkpoint with a "
    "larger limit to continue.",
    StatusReason.DISK_FULL: "The disk had no space for a checkpoint.",
    StatusReason.WORKER_LOST: "The server lost contact with the job's worker more often than allowed.",
    StatusReason.LAUNCH_FAILED: "The training process could not be started.",
    StatusReason.PROCESS_KILLED: "The training process was killed by a signal.",
    StatusReason.STALLED: "The run completed no step for much longer than usual; its log shows where it stalled.",
    StatusReason.NODE_LOST: "One of the job's hosts stopped responding to the others.",
    StatusReason.NODES_NOT_READY: "Not all workers of the job were ready in time.",
    StatusReason.ELIMINATED: "Other jobs of its sweep had a lower loss after the same number of steps; its checkpoints "
    "are kept.",
    StatusReason.WAITS_FOR_SWEEP: "The job waits until the other jobs of its sweep have trained as many steps; then it "
    "continues or is eliminated.",
    StatusReason.PAUSED_BY_USER: "The job was paused on request; `zeta resume` continues it.",
    StatusReason.RESUMED: "The job was resumed.",
    StatusReason.HANDED_BACK: "The worker handed the job back: it is stopping, drained, or lost contact with the "
    "server.",
    StatusReason.RETRYING: "The last attempt failed; the job is retried.",
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
    SWEEP = "sweep"
    DISK = "disk"
    WORKER_TOO_OLD = "worker_too_old"
    HANDING_OVER = "handing_over"
    ENDING = "ending"


WAITING_SENTENCES: dict[WaitingCode, str] = {
    WaitingCode.NO_WORKER: "No worker is connected; start one with `zeta worker`.",
    WaitingCode.WORKERS_BUSY: "All slots are in use; the job starts when one is free.",
    WaitingCode.RESOURCES: "There are not enough free slots for this job's resources; it starts when more are free.",
    WaitingCode.NEVER_FITS: "No connected worker is large enough for this job's resources; request fewer gpus, or "
    "connect a larger worker.",
    WaitingCode.QUOTA: "The project is at one of its limits; the job starts when its other jobs use less.",
    WaitingCode.RETRY_BACKOFF: "The last attempt failed; the next one starts after a delay.",
    WaitingCode.PAUSED: "The job is paused; `zeta resume` queues it again.",
    WaitingCode.SWEEP: "The job waits until the other jobs of its sweep have trained as many steps; then it continues "
    "or is eliminated.",
    WaitingCode.DISK: "The disk is nearly full; the job continues when space is free.",
    WaitingCode.WORKER_TOO_OLD: "The connected workers run a version that is too old for this job; upgrade them.",
    WaitingCode.HANDING_OVER: "The job was dispatched to a worker, which is starting it.",
    WaitingCode.ENDING: "A worker has not ended the last attempt yet; the next one starts when it has.",
}

# A job that is to wait for its sweep is paused by the server (`server.engine.halving`).
RequestedAction = Literal["cancel", "pause", "wait_for_sweep"]
REQUESTED_ACTIONS: tuple[RequestedAction, ...] = get_args(RequestedAction)

# The reasons for stopping a run, least urgent first; a more urgent one replaces an earlier one. The run saves a
# checkpoint first, except for `cancel`, and for `disk` if there is no space. A run whose disk is full stops itself with
# `disk`.
StopAction = Literal["hand_back", "disk", "pause", "time_limit", "cancel"]
STOP_ACTIONS: tuple[StopAction, ...] = get_args(StopAction)

STOP_ENDS: dict[StopAction, tuple[JobStatus, StatusReason]] = {
    "hand_back": (JobStatus.QUEUED, StatusReason.HANDED_BACK),
    "disk": (JobStatus.PAUSED, StatusReason.DISK_FULL),
    "pause": (JobStatus.PAUSED, StatusReason.PAUSED_BY_USER),
    "time_limit": (JobStatus.FAILED, StatusReason.TIME_LIMIT),
    "cancel": (JobStatus.CANCELLED, StatusReason.CANCELLED_BY_USER),
}
