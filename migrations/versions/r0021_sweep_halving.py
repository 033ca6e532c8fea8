"""Add the number of the next comparison of a sweep with successive halving."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

IS_PENDING = sa.text("next_comparison IS NOT NULL")


def upgrade() -> None:
    op.add_column("sweeps", sa.Column("next_comparison", sa.Integer(), nullable=True))
    op.create_index(
        "ix_sweeps_next_comparison",
        "sweeps",
        ["next_comparison"],
        sqlite_where=IS_PENDING,
        postgresql_where=IS_PENDING,
    )


def downgrade() -> None:
    op.drop_index("ix_sweeps_next_comparison", "sweeps")
    op.drop_column("sweeps", "next_comparison")
