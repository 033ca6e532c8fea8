"""The tables of projects, API keys, secrets of workers, the audit log and browser sessions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from server.database.tables import BigNumber, Table


class ProjectRow(Table):
    """A project. ``limits`` contains only the limits that differ from the defaults in the settings."""

    __tablename__ = "projects"

    name: Mapped[str] = mapped_column(primary_key=True)
    created_by: Mapped[str]
    created_at: Mapped[datetime]
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)


class KeyRow(Table):
    """An API key, identified by the SHA-256 of its text, which is not stored.

    After a rotation with a grace period, the key's old text continues to work until ``old_expires_at``.
    """

    __tablename__ = "keys"
    __table_args__ = (Index("ix_keys_project_created_at_id", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    name: Mapped[str]
    scopes: Mapped[list[Any]]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    old_secret_sha256: Mapped[str | None] = mapped_column(unique=True)
    old_expires_at: Mapped[datetime | None]


class WorkerSecretRow(Table):
    """A worker with an individual secret. The secret is derived from ``secret_id``; see `engine.worker_secrets`.

    After a rotation with a grace period, the old secret continues to work until ``old_expires_at``.
    """

    __tablename__ = "worker_secrets"

    worker: Mapped[str] = mapped_column(primary_key=True)
    secret_id: Mapped[str]
    created_by: Mapped[str]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    old_secret_id: Mapped[str | None]
    old_expires_at: Mapped[datetime | None]


class AuditRow(Table):
    """One entry of the audit log. Triggers reject every change and every deletion of a row."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_project_id", "project", "id"),)

    id: Mapped[int] = mapped_column(BigNumber, primary_key=True, autoincrement=True)
    created_at: Mapped[datetime]
    project: Mapped[str | None]
    key_id: Mapped[str]
    key_name: Mapped[str]
    address: Mapped[str | None]
    action: Mapped[str]
    object_id: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)


class SessionRow(Table):
    """A browser session: the SHA-256 of its cookie's token, and that of the API key that it was started with."""

    __tablename__ = "sessions"

    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    key_sha256: Mapped[str]
    project: Mapped[str | None]  # chosen by an admin key instead of its own
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)


class LoginLinkRow(Table):
    """A link that starts one session with this API key. Using it deletes the row."""

    __tablename__ = "login_links"

    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    key_sha256: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
