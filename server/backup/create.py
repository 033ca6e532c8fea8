"""Creating a backup beside a running service.

The database is saved first, and then the files that it names. Files that the service removes in the meantime, such as
superseded checkpoints, are then missing; so the database is saved again, until it names only files that the backup has.
Later rounds are short, because files that were copied already are not copied again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from server.artifact_ownership import require_owner
from server.backup.artifact_copy import named_files, save_artifacts
from server.backup.database_copy import save_database
from server.backup.directory import DATABASE_KEY, OBJECTS, Backup, BackupDirectory, SavedFile
from server.database.connections import Database
from server.database.schema import require_schema
from server.database.service_identity import read_service_id
from server.settings import StorageSettings
from zeta_core.contract.job.events import utc_now
from zeta_core.system.artifact_store import ArtifactStore, open_store
from zeta_core.system.distribution import version

MAX_ROUNDS = 20
PAUSE_SECONDS = 2.0  # before the next round: a checkpoint may be replaced just now


class BackupReport(BaseModel):
    """The result of a backup; sizes in bytes. ``problems`` are the keys of files that could not be read."""

    model_config = ConfigDict(frozen=True)

    directory: str
    jobs: int
    checkpoints: int
    files: int
    bytes: int
    new_bytes: int
    problems: list[str]


def create_backup(settings: StorageSettings, path: Path, environment: Mapping[str, str]) -> BackupReport:
    """Back up the service of these settings to the folder ``path``, which may contain its earlier backup.

    Raises `InvalidSettings`, `Conflict` if the folder can't be used, `Unavailable`, and `OSError`.
    """
    service = asyncio.run(_read_service_id(settings))
    store = open_store(settings)
    store.check_access()
    require_owner(store, service)
    directory = BackupDirectory(path)
    with directory.locked():
        return _create(settings, store, directory, service, environment)


def _create(
    settings: StorageSettings,
    store: ArtifactStore,
    directory: BackupDirectory,
    service: str | None,
    environment: Mapping[str, str],
) -> BackupReport:
    new_bytes, number = 0, 0
    problems: set[str] = set()
    saved_database = directory.path / OBJECTS / ".database"
    while True:
        created_at, number = utc_now(), number + 1
        saved_database.unlink(missing_ok=True)
        save_database(settings.database, saved_database, environment)
        named = named_files(saved_database)
        saved = save_artifacts(store, directory, named)
        new_bytes += saved.new_bytes
        if not saved.problems or saved.problems == problems or number == MAX_ROUNDS:
            break
        problems = saved.problems
        threading.Event().wait(PAUSE_SECONDS)
    with saved_database.open("rb") as content:
        sha256, num_bytes = directory.add(content)
    saved_database.unlink()
    backup = Backup(
        version=version(),
        service=service,
        created_at=created_at,
        database=SavedFile(key=DATABASE_KEY, bytes=num_bytes, sha256=sha256),
        files=saved.files,
        checkpoints=saved.checkpoints,
        jobs=sorted(named.jobs),
        problems=sorted(saved.problems),
    )
    sizes = {**saved.sizes, sha256: num_bytes}
    directory.finish(backup, sizes)
    return BackupReport(
        directory=str(directory.path),
        jobs=len(backup.jobs),
        checkpoints=len(backup.checkpoints),
        files=len(backup.files),
        bytes=sum(sizes.values()),
        new_bytes=new_bytes + num_bytes,
        problems=backup.problems,
    )


async def _read_service_id(settings: StorageSettings) -> str | None:
    database = Database(settings.database)
    try:
        await require_schema(database)
        return await read_service_id(database)
    finally:
        await database.close()
