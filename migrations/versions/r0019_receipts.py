"""Add the signed receipts of jobs, and the key that signs them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
UNSIGNED = sa.text("signed_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "receipts",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("signed_at", TIME, nullable=True),
        sa.Column("envelope", DOCUMENT, nullable=True),
        sa.PrimaryKeyConstraint("job_id", name="pk_receipts"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_receipts_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_index(
        "ix_receipts_unsigned", "receipts", ["created_at"], sqlite_where=UNSIGNED, postgresql_where=UNSIGNED
    )
    op.create_table(
        "receipt_keys",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("private_key", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_receipt_keys"),
    )


def downgrade() -> None:
    op.drop_table("receipt_keys")
    op.drop_table("receipts")
