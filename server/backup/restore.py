"""Restoring a backup to an empty database and an empty artifact store, of the same kind as before or another one.

The files are restored first and the database last, so a service can't start on an incomplete restore. An interrupted
restore is continued by repeating it. The SHA-256 of everything is verified.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from server.artifact_ownership import OWNER_KEY, RESTORE_KEY
from server.artifacts import Artifacts
from server.backup.database_copy import require_empty, restore_database
from server.backup.directory import FOLDERS, Backup, BackupDirectory, SavedCheckpoint, SavedFile, WrongContent
from server.settings import StorageSettings
from zeta_core.contract.errors import Conflict, InvalidRequest
from zeta_core.contract.job.checkpoint import Manifest
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.system.artifact_store import ArtifactStore, open_store
from zeta_core.system.database_url import DatabaseAddress

_WORK = ".restore"  # in the local folder of the store: files that are not complete yet


class RestoreReport(BaseModel):
    """The result of a restore. ``problems`` are the keys of files that the backup lacks or that are damaged in it."""

    model_config = ConfigDict(frozen=True)

    home: str
    database: str
    store: str
    jobs: int
    checkpoints: int
    files: int
    problems: list[str]


def restore_backup(settings: StorageSettings, path: Path, environment: Mapping[str, str]) -> RestoreReport:
    """Restore the backup in ``path`` to the database and the store of these settings.

    Raises `InvalidRequest` if it is not a backup or its database is damaged, `Conflict` if the database or the store is
    not empty, `InvalidSettings`, `Unavailable`, and `OSError`.
    """
    directory = BackupDirectory(path)
    backup = directory.read()
    require_empty(settings.database)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = open_store(settings)
    Artifacts(store).prepare()
    _require_empty_store(store, backup)
    work = store.root / _WORK
    shutil.rmtree(work, ignore_errors=True)
    try:
        database = work / "zeta.db"
        try:
            directory.copy(backup.database.sha256, database)
        except WrongContent as error:
            raise InvalidRequest(
                f"The database of the backup in {path} is damaged ({error}); use another backup.", code="damaged_backup"
            ) from error
        store.write(RESTORE_KEY, backup.database.sha256.encode())
        problems = _restore_artifacts(directory, backup, store, work)
        restore_database(database, settings.database, environment)
        store.remove(RESTORE_KEY)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return RestoreReport(
        home=str(settings.home),
        database=DatabaseAddress.parse(settings.database).location,
        store=str(store),
        jobs=len(backup.jobs),
        checkpoints=len(backup.checkpoints),
        files=len(backup.files),
        problems=sorted({*backup.problems, *problems}),
    )


def _require_empty_store(store: ArtifactStore, backup: Backup) -> None:
    """Raise `Conflict` if the store has an owner or files, except those of an interrupted restore of this backup."""
    try:
        with store.open(RESTORE_KEY) as mark:
            is_continued = mark.read().decode() == backup.database.sha256
    except FileNotFoundError:
        is_continued = False
    is_owned = store.size(OWNER_KEY) is not None
    if is_owned or (not is_continued and any(any(store.objects(PurePosixPath(name))) for name in FOLDERS)):
        raise Conflict(
            f"The artifact store {store} is not empty; restore into another ZETA_HOME or ZETA_ARTIFACTS_URL.",
            code="not_empty",
        )


def _restore_artifacts(directory: BackupDirectory, backup: Backup, store: ArtifactStore, work: Path) -> list[str]:
    """Returns the keys of damaged files."""
    damaged: list[str] = []
    for job_id in backup.jobs:
        store.open_job(job_id)
    for file in backup.files:
        try:
            _restore_file(directory, file, store, work / "file")
        except WrongContent:
            damaged.append(file.key)
    for checkpoint in backup.checkpoints:
        try:
            _restore_checkpoint(directory, checkpoint, store, work / "checkpoint")
        except WrongContent:
            damaged.append(str(checkpoint_key(checkpoint.job, checkpoint.name)))
    return damaged


def _restore_file(directory: BackupDirectory, file: SavedFile, store: ArtifactStore, copy: Path) -> None:
    key = PurePosixPath(file.key)
    if store.size(key) == file.bytes:
        return  # by an interrupted restore; files appear only with their complete, verified content
    directory.copy(file.sha256, copy)
    (store.root / key).parent.mkdir(parents=True, exist_ok=True)
    store.upload(copy, key, file.sha256)
    store.commit(copy, key)


def _restore_checkpoint(
    directory: BackupDirectory, checkpoint: SavedCheckpoint, store: ArtifactStore, copy: Path
) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    manifest_file = copy / MANIFEST_NAME
    directory.copy(checkpoint.manifest_sha256, manifest_file)
    if store.is_stored(checkpoint.job, checkpoint.name, copy):
        return
    try:
        files = Manifest.model_validate_json(manifest_file.read_bytes()).files
    except ValidationError as error:
        raise WrongContent(f"the manifest of {checkpoint.job}/{checkpoint.name} is invalid") from error
    for file in files:
        directory.copy(file.sha256, copy / file.path)
    store.put_checkpoint(checkpoint.job, checkpoint.name, copy)
