"""Counts the bytes of unfinished uploads as they arrive, against the project's quota.

Guarantees: uploads never bring a project's files, checkpoints and the received bytes of its unfinished uploads in this
process above the quota, whether or not an upload announced its length. The uploads of other server processes count by
the size of their temporary files, so several processes can exceed the quota by at most the data they hold in memory.
A checkpoint is never refused, so that no training is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

from sqlalchemy.ext.asyncio import AsyncSession

from server.artifacts import Artifacts, IncomingFile, part_key, stored_file_key
from server.database.access_tables import AuditRow
from server.database.availability import DatabaseUnavailable
from server.database.connections import Database
from server.database.file_tables import FileRow, UploadPartRow
from server.database.object_removals import announce_upload, complete_upload, request_removal
from server.database.projects import stored_bytes
from server.uploads.removals import remove_now
from zeta_core.contract.errors import QuotaExceeded

logger = logging.getLogger(__name__)

FRESH_SECONDS = 1.0  # how long the sum of stored bytes is cached
BATCH_BYTES = 4 << 20  # written per call in a thread while few uploads are open
MIN_BATCH_BYTES = 256 << 10


@dataclass(eq=False)
class OpenUpload:
    """An unfinished upload: its temporary file and the number of bytes received."""

    project: str
    incoming: IncomingFile
    quota_bytes: int | None  # of the project
    num_bytes: int = 0


class OpenUploads:
    """The unfinished uploads of this process. Create one per process, inside its event loop."""

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts
        self._open: set[OpenUpload] = set()
        self._elsewhere: dict[str, tuple[float, int]] = {}  # by project: time of the count (monotonic), and bytes
        self._counting = asyncio.Lock()

    @property
    def batch_bytes(self) -> int:
        """The number of bytes to buffer per upload, which shrinks as the number of open uploads grows."""
        return max(MIN_BATCH_BYTES, BATCH_BYTES // max(1, len(self._open)))

    @asynccontextmanager
    async def open(self, project: str, announced_bytes: int, *, quota_bytes: int | None) -> AsyncGenerator[OpenUpload]:
        """Open an upload for the block; its temporary file is removed at the end unless `store` kept it.

        Raises `QuotaExceeded` if the announced bytes don't fit, and `Unavailable`.
        """
        await self._require_quota(project, announced_bytes, quota_bytes, max_age_seconds=0)
        incoming = await asyncio.to_thread(self._artifacts.open_incoming, project)
        upload = OpenUpload(project, incoming, quota_bytes)
        self._open.add(upload)
        try:
            yield upload
        finally:
            self._open.discard(upload)
            upload.incoming.discard()

    async def require_space(self, project: str, num_bytes: int, quota_bytes: int | None) -> None:
        """Raise `QuotaExceeded` or `Unavailable` if a later upload of this size would not fit."""
        await asyncio.to_thread(self._artifacts.require_free, num_bytes)
        await self._require_quota(project, num_bytes, quota_bytes, max_age_seconds=0)

    async def count(self, upload: OpenUpload, num_bytes: int) -> None:
        """Count received bytes. Raises `QuotaExceeded` as soon as they exceed the quota."""
        upload.num_bytes += num_bytes
        try:
            await self._require_quota(upload.project, 0, upload.quota_bytes, max_age_seconds=FRESH_SECONDS)
        except QuotaExceeded:
            upload.num_bytes = 0  # the upload will be dropped, so it must not count against others
            raise

    async def store(
        self,
        upload: OpenUpload,
        row: FileRow | UploadPartRow,
        entry: AuditRow | None,
        also: Callable[[AsyncSession], Awaitable[None]] | None = None,
    ) -> None:
        """Store the file or part: its bytes first, then its row, in one transaction with ``entry`` and ``also``.

        Raises `QuotaExceeded`, `Unavailable` and the errors of ``also``.
        """
        is_part = isinstance(row, UploadPartRow)
        key = part_key(row.upload_id, row.id) if is_part else stored_file_key(row.id)
        async with self._database.write() as session:
            announce_upload(session, str(key))
        try:
            await asyncio.to_thread(upload.incoming.upload, key)
            await self._commit(upload, key, row, entry, also)
        except BaseException:
            await self._drop(key, type(row), row.id)
            raise

    async def _drop(self, key: PurePosixPath, kind: type[FileRow | UploadPartRow], row_id: str) -> None:
        """Remove the bytes of an upload that was not stored, now or as soon as the store responds."""
        try:
            async with self._database.write() as session:
                if await session.get(kind, row_id) is not None:
                    return  # it was stored: the connection failed, or the request was cancelled, during the commit
                await request_removal(session, str(key))
        except DatabaseUnavailable as error:  # it was announced, so it is removed when it expires
            logger.warning("The rest of an upload, %s, remains for now: %s", key, error, extra={"action": "upload"})
            return
        await remove_now(self._database, self._artifacts, key)

    async def _commit(
        self,
        upload: OpenUpload,
        key: PurePosixPath,
        row: FileRow | UploadPartRow,
        entry: AuditRow | None,
        also: Callable[[AsyncSession], Awaitable[None]] | None,
    ) -> None:
        async with self._counting:
            if upload.quota_bytes is not None:
                await self._count_elsewhere(upload.project)
                self._check(upload.project, 0, upload.quota_bytes)
            await asyncio.to_thread(upload.incoming.commit, key)
            async with self._database.write() as session:
                await complete_upload(session, str(key))
                session.add_all([row] if entry is None else [row, entry])
                if also is not None:
                    await also(session)
            self._open.discard(upload)
            self._add_elsewhere(upload.project, upload.num_bytes)

    async def count_stored(self, project: str) -> int:
        """The project's files, checkpoints and unfinished uploads, as counted at most `FRESH_SECONDS` ago."""
        counted_at, _ = self._elsewhere.get(project, (float("-inf"), 0))
        if time.monotonic() - counted_at >= FRESH_SECONDS:
            async with self._counting:
                await self._count_elsewhere(project)
        return self._elsewhere[project][1] + self._open_bytes(project)

    async def _require_quota(
        self, project: str, num_bytes: int, quota_bytes: int | None, *, max_age_seconds: float
    ) -> None:
        if quota_bytes is None:
            return
        counted_at, elsewhere = self._elsewhere.get(project, (0.0, 0))
        is_fresh = time.monotonic() - counted_at < max_age_seconds
        if is_fresh and elsewhere + self._open_bytes(project) + num_bytes <= quota_bytes:
            return
        async with self._counting:
            await self._count_elsewhere(project)
            self._check(project, num_bytes, quota_bytes)

    async def _count_elsewhere(self, project: str) -> None:
        """Count the project's files and checkpoints, and the unfinished uploads of other processes."""
        async with self._database.read() as session:
            stored = (await stored_bytes(session, [project]))[project]
        own = {upload.incoming.path for upload in self._open}
        others = await asyncio.to_thread(self._artifacts.incoming_bytes, project, own)
        self._elsewhere[project] = (time.monotonic(), stored + others)

    def _add_elsewhere(self, project: str, num_bytes: int) -> None:
        if project in self._elsewhere:
            counted_at, elsewhere = self._elsewhere[project]
            self._elsewhere[project] = (counted_at, elsewhere + num_bytes)

    def _open_bytes(self, project: str) -> int:
        return sum(upload.num_bytes for upload in self._open if upload.project == project)

    def _check(self, project: str, num_bytes: int, quota_bytes: int) -> None:
        elsewhere, arrived = self._elsewhere[project][1], self._open_bytes(project)
        if elsewhere + arrived + num_bytes > quota_bytes:
            raise QuotaExceeded(
                f"The file exceeds the quota of project {project!r}: {elsewhere} of {quota_bytes} bytes "
                f"(max_stored_bytes, by default ZETA_PROJECT_QUOTA_BYTES) are in use, and unfinished uploads take "
                f"{arrived} more. Delete files and jobs that are no longer needed.",
                param="file",
            )
