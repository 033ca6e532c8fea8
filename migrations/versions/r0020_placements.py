"""Add the placements of attempts on several workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
UNRELEASED = sa.text("state <> 'released'")


def upgrade() -> None:
    op.add_column("attempts", sa.Column("num_nodes", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("attempts", sa.Column("is_preparing", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "placements",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("node_rank", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("slots", DOCUMENT, nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("incarnation", sa.String(), nullable=True),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("port", sa.Integer(), nullable=True),
        sa.Column("stored_line", sa.Integer(), nullable=False),
        sa.Column("last_line", DOCUMENT, nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "attempt", "node_rank", name="pk_placements"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_placements_job_id_jobs", ondelete="CASCADE"),
        sa.UniqueConstraint("job_id", "attempt", "worker", name="uq_placements_job_id_attempt_worker"),
    )
    op.create_index(
        "ix_placements_unreleased", "placements", ["worker"], sqlite_where=UNRELEASED, postgresql_where=UNRELEASED
    )


def downgrade() -> None:
    op.drop_table("placements")
    for column in ("is_preparing", "num_nodes"):
        op.drop_column("attempts", column)
