"""The artifact store: a folder shared by the server and the workers, with the layout of `contract.wire.run_directory`.

Guarantees: an upload is flushed to disk and then appears under its key by one rename, or not at all. A temporary file
is locked while it is written, so cleaning up after a crash never removes one that is in use. Uploads always leave
`min_free_bytes` of the disk free for the database and the workers. Keys are built only from validated ids, names and
manifest paths, so no client input can refer to a file outside the folder. There is no protection against other programs
that change files in the folder.

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
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydantic import ValidationError

from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidSettings, Unavailable
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN, Manifest
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key, file_key, job_key, log_key, upload_key
from zeta_core.system.durable_files import rename_durably

logger = logging.getLogger(__name__)

INCOMING = "incoming"  # unfinished uploads, on the same file system as the stored files
_YOUNG_SECONDS = 60.0  # a temporary file younger than this may not be locked yet


@dataclass(frozen=True)
class StoredCheckpoint:
    """A complete checkpoint: its parsed manifest, the manifest's bytes, and its directory."""

    manifest: Manifest
    manifest_bytes: bytes
    directory: Path


class IncomingFile:
    """An unfinished upload: `write` its bytes, then `commit` or `discard` it. Hashes while writing."""

    def __init__(self, file: BinaryIO, path: Path, min_free_bytes: int) -> None:
        self.path = path
        self._file = file
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

    def flush(self) -> None:
        """Flush the bytes to the disk, which takes long for a large file. Raises `Unavailable`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _storage_error(error) from error

    def commit(self, target: Path) -> None:
        """Rename the flushed file to ``target``. Raises `Unavailable`."""
        try:
            rename_durably(self.path, target)
        except OSError as error:
            raise _storage_error(error) from error
        self._file.close()

    def discard(self) -> None:
        """Remove the file unless it was committed; harmless when repeated."""
        self.path.unlink(missing_ok=True)
        self._file.close()


class ArtifactFolder:
    """Locates files in the store, and opens and removes its unfinished uploads."""

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self.root = root
        self._min_free_bytes = min_free_bytes

    def prepare(self) -> None:
        """Create the folders and remove unfinished uploads of a killed server. Raises `InvalidSettings`."""
        try:
            for name in (INCOMING, "files", "jobs", "uploads"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSettings(
                f"ZETA_ARTIFACTS_URL is {str(self.root)!r}, which cannot be written ({error.strerror}); make it "
                "writable, or use another folder.",
                param="ZETA_ARTIFACTS_URL",
            ) from error
        for path in (self.root / INCOMING).iterdir():
            _remove_if_abandoned(path)

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
        return IncomingFile(file, Path(name), self._min_free_bytes)

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

    def file_path(self, file_id: str) -> Path:
        """The path of an uploaded file's bytes."""
        assert is_id(file_id, "file"), f"{file_id!r} is not a file id"
        return self._path(file_key(file_id))

    def part_path(self, upload_id: str, part_id: str) -> Path:
        """The path of the bytes of an upload's part, whose folder exists from now on."""
        assert is_id(part_id, "part"), f"{part_id!r} is not a part's id"
        folder = self._upload_folder(upload_id)
        folder.mkdir(exist_ok=True)
        return folder / part_id

    def remove_parts(self, upload_id: str) -> None:
        """Remove the parts of an upload; harmless when repeated. Raises `OSError`."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._upload_folder(upload_id))

    def _upload_folder(self, upload_id: str) -> Path:
        assert is_id(upload_id, "upload"), f"{upload_id!r} is not an upload's id"
        return self._path(upload_key(upload_id))

    def log_path(self, job_id: str, attempt: int, node_rank: int = 0) -> Path:
        assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
        return self._path(log_key(job_id, attempt, node_rank))

    def remove_job(self, job_id: str) -> None:
        """Remove everything that a job stored; harmless when repeated. Raises `OSError`."""
        assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
        with suppress(FileNotFoundError):
            shutil.rmtree(self._path(job_key(job_id)))

    def checkpoint(self, job_id: str, name: str) -> StoredCheckpoint | None:
        """A job's checkpoint, or ``None`` if it doesn't exist. Raises `Unavailable` for a damaged manifest."""
        assert is_id(job_id, "job"), f"{job_id!r} is not a job id"
        assert NAME_PATTERN.match(name), f"{name!r} is not a checkpoint name"
        directory = self._path(checkpoint_key(job_id, name))
        try:
            content = (directory / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            return None
        try:
            manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            raise Unavailable(
                f"The manifest of checkpoint {name!r} of {job_id} is damaged; use another one."
            ) from error
        return StoredCheckpoint(manifest, content, directory)

    def _path(self, key: PurePosixPath) -> Path:
        return self.root.joinpath(*key.parts)


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
    return Unavailable(f"The upload could not be stored: {error.strerror}.", code=code)


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
