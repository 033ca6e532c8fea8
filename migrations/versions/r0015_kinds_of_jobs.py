"""Add the kind of a job. Most jobs are trainings, so the indexes contain only the others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_jobs_kind_status_priority_created_at_id": ["kind", "status", "priority", "created_at", "id"],
    "ix_jobs_project_kind_created_at_id": ["project", "kind", "created_at", "id"],
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("kind", sa.String(), nullable=False, server_default="training"))
    is_other = sa.text("kind <> 'training'")
    for name, columns in INDEXES.items():
        op.create_index(name, "jobs", columns, sqlite_where=is_other, postgresql_where=is_other)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "jobs")
    op.drop_column("jobs", "kind")
