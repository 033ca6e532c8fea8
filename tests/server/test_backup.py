"""`zeta backup` and `zeta restore`: the database and the artifacts, of a folder or a bucket, SQLite or PostgreSQL."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, Text, cast, create_engine, make_url, select, text

from migrations.upgrade import upgrade
from server.artifact_ownership import claim_store
from server.backup import create
from server.backup.create import create_backup
from server.backup.table_rows import copy_rows
from server.database.connections import Database
from server.database.service_identity import identify_service
from server.database.tables import ServiceRow, Table
from server.settings import ServerSettings, StorageSettings
from tests.harness.postgres import PostgresServer
from tests.harness.seaweedfs import SeaweedServer
from tests.harness.service import ZETA, clean_environment
from tests.harness.waiting import wait_until
from tests.server.stored_service import StoredService, run_zeta
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import checkpoint_key, file_key
from zeta_core.system.artifact_store import ArtifactStore, open_store


@pytest.fixture
def service(tmp_path: Path) -> StoredService:
    return StoredService(tmp_path / "original")


@pytest.fixture
def database_urls(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str | None]]:
    """Returns the URL of a new database on each call; ``None`` for SQLite, whose file is in the home."""
    with ExitStack() as opened:

        def new(backend: str) -> str | None:
            if backend == "sqlite":
                return None
            server: PostgresServer = request.getfixturevalue("postgres_server")
            return opened.enter_context(server.fresh_database())

        yield new


def add_foreign_table(url: str) -> None:
    """Add a table of another program, such as an extension."""
    with create_engine(make_url(url).set(drivername="postgresql+psycopg")).begin() as connection:
        connection.execute(text("CREATE TABLE spatial_ref_sys (srid integer)"))


def all_rows(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of all tables but ``service``; JSON as Python values, and as text where it is NULL or null."""
    parsed = make_url(url)
    driver = "sqlite" if parsed.get_backend_name() == "sqlite" else "postgresql+psycopg"
    engine = create_engine(parsed.set(drivername=driver))
    with engine.connect() as connection:
        rows: dict[str, list[tuple[Any, ...]]] = {}
        for table in Table.metadata.sorted_tables:
            if table.name == ServiceRow.__tablename__:
                continue
            texts = [cast(column, Text).is_(None) for column in table.columns if isinstance(column.type, JSON)]
            query = select(*table.columns, *texts).order_by(*table.primary_key)
            rows[table.name] = [tuple(row) for row in connection.execute(query)]
    engine.dispose()
    return rows


def report_of(*words: str, home: Path, database_url: str | None = None, **variables: str) -> dict[str, Any]:
    """Run `zeta backup` or `zeta restore`, which must find no problems."""
    done = run_zeta(*words, "--json", home=home, database_url=database_url, **variables)
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def stored_settings(**fields: Any) -> ServerSettings:
    return ServerSettings(worker_secret="secret", **fields)


def start_once(settings: ServerSettings) -> ArtifactStore:
    """Make the restored data a service of its own, as a server does when it starts."""

    async def start() -> ArtifactStore:
        database = Database(settings.database)
        try:
            store = open_store(settings)
            claim_store(settings, store, await identify_service(database))
            return store
        finally:
            await database.close()

    return asyncio.run(start())


@pytest.mark.extended
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sqlite", "sqlite"),
        ("sqlite", "postgresql"),
        ("postgresql", "postgresql"),
        ("postgresql", "sqlite"),
    ],
)
def test_a_backup_restores_every_row_and_file(
    tmp_path: Path, database_urls: Callable[[str], str | None], source: str, target: str
) -> None:
    original = StoredService(tmp_path / "original", database_urls(source))
    if source == "postgresql":
        add_foreign_table(original.settings.database)
    backup, home = tmp_path / "backup", tmp_path / "restored"
    first = report_of("backup", str(backup), home=original.settings.home, database_url=original.settings.database_url)
    assert (first["jobs"], first["checkpoints"], first["files"], first["problems"]) == (2, 1, 3, [])
    restored_url = database_urls(target)
    report_of("restore", str(backup), home=home, database_url=restored_url)
    settings = stored_settings(home=home, database_url=restored_url)
    assert all_rows(settings.database) == all_rows(original.settings.database)
    (home / "artifacts" / "restore.json").write_text("0")  # left by a restore that was killed at its very end
    start_once(settings)
    checked = run_zeta("artifacts", "check", "--hash", home=home, database_url=restored_url)
    assert checked.stdout == f"6 files in {home}/artifacts match the database. Their content was verified.\n", checked
    again = run_zeta("restore", str(backup), home=home, database_url=restored_url)
    assert again.returncode == 2
    assert "already exists; restore into another ZETA_HOME or ZETA_DATABASE_URL." in again.stderr
    before = original.check("--hash")
    assert before.returncode == 0, "the original is unchanged"


def test_every_table_of_the_database_is_copied(service: StoredService, tmp_path: Path) -> None:
    target = f"sqlite:///{tmp_path}/copy.db"
    upgrade(target)
    with create_engine(service.settings.database).connect() as source, create_engine(target).begin() as connection:
        copy_rows(source, connection)
    assert all_rows(target) == all_rows(service.settings.database)


@pytest.mark.extended
def test_a_second_backup_copies_only_new_files_and_forgets_removed_ones(service: StoredService, tmp_path: Path) -> None:
    home, backup = service.settings.home, tmp_path / "backup"
    first = report_of("backup", str(backup), home=home)
    num_objects = len(list(backup.glob("objects/*/*")))
    second = report_of("backup", str(backup), home=home)
    assert second["bytes"] == first["bytes"]
    logs, database = len("the log") * 2, json.loads((backup / "backup.json").read_text())["database"]["bytes"]
    assert second["new_bytes"] == logs + database, "logs may have changed"
    rows = service.rows
    rows.checkpoint(service.ended, "best", 2, {"model/weights": ("weights", b"v" * 100)})
    assert report_of("backup", str(backup), home=home)["checkpoints"] == 2
    assert len(list(backup.glob("objects/*/*"))) == num_objects + 2, "another manifest and other weights"
    assert backup.stat().st_mode & 0o777 == 0o700


def test_a_backup_waits_until_its_database_names_only_stored_files(
    service: StoredService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is superseded after the database was saved, and before its files are copied."""
    rows, saved = service.rows, create.save_database
    rows.checkpoint(service.running, "step-2", 2, {"weights": ("weights", b"2" * 100)})

    def save_and_replace(*arguments: Any) -> None:
        saved(*arguments)
        if service.path(checkpoint_key(service.running, "step-2")).exists():
            rows.checkpoint(service.running, "step-4", 4, {"weights": ("weights", b"4" * 100)})
            rows.forget_checkpoint(service.running, "step-2")

    monkeypatch.setattr(create, "save_database", save_and_replace)
    report = create_backup(StorageSettings(home=service.settings.home), tmp_path / "backup", {})
    assert report.problems == []
    named = json.loads((tmp_path / "backup" / "backup.json").read_text())["checkpoints"]
    assert {checkpoint["name"] for checkpoint in named} == {"final", "step-4"}


@pytest.mark.extended
def test_missing_and_damaged_files_are_listed_and_the_rest_is_restored(service: StoredService, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    service.path(file_key(service.file_id)).unlink()
    done = run_zeta("backup", str(backup), home=service.settings.home)
    assert done.returncode == 1
    assert done.stdout.startswith(f"missing or damaged  {file_key(service.file_id)}\n")
    weights = next(path for path in backup.glob("objects/*/*") if path.read_bytes() == b"w" * 100)
    weights.write_bytes(b"x" * 100)
    done = run_zeta("restore", str(backup), "--json", home=tmp_path / "restored")
    assert done.returncode == 1
    final = checkpoint_key(service.ended, "final")
    assert json.loads(done.stdout)["problems"] == sorted([str(file_key(service.file_id)), str(final)])


@pytest.mark.extended
def test_an_interrupted_restore_continues_and_nothing_is_overwritten(service: StoredService, tmp_path: Path) -> None:
    backup, home = tmp_path / "backup", tmp_path / "restored"
    report_of("backup", str(backup), home=service.settings.home)
    database = next(path for path in backup.glob("objects/*/*") if path.read_bytes().startswith(b"SQLite format 3"))
    report_of("restore", str(backup), home=home)
    (home / "zeta.db").unlink()
    sha256 = database.name
    foreign = run_zeta("restore", str(backup), home=home)
    assert foreign.returncode == 2
    assert f"The artifact store {home}/artifacts is not empty" in foreign.stderr
    (home / "artifacts" / "restore.json").write_text(sha256)  # as a killed restore leaves it, shortly before its end
    shutil.rmtree(home / "artifacts" / checkpoint_key(service.ended, "final"))
    assert report_of("restore", str(backup), home=home)["problems"] == []
    start_once(stored_settings(home=home))
    assert run_zeta("artifacts", "check", "--hash", home=home).returncode == 0


@pytest.mark.extended
def test_a_backup_that_is_interrupted_says_how_to_continue(service: StoredService, tmp_path: Path) -> None:
    file, backup = service.path(file_key(service.file_id)), tmp_path / "backup"
    file.unlink()
    os.mkfifo(file)  # opening it waits until it is opened for writing
    command = [ZETA, "backup", backup, "--home", service.settings.home]
    with subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True) as running:
        wait_until(lambda: (backup / "objects" / ".database").exists(), 30, "the database to be copied")
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=30)[1] == "Interrupted; repeat the command to continue.\n"
    assert running.returncode == 130
    file.unlink()
    file.write_bytes(b"content")
    assert report_of("backup", str(backup), home=service.settings.home)["problems"] == []


def test_folders_that_are_not_backups_are_refused(service: StoredService, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("important")
    done = run_zeta("backup", str(full), home=service.settings.home)
    assert done.returncode == 2
    assert "contains 'thesis.txt', so it is not a backup" in done.stderr
    done = run_zeta("restore", str(full), home=tmp_path / "restored")
    assert done.returncode == 2
    assert "is not a finished backup" in done.stderr
    assert not (tmp_path / "restored").exists()


@pytest.mark.extended
def test_a_backup_moves_a_service_from_a_folder_to_a_bucket_and_back(
    service: StoredService, tmp_path: Path, object_store: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    url = f"s3://{object_store.new_bucket()}/zeta"
    report_of("backup", str(tmp_path / "first"), home=service.settings.home)
    report_of("restore", str(tmp_path / "first"), home=tmp_path / "moved", ZETA_ARTIFACTS_URL=url)
    moved = stored_settings(home=tmp_path / "moved", artifacts_url=url)
    store = start_once(moved)
    assert not store.is_deleted(service.ended)
    report_of("backup", str(tmp_path / "second"), home=moved.home, ZETA_ARTIFACTS_URL=url)
    report_of("restore", str(tmp_path / "second"), home=tmp_path / "back")
    start_once(stored_settings(home=tmp_path / "back"))
    checked = run_zeta("artifacts", "check", "--hash", home=tmp_path / "back")
    assert checked.stdout.startswith("6 files"), checked
    assert JobStatus.SUCCEEDED in {row[6] for row in all_rows(f"sqlite:///{tmp_path}/back/zeta.db")["jobs"]}
