"""Add the individual secrets of workers. Only their ids are stored; the server derives the secrets from them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "worker_secrets",
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column("secret_id", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("old_secret_id", sa.String(), nullable=True),
        sa.Column("old_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("worker", name="pk_worker_secrets"),
    )


def downgrade() -> None:
    op.drop_table("worker_secrets")
