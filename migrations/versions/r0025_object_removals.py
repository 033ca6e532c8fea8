"""Add the objects of the artifact store that are to be removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "object_removals",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("is_due", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_object_removals"),
    )


def downgrade() -> None:
    op.drop_table("object_removals")
