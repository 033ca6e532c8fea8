"""Index every filter of the lists, keep the metadata of jobs in a table, and count jobs by status and priority.

Triggers maintain both tables, so that every statement that changes jobs is counted, including those of a server of
another version, a script or a restored backup.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

BIG_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

# Every change inserts rows and updates none: concurrent transactions on PostgreSQL neither wait for each other nor can
# deadlock, and a transaction that changes 100,000 jobs stays fast. `server.database.job_counts` merges the rows.
SQLITE_TRIGGERS = (
    """CREATE TRIGGER jobs_count_insert AFTER INSERT ON jobs BEGIN
    INSERT INTO job_counts (status, priority, count) VALUES (new.status, new.priority, 1);
    END""",
    """CREATE TRIGGER jobs_count_update AFTER UPDATE OF status, priority ON jobs
    WHEN old.status <> new.status OR old.priority <> new.priority BEGIN
    INSERT INTO job_counts (status, priority, count)
    VALUES (old.status, old.priority, -1), (new.status, new.priority, 1);
    END""",
    """CREATE TRIGGER jobs_count_delete AFTER DELETE ON jobs BEGIN
    INSERT INTO job_counts (status, priority, count) VALUES (old.status, old.priority, -1);
    END""",
    """CREATE TRIGGER jobs_index_metadata AFTER INSERT ON jobs WHEN json_type(new.metadata) = 'object' BEGIN
    INSERT INTO job_metadata (job_id, "key", value, project, created_at)
    SELECT new.id, entry."key", entry.value, new.project, new.created_at FROM json_each(new.metadata) AS entry
    WHERE entry.value IS NOT NULL;
    END""",
)
POSTGRESQL_TRIGGERS = (
    """CREATE FUNCTION count_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO job_counts (status, priority, count) VALUES (OLD.status, OLD.priority, -1);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO job_counts (status, priority, count) VALUES (NEW.status, NEW.priority, 1);
    END IF;
    RETURN NULL;
    END $$""",
    """CREATE TRIGGER jobs_count AFTER INSERT OR DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION count_job()""",
    """CREATE TRIGGER jobs_count_update AFTER UPDATE OF status, priority ON jobs FOR EACH ROW
    WHEN (OLD.status <> NEW.status OR OLD.priority <> NEW.priority) EXECUTE FUNCTION count_job()""",
    """CREATE FUNCTION index_job_metadata() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO job_metadata (job_id, "key", value, project, created_at)
    SELECT NEW.id, entry.key, entry.value, NEW.project, NEW.created_at FROM jsonb_each_text(NEW.metadata) AS entry
    WHERE entry.value IS NOT NULL;
    RETURN NULL;
    END $$""",
    """CREATE TRIGGER jobs_index_metadata AFTER INSERT ON jobs FOR EACH ROW
    WHEN (jsonb_typeof(NEW.metadata) = 'object') EXECUTE FUNCTION index_job_metadata()""",
)
TRIGGERS = {"sqlite": SQLITE_TRIGGERS, "postgresql": POSTGRESQL_TRIGGERS}
ENTRIES = {
    "sqlite": "json_each(jobs.metadata) AS entry WHERE json_type(jobs.metadata) = 'object'",
    "postgresql": "jsonb_each_text(jobs.metadata) AS entry WHERE jsonb_typeof(jobs.metadata) = 'object'",
}
JOB_INDEXES = {
    "ix_jobs_project_status_created_at_id": ["project", "status", "created_at", "id"],
    "ix_jobs_project_entity_name_created_at_id": ["project", "entity_name", "created_at", "id"],
    "ix_jobs_status_priority_created_at_id": ["status", "priority", "created_at", "id"],
    "ix_jobs_started_at": ["started_at"],
}
FILE_INDEXES = {
    "ix_files_project_created_at_id": ["project", "created_at", "id"],
    "ix_files_project_sha256_created_at_id": ["project", "sha256", "created_at", "id"],
}


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    op.create_table(
        "job_counts",
        sa.Column("id", BIG_NUMBER, autoincrement=True, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("count", BIG_NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_job_counts"),
    )
    op.create_table(
        "job_metadata",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_metadata_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key", name="pk_job_metadata"),
    )
    op.execute(
        "INSERT INTO job_counts (status, priority, count) SELECT status, priority, count(*) FROM jobs "
        "GROUP BY status, priority"
    )
    op.execute(
        'INSERT INTO job_metadata (job_id, "key", value, project, created_at) '
        'SELECT jobs.id, entry."key", entry.value, jobs.project, jobs.created_at '
        f"FROM jobs, {ENTRIES[dialect]} AND entry.value IS NOT NULL"
    )
    op.create_index(
        "ix_job_metadata_project_key_value_created_at_job_id",
        "job_metadata",
        ["project", "key", "value", "created_at", "job_id"],
    )
    op.drop_index("ix_jobs_entity_name", "jobs")
    op.drop_index("ix_jobs_status_priority_created_at", "jobs")
    op.drop_index("ix_files_project_sha256", "files")
    for name, columns in JOB_INDEXES.items():
        op.create_index(name, "jobs", columns)
    for name, columns in FILE_INDEXES.items():
        op.create_index(name, "files", columns)
    assigned = sa.text("worker IS NOT NULL")
    op.create_index("ix_jobs_worker", "jobs", ["worker"], sqlite_where=assigned, postgresql_where=assigned)
    for statement in TRIGGERS[dialect]:
        op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION count_job() CASCADE")
        op.execute("DROP FUNCTION index_job_metadata() CASCADE")
    else:
        for name in ("jobs_count_insert", "jobs_count_update", "jobs_count_delete", "jobs_index_metadata"):
            op.execute(f"DROP TRIGGER {name}")
    op.drop_index("ix_jobs_worker", "jobs")
    for name in FILE_INDEXES:
        op.drop_index(name, "files")
    for name in JOB_INDEXES:
        op.drop_index(name, "jobs")
    op.create_index("ix_files_project_sha256", "files", ["project", "sha256"])
    op.create_index("ix_jobs_status_priority_created_at", "jobs", ["status", "priority", "created_at"])
    op.create_index("ix_jobs_entity_name", "jobs", ["entity_name"])
    op.drop_table("job_metadata")
    op.drop_table("job_counts")
