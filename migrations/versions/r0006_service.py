"""Add the id of the service that owns the database, and the identity of the database."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "service",
        sa.Column("number", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("database", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_service"),
    )


def downgrade() -> None:
    op.drop_table("service")
