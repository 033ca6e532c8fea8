"""Compares the artifact store with the database, and changes nothing.

The database records the files of users, the parts of unfinished uploads, and the checkpoints of jobs, whose manifests
list their files. Logs and curves are not recorded, so they differ only if their job does not exist.

A running service changes both sides in the meantime. Therefore, a difference counts only if a second comparison finds
it, too. Objects of unfinished jobs that the database does not know are not differences: workers report them later.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from server.artifacts import BUFFER_BYTES, part_key, stored_file_key
from server.database.connections import Database
from server.database.file_tables import FileRow, UploadPartRow
from server.database.object_removals import ObjectRemovalRow
from server.database.tables import CheckpointRow, JobRow
from zeta_core.contract.job.status import UNFINISHED
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.system.artifact_store import ArtifactStore, BrokenCheckpoint

FOLDERS = ("files", "uploads", "jobs")
PAUSE_SECONDS = 2.0  # before the second comparison: a file is stored shortly before its row

DifferenceKind = Literal["missing", "extra", "wrong_size", "wrong_content"]


class StoreDifference(BaseModel):
    """A stored file that differs from the database; sizes in bytes, as far as they are known."""

    model_config = ConfigDict(frozen=True)

    kind: DifferenceKind
    key: str
    expected_bytes: int | None = None
    stored_bytes: int | None = None


class StoreComparison(BaseModel):
    """``num_files`` counts the stored files, and ``hashed`` states whether their content was verified."""

    model_config = ConfigDict(frozen=True)

    store: str
    num_files: int
    hashed: bool
    differences: list[StoreDifference]


@dataclass(frozen=True)
class _File:
    """A stored file as the database records it; ``None`` stands for a value that it does not record."""

    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class _Record:
    """The content of the store as the database records it."""

    files: dict[str, _File]  # by key; without those of checkpoints
    jobs: frozenset[str]
    settled: frozenset[str]  # the jobs that have ended and are not being deleted
    removals: frozenset[str]  # the keys that the server is going to remove, or that uploads are going to store
    checkpoints: frozenset[tuple[str, str]]  # (job, name); without those of jobs that are being deleted


@dataclass(frozen=True)
class _State:
    """The content of the store as recorded and as stored, read at about the same time, and their differences."""

    expected: dict[str, _File]
    stored: dict[str, int]  # sizes in bytes by key
    differences: frozenset[StoreDifference]


async def compare(database: Database, store: ArtifactStore, *, verify_content: bool) -> StoreComparison:
    """Compare keys and sizes, and with ``verify_content``, which reads everything, also each known SHA-256.

    Raises `Unavailable` if the database fails, and `OSError` if the store does.
    """
    first = await _observe(database, store)
    found = first.differences
    if verify_content:
        found |= await asyncio.to_thread(_differences_of_content, store, first)
    if found:
        await asyncio.sleep(PAUSE_SECONDS)
        second = await _observe(database, store)
        found = frozenset(difference for difference in found if _remains(difference, first, second))
    ordered = sorted(found, key=lambda difference: (difference.key, difference.kind))
    return StoreComparison(store=str(store), num_files=len(first.stored), hashed=verify_content, differences=ordered)


def _remains(difference: StoreDifference, first: _State, second: _State) -> bool:
    if difference in second.differences:
        return True
    key = difference.key  # content is not read again, but the file may have been replaced or removed
    return (
        difference.kind == "wrong_content" and key in second.stored and first.expected[key] == second.expected.get(key)
    )


async def _observe(database: Database, store: ArtifactStore) -> _State:
    record = await _read_record(database)
    return await asyncio.to_thread(_compare_with, store, record)


async def _read_record(database: Database) -> _Record:
    async with database.read() as session:
        files = {
            str(stored_file_key(file_id)): _File(num_bytes, sha256)
            for file_id, num_bytes, sha256 in await session.execute(select(FileRow.id, FileRow.bytes, FileRow.sha256))
        }
        columns = select(UploadPartRow.upload_id, UploadPartRow.id, UploadPartRow.bytes)
        for upload_id, part_id, num_bytes in await session.execute(columns):
            files[str(part_key(upload_id, part_id))] = _File(num_bytes)
        jobs = {job.id: job for job in await session.execute(select(JobRow.id, JobRow.status, JobRow.deleted_at))}
        checkpoints = await session.execute(select(CheckpointRow.job_id, CheckpointRow.name))
        return _Record(
            files,
            frozenset(jobs),
            frozenset(job.id for job in jobs.values() if job.status not in UNFINISHED and job.deleted_at is None),
            frozenset(await session.scalars(select(ObjectRemovalRow.key))),
            frozenset((job_id, name) for job_id, name in checkpoints if jobs[job_id].deleted_at is None),
        )


def _compare_with(store: ArtifactStore, record: _Record) -> _State:
    stored = {str(found.key): found.num_bytes for name in FOLDERS for found in store.objects(PurePosixPath(name))}
    expected = dict(record.files)
    readable: set[tuple[str, str]] = set()  # the checkpoints whose manifest can be read
    differences: set[StoreDifference] = set()
    for job_id, name in record.checkpoints:
        manifest_key = str(checkpoint_key(job_id, name) / MANIFEST_NAME)
        expected[manifest_key] = _File()
        try:
            checkpoint = store.checkpoint(job_id, name)
        except BrokenCheckpoint:
            differences.add(
                StoreDifference(kind="wrong_content", key=manifest_key, stored_bytes=stored.get(manifest_key))
            )
            continue
        if checkpoint is not None:
            readable.add((job_id, name))
            for file in checkpoint.manifest.files:
                expected[str(checkpoint.key / file.path)] = _File(file.size, file.sha256)
    for key, file in expected.items():
        if key not in stored:
            differences.add(_missing_file(key, file))
        elif file.num_bytes not in (None, stored[key]):
            sizes = {"expected_bytes": file.num_bytes, "stored_bytes": stored[key]}
            differences.add(StoreDifference(kind="wrong_size", key=key, **sizes))
    for key in stored.keys() - expected.keys():
        if _is_extra(key, record, readable):
            differences.add(StoreDifference(kind="extra", key=key, stored_bytes=stored[key]))
    return _State(expected, stored, frozenset(differences))


def _is_extra(key: str, record: _Record, readable: set[tuple[str, str]]) -> bool:
    """Whether a stored file that the database does not know should not exist."""
    match PurePosixPath(key).parts:
        case ("jobs", job_id, "checkpoints", name, *_) if job_id in record.jobs:
            checkpoint = (job_id, name)
            return job_id in record.settled and (checkpoint in readable or checkpoint not in record.checkpoints)
        case ("jobs", job_id, *_):
            return job_id not in record.jobs
        case _:
            return key not in record.removals


def _differences_of_content(store: ArtifactStore, state: _State) -> frozenset[StoreDifference]:
    """The files with the right size whose SHA-256 is not the expected one."""
    differences: set[StoreDifference] = set()
    for key, file in state.expected.items():
        if file.sha256 is None or state.stored.get(key) != file.num_bytes:
            continue
        try:
            sha256 = _sha256(store, PurePosixPath(key))
        except FileNotFoundError:  # removed since it was listed
            differences.add(_missing_file(key, file))
            continue
        if sha256 != file.sha256:
            sizes = {"expected_bytes": file.num_bytes, "stored_bytes": file.num_bytes}
            differences.add(StoreDifference(kind="wrong_content", key=key, **sizes))
    return frozenset(differences)


def _sha256(store: ArtifactStore, key: PurePosixPath) -> str:
    digest = hashlib.sha256()
    with store.open(key) as content:
        while piece := content.read(BUFFER_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _missing_file(key: str, file: _File) -> StoreDifference:
    return StoreDifference(kind="missing", key=key, expected_bytes=file.num_bytes)
