"""The tables of webhooks and of their deliveries."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Index, text
from sqlalchemy.orm import Mapped, mapped_column

from server.database.tables import Table


class WebhookRow(Table):
    """A webhook of a project. ``secret`` is stored as it is, because it signs the deliveries."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_project_created_at_id", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_by: Mapped[str]
    name: Mapped[str | None]
    url: Mapped[str]
    format: Mapped[str]  # json, slack or email
    events: Mapped[list[Any]]
    secret: Mapped[str]
    old_secret: Mapped[str | None]  # signs, too, until the grace period of a rotation ends
    old_secret_expires_at: Mapped[datetime | None]
    enabled: Mapped[bool]
    disabled_reason: Mapped[str | None]
    failing_since: Mapped[datetime | None]
    created_at: Mapped[datetime]


class DeliveryRow(Table):
    """A message to one receiver: a webhook, or a URL of a job's ``notify``.

    While a server sends it, ``next_attempt_at`` is the time after which another server may send it again.
    """

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("ix_deliveries_webhook_id_created_at_id", "webhook_id", "created_at", "id"),
        Index("ix_deliveries_job_id_created_at_id", "job_id", "created_at", "id"),
        Index(
            "ix_deliveries_pending",
            "next_attempt_at",
            sqlite_where=text("status = 'pending'"),
            postgresql_where=text("status = 'pending'"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    webhook_id: Mapped[str | None]
    job_id: Mapped[str | None]
    event: Mapped[str]
    url: Mapped[str]
    format: Mapped[str]
    body: Mapped[dict[str, Any]]
    status: Mapped[str]  # pending, delivered or failed
    attempts: Mapped[int]
    status_code: Mapped[int | None]
    error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(index=True)
    delivered_at: Mapped[datetime | None]
    next_attempt_at: Mapped[datetime | None]
