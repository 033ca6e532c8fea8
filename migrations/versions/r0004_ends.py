"""Count ended jobs by reason, including deleted ones, and clear the errors of jobs that have not ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "job_ends",
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("count", BIG_NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("reason", name="pk_job_ends"),
    )
    ended = "status IN ('succeeded', 'failed', 'cancelled')"
    op.execute(
        "INSERT INTO job_ends (reason, count) SELECT coalesce(status_reason, 'unknown'), count(*) FROM jobs "
        f"WHERE {ended} GROUP BY coalesce(status_reason, 'unknown')"
    )
    op.execute(f"UPDATE jobs SET error = NULL WHERE NOT {ended}")


def downgrade() -> None:
    op.drop_table("job_ends")
