"""Where things lie: the artifact store, a worker's run directories, and the files inside one run directory.

Names only. The two sides of a run (worker and training process) speak through these files and nothing else, so that
``ls`` explains a job.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.resolved_spec import RecordedSpec, ResolvedSpec

# --- Artifact store: keys relative to its root (a shared folder today, a bucket later) -------------------------------


def checkpoint_key(job_id: str, name: str) -> PurePosixPath:
    """The directory of one checkpoint; its ``manifest.json`` is written last and makes it exist."""
    return PurePosixPath("jobs", job_id, "checkpoints", name)


def log_key(job_id: str, attempt: int) -> PurePosixPath:
    """The full text that the processes of one attempt wrote, appended to by its worker."""
    return PurePosixPath("jobs", job_id, "logs", f"attempt-{attempt}.log")


TENSORBOARD_DIRECTORY = "tensorboard"


def tensorboard_key(job_id: str) -> PurePosixPath:
    """What the attempts of a job that reports to TensorBoard wrote, for ``tensorboard --logdir``."""
    return PurePosixPath("jobs", job_id, TENSORBOARD_DIRECTORY)


def job_key(job_id: str) -> PurePosixPath:
    return PurePosixPath("jobs", job_id)


def file_key(file_id: str) -> PurePosixPath:
    """The bytes of one uploaded file."""
    return PurePosixPath("files", file_id)


MANIFEST_NAME = "manifest.json"
TRAINING_STATE_NAME = "training_state"
MERGED_NAME = "merged"  # in an adapter's checkpoint: the whole model, base and adapter added together

# --- A worker's home: runs/<job>/attempt-N is a RUN_DIR, runs/<job>/output is shared by a job's attempts here -------


CACHE_DIRECTORY = "cache"  # tokens and unpacked models by content, shared by the jobs of a worker


def run_directory(job_id: str, attempt: int) -> PurePosixPath:
    return PurePosixPath("runs", job_id, f"attempt-{attempt}")


def output_directory(job_id: str) -> PurePosixPath:
    return PurePosixPath("runs", job_id, "output")


# --- One run directory ------------------------------------------------------------------------------------------------

RUN_FILE = "run.json"  # in: what to train (a `RunFile`), written before the start, never changed
STOP_FILE = "stop"  # in: a `StopFile`; the training looks for it after every optimizer step
ALIVE_FILE = "alive"  # in: when its worker was last heard, in seconds of this machine's monotonic clock
JOURNAL_FILE = "events.jsonl"  # out: one journal line per text line, appended, flushed
MAX_LINE_BYTES = 4 * 2**20  # of the journal: a longer one is not read; writers shorten its texts
LOG_FILE = "train.log"  # out: standard output and error of every process of the run
PUBLISHED_FILE = "published"  # out, by the worker: the last line is stored; the directory is kept a day for people
LOCK_FILE = "lock"  # held shared (flock) by every process of the run; says which file it is, so that a copy is known
PROCESS_FILE = "process.json"  # out, by the worker: a `ProcessFile` about the first process that it started

STACKS_SIGNAL = "SIGUSR2"  # a process of a run that gets it writes the stacks of its threads into its log
DISK_FULL_EXIT = 28  # of a process that could not even say in its journal that the disk is full (the number of ENOSPC)

OUT_OF_MEMORY_EXIT = 12  # of a check whose process reached its limit of memory (the number of ENOMEM)

JOB_VARIABLE = "ZETA_JOB_ID"  # in the environment of every process of a run
ATTEMPT_VARIABLE = "ZETA_ATTEMPT"
RUN_VARIABLE = "ZETA_RUN"  # ... and which run directory is its own: device and inode number of the lock file there


class RunFile(BaseModel):
    """``run.json``: everything a training process is told. Paths are absolute on its machine."""

    model_config = ConfigDict(frozen=True, extra="allow")

    job_id: str
    attempt: int
    spec: dict[str, JsonValue]
    resolved_spec: RecordedSpec = ResolvedSpec()
    output_dir: str
    artifacts_root: str  # where {"file": id} and {"job": id} of the spec are found, by the keys above
    data_root: str | None = None  # the only folder that {"path": ...} may name, ZETA_DATA_ROOT
    hub: bool = True  # whether the Hugging Face hub may be reached
    cache_dir: str | None = None  # tokens and unpacked models, shared by this worker's jobs; none: in output_dir
    processes: int = 1
    slots: list[int] = []  # the worker's, for a worker that finds this run after its own restart
    is_opened: bool = False  # the job's folder in the store was made; older workers made it when they stored something
    resume_from: str | None = None  # a checkpoint directory, or an output directory (its newest valid checkpoint)
    self_stop_seconds: float | None = None  # ``alive`` not touched for so long: save and end; none: nobody touches it
    end_seconds: float | None = None  # ... and for so long: end at once
    journal_max_lines: int | None = None  # beyond it only what matters is told
    device: Literal["cpu", "cuda"] | None = None  # of a check, which sees no GPU: what the training would get
    supports_bf16: bool = False  # ... and whether that has instructions for it
    rows_seconds: float = 15.0  # of a check: how long it may read the rows of a dataset


class StopFile(BaseModel):
    """``stop``: save a checkpoint unless the action is ``cancel``, then end with the status that `StopAction` says."""

    model_config = ConfigDict(frozen=True, extra="allow")

    action: StopAction


class ProcessFile(BaseModel):
    """``process.json``: what a restarted worker must know about a training that an earlier worker process started."""

    model_config = ConfigDict(frozen=True, extra="allow")

    pid: int
    group_oom_kills: int | None = None  # the kernel's counts when it was started, as `oom.OomKills`
    machine_oom_kills: int | None = None
