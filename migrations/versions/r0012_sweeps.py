"""Add sweeps, and requests to save a checkpoint."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0008"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request", DOCUMENT, nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_sweeps"),
        sa.UniqueConstraint(
            "project", "created_by", "idempotency_key", name="uq_sweeps_project_created_by_idempotency_key"
        ),
    )
    op.create_index("ix_sweeps_project_created_at_id", "sweeps", ["project", "created_at", "id"])
    op.add_column("jobs", sa.Column("sweep", sa.String(), nullable=True))
    op.create_index(
        "ix_jobs_sweep",
        "jobs",
        ["sweep"],
        sqlite_where=sa.text("sweep IS NOT NULL"),
        postgresql_where=sa.text("sweep IS NOT NULL"),
    )
    op.add_column("jobs", sa.Column("num_save_requests", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("fulfilled_save_request", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_index("ix_jobs_sweep", "jobs")
    for column in ("fulfilled_save_request", "num_save_requests", "sweep"):
        op.drop_column("jobs", column)
    op.drop_table("sweeps")
