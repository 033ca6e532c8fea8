"""Add the usage of workers' machines over time, and an index of the events other than progress by their type."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0023"
down_revision = "0021"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
BIG_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IS_RARE = sa.text("type <> 'progress'")


def upgrade() -> None:
    op.create_table(
        "worker_usage",
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("interval_seconds", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cpu", sa.Double(), nullable=False),
        sa.Column("memory_bytes", BIG_NUMBER, nullable=False),
        sa.Column("gpus", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("worker", "interval_seconds", "started_at", name="pk_worker_usage"),
    )
    op.create_index("ix_worker_usage_interval_seconds_started_at", "worker_usage", ["interval_seconds", "started_at"])
    op.create_index(
        "ix_events_job_id_type_seq",
        "events",
        ["job_id", "type", "seq"],
        sqlite_where=IS_RARE,
        postgresql_where=IS_RARE,
    )


def downgrade() -> None:
    op.drop_index("ix_events_job_id_type_seq", "events")
    op.drop_table("worker_usage")
