"""The server's use of the artifact store: uploads, and reading what jobs have stored.

Guarantees: an upload appears under its key as a whole or not at all, after it was flushed to disk or to the bucket. A
temporary file is locked while it is written, so cleaning up after a crash never removes one that is in use. Uploads
always leave `min_free_bytes` of the disk free for the database and the workers. Keys are built only from validated ids,
names and manifest paths, so no client input can refer to anything else in the store.

All functions block; call them in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidSettings, Unavailable
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.wire.run_directory import file_key, log_key, upload_key
from zeta_core.system.artifact_store import (
    ArtifactStore,
    BrokenCheckpoint,
    StoredCheckpoint,
    brief_reason,
    storage_errors,
    storage_unavailable,
)

logger = logging.getLogger(__name__)

INCOMING = "incoming"  # unfinished uploads, on the same file system as the files of a folder
BUFFER_BYTES = 1 << 20
_YOUNG_SECONDS = 60.0  # a temporary file younger than this may not be locked yet


class IncomingFile:
    """An unfinished upload: `write` its bytes, then `upload` and `commit` it, or `discard` it. Hashes while writing."""

    def __init__(self, file: BinaryIO, path: Path, store: ArtifactStore, min_free_bytes: int) -> None:
        self.path = path
        self._file = file
        self._store = store
        self._min_free_bytes = min_free_bytes
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Append ``pieces``. Raises `Unavailable` if they would use the disk's reserve, or if writing fails."""
        try:
            require_free(self.path.parent, sum(map(len, pieces)), self._min_free_bytes)
            for piece in pieces:
                self._sha256.update(piece)
                self.num_bytes += len(piece)
                remaining = piece
                while remaining:
                    remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise _storage_error(error) from error

    @property
    def sha256(self) -> str:
        """The hex digest of the bytes written so far."""
        return self._sha256.hexdigest()

    def upload(self, key: PurePosixPath) -> None:
        """Send the bytes to the store without making them visible; slow for large files. Raises `Unavailable`."""
        try:
            self._store.upload(self.path, key, self.sha256)
        except OSError as error:
            raise _storage_error(error) from error

    def commit(self, key: PurePosixPath) -> None:
        """Make the uploaded bytes visible under their key. Raises `Unavailable`."""
        try:
            self._store.commit(self.path, key)
        except OSError as error:
            raise _storage_error(error) from error
        self._file.close()

    def discard(self) -> None:
        """Remove the file unless it was committed; harmless when repeated."""
        self.path.unlink(missing_ok=True)
        self._file.close()


class Artifacts:
    """Reads and removes what is in the store, and opens unfinished uploads, which are files on this machine."""

    def __init__(self, store: ArtifactStore, *, min_free_bytes: int = 0) -> None:
        self.store = store
        self.root = store.root
        self._min_free_bytes = min_free_bytes

    def prepare(self) -> None:
        """Create the local folders, and clear them of a killed server's unfinished files. Raises `InvalidSettings`."""
        try:
            self.store.check_access()
            for name in (INCOMING, "files", "jobs", "uploads"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSettings(
                f"ZETA_ARTIFACTS_URL is {str(self.store)!r}, which cannot be used ({error.strerror}); make it "
                "available and writable, or use another one.",
                param="ZETA_ARTIFACTS_URL",
            ) from error
        for path in (self.root / INCOMING).iterdir():
            _remove_if_abandoned(path)

    def remove_abandoned_uploads(self) -> None:
        """Remove from the store what killed servers have left of uploads. An error is logged and not raised.

        Call it only after `claim_store`, because the store may belong to another service.
        """
        try:
            for name in ("files", "uploads"):
                self.store.remove_abandoned_uploads(PurePosixPath(name))
        except OSError as error:
            logger.warning("Unfinished uploads cannot be removed now: %s", error, extra={"action": "upload"})

    def require_free(self, num_bytes: int) -> None:
        """Raise `Unavailable` if an upload of this size would use the disk's reserve."""
        require_free(self.root, num_bytes, self._min_free_bytes)

    def open_incoming(self, project: str) -> IncomingFile:
        """A new, locked temporary file on the store's own file system. Raises `Unavailable`."""
        try:
            handle, name = tempfile.mkstemp(dir=self.root / INCOMING, prefix=_incoming_prefix(project))
        except OSError as error:
            raise _storage_error(error) from error
        file = os.fdopen(handle, "wb", buffering=0)
        assert _lock(file), f"the new temporary file {name} is locked by another process"
        return IncomingFile(file, Path(name), self.store, self._min_free_bytes)

    def incoming_bytes(self, project: str, excluded: Collection[Path]) -> int:
        """The size of the project's unfinished uploads except ``excluded``; removes those of a killed server."""
        num_bytes = 0
        for path in (self.root / INCOMING).glob(f"{_incoming_prefix(project)}*"):
            if path in excluded:
                continue
            try:
                status = path.stat()
                if time.time() - status.st_mtime < _YOUNG_SECONDS or not _remove_if_abandoned(path):
                    num_bytes += status.st_size
            except FileNotFoundError:
                continue  # it was finished or removed in the meantime
        return num_bytes

    @contextmanager
    def open_file(self, file_id: str) -> Generator[BinaryIO]:
        """The bytes of an uploaded file, buffered. Raises `Unavailable`, also while they are read."""
        try:
            with self._open(stored_file_key(file_id)) as file:
                yield file
        except FileNotFoundError as error:
            raise Unavailable(
                f"The content of {file_id} is missing in the artifact store; upload the file again.",
                code="storage_unavailable",
            ) from error

    def open_part(self, upload_id: str, part_id: str) -> AbstractContextManager[BinaryIO]:
        """The bytes of an upload's part, buffered.

        Raises `FileNotFoundError` if it was removed, and `Unavailable`, also while they are read.
        """
        return self._open(part_key(upload_id, part_id))

    def remove(self, key: PurePosixPath) -> None:
        """Remove a file; harmless when repeated. Raises `OSError`."""
        self.store.remove(key)

    def discard(self, key: PurePosixPath) -> bool:
        """Remove a file or folder that is no longer needed, if possible; returns whether it was removed."""
        try:
            self.store.remove(key)
        except OSError as error:
            logger.warning("%s cannot be removed now: %s", key, error, extra={"action": "removal"})
            return False
        return True

    def remove_job(self, job_id: str) -> None:
        """Remove everything that a job stored; harmless when repeated. Raises `OSError`."""
        assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
        self.store.remove_job(job_id)

    def remove_checkpoints(self, job_id: str, *, keep: Collection[str]) -> None:
        """Remove all checkpoints of an ended job except ``keep``, and what was stored of their unfinished successors.

        Harmless if repeated. Raises `OSError`.
        """
        assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
        for name in self.store.checkpoint_names(job_id):
            if name in keep:
                self.store.remove_unfinished(job_id, name)
            else:
                self.store.remove_checkpoint(job_id, name)

    def checkpoint(self, job_id: str, name: str) -> StoredCheckpoint | None:
        """A job's checkpoint, or ``None`` if it doesn't exist.

        Raises `Unavailable` for a damaged manifest, and if the store fails.
        """
        assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
        assert NAME_PATTERN.match(name), f"{name!r} is not a checkpoint name"
        try:
            return self.store.checkpoint(job_id, name)
        except BrokenCheckpoint as error:
            raise Unavailable(
                f"The manifest of checkpoint {name!r} of {job_id} is damaged; use another one."
            ) from error
        except OSError as error:
            raise storage_unavailable(error) from error

    @contextmanager
    def _open(self, key: PurePosixPath) -> Generator[BinaryIO]:
        with storage_errors(), io.BufferedReader(cast(io.RawIOBase, self.store.open(key)), BUFFER_BYTES) as file:
            yield file


def stored_file_key(file_id: str) -> PurePosixPath:
    """The key of an uploaded file's bytes."""
    assert is_id(file_id, "file"), f"{file_id!r} is not a file id"
    return file_key(file_id)


def parts_key(upload_id: str) -> PurePosixPath:
    """The key below which the parts of an upload are stored."""
    assert is_id(upload_id, "upload"), f"{upload_id!r} is not an upload's id"
    return upload_key(upload_id)


def part_key(upload_id: str, part_id: str) -> PurePosixPath:
    """The key of the bytes of an upload's part."""
    assert is_id(part_id, "part"), f"{part_id!r} is not a part's id"
    return parts_key(upload_id) / part_id


def attempt_log_key(job_id: str, attempt: int, node_rank: int = 0) -> PurePosixPath:
    """The key of the log of an attempt, or of one node of it."""
    assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
    return log_key(job_id, attempt, node_rank)


def _incoming_prefix(project: str) -> str:
    """The name prefix of a project's temporary files; hashed, because project names may contain any character."""
    return f"upload-{hashlib.sha256(project.encode()).hexdigest()[:16]}-"


def _remove_if_abandoned(path: Path) -> bool:
    """Remove a temporary file unless a running server holds it."""
    with path.open("rb") as file:
        if not _lock(file):
            return False
        path.unlink(missing_ok=True)
    logger.info("Removed %s, the rest of an interrupted upload.", path)
    return True


def require_free(folder: Path, num_bytes: int, min_free_bytes: int) -> None:
    """Raise `Unavailable` if writing ``num_bytes`` would leave less than ``min_free_bytes`` on the file system."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes - num_bytes < min_free_bytes:
        raise Unavailable(
            f"Not enough disk space: the upload needs {num_bytes} bytes and {free_bytes} are free, including a reserve "
            f"of {min_free_bytes} (ZETA_SERVER_MIN_FREE_BYTES). Free disk space and upload the file again.",
            code="disk_full",
        )


def disk_state(settings: ServerSettings) -> str:
    """``ok``, or the disk that has less free space than its reserve. Contains no path, because anyone may read it."""
    for name, folder in (("home", settings.home), ("artifact store", settings.artifacts)):
        try:
            free_bytes = shutil.disk_usage(folder).free
        except OSError as error:
            return f"the disk of the {name} cannot be reached: {error.strerror}"
        if free_bytes < settings.server_min_free_bytes:
            reserve = f"less than the reserve of {settings.server_min_free_bytes} (ZETA_SERVER_MIN_FREE_BYTES)"
            return f"the disk of the {name} has {free_bytes} bytes free, {reserve}; free space on it"
    return "ok"


def _storage_error(error: OSError) -> Unavailable:
    code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "storage_unavailable"
    logger.warning("An upload could not be stored: %s", error, extra={"action": "upload"})
    return Unavailable(f"The upload could not be stored: {brief_reason(error)}.", code=code)


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
