"""The migrations create exactly the tables, on both databases."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, func, insert, make_url, select, text

import migrations
from migrations.upgrade import latest_revision, upgrade
from server.database.connections import Database
from server.database.schema import SCHEMA_REVISION, require_schema
from server.database.tables import JobCountRow, JobEndRow, JobMetadataRow, JobRow, Table
from server.settings import DatabaseSettings
from tests.harness.ports import free_loopback_port
from zeta_core.contract.errors import InvalidSettings, Unavailable, ZetaError
from zeta_core.contract.job.events import utc_now
from zeta_core.system.database_url import sqlite_url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind in turn."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'zeta.db'}"


def sync_url(url: str) -> str:
    parsed = make_url(url)
    driver = "sqlite" if parsed.get_backend_name() == "sqlite" else "postgresql+psycopg"
    return parsed.set(drivername=driver).render_as_string(hide_password=False)


def downgrade(url: str, revision: str) -> None:
    """Restore the schema of an earlier release."""
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = create_engine(sync_url(url))
    with engine.begin() as connection:
        configuration.attributes["connection"] = connection
        command.downgrade(configuration, revision)
    engine.dispose()


def test_the_upgrade_counts_and_indexes_existing_jobs(database_url: str) -> None:
    upgrade(database_url)
    downgrade(database_url, "0006")
    engine = create_engine(sync_url(database_url))
    common = {"project": "p", "created_by": "k", "spec": {}, "resolved_spec": {}, "max_retries": 3}
    jobs = [("queued", 0, {"team": "a", "Größe": "5"}), ("queued", 0, {}), ("queued", 7, {"team": "b"})]
    with engine.begin() as connection:
        for number, (status, priority, metadata) in enumerate([*jobs, ("failed", 0, {"team": "a"})]):
            job = {"id": f"job_{number}", "status": status, "priority": priority, "metadata": metadata}
            connection.execute(insert(JobRow).values(**job, **common, created_at=utc_now()))
    upgrade(database_url)
    with engine.connect() as connection:
        columns = (JobMetadataRow.job_id, JobMetadataRow.key, JobMetadataRow.value, JobMetadataRow.project)
        entries = connection.execute(select(*columns)).all()
        same_times = select(func.count()).select_from(JobMetadataRow).join(JobRow, JobRow.id == JobMetadataRow.job_id)
        num_same = connection.scalar(same_times.where(JobRow.created_at == JobMetadataRow.created_at))
        columns = (JobCountRow.project, JobCountRow.status, JobCountRow.priority, JobCountRow.count)
        counts = connection.execute(select(*columns)).all()
    engine.dispose()
    expected = [("job_0", "team", "a"), ("job_0", "Größe", "5"), ("job_2", "team", "b"), ("job_3", "team", "a")]
    assert sorted(map(tuple, entries)) == sorted((*entry, "p") for entry in expected)
    assert num_same == 4
    assert sorted(map(tuple, counts)) == [("p", "failed", 0, 1), ("p", "queued", 0, 2), ("p", "queued", 7, 1)]


def test_the_migrations_build_exactly_the_tables(database_url: str) -> None:
    upgrade(database_url)
    engine = create_engine(sync_url(database_url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_the_comparison_of_tables_detects_a_difference(database_url: str) -> None:
    upgrade(database_url)
    engine = create_engine(sync_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN surplus VARCHAR"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) != []
    engine.dispose()


def test_the_upgrade_counts_ended_jobs_and_clears_errors_of_others(
    database_url: str,
) -> None:
    upgrade(database_url)
    downgrade(database_url, "0003")
    engine = create_engine(sync_url(database_url))
    ends = [("failed", "train_error"), ("failed", "train_error"), ("succeeded", "completed"), ("queued", "retrying")]
    with engine.begin() as connection:
        for number, (status, reason) in enumerate(ends):
            job = {"id": f"job_{number}", "status": status, "status_reason": reason, "error": {"code": reason}}
            common = {"project": "p", "created_by": "k", "spec": {}, "resolved_spec": {}, "priority": 0}
            connection.execute(insert(JobRow).values(**job, **common, max_retries=3, created_at=utc_now()))
    upgrade(database_url)
    with engine.connect() as connection:
        counted = connection.execute(select(JobEndRow.reason, JobEndRow.count)).all()
        errors = connection.execute(select(JobRow.error["code"].as_string()).order_by(JobRow.id)).scalars().all()
    engine.dispose()
    assert dict(counted) == {"train_error": 2, "completed": 1}
    assert list(errors) == ["train_error", "train_error", "completed", None]


def test_upgrading_twice_changes_nothing(database_url: str) -> None:
    assert upgrade(database_url) == upgrade(database_url) == latest_revision()


def test_the_server_requires_the_latest_revision() -> None:
    assert latest_revision() == SCHEMA_REVISION


async def check(url: str) -> None:
    database = Database(url)
    try:
        await require_schema(database)
    finally:
        await database.close()


@pytest.mark.anyio
async def test_a_database_without_the_schema_is_rejected_with_the_command(database_url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"revision none .* run `zeta migrate`"):
        await check(database_url)


@pytest.mark.anyio
async def test_only_the_servers_own_schema_is_accepted(database_url: str) -> None:
    upgrade(database_url)
    await check(database_url)
    engine = create_engine(sync_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(InvalidSettings, match="upgrade zeta-train"):
        await check(database_url)


@pytest.mark.anyio
async def test_an_unreachable_database_is_reported() -> None:
    with pytest.raises(Unavailable, match="cannot be opened"):
        await check(f"postgresql://nobody@127.0.0.1:{free_loopback_port()}/zeta")


def test_a_database_with_data_is_backed_up_before_its_upgrade(tmp_path: Path) -> None:
    file = tmp_path / "zeta.db"
    upgrade(sqlite_url(file))
    downgrade(sqlite_url(file), "0004")
    upgrade(sqlite_url(file))
    with closing(sqlite3.connect(tmp_path / f"zeta.db.before-{latest_revision()}")) as copy:
        tables = {name for (name,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("0004",)]
    assert {"jobs", "events"} <= tables


def test_a_database_of_a_newer_version_is_reported_and_left_alone(database_url: str, tmp_path: Path) -> None:
    upgrade(database_url)
    engine = create_engine(sync_url(database_url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    engine.dispose()
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(InvalidSettings, match=r"revision 0999, which this version doesn't know.*upgrade zeta-train"):
        upgrade(database_url)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("name", ["run?lr=1", "feature%2Fx", "100%", "a b#c", "Übung", "x" * 200])
def test_a_home_with_special_characters_contains_its_database(tmp_path: Path, name: str) -> None:
    settings = DatabaseSettings(home=tmp_path / name)
    upgrade(settings.database)
    asyncio.run(check(settings.database))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "zeta.db").is_file()


@pytest.mark.parametrize("kind", ["not a database", "a folder", "below a file"])
def test_an_invalid_database_file_is_reported_in_one_sentence(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "zeta.db"
    if kind == "a folder":
        file.mkdir()
    else:
        file.write_bytes(b"not a database at all, but long enough to look at" * 100)
    if kind == "below a file":
        file /= "zeta.db"
    reasons = {
        "not a database": "file is not a database",
        "a folder": "unable to open database file",
        "below a file": "File exists",
    }
    sentence = f"The database {file} (ZETA_DATABASE_URL) cannot be opened: {reasons[kind]}."
    with pytest.raises(Unavailable) as failed_upgrade:
        upgrade(sqlite_url(file))
    assert failed_upgrade.value.message == sentence
    with pytest.raises(ZetaError) as failed_start:
        asyncio.run(check(sqlite_url(file)))
    if kind == "below a file":  # like a file that does not exist yet
        sentence = f"The database is at revision none and this server needs {SCHEMA_REVISION}; run `zeta migrate`."
    assert failed_start.value.message == sentence
