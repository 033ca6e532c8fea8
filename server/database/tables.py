"""The tables of jobs and sweeps, with their attempts, events and checkpoints, and of the service; one class each.

Other modules of this package define further tables; `all_tables` lists these modules.

The migrations create exactly these tables (a test compares them). Times are UTC. JSON columns contain dumps of the
contract's models, so no table repeats their fields.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

Document = JSON().with_variant(JSONB(), "postgresql")
BigNumber = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's Integer already has 64 bits


IS_RARE_EVENT = "type <> 'progress'"


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time on both databases (SQLite doesn't store the zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "times in the database must have a zone"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: Document,
        list[Any]: Document,
        datetime: UtcTime,
        str: String(),
    }


class JobRow(Table):
    """One job. Only `transitions` assigns ``status``, and only it and `events` assign ``last_seq``."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_created_at_id", "project", "created_at", "id"),
        Index("ix_jobs_project_status_created_at_id", "project", "status", "created_at", "id"),
        Index("ix_jobs_project_entity_name_created_at_id", "project", "entity_name", "created_at", "id"),
        Index("ix_jobs_status_priority_created_at_id", "status", "priority", "created_at", "id"),
        Index(
            "ix_jobs_queue",
            "project",
            "priority",
            "created_at",
            "id",
            sqlite_where=text("status = 'queued'"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_kind_status_priority_created_at_id",
            "kind",
            "status",
            "priority",
            "created_at",
            "id",
            sqlite_where=text("kind <> 'training'"),
            postgresql_where=text("kind <> 'training'"),
        ),
        Index(
            "ix_jobs_project_kind_created_at_id",
            "project",
            "kind",
            "created_at",
            "id",
            sqlite_where=text("kind <> 'training'"),
            postgresql_where=text("kind <> 'training'"),
        ),
        Index(
            "ix_jobs_worker",
            "worker",
            sqlite_where=text("worker IS NOT NULL"),
            postgresql_where=text("worker IS NOT NULL"),
        ),
        Index(
            "ix_jobs_sweep",
            "sweep",
            sqlite_where=text("sweep IS NOT NULL"),
            postgresql_where=text("sweep IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(server_default=JobKind.TRAINING)
    project: Mapped[str]
    created_by: Mapped[str]
    parent: Mapped[str | None]
    sweep: Mapped[str | None]  # the id of the `SweepRow` that created it
    status: Mapped[str]
    status_reason: Mapped[str | None]
    requested_action: Mapped[str | None]
    num_save_requests: Mapped[int] = mapped_column(server_default="0")
    fulfilled_save_request: Mapped[int] = mapped_column(server_default="0")  # the number of the newest one
    waiting_reason: Mapped[dict[str, Any] | None]
    entity_name: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    resolved_spec_json: Mapped[dict[str, Any]] = mapped_column("resolved_spec")
    priority: Mapped[int]
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)  # consecutive, since the last new checkpoint
    lost_workers: Mapped[int] = mapped_column("losses", default=0)  # consecutive, since the last new checkpoint
    max_retries: Mapped[int]
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime | None]  # when it was last queued
    wait_announced_at: Mapped[datetime | None]  # when webhooks were notified of the present wait
    started_at: Mapped[datetime | None] = mapped_column(index=True)
    finished_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]  # the end of the back-off after a failure
    worker: Mapped[str | None]  # the worker that the job was dispatched to
    slots: Mapped[list[Any] | None]
    dispatched_at: Mapped[datetime | None] = mapped_column("handed_over_at")
    last_seq: Mapped[int] = mapped_column(default=0)
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    num_limited_events: Mapped[int] = mapped_column(default=0, server_default="0")  # see `apply_journal`
    deleted_at: Mapped[datetime | None]  # hidden from users; its artifacts and this row are being removed
    openai_request: Mapped[dict[str, Any] | None]  # of a job created under /openai/v1; see `server.openai.fine_tuning`

    @property
    def resolved_spec(self) -> ResolvedSpec:
        return ResolvedSpec.model_validate(self.resolved_spec_json)

    @resolved_spec.setter
    def resolved_spec(self, resolved: ResolvedSpec) -> None:
        self.resolved_spec_json = resolved.as_json()


class SweepRow(Table):
    """A sweep. ``request`` is the body that created it; its jobs are those with its id."""

    __tablename__ = "sweeps"
    __table_args__ = (
        Index("ix_sweeps_project_created_at_id", "project", "created_at", "id"),
        UniqueConstraint("project", "created_by", "idempotency_key"),
        Index(
            "ix_sweeps_next_comparison",
            "next_comparison",
            sqlite_where=text("next_comparison IS NOT NULL"),
            postgresql_where=text("next_comparison IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    created_at: Mapped[datetime]
    request: Mapped[dict[str, Any]]
    idempotency_key: Mapped[str | None]
    next_comparison: Mapped[int | None]  # its number from 0, with successive halving; null after the last one


class JobMetadataRow(Table):
    """One metadata entry of a job, for the filter ``metadata[k]=v``. A trigger inserts it with the job."""

    __tablename__ = "job_metadata"
    __table_args__ = (
        Index("ix_job_metadata_project_key_value_created_at_job_id", "project", "key", "value", "created_at", "job_id"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
    project: Mapped[str]  # this and the next column are the job's, for the index
    created_at: Mapped[datetime]


class JobCountRow(Table):
    """A change of a project's number of jobs with this status and priority. Triggers insert it; see `job_counts`."""

    __tablename__ = "job_counts"

    id: Mapped[int] = mapped_column(BigNumber, primary_key=True, autoincrement=True)
    project: Mapped[str]
    status: Mapped[str]
    priority: Mapped[int]
    count: Mapped[int] = mapped_column(BigNumber)


class AttemptRow(Table):
    """One attempt to run a job; ``stored_line`` is the number of its last stored journal line.

    An attempt on several nodes has a `PlacementRow` for each. ``worker`` is the worker of node 0, and nothing runs
    while ``is_preparing``.
    """

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    incarnation: Mapped[str]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    reason: Mapped[str | None]
    first_step: Mapped[int | None]
    last_step: Mapped[int | None]
    stored_line: Mapped[int] = mapped_column(default=0)
    ran_seconds: Mapped[float | None] = mapped_column(Double)  # only if the job has a time limit; see `time_limits`
    device_kind: Mapped[str | None]  # null until the run has reported it
    num_nodes: Mapped[int] = mapped_column(default=1, server_default="1")
    is_preparing: Mapped[bool] = mapped_column(default=False, server_default=false())


class EventRow(Table):
    """One event; ``line`` is its journal line, or null for the server's own events."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "line"),
        Index(  # for the few events among many of progress; a condition must be literally the same to use it
            "ix_events_job_id_type_seq",
            "job_id",
            "type",
            "seq",
            sqlite_where=text(IS_RARE_EVENT),
            postgresql_where=text(IS_RARE_EVENT),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    line: Mapped[int | None]
    type: Mapped[str]
    created_at: Mapped[datetime]
    fields: Mapped[dict[str, Any]]


class CheckpointRow(Table):
    """One stored checkpoint of a job. ``latest`` refers to the one with the highest step."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int]
    attempt: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigNumber)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class ModelNameRow(Table):
    """The name of a base model in a project. ``spec`` is the part of a job spec that the name stands for."""

    __tablename__ = "model_names"

    project: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    created_by: Mapped[str]
    spec: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class DrainRow(Table):
    """A drained worker: it gets no new jobs and hands back its running ones while this row exists."""

    __tablename__ = "drains"

    worker: Mapped[str] = mapped_column(primary_key=True)
    created_by: Mapped[str]
    created_at: Mapped[datetime]


class ServiceRow(Table):
    """The single row that identifies the service that owns this database; see `service_identity`."""

    __tablename__ = "service"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str]
    database: Mapped[str]  # the identity of the database at the last start
    claim: Mapped[str | None]  # identifies the Redis of its servers; see `engine.database_claim`
    claimed_by: Mapped[str | None]  # host and Redis of the server that renewed the claim, for error messages


class CheckRow(Table):
    """A worker's result of checking a spec; ``id`` is the SHA-256 of the request."""

    __tablename__ = "checks"

    id: Mapped[str] = mapped_column(primary_key=True)
    worker: Mapped[str]
    answer: Mapped[dict[str, Any] | None]
    failure: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(index=True)


class JobEndRow(Table):
    """The number of jobs that have ended for a reason, including deleted ones; only `transitions` counts."""

    __tablename__ = "job_ends"

    reason: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(BigNumber)


class IdempotencyRow(Table):
    """A processed submission: the same key and body within 24 hours return the same job."""

    __tablename__ = "idempotency"

    project: Mapped[str] = mapped_column(primary_key=True)  # an admin key acts in several
    key_id: Mapped[str] = mapped_column(primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(index=True)
