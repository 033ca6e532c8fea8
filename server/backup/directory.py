"""The folder of a backup: ``backup.json``, and the content of all files in ``objects/``, named by their SHA-256.

Guarantees: ``backup.json`` is written last, by one rename, and objects are removed only after that, so a backup that is
interrupted leaves the earlier one usable. An object appears only with the content that its name states. Equal files are
stored once, and later backups into the same folder don't copy them again. Only the owner of the folder can read it,
because it contains the secrets of the database. Nothing in the folder can name a file outside of it or of the
artifact store; objects that are links or devices are damaged.

All functions block and raise `OSError`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Collection, Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from zeta_core.contract.errors import Conflict, InvalidRequest
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.system.durable_files import flush, rename_durably, write_durably

BACKUP_FILE, OBJECTS, LOCK = "backup.json", "objects", "lock"
DATABASE_KEY = "database"
FOLDERS = ("files", "uploads", "jobs")  # of the artifact store
_CHUNK_BYTES = 4 * 2**20


def _job_id(value: str) -> str:
    if not is_id(value, "job"):
        raise ValueError("it is not a job id")
    return value


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SavedFile(BaseModel):
    """A file of the artifact store, or the database (whose key is ``database``)."""

    model_config = ConfigDict(frozen=True)

    key: str
    bytes: int
    sha256: Sha256

    @field_validator("key")
    @classmethod
    def _is_inside(cls, value: str) -> str:
        parts = value.split("/")
        is_inside = parts[0] in FOLDERS and not {"", ".", ".."} & set(parts) and value.isprintable()
        if value != DATABASE_KEY and not is_inside:
            raise ValueError("it is not a key of the artifact store")
        return value


class SavedCheckpoint(BaseModel):
    """A checkpoint: the object that is its manifest, which lists its files."""

    model_config = ConfigDict(frozen=True)

    job: Annotated[str, AfterValidator(_job_id)]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    manifest_sha256: Sha256


class Backup(BaseModel):
    """``backup.json``. ``problems`` are the keys of files that the database names and that could not be read."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    version: str  # of the program
    service: str | None  # the id of the service
    created_at: datetime
    database: SavedFile  # a SQLite file, also for a service on PostgreSQL
    files: list[SavedFile]
    checkpoints: list[SavedCheckpoint]
    jobs: list[Annotated[str, AfterValidator(_job_id)]]  # those that have files
    problems: list[str] = []


class WrongContent(Exception):
    """The content that was read does not have the expected SHA-256."""


class BackupDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._objects = path / OBJECTS

    @contextmanager
    def locked(self) -> Generator[None]:
        """Create the folder, and keep others from writing to it. Raises `Conflict` if it can't be used."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = {entry.name for entry in self.path.iterdir()} - {BACKUP_FILE, f"{BACKUP_FILE}.part", OBJECTS, LOCK}
        if foreign:
            raise Conflict(
                f"{self.path} contains {min(foreign)!r}, so it is not a backup; choose an empty or new folder, "
                "or that of an earlier backup.",
                code="not_a_backup",
            )
        self.path.chmod(0o700)
        with (self.path / LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    f"Another process is writing to {self.path}; wait for it.", code="backup_busy"
                ) from error
            self._objects.mkdir(exist_ok=True)
            yield

    def read(self) -> Backup:
        """The finished backup in this folder. Raises `InvalidRequest` if there is none."""
        file = self.path / BACKUP_FILE
        try:
            return Backup.model_validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InvalidRequest(
                f"{self.path} is not a finished backup: it has no {BACKUP_FILE}; create one with `zeta backup`.",
                code="not_a_backup",
            ) from error
        except ValidationError as error:
            fault = error.errors()[0]
            raise InvalidRequest(
                f"{file} cannot be read ({'.'.join(map(str, fault['loc']))}: {fault['msg']}); it is damaged, or from "
                "a newer version of zeta-train.",
                code="not_a_backup",
            ) from error

    def finish(self, backup: Backup, needed: Collection[str]) -> None:
        """Replace ``backup.json``, then remove all objects except ``needed``."""
        write_durably(self.path / BACKUP_FILE, f"{backup.model_dump_json(indent=1)}\n".encode())
        for path in self._objects.glob("*/*"):
            if path.name not in needed:
                path.unlink()

    def has(self, sha256: str, num_bytes: int) -> bool:
        """Whether an object is here, with its size; its content is verified when it is restored."""
        try:
            return self.object(sha256).stat().st_size == num_bytes
        except FileNotFoundError:
            return False

    def object(self, sha256: str) -> Path:
        return self._objects / sha256[:2] / sha256

    def add(self, content: BinaryIO, sha256: str | None = None) -> tuple[str, int]:
        """Store the rest of an open file; returns its SHA-256 and size. `WrongContent` for another ``sha256``."""
        part = self._objects / ".part"
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with part.open("wb") as written:
                while chunk := content.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    num_bytes += written.write(chunk)
            actual = digest.hexdigest()
            if sha256 not in (None, actual):
                raise WrongContent(f"the content has the SHA-256 {actual} instead of {sha256}")
            flush(part)
            target = self.object(actual)
            target.parent.mkdir(exist_ok=True)
            rename_durably(part, target)
        finally:
            part.unlink(missing_ok=True)
        return actual, num_bytes

    def copy(self, sha256: str, target: Path) -> None:
        """Copy an object to a new file and verify it. Raises `WrongContent`, also if it is missing or not a file."""
        digest = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open(sha256) as content, target.open("wb") as written:
                while chunk := content.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    written.write(chunk)
        except FileNotFoundError as error:
            raise WrongContent(f"{self.object(sha256)} is missing") from error
        if digest.hexdigest() != sha256:
            target.unlink()
            raise WrongContent(f"{self.object(sha256)} is damaged")
        flush(target)

    def _open(self, sha256: str) -> BinaryIO:
        path = self.object(sha256)
        if not stat.S_ISREG(path.lstat().st_mode):  # reading a device or a pipe may never end
            raise WrongContent(f"{path} is not a file")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
