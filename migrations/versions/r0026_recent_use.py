"""Add the recent use of slots by project."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "recent_use",
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("mean_slots", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("project", name="pk_recent_use"),
    )


def downgrade() -> None:
    op.drop_table("recent_use")
