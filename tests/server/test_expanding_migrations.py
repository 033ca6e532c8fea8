"""Servers of two successive versions run side by side on one database, because migrations only add to the schema."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, MetaData, Table, create_engine, inspect, make_url
from sqlalchemy.sql import sqltypes

import migrations
from migrations.upgrade import latest_revision, upgrade
from tests.harness.children import start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until
from tests.server.server_process import API_KEY, REPOSITORY, SECRET, running_server, submit
from zeta_core.contract.job.events import utc_now

# Servers at this revision or a later one run beside those of the next version. Earlier revisions were never released.
FIRST_REVISION = "0017"
# Revisions that remove something, with the release that stopped using it, which must be an earlier one.
CONTRACTIONS: Mapping[str, str] = {}


@dataclass(frozen=True)
class ColumnKind:
    type: str
    is_nullable: bool
    has_default: bool


Schema = dict[str, dict[str, ColumnKind]]  # the columns of each table by name


def script() -> Config:
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return configuration


def revisions() -> list[str]:
    """The supported revisions in the order in which they are applied."""
    walked = ScriptDirectory.from_config(script()).walk_revisions()
    return sorted(found.revision for found in walked if found.revision >= FIRST_REVISION)


def upgrade_to(engine: Engine, revision: str) -> None:
    configuration = script()
    with engine.begin() as connection:
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, revision)


def read_schema(engine: Engine) -> Schema:
    inspector = inspect(engine)
    return {
        table: {
            column["name"]: ColumnKind(str(column["type"]), bool(column["nullable"]), column["default"] is not None)
            for column in inspector.get_columns(table)
        }
        for table in inspector.get_table_names()
    }


def removals(before: Schema, after: Schema) -> list[str]:
    """What a server that uses the schema ``before`` can't read or write any more in the schema ``after``."""
    found = [f"table {table} is missing" for table in before.keys() - after.keys()]
    for table in sorted(before.keys() & after.keys()):
        old, new = before[table], after[table]
        found += [f"column {table}.{name} is missing" for name in sorted(old.keys() - new.keys())]
        for name in sorted(new.keys() - old.keys()):
            if not (new[name].is_nullable or new[name].has_default):
                found.append(f"new column {table}.{name} is neither nullable nor has a server default")
        for name in sorted(old.keys() & new.keys()):
            if old[name].type != new[name].type:
                found.append(f"column {table}.{name} was {old[name].type} and is {new[name].type}")
            if old[name].is_nullable and not new[name].is_nullable:
                found.append(f"column {table}.{name} is not nullable any more")
    return found


@pytest.fixture
def engine(database_url: str | None, tmp_path: Path) -> Engine:
    """A connection to a new database of each kind in turn."""
    if database_url is None:
        return create_engine(f"sqlite:///{tmp_path / 'zeta.db'}")
    return create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))


def test_each_migration_only_expands_and_accepts_rows_of_the_oldest_servers(engine: Engine) -> None:
    first, *later = revisions()
    upgrade_to(engine, first)
    oldest = MetaData()
    oldest.reflect(engine)
    schema = read_schema(engine)
    for revision in later:
        upgrade_to(engine, revision)
        before, schema = schema, read_schema(engine)
        if revision not in CONTRACTIONS:
            assert removals(before, schema) == [], f"revision {revision}"
    with engine.begin() as connection:
        for table in oldest.sorted_tables:
            if table.name not in ("alembic_version", "job_counts", "service"):  # filled by the migrations
                connection.execute(table.insert().values(row_of(table)))
    engine.dispose()


def row_of(table: Table) -> dict[str, Any]:
    """A row with a value for every column that an old server must set. Foreign keys refer to the rows of this test."""
    values: dict[str, Any] = {}
    for column in table.columns:
        if not column.nullable and column.server_default is None and column.autoincrement is not True:
            match column.type:
                case sqltypes.JSON():
                    values[column.name] = {}
                case sqltypes.Boolean():
                    values[column.name] = False
                case sqltypes.Integer() | sqltypes.Numeric():
                    values[column.name] = 1
                case sqltypes.DateTime():
                    values[column.name] = utc_now()
                case sqltypes.LargeBinary():
                    values[column.name] = b"x"
                case _:
                    values[column.name] = "x"
    return values


def test_the_comparison_finds_what_an_older_server_can_not_use() -> None:
    text, number = ColumnKind("VARCHAR", True, False), ColumnKind("INTEGER", False, False)
    before: Schema = {"jobs": {"a": text, "b": text, "c": number}, "files": {}}
    after: Schema = {"jobs": {"a": number, "c": number, "new": number}}
    assert removals(before, after) == [
        "table files is missing",
        "column jobs.b is missing",
        "new column jobs.new is neither nullable nor has a server default",
        "column jobs.a was VARCHAR and is INTEGER",
        "column jobs.a is not nullable any more",
    ]


@pytest.mark.extended
def test_a_server_of_the_previous_revision_works_beside_a_new_one(
    tmp_path: Path, redis_url: str, postgres_url: str
) -> None:
    code = previous_version(tmp_path / "previous")
    port = free_loopback_port()
    environment = {
        **clean_environment(),
        "PYTHONPATH": str(code),
        "ZETA_HOME": str(tmp_path / "old"),
        "ZETA_PORT": str(port),
        "ZETA_REDIS_URL": redis_url,
        "ZETA_DATABASE_URL": postgres_url,
        "ZETA_API_KEY": API_KEY,
        "ZETA_WORKER_SECRET": SECRET,
        "ZETA_ARTIFACTS_URL": str(tmp_path / "artifacts"),
    }
    (tmp_path / "old").mkdir()
    python = [sys.executable, "-P"]  # without the working directory, which contains the present version
    migrating = start_child([*python, "-m", "migrations"], log_file=tmp_path / "log", environment=environment)
    assert migrating.wait(60) == 0, (tmp_path / "log").read_text()
    assert revision_of(postgres_url) < latest_revision()
    old = start_child([*python, "-m", "server"], log_file=tmp_path / "log", environment=environment)
    try:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as old_http:
            wait_until(lambda: is_ready(old_http), 90, f"the old server:\n{(tmp_path / 'log').read_text()}")
            before = submit(old_http)
            upgrade(postgres_url)
            artifacts = {"ZETA_ARTIFACTS_URL": str(tmp_path / "artifacts")}
            with running_server(tmp_path / "new", redis_url, postgres_url, **artifacts) as new, new.http() as new_http:
                jobs = [before, submit(old_http), submit(new_http)]
                for http in (old_http, new_http):
                    assert {http.get(f"/v1/jobs/{job['id']}").json()["status"] for job in jobs} == {"queued"}
                assert old_http.post(f"/v1/jobs/{jobs[2]['id']}/cancel").status_code == 202
                assert new_http.post(f"/v1/jobs/{jobs[1]['id']}/cancel").status_code == 202
                assert new_http.get(f"/v1/jobs/{jobs[2]['id']}").json()["status"] == "cancelled"
                assert old_http.get(f"/v1/jobs/{jobs[1]['id']}").json()["status"] == "cancelled"
                assert "Traceback" not in new.log()
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        stop_child(old, stop_signal=signal.SIGTERM)


def revision_of(url: str) -> str:
    with psycopg.connect(url) as connection:
        [(revision,)] = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    return str(revision)


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def previous_version(target: Path) -> Path:
    """The code before the commit that added the newest migration, from the history of this clone."""
    newest = max((REPOSITORY / "migrations" / "versions").glob("r0*.py"))

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True).stdout

    try:
        added = git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(newest)).decode().strip()
        archive = git("archive", f"{added}^", "server", "zeta_core", "migrations", "zeta", "pyproject.toml")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the history of this clone does not contain the previous version ({error})")
    target.mkdir()
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)
    return target
