"""The database: one class per table. The migrations build exactly these (a test holds them against each other).

Times are UTC. JSON columns hold dumps of the contract's models, so no table repeats their fields.
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
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Document = JSON().with_variant(JSONB(), "postgresql")
BigNumber = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's Integer already has 64 bits


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time on both databases (SQLite itself forgets the zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "a time without a zone must not reach the database"
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
    """One job. ``status`` is changed by `state.change_status` alone, ``last_seq`` by `events.append` alone."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_created_at_id", "project", "created_at", "id"),
        Index("ix_jobs_status_priority_created_at", "status", "priority", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    parent: Mapped[str | None]
    status: Mapped[str]
    status_reason: Mapped[str | None]
    requested_action: Mapped[str | None]
    waiting_reason: Mapped[dict[str, Any] | None]
    entity_name: Mapped[str | None] = mapped_column(index=True)
    spec: Mapped[dict[str, Any]]
    resolved_spec: Mapped[dict[str, Any]]
    priority: Mapped[int]
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)  # consecutive ones, without a new checkpoint
    lost_workers: Mapped[int] = mapped_column("losses", default=0)  # consecutive ones, without a new checkpoint
    max_retries: Mapped[int]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]  # queued again after a failure: not handed over earlier
    worker: Mapped[str | None]  # the one it runs on, or is handed over to
    slots: Mapped[list[Any] | None]
    handed_over_at: Mapped[datetime | None]
    last_seq: Mapped[int] = mapped_column(default=0)
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    num_limited_events: Mapped[int] = mapped_column(default=0, server_default="0")  # logs, samples and progress
    deleted_at: Mapped[datetime | None]  # gone for everybody; its artifacts and this row are being removed


class AttemptRow(Table):
    """One start of a job; ``stored_line`` is the last journal line of it that became an event."""

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
    ran_seconds: Mapped[float | None] = mapped_column(
        Double
    )  # on the server's monotonic clock, of jobs with a time limit
    device_kind: Mapped[str | None]  # null until the training has reported it


class EventRow(Table):
    """One event; ``line`` is its journal line, or null for a sentence of the server's own."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "attempt", "line"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    line: Mapped[int | None]
    type: Mapped[str]
    created_at: Mapped[datetime]
    fields: Mapped[dict[str, Any]]


class CheckpointRow(Table):
    """One stored checkpoint of a job, by name; the newest step's row answers ``latest``."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int]
    attempt: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigNumber)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class FileRow(Table):
    __tablename__ = "files"
    __table_args__ = (Index("ix_files_project_sha256", "project", "sha256"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigNumber)
    sha256: Mapped[str]
    purpose: Mapped[str]
    created_at: Mapped[datetime]


class KeyRow(Table):
    """An API key by the SHA-256 of its text; the text itself is shown once and stored nowhere."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    name: Mapped[str]
    scopes: Mapped[list[Any]]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class DrainRow(Table):
    """A worker that is to get no job and to hand back those it has, until this row is gone."""

    __tablename__ = "drains"

    worker: Mapped[str] = mapped_column(primary_key=True)
    created_by: Mapped[str]
    created_at: Mapped[datetime]


class ServiceRow(Table):
    """The single row that identifies the service that owns this database; see `identity`."""

    __tablename__ = "service"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str]
    database: Mapped[str]  # the identity of the database at the last start
    claim: Mapped[str | None]  # which Redis its servers use; see `engine.database_claim`
    claimed_by: Mapped[str | None]  # host and Redis of the server that renewed the claim, for people to read


class CheckRow(Table):
    """What a worker found out about a spec; ``id`` is the SHA-256 of what was checked."""

    __tablename__ = "checks"

    id: Mapped[str] = mapped_column(primary_key=True)
    worker: Mapped[str]
    answer: Mapped[dict[str, Any] | None]
    failure: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(index=True)


class JobEndRow(Table):
    """How many jobs ever ended with a reason; `state.change_status` alone counts. Deleted ones stay counted."""

    __tablename__ = "job_ends"

    reason: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(BigNumber)


class IdempotencyRow(Table):
    """A submission that was answered: the same key and body within 24 hours is the same job."""

    __tablename__ = "idempotency"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(index=True)
