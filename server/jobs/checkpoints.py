"""Lists a job's stored checkpoints and serves them file by file or as one .tar.

Only files listed in the manifest are served, so no path from a client reaches the file system.
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import re
import tarfile
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from server.auth import Caller
from server.database.checkpoints import LATEST, checkpoints_newest_first
from server.database.tables import CheckpointRow
from server.http.downloads import Content, FilePart, Part
from server.jobs.queries import find_job
from server.service import Service
from zeta_core.contract.errors import InvalidRequest, NotFound
from zeta_core.contract.job.checkpoint import NAME_PATTERN, Manifest, ManifestFile, checkpoint_step
from zeta_core.contract.job.responses import Page
from zeta_core.contract.job.status import ENDED, JobStatus
from zeta_core.contract.spec.validation import shown
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, TRAINING_STATE_NAME
from zeta_core.system.artifact_store import StoredCheckpoint

_BLOCK_BYTES = 512  # of a .tar
_MEDIA_TYPES = {".json": "application/json", ".txt": "text/plain; charset=utf-8", ".md": "text/plain; charset=utf-8"}


async def list_checkpoints(
    service: Service, caller: Caller, job_id: str, after: str | None, limit: int
) -> Page[Manifest]:
    """The manifests of the stored checkpoints, newest first.

    Raises `NotFound` for the name of a checkpoint that the job does not have.
    """
    async with service.database.read() as session:
        job = await find_job(session, caller, job_id)
        names = list(await session.scalars(checkpoints_newest_first(job_id)))
        if after is None:
            rest = names
        elif after in names:
            rest = names[names.index(after) + 1 :]
        elif (step := checkpoint_step(after)) is not None:  # the checkpoint was removed; continue by its step number
            rest = list(await session.scalars(checkpoints_newest_first(job_id).where(CheckpointRow.step <= step)))
        elif NAME_PATTERN.match(after):
            raise NotFound(
                _not_found_message(job_id, after, job.status, has_any=bool(names)), code="checkpoint_not_found"
            )
        else:
            raise InvalidRequest(
                f"after is {shown(after)}, which is not a checkpoint of {job_id}; use the last_id of an earlier page.",
                param="after",
            )
    checkpoints = await asyncio.to_thread(lambda: [service.artifacts.checkpoint(job_id, name) for name in rest[:limit]])
    data = [checkpoint.manifest for checkpoint in checkpoints if checkpoint is not None]
    return Page(
        data=data,
        has_more=len(rest) > limit,
        first_id=data[0].name if data else None,
        last_id=rest[:limit][-1] if rest else None,
        next_after=rest[limit - 1] if len(rest) > limit else None,
    )


async def find_checkpoint(service: Service, caller: Caller, job_id: str, name: str) -> StoredCheckpoint:
    """The checkpoint ``step-N``, ``best``, ``final`` or ``latest`` of the caller's job. Raises `NotFound`."""
    async with service.database.read() as session:
        status = (await find_job(session, caller, job_id)).status
        newest = await session.scalar(checkpoints_newest_first(job_id).limit(1))
        stored_name = newest if name == LATEST else await _stored_name(session, job_id, name)
    stored = await asyncio.to_thread(service.artifacts.checkpoint, job_id, stored_name) if stored_name else None
    if stored is None:
        raise NotFound(
            _not_found_message(job_id, name, status, has_any=newest is not None), code="checkpoint_not_found"
        )
    return stored


def _not_found_message(job_id: str, name: str, status: str, *, has_any: bool) -> str:
    """Why there is no such checkpoint, and what to do."""
    if has_any:
        return (
            f"Job {job_id} has no checkpoint {shown(name)}; list its checkpoints with `zeta checkpoints {job_id}` "
            f"or GET /v1/jobs/{job_id}/checkpoints."
        )
    if status in ENDED:
        return f"Job {job_id} ended ({status}) before it saved a checkpoint; start it again with `zeta rerun {job_id}`."
    if status == JobStatus.PAUSED:
        return f"Job {job_id} is paused and has no checkpoint yet; continue it with `zeta resume {job_id}`."
    return f"Job {job_id} is {status} and has no checkpoint yet; `zeta wait {job_id}` waits until it has ended."


def file_content(stored: StoredCheckpoint, path: str) -> Content:
    """One file of a checkpoint, or its manifest. Raises `NotFound`."""
    if path == MANIFEST_NAME:
        return Content((stored.manifest_bytes,), _digest(stored.manifest_bytes), "application/json", MANIFEST_NAME)
    for file in stored.manifest.files:
        if file.path == path:
            name = path.rpartition("/")[2]
            media_type = _MEDIA_TYPES.get(name[name.rfind(".") :], "application/octet-stream")
            return Content((_part(stored, file),), file.sha256, media_type, name)
    listed = ", ".join(file.path for file in stored.manifest.files[:20])
    raise NotFound(
        f"Checkpoint {stored.manifest.name!r} has no file {shown(path)}; it has {listed}.", code="file_not_found"
    )


def _part(stored: StoredCheckpoint, file: ManifestFile) -> FilePart:
    return FilePart(stored.store, stored.key / file.path, file.size)


def archive_content(stored: StoredCheckpoint, job_id: str, include: str | None, state: bool) -> Content:
    """The checkpoint as a .tar, files at its top level and ``manifest.json`` last; the same bytes each time.

    ``include`` is a glob for the files' paths (``*`` also matches ``/``). Raises `NotFound` if it matches nothing.
    """
    manifest = stored.manifest
    files = [file for file in manifest.files if state or not _is_state(file)]
    pattern = re.compile(fnmatch.translate(include)) if include is not None else None
    selected = sorted(
        (file for file in files if pattern is None or pattern.match(file.path)), key=lambda file: file.path
    )
    with_manifest = pattern is None or pattern.match(MANIFEST_NAME) is not None
    if not selected and not with_manifest:
        raise NotFound(
            f"include is {shown(include)}, which matches no file of checkpoint {manifest.name!r}"
            f"{'' if state else ' (training state requires state=true)'}.",
            code="nothing_included",
            param="include",
        )
    parts: list[Part] = []
    for file in selected:
        parts += _member(file.path, file.size, manifest.created_at, _part(stored, file))
    if with_manifest:
        content = stored.manifest_bytes
        parts += _member(MANIFEST_NAME, len(content), manifest.created_at, content)
    parts.append(b"\0" * (2 * _BLOCK_BYTES))
    return Content(parts, _archive_digest(parts, selected), "application/x-tar", f"{job_id}-{manifest.name}.tar")


async def _stored_name(session: AsyncSession, job_id: str, name: str) -> str | None:
    if not NAME_PATTERN.match(name):
        return None
    row = await session.get(CheckpointRow, (job_id, name))
    return row.name if row else None


def _is_state(file: ManifestFile) -> bool:
    return file.role == "state" or file.path.startswith(f"{TRAINING_STATE_NAME}/")


def _member(path: str, num_bytes: int, modified_at: datetime, content: Part) -> list[Part]:
    """One file of a .tar: header, content, and zeros up to the next block."""
    entry = tarfile.TarInfo(path)
    entry.size, entry.mtime, entry.mode = num_bytes, int(modified_at.timestamp()), 0o644
    padding = -num_bytes % _BLOCK_BYTES
    return [entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), content, b"\0" * padding]


def _archive_digest(parts: Sequence[Part], files: Sequence[ManifestFile]) -> str:
    """A digest of the archive from its headers and the files' hashes, without reading the files."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
    for file in files:
        digest.update(file.sha256.encode())
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
