"""The messages between server and workers, sent through Redis and signed (see `wire.signatures`).

| channel                       | from -> to       | content                                                      |
|-------------------------------|------------------|--------------------------------------------------------------|
| Celery queue `worker_queue`   | server -> worker | `Dispatch`: start this job (the argument of one Celery task) |
| stream `SERVER_STREAM`        | worker -> server | `Claim`, `Prepared`, `JournalBatch`, `CheckResult`           |
| stream `worker_stream(name)`  | server -> worker | `ClaimAnswer`, `Go`, `JournalAck`, `StopRequest`,            |
|                               |                  | `CheckRequest`; `AnswerRequest`, `AnswerControl`             |
|                               |                  | (see `wire.answers`)                                         |
| stream `answer_stream(id)`    | worker -> server | `AnswerPart` (see `wire.answers`)                            |
| hash `WORKERS_HASH` by name   | worker -> server | `Heartbeat`, every `HEARTBEAT_SECONDS`; the server removes   |
|                               |                  | those of workers that were silent for a day                  |
| string `SERVICE_KEY`          | server -> server | which service uses this Redis database                       |
| strings ``zeta:nonce:*``      | server -> server | the nonces of messages that were read, for two minutes       |
| list `DATABASE_KEY`           | server -> server | the recent claims of the database by servers on this Redis   |

Redis may lose any of these at any time. So every message is repeated until it is answered, and handling is idempotent:
a claim that was granted to the same worker is granted again, a stored line is not stored again, and a run that is
already stopping ignores further stop requests.

Messages are accepted only within `signatures.CLOCK_WINDOW_SECONDS` of their time, except `DURABLE` ones: a
`JournalBatch` and a `JournalAck` state facts that stay true, so they are accepted however long an outage delayed them.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from zeta_core.contract.access import DEFAULT_PROJECT, HubAccess
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.job.data_preview import RowSelection
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.machine_usage import MachineUsage
from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.resolved_spec import RecordedSpec, ResolvedSpec
from zeta_core.contract.wire.answers import AnswerControl, AnswerRequest
from zeta_core.contract.wire.node_group import MAX_NODES, NodeAddress, NodeGroup

CONTRACT_VERSION = 6  # since 5, messages carry their sender, a time and a nonce; earlier ones are rejected
TIME_LIMIT_VERSION = 2  # the first version of workers that support the stop actions ``time_limit`` and ``disk``
CHECK_VERSION = 2  # ... and that support `CheckRequest`
GPUS_VERSION = 3  # the first version of workers whose runs accept several GPUs
SAVE_VERSION = 3  # ... and that support `SaveRequest`
ANSWER_VERSION = 3  # ... and that support `AnswerRequest`
KINDS_VERSION = 4  # the first version of workers that run jobs that are not trainings
NODES_VERSION = 6  # ... and that run jobs of several nodes

START_TASK = "zeta.start"
SERVER_STREAM = "zeta:server"
SERVER_GROUP = "keepers"
MAX_CACHED_INPUTS = 64  # that a heartbeat lists
LAST_STREAM_ID = b"18446744073709551615-18446744073709551615"  # nothing can be appended to a stream after it
WORKERS_HASH = "zeta:workers"
SERVICE_KEY = "zeta:service"
DATABASE_KEY = "zeta:database"
HEARTBEAT_SECONDS = 2.0
HEARTBEAT_GONE_SECONDS = 15.0  # a worker that is silent for longer gets no new jobs
MAX_BATCH_LINES = 500


def worker_queue(worker: str) -> str:
    """The Celery queue that only this worker consumes."""
    return f"zeta.worker.{worker}"


def queue_keys(worker: str) -> dict[str, str]:
    """The Redis keys of a worker's Celery queue, with their types (kombu/transport/redis.py)."""
    queue = worker_queue(worker)
    by_priority = {f"{queue}\x06\x16{step}": "list" for step in (3, 6, 9)}
    return {queue: "list", **by_priority, f"_kombu.binding.{queue}": "set"}


def worker_stream(worker: str) -> str:
    return f"zeta:worker:{worker}"


def new_incarnation(folder_id: str) -> str:
    """A new name for one process of a worker, ``FOLDER_ID.TOKEN``. The folder id survives restarts."""
    return f"{folder_id}.{secrets.token_hex(8)}"


def parse_folder_id(incarnation: str) -> str | None:
    """The id of the worker's folder, which records its runs; ``None`` if an older worker does not report it."""
    folder_id, dot, _ = incarnation.partition(".")
    return folder_id if dot else None


# What workers send is bounded by the columns that store it.
Name = Annotated[str, Field(pattern=r"^[\x20-\x7e]{1,200}$")]
StoredNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
InputKey = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]  # the start of a SHA-256 of a project and a source


class _Message(BaseModel):
    """Frozen. Unknown fields of another version are kept, so machines can be upgraded one at a time."""

    model_config = ConfigDict(frozen=True, extra="allow")

    contract_version: int = CONTRACT_VERSION


class Dispatch(_Message):
    kind: Literal["hand_over"] = "hand_over"  # as version 1 called it
    job_kind: JobKind = JobKind.TRAINING
    job_id: str
    attempt: int  # the attempt that the claim will start: the job's `attempt` + 1
    worker: str
    slots: list[int]
    project: str = DEFAULT_PROJECT  # older servers don't send it
    spec: dict[str, JsonValue]
    resolved_spec: RecordedSpec = ResolvedSpec()
    processes: int = 1  # of this worker
    num_nodes: int = 1  # workers that run the attempt together; with several, it starts after `Prepared` and `Go`
    node_rank: int = 0  # the position of this worker among them
    hub: HubAccess = HubAccess.OPERATOR_TOKEN  # older servers don't send it, and know no other
    resume_from: str | None = None  # the stored checkpoint to resume from, such as "job_.../step-N"
    bases: list[str] = []  # the models that an adapter may name as its base: "job_.../final", "file_..." or a Hub id
    inputs: list[InputKey] = []  # the model and the data of the job, as in `Heartbeat.cached_inputs`


class Claim(_Message):
    """A worker's request to start an attempt that was dispatched to it. It starts nothing before this is granted."""

    kind: Literal["claim"] = "claim"
    job_id: Name
    attempt: StoredNumber
    worker: Name
    incarnation: Name  # a new one each time the worker process starts (`new_incarnation`)


class ClaimAnswer(_Message):
    kind: Literal["claim_answer"] = "claim_answer"
    job_id: str
    attempt: int
    incarnation: str  # that of the claim; a worker ignores answers to its earlier processes
    granted: bool
    reason: str | None = None


class Prepared(_Message):
    """One of several nodes has its inputs and a free port, and waits for `Go`.

    It is repeated until the answer: a `Go` when all nodes are prepared, or a fenced `JournalAck` if the attempt is
    over. ``port`` is that of the rendezvous if this is node 0; the others report one, too.
    """

    kind: Literal["prepared"] = "prepared"
    job_id: Name
    attempt: StoredNumber
    worker: Name
    incarnation: Name
    node_rank: Annotated[int, Field(ge=0, lt=MAX_NODES)]
    address: NodeAddress  # where the other nodes reach this one
    port: Annotated[int, Field(ge=1, le=65535)]


class Go(_Message):
    """All nodes of the attempt are prepared, so start the run. Repeating it has no effect."""

    kind: Literal["go"] = "go"
    job_id: str
    attempt: int
    incarnation: str  # that of the answered `Prepared`
    group: NodeGroup


class JournalBatch(_Message):
    """Consecutive journal lines of one attempt. The next batch is sent when this one is acknowledged."""

    kind: Literal["journal_batch"] = "journal_batch"
    job_id: Name
    attempt: StoredNumber
    worker: Name
    first_line: StoredNumber  # from 1
    lines: list[dict[str, Any]]


class JournalAck(_Message):
    """All lines up to ``stored_line`` are stored in the database; a ``fenced`` attempt has been ended by the server."""

    kind: Literal["journal_ack"] = "journal_ack"
    job_id: str
    attempt: int
    stored_line: int
    fenced: bool = False
    keep: list[str] = []  # checkpoints that other jobs need, which the worker must not delete


class StopRequest(_Message):
    kind: Literal["stop_order"] = "stop_order"
    job_id: str
    attempt: int
    action: StopAction


class SaveRequest(_Message):
    """Save a checkpoint after the current step and continue. It is repeated until a checkpoint names its number."""

    kind: Literal["save_request"] = "save_request"
    job_id: str
    attempt: int
    number: int  # counts the job's requests, from 1; a checkpoint fulfils this request and all earlier ones


class SecretRejected(_Message):
    """The server no longer accepts the secret that this message is signed with; the worker must stop."""

    kind: Literal["secret_rejected"] = "secret_rejected"
    incarnation: str  # of the worker process
    reason: str


class CheckRequest(_Message):
    """Run ``python -m zeta_core check`` on a spec. It is sent once, and the server waits no longer than the limit."""

    kind: Literal["check_request"] = "check_request"
    check_id: str  # the SHA-256 of the checked content; the key under which the result is cached
    project: str = DEFAULT_PROJECT  # older servers don't send it
    spec: dict[str, JsonValue]
    resolved_spec: RecordedSpec
    processes: int = 1
    hub: HubAccess = HubAccess.OPERATOR_TOKEN
    limit_seconds: float
    bases: list[str] = []  # as in `Dispatch`
    shown: RowSelection | None = None  # show these rows instead; an older worker checks the spec and shows none


class CheckResult(_Message):
    """The result of a check, or the reason why it failed."""

    kind: Literal["check_result"] = "check_result"
    check_id: Name
    worker: Name
    answer: CheckAnswer | None = None
    failure: str | None = None


class Heartbeat(_Message):
    message: Literal["heartbeat"] = "heartbeat"
    worker: str
    incarnation: str  # `new_incarnation`
    beat: int  # increases by one each time
    version: str
    host: str
    started_at: datetime
    cores: int
    memory_bytes: int
    labels: dict[str, str] = {}
    stopping: bool = False
    disk_free_bytes: int | None = None  # the smaller free space of its home and the artifact store
    cpu_kind: str | None = None  # the device kind of a run without GPUs; older workers don't report it
    sandbox: str | None = None  # what confines its runs, or "none"; older workers don't report it
    data_root: bool | None = None  # whether it has a folder for {"path": ...}; older workers don't report it
    disk_low: bool = False  # free space is below the threshold: it gets no jobs and pauses its runs (`disk_full`)
    failing: dict[str, str] = {}  # the reasons why loops and other components are failing now, by component
    num_dropped: int = 0  # invalid entries that it has removed from Redis since it was started
    usage: MachineUsage | None = None  # of its machine; older workers don't report it
    # The inputs of the jobs that it ran last, which its caches probably still hold; older workers don't report them.
    cached_inputs: Annotated[list[InputKey], Field(max_length=MAX_CACHED_INPUTS)] = []
    slots: list[DeviceReport]
    # Kept apart from the slots, because older servers would dispatch trainings to them.
    background_slots: list[DeviceReport] = []

    @property
    def all_slots(self) -> list[DeviceReport]:
        return [*self.slots, *self.background_slots]


FromWorker = Annotated[Claim | Prepared | JournalBatch | CheckResult, Field(discriminator="kind")]
FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(FromWorker)
ToWorker = Annotated[
    ClaimAnswer
    | Go
    | JournalAck
    | StopRequest
    | SaveRequest
    | SecretRejected
    | CheckRequest
    | AnswerRequest
    | AnswerControl,
    Field(discriminator="kind"),
]
TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)

HEARTBEAT: TypeAdapter[Heartbeat] = TypeAdapter(Heartbeat)
DURABLE = (JournalBatch, JournalAck)  # messages that are accepted at any age, because repeating them has no effect
