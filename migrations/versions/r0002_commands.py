"""Add the columns and tables for pausing, deleting, time limits and draining."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UTC_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("jobs", sa.Column("deleted_at", UTC_TIME, nullable=True))
    op.add_column("jobs", sa.Column("num_limited_events", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("attempts", sa.Column("ran_seconds", sa.Double(), nullable=True))
    op.create_table(
        "drains",
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", UTC_TIME, nullable=False),
        sa.PrimaryKeyConstraint("worker", name="pk_drains"),
    )


def downgrade() -> None:
    op.drop_table("drains")
    with op.batch_alter_table("attempts") as attempts:
        attempts.drop_column("ran_seconds")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("num_limited_events")
        jobs.drop_column("deleted_at")
