"""Copying the files that a saved database names from the artifact store to a backup."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sqlalchemy import select

from server.artifacts import part_key, stored_file_key
from server.backup.database_copy import open_engine
from server.backup.directory import BackupDirectory, SavedCheckpoint, SavedFile, WrongContent
from server.database.file_tables import FileRow, UploadPartRow
from server.database.tables import CheckpointRow, JobRow
from zeta_core.contract.wire.run_directory import TENSORBOARD_DIRECTORY, checkpoint_key, log_key
from zeta_core.system.artifact_store import ArtifactStore, BrokenCheckpoint
from zeta_core.system.database_url import DatabaseAddress

_UNRECORDED = (log_key("job", 1).parts[2], TENSORBOARD_DIRECTORY)  # the folders of a job that no row names


@dataclass(frozen=True)
class NamedFiles:
    """The files that the rows of a database name; the SHA-256 of parts of uploads is unknown."""

    files: dict[PurePosixPath, tuple[int, str | None]]  # by key: size in bytes and SHA-256
    checkpoints: Sequence[tuple[str, str]]  # (job, name)
    jobs: frozenset[str]  # those that have started, without deleted ones


@dataclass
class SavedArtifacts:
    """The result of `save_artifacts`; ``problems`` are the keys of missing or damaged files and checkpoints."""

    files: list[SavedFile] = field(default_factory=list[SavedFile])
    checkpoints: list[SavedCheckpoint] = field(default_factory=list[SavedCheckpoint])
    problems: set[str] = field(default_factory=set[str])
    sizes: dict[str, int] = field(default_factory=dict[str, int])  # of all objects that the backup needs, by SHA-256
    new_bytes: int = 0  # copied now


def named_files(database: Path) -> NamedFiles:
    """The files that the rows of a saved database name."""
    with open_engine(DatabaseAddress("sqlite", str(database))) as opened, opened.connect() as connection:
        files: dict[PurePosixPath, tuple[int, str | None]] = {
            stored_file_key(row.id): (row.bytes, row.sha256)
            for row in connection.execute(select(FileRow.id, FileRow.bytes, FileRow.sha256))
        }
        parts = connection.execute(select(UploadPartRow.upload_id, UploadPartRow.id, UploadPartRow.bytes))
        files |= {part_key(row.upload_id, row.id): (row.bytes, None) for row in parts}
        started = select(JobRow.id).where(JobRow.deleted_at.is_(None), JobRow.attempt > 0)
        jobs = frozenset(connection.scalars(started))
        checkpoints = select(CheckpointRow.job_id, CheckpointRow.name).where(CheckpointRow.job_id.in_(started))
        found = connection.execute(checkpoints.order_by(CheckpointRow.job_id, CheckpointRow.step))
        return NamedFiles(files, [(row.job_id, row.name) for row in found], jobs)


def save_artifacts(store: ArtifactStore, directory: BackupDirectory, named: NamedFiles) -> SavedArtifacts:
    """Copy the named files, and the logs and curves of their jobs, unless the backup has their content already.

    Raises `OSError` if the store or the folder fails.
    """
    saved = SavedArtifacts()
    for key, (num_bytes, sha256) in named.files.items():
        file = _save(store, directory, saved, key, sha256, num_bytes)
        if file is None:
            saved.problems.add(str(key))
        else:
            saved.files.append(file)
    for job_id, name in named.checkpoints:
        checkpoint = _save_checkpoint(store, directory, saved, job_id, name)
        if checkpoint is None:
            saved.problems.add(str(checkpoint_key(job_id, name)))
        else:
            saved.checkpoints.append(checkpoint)
    for found in store.objects(PurePosixPath("jobs")):
        _, job_id, folder, *_ = (*found.key.parts, "", "")
        if job_id in named.jobs and folder in _UNRECORDED:
            file = _save(store, directory, saved, found.key, None, None)
            if file is not None:  # otherwise it was removed since it was listed
                saved.files.append(file)
    return saved


def _save_checkpoint(
    store: ArtifactStore, directory: BackupDirectory, saved: SavedArtifacts, job_id: str, name: str
) -> SavedCheckpoint | None:
    """Copy a checkpoint; ``None`` if it is missing or damaged, or was replaced in the meantime."""
    try:
        stored = store.checkpoint(job_id, name)
    except BrokenCheckpoint:
        return None
    if stored is None:
        return None
    for file in stored.manifest.files:
        if _save(store, directory, saved, stored.key / file.path, file.sha256, file.size) is None:
            return None
    sha256, num_bytes = directory.add(io.BytesIO(stored.manifest_bytes))
    saved.sizes[sha256] = num_bytes
    return SavedCheckpoint(job=job_id, name=name, manifest_sha256=sha256)


def _save(
    store: ArtifactStore,
    directory: BackupDirectory,
    saved: SavedArtifacts,
    key: PurePosixPath,
    sha256: str | None,
    num_bytes: int | None,
) -> SavedFile | None:
    """Copy a file unless the backup has its content; ``None`` if it is missing or has other content."""
    if sha256 is None or num_bytes is None or not directory.has(sha256, num_bytes):
        try:
            with store.open(key) as content:
                sha256, num_bytes = directory.add(content, sha256)
        except (FileNotFoundError, WrongContent):
            return None
        saved.new_bytes += num_bytes
    saved.sizes[sha256] = num_bytes
    return SavedFile(key=str(key), bytes=num_bytes, sha256=sha256)
