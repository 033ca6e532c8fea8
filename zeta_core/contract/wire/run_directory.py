"""Path names: in the artifact store, in a worker's home, and in a run directory.

A worker and a training process communicate only through the files of the run directory, so ``ls`` shows the state of a
run.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from zeta_core.contract.access import DEFAULT_PROJECT, HubAccess
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.job.data_preview import RowSelection
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.resolved_spec import RecordedSpec, ResolvedSpec
from zeta_core.contract.wire.node_group import NodeGroup

# --- Artifact store: keys relative to the root of the folder or the prefix in the bucket ----------------------------


def checkpoint_key(job_id: str, name: str) -> PurePosixPath:
    """The directory of one checkpoint. It is complete when it contains ``manifest.json``, which is written last."""
    return PurePosixPath("jobs", job_id, "checkpoints", name)


def log_key(job_id: str, attempt: int, node_rank: int = 0) -> PurePosixPath:
    """The complete output of the processes of one attempt on one node, to which its worker appends."""
    node = f".node-{node_rank}" if node_rank else ""
    return PurePosixPath("jobs", job_id, "logs", f"attempt-{attempt}{node}.log")


TENSORBOARD_DIRECTORY = "tensorboard"


def tensorboard_key(job_id: str) -> PurePosixPath:
    """The TensorBoard logs of all attempts of a job, for ``tensorboard --logdir``."""
    return PurePosixPath("jobs", job_id, TENSORBOARD_DIRECTORY)


def job_key(job_id: str) -> PurePosixPath:
    return PurePosixPath("jobs", job_id)


def file_key(file_id: str) -> PurePosixPath:
    """The bytes of one uploaded file."""
    return PurePosixPath("files", file_id)


def stored_model_key(name: str) -> PurePosixPath | None:
    """Where a model with such a name, ``job_.../final`` or ``file_...``, is stored; ``None`` for other names."""
    if is_id(name, "file"):
        return file_key(name)
    job_id, _, checkpoint = name.partition("/")
    return checkpoint_key(job_id, checkpoint) if is_id(job_id, "job") and NAME_PATTERN.match(checkpoint) else None


def upload_key(upload_id: str) -> PurePosixPath:
    """The folder of the parts of an unfinished upload."""
    return PurePosixPath("uploads", upload_id)


MANIFEST_NAME = "manifest.json"
TRAINING_STATE_NAME = "training_state"
MERGED_NAME = "merged"  # in an adapter's checkpoint: the base with the adapter merged into it

# --- A worker's home: runs/<job>/attempt-N is a run directory; runs/<job>/output is shared by the job's attempts -----

PROJECT_CACHES = "caches"
CACHE_DIRECTORY = "cache"  # shared by all projects, in earlier versions


def project_cache(project: str) -> PurePosixPath:
    """Tokens, unpacked models and compiled code by content, shared by a project's jobs on a worker."""
    return PurePosixPath(PROJECT_CACHES, project)


ENVIRONMENTS_DIRECTORY = "environments"  # in the home: environments with other libraries, one folder per project


def run_directory(job_id: str, attempt: int) -> PurePosixPath:
    return PurePosixPath("runs", job_id, f"attempt-{attempt}")


def output_directory(job_id: str) -> PurePosixPath:
    return PurePosixPath("runs", job_id, "output")


# --- One run directory ------------------------------------------------------------------------------------------------

RUN_FILE = "run.json"  # in: what to do (a `RunFile`), written before the start and never changed
STOP_FILE = "stop"  # in: a `StopFile`; the run checks for it after each optimizer step
SAVE_FILE = "save"  # in: a `SaveFile`; the run checks for it after each optimizer step
ALIVE_FILE = "alive"  # in: the last contact between worker and server, in seconds of the monotonic clock
JOURNAL_FILE = "events.jsonl"  # out: one journal line per text line, appended, flushed
MAX_LINE_BYTES = 4 * 2**20  # of a journal line; longer ones are not read, so writers shorten their texts
LOG_FILE = "train.log"  # out: standard output and error of every process of the run
PUBLISHED_FILE = "published"  # out, by the worker: the last line is stored; the directory is deleted a day later
LOCK_FILE = "lock"  # locked (flock, shared) by each process of the run; contains its own identity to detect copies
PROCESS_LIMIT_FILE = "process-limit"  # out: its processes were killed, because there were more than this number
PROCESS_FILE = "process.json"  # out, by the worker: a `ProcessFile` about the first process that it started

STACKS_SIGNAL = "SIGUSR2"  # makes a process of a run write the stacks of its threads to its log
DISK_FULL_EXIT = 28  # if the disk is too full even for the journal line (the number of ENOSPC)

OUT_OF_MEMORY_EXIT = 12  # of a check whose process reached its memory limit (the number of ENOMEM)

JOB_VARIABLE = "ZETA_JOB_ID"  # environment variables of every process of a run
ATTEMPT_VARIABLE = "ZETA_ATTEMPT"
RUN_VARIABLE = "ZETA_RUN"  # identifies its run directory: device and inode number of the lock file


class RunFile(BaseModel):
    """``run.json``: the input of a run. Paths are absolute."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: JobKind = JobKind.TRAINING
    job_id: str
    attempt: int
    project: str = DEFAULT_PROJECT  # older workers don't write it
    spec: dict[str, JsonValue]
    resolved_spec: RecordedSpec = ResolvedSpec()
    output_dir: str
    artifacts_root: str  # where {"file": id} and {"job": id} of the spec are stored, under the keys above
    data_root: str | None = None  # the only folder that {"path": ...} may name, ZETA_DATA_ROOT
    hub: bool = True  # whether the Hugging Face Hub may be accessed
    hub_access: HubAccess = HubAccess.OPERATOR_TOKEN  # what may be read from it; older workers knew no other
    bases: list[str] = []  # the models that an adapter may name as its base, as in `Dispatch`
    cache_dir: str | None = None  # tokens and unpacked models, shared by this worker's jobs; see `cache`
    processes: int = 1  # of this node
    num_nodes: int = 1  # hosts; each of them has a run directory of its own
    node_rank: int = 0
    node_group: NodeGroup | None = None  # of a run on several hosts; known when all of them are prepared
    slots: list[int] = []  # the worker's slots, for a worker that adopts this run after its own restart
    is_opened: bool = False  # the job's folder in the store exists; older workers created it on first use
    resume_from: str | None = None  # a checkpoint directory, or an output directory (its newest valid checkpoint)
    self_stop_seconds: float | None = (
        None  # after this long without contact, save and exit; none: ``alive`` is not used
    )
    end_seconds: float | None = None  # after this long without contact, exit immediately
    journal_max_lines: int | None = None  # beyond it, only important lines are written
    device: Literal["cpu", "cuda"] | None = None  # for a check, which sees no GPU: the device of the run
    supports_bf16: bool = False  # ... and whether that device supports bfloat16
    environments_dir: str | None = None  # for an export: where its project creates environments with other libraries
    gguf_python: str | None = None  # ... and the operator's Python with the GGUF converter
    rows_seconds: float = 15.0  # for a check: the time limit for reading the rows of a dataset
    shown: RowSelection | None = None  # ... and the rows to show instead of checking the spec, whose model may be unset

    @property
    def cache(self) -> Path:
        """The absolute path of the cache; a run without ``cache_dir`` has one of its own in its output directory."""
        return (Path(self.output_dir) / "cache" if self.cache_dir is None else Path(self.cache_dir)).absolute()


class StopFile(BaseModel):
    """``stop``: save a checkpoint unless the action is ``cancel``, then exit with the status of `STOP_ENDS`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    action: StopAction


class SaveFile(BaseModel):
    """``save``: save a checkpoint and continue. A run saves once for each new number, which its checkpoint reports."""

    model_config = ConfigDict(frozen=True, extra="allow")

    number: int


class ProcessFile(BaseModel):
    """``process.json``: what a restarted worker needs to adopt a run that an earlier worker process started."""

    model_config = ConfigDict(frozen=True, extra="allow")

    pid: int
    group_oom_kills: int | None = None  # the kernel's counts when it was started, as in `OomKills`
    machine_oom_kills: int | None = None
