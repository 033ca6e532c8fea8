"""The artifact store: a folder that server and workers share, laid out by `contract.layout`.

Guarantees: an upload appears under its key by one rename, after its bytes were flushed to the disk, or not at all; a
temporary file is locked while it is written, so that cleaning up after a crash never takes one that is in use. Every
key is built from ids, names and manifest paths that were checked here: nothing a client sends can leave the folder.
Not guaranteed: what happens when somebody else changes the folder's files.

All functions block; call them in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydantic import ValidationError

from zeta_core.contract.checkpoint import NAME_PATTERN, Manifest
from zeta_core.contract.errors import InvalidSettings, Unavailable
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.layout import MANIFEST_NAME, checkpoint_key, file_key, job_key, log_key

logger = logging.getLogger(__name__)

INCOMING = "incoming"  # uploads under way, on the same file system as what they become
KEEP_FREE_BYTES = 256 * 2**20  # an upload that would leave less than this is refused


@dataclass(frozen=True)
class StoredCheckpoint:
    """A whole checkpoint: its manifest, the manifest's own bytes, and its directory."""

    manifest: Manifest
    manifest_bytes: bytes
    directory: Path


class Incoming:
    """An upload under way: `write` its bytes, then `keep` it under a key or `drop` it. Hashes as it writes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, pieces: Iterable[memoryview]) -> None:
        """Append ``pieces``. Raises `Unavailable` when the disk is full, or refuses."""
        try:
            for piece in pieces:
                self._sha256.update(piece)
                self.num_bytes += len(piece)
                remaining = piece
                while remaining:
                    remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise _refused(error) from error

    @property
    def sha256(self) -> str:
        """The hex digest of what was written so far."""
        return self._sha256.hexdigest()

    def keep(self, target: Path) -> None:
        """Give the file its place: flushed to the disk, then renamed. Raises `Unavailable`."""
        try:
            os.fsync(self._file.fileno())
            self._path.replace(target)
            sync_directory(target.parent)
        except OSError as error:
            raise _refused(error) from error
        self._file.close()

    def drop(self) -> None:
        """Remove the file unless it was kept; harmless when repeated."""
        self._path.unlink(missing_ok=True)
        self._file.close()


class ArtifactStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folders and remove what a killed server's uploads left. Raises `InvalidSettings`."""
        try:
            for name in (INCOMING, "files", "jobs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSettings(
                f"ZETA_ARTIFACTS_URL is {str(self.root)!r}, which cannot be written: {error.strerror}.",
                param="ZETA_ARTIFACTS_URL",
            ) from error
        for left in (self.root / INCOMING).iterdir():
            with left.open("rb") as file:
                if _lock(file):
                    left.unlink(missing_ok=True)
                    logger.info("Removed %s, which an upload that never ended had left.", left)

    def free_bytes(self) -> int:
        """The bytes that uploads may still take."""
        return max(0, shutil.disk_usage(self.root).free - KEEP_FREE_BYTES)

    def open_incoming(self) -> Incoming:
        """A new, locked temporary file on the store's own file system. Raises `Unavailable`."""
        try:
            handle, name = tempfile.mkstemp(dir=self.root / INCOMING, prefix="upload-")
        except OSError as error:
            raise _refused(error) from error
        file = os.fdopen(handle, "wb", buffering=0)
        assert _lock(file), f"the new temporary file {name} is locked by somebody else"
        return Incoming(file, Path(name))

    def file_path(self, file_id: str) -> Path:
        """Where the bytes of an uploaded file lie."""
        assert is_id(file_id, "file"), f"{file_id!r} is no file id"
        return self._path(file_key(file_id))

    def log_path(self, job_id: str, attempt: int) -> Path:
        assert is_id(job_id, "job"), f"{job_id!r} is no job id"
        return self._path(log_key(job_id, attempt))

    def remove_job(self, job_id: str) -> None:
        """Remove everything that a job stored; harmless when repeated. Raises `OSError`."""
        assert is_id(job_id, "job"), f"{job_id!r} is no job id"
        with suppress(FileNotFoundError):
            shutil.rmtree(self._path(job_key(job_id)))

    def checkpoint(self, job_id: str, name: str) -> StoredCheckpoint | None:
        """A job's checkpoint, or ``None`` where there is none. Raises `Unavailable` for a damaged manifest."""
        assert is_id(job_id, "job"), f"{job_id!r} is no job id"
        assert NAME_PATTERN.match(name), f"{name!r} is no checkpoint name"
        directory = self._path(checkpoint_key(job_id, name))
        try:
            content = (directory / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            return None
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise Unavailable(f"The manifest of checkpoint {name!r} of {job_id} is damaged.") from error
        return StoredCheckpoint(manifest, content, directory)

    def _path(self, key: PurePosixPath) -> Path:
        return self.root.joinpath(*key.parts)


def _refused(error: OSError) -> Unavailable:
    code = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "storage_unavailable"
    return Unavailable(f"The upload could not be stored: {error.strerror}.", code=code)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
