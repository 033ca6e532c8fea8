"""The table of the usage of workers' machines over time."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Double, Index
from sqlalchemy.orm import Mapped, mapped_column

from server.database.tables import BigNumber, Table


class UsageRow(Table):
    """The mean usage of a machine in one interval. ``gpus`` are dumps of `GpuUsage`, with means."""

    __tablename__ = "worker_usage"
    __table_args__ = (Index("ix_worker_usage_interval_seconds_started_at", "interval_seconds", "started_at"),)

    worker: Mapped[str] = mapped_column(primary_key=True)
    interval_seconds: Mapped[int] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(primary_key=True)
    cpu: Mapped[float] = mapped_column(Double)
    memory_bytes: Mapped[int] = mapped_column(BigNumber)
    gpus: Mapped[list[Any]]
