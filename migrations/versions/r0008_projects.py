"""Create projects and the audit log, extend keys, and count jobs and remember submissions by project."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

BIG_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)

# These replace the triggers of revision 0007, whose counts contain no project.
SQLITE_TRIGGERS = (
    "DROP TRIGGER jobs_count_insert",
    "DROP TRIGGER jobs_count_update",
    "DROP TRIGGER jobs_count_delete",
    """CREATE TRIGGER jobs_count_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO job_counts (project, status, priority, count) VALUES (new.project, new.status, new.priority, 1);
    END""",
    """CREATE TRIGGER jobs_count_update AFTER UPDATE OF status, priority ON jobs
    WHEN old.status <> new.status OR old.priority <> new.priority BEGIN
    INSERT INTO job_counts (project, status, priority, count)
    VALUES (old.project, old.status, old.priority, -1), (new.project, new.status, new.priority, 1);
    END""",
    """CREATE TRIGGER jobs_count_delete AFTER DELETE ON jobs BEGIN
    INSERT INTO job_counts (project, status, priority, count) VALUES (old.project, old.status, old.priority, -1);
    END""",
    """CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
    END""",
    """CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
    END""",
)
POSTGRESQL_TRIGGERS = (
    """CREATE OR REPLACE FUNCTION count_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO job_counts (project, status, priority, count) VALUES (OLD.project, OLD.status, OLD.priority, -1);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO job_counts (project, status, priority, count) VALUES (NEW.project, NEW.status, NEW.priority, 1);
    END IF;
    RETURN NULL;
    END $$""",
    """CREATE FUNCTION reject_change_of_audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'the audit log is append-only';
    END $$""",
    """CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION reject_change_of_audit()""",
)
TRIGGERS = {"sqlite": SQLITE_TRIGGERS, "postgresql": POSTGRESQL_TRIGGERS}
# The functions of revision 0007, for a downgrade.
EARLIER_SQLITE_TRIGGERS = tuple(
    statement.replace("project, status", "status").replace("new.project, ", "").replace("old.project, ", "")
    for statement in SQLITE_TRIGGERS
    if "jobs_count" in statement
)
EARLIER_COUNT_JOB = (
    POSTGRESQL_TRIGGERS[0]
    .replace("project, status", "status")
    .replace("NEW.project, ", "")
    .replace("OLD.project, ", "")
)


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("limits", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_projects"),
    )
    names = (
        "SELECT 'default' AS project UNION SELECT project FROM keys UNION SELECT project FROM jobs "
        "UNION SELECT project FROM files"
    )
    op.execute(
        "INSERT INTO projects (name, created_by, created_at, limits) "
        f"SELECT project, 'migration', CURRENT_TIMESTAMP, '{{}}' FROM ({names}) AS names"
    )
    op.create_table(
        "audit",
        sa.Column("id", BIG_NUMBER, autoincrement=True, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("project", sa.String(), nullable=True),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("key_name", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("details", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_project_id", "audit", ["project", "id"])
    op.add_column("keys", sa.Column("last_used_at", TIME, nullable=True))
    op.add_column("keys", sa.Column("old_secret_sha256", sa.String(), nullable=True))
    op.add_column("keys", sa.Column("old_expires_at", TIME, nullable=True))
    with op.batch_alter_table("keys") as keys:
        keys.create_unique_constraint("uq_keys_old_secret_sha256", ["old_secret_sha256"])
    op.create_index("ix_keys_project_created_at_id", "keys", ["project", "created_at", "id"])
    queued = sa.text("status = 'queued'")
    columns = ["project", "priority", "created_at", "id"]
    op.create_index("ix_jobs_queue", "jobs", columns, sqlite_where=queued, postgresql_where=queued)
    _replace_counts(by_project=True)
    _replace_idempotency(by_project=True)
    for statement in TRIGGERS[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION reject_change_of_audit() CASCADE")
        op.execute(EARLIER_COUNT_JOB)
    else:
        for statement in EARLIER_SQLITE_TRIGGERS:
            op.execute(statement)
    _replace_idempotency(by_project=False)
    _replace_counts(by_project=False)
    op.drop_index("ix_jobs_queue", "jobs")
    op.drop_index("ix_keys_project_created_at_id", "keys")
    with op.batch_alter_table("keys") as keys:
        keys.drop_constraint("uq_keys_old_secret_sha256", type_="unique")
        keys.drop_column("old_expires_at")
        keys.drop_column("old_secret_sha256")
        keys.drop_column("last_used_at")
    op.drop_table("audit")
    op.drop_table("projects")


def _replace_counts(*, by_project: bool) -> None:
    """Create the table of counts anew, and count all jobs."""
    project = [sa.Column("project", sa.String(), nullable=False)] if by_project else []
    op.drop_table("job_counts")
    op.create_table(
        "job_counts",
        sa.Column("id", BIG_NUMBER, autoincrement=True, nullable=False),
        *project,
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("count", BIG_NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_counts"),
    )
    columns = "project, status, priority" if by_project else "status, priority"
    op.execute(f"INSERT INTO job_counts ({columns}, count) SELECT {columns}, count(*) FROM jobs GROUP BY {columns}")


def _replace_idempotency(*, by_project: bool) -> None:
    """Create the table of submissions anew, with or without the project in its key, and keep its rows."""
    columns = "key_id, idempotency_key, body_sha256, job_id, created_at"
    op.execute(f"CREATE TEMPORARY TABLE earlier_submissions AS SELECT {columns} FROM idempotency")
    op.drop_table("idempotency")
    project = [sa.Column("project", sa.String(), nullable=False)] if by_project else []
    names = (["project"] if by_project else []) + ["key_id", "idempotency_key"]
    op.create_table(
        "idempotency",
        *project,
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=False),
        sa.Column("body_sha256", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint(*names, name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"])
    if by_project:
        op.execute(
            f"INSERT INTO idempotency (project, {columns}) SELECT jobs.project, "
            + ", ".join(f"earlier.{name}" for name in columns.split(", "))
            + " FROM earlier_submissions AS earlier JOIN jobs ON jobs.id = earlier.job_id"
        )
    else:
        op.execute(
            f"INSERT INTO idempotency ({columns}) SELECT {columns} FROM earlier_submissions WHERE true "
            "ON CONFLICT DO NOTHING"
        )
    op.execute("DROP TABLE earlier_submissions")
