"""Add browser sessions and one-time login links. Each belongs to the API key with the stored SHA-256."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_table("sessions", sa.Column("project", sa.String(), nullable=True))
    _create_table("login_links")


def downgrade() -> None:
    for table in ("sessions", "login_links"):
        op.drop_index(f"ix_{table}_expires_at", table_name=table)
        op.drop_table(table)


def _create_table(name: str, *further: sa.Column[Any]) -> None:
    op.create_table(
        name,
        sa.Column("token_sha256", sa.String(), nullable=False),
        sa.Column("key_sha256", sa.String(), nullable=False),
        *further,
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("token_sha256", name=f"pk_{name}"),
    )
    op.create_index(f"ix_{name}_expires_at", name, ["expires_at"])
