"""The artifact store as a folder: workers write the checkpoints of jobs, and the server reads them.

Guarantees: a checkpoint appears under its name by one rename, with every file that its manifest lists at its size (and,
if files had to be copied, with its SHA-256). A checkpoint that is being replaced is complete except for the instant
between two renames. On one file system, files are hard-linked, not copied. Nothing is written outside the root.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from pydantic import ValidationError

from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.checkpoint import Manifest, ManifestFile, checkpoint_step, surplus_checkpoints
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key, job_key, tensorboard_key
from zeta_core.system.durable_files import rename_durably, write_durably

COPY_BYTES = 4 * 2**20
# Linking fails between file systems, on some network file systems, and beyond a file system's own limit.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES})


class BrokenCheckpoint(ZetaError):
    """A checkpoint directory is missing or does not match its manifest."""

    code = "broken_checkpoint"


class TransferCancelled(Exception):
    """The transfer was cancelled."""


def _never_cancelled() -> None:
    """A cancellation check that never cancels."""


class ArtifactStore:
    """`open_job` creates a job's folder once; if it is missing later, the server has deleted the job."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open_job(self, job_id: str) -> None:
        """Create the job's folder; call it only for an attempt that the server has just granted. Raises `OSError`."""
        (self.root / job_key(job_id)).mkdir(parents=True, exist_ok=True)

    def checkpoint(self, job_id: str, name: str) -> Path:
        return self.root / checkpoint_key(job_id, name)

    def put_checkpoint(self, job_id: str, name: str, source: Path) -> None:
        """Store the checkpoint directory ``source`` under ``name``; an equal one is left unchanged.

        Raises `BrokenCheckpoint`, also for a deleted job, or `OSError`.
        """
        if self.is_deleted(job_id):
            raise BrokenCheckpoint(f"{job_id} was deleted; its checkpoints are no longer stored.")
        target = self.checkpoint(job_id, name)
        target.parent.mkdir(exist_ok=True)
        _transfer(source, target, _never_cancelled)

    def fetch_checkpoint(
        self, job_id: str, name: str, target: Path, check_cancelled: Callable[[], None] = _never_cancelled
    ) -> None:
        """Copy a stored checkpoint to ``target``, by links where possible.

        Raises `TransferCancelled` if ``check_cancelled``, which is called before every change, does.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        _transfer(self.checkpoint(job_id, name), target, check_cancelled)

    def is_stored(self, job_id: str, name: str, local: Path) -> bool:
        """Whether the store has exactly the checkpoint that is in ``local``."""
        manifest = _manifest_bytes(local)
        return manifest is not None and manifest == _manifest_bytes(self.checkpoint(job_id, name))

    def is_deleted(self, job_id: str) -> bool:
        """Whether the server has removed the folder of a job; always false while the store is not mounted."""
        job = self.root / job_key(job_id)
        return job.parent.is_dir() and not job.exists()

    def put_curves(self, job_id: str, source: Path) -> None:
        """Copy TensorBoard's files; those of each attempt have names of their own. Raises `OSError`."""
        shutil.copytree(source, self.root / tensorboard_key(job_id), dirs_exist_ok=True)

    def remove_newer_checkpoints(
        self, job_id: str, name: str | None, check_cancelled: Callable[[], None] = _never_cancelled
    ) -> None:
        """Remove each ``step-N`` and ``final`` of a job that is newer than its checkpoint ``name``, if given.

        Raises `BrokenCheckpoint` if ``name`` has no manifest, and `TransferCancelled` as `fetch_checkpoint` does.
        """
        last = -1 if name is None else self._manifest(job_id, name).step
        folder = self.checkpoint(job_id, "final").parent
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            step = checkpoint_step(entry.name)
            if entry.name == "final" and name != "final":
                step = self._manifest(job_id, "final").step
            check_cancelled()
            if step is not None and step > last:
                _remove(entry)

    def _manifest(self, job_id: str, name: str) -> Manifest:
        directory = self.checkpoint(job_id, name)
        content = _manifest_bytes(directory)
        if content is None:
            raise BrokenCheckpoint(f"{name} is not in the store, or has no {MANIFEST_NAME}.")
        return _parsed(content, directory)

    def prune(
        self, job_id: str, save_total_limit: int, *, published_step: int, keep: Collection[str] = frozenset()
    ) -> None:
        """Remove all but the newest ``save_total_limit`` checkpoints ``step-N``, except those in ``keep``.

        Checkpoints above ``published_step`` are neither counted nor removed: the server resumes from the earlier ones
        until it knows them.
        """
        folder = self.checkpoint(job_id, "final").parent
        entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        published = [name for name in entries if (step := checkpoint_step(name)) is not None and step <= published_step]
        for name in surplus_checkpoints(published, save_total_limit):
            if name not in keep:
                _remove(folder / name)


def _transfer(source: Path, target: Path, check_cancelled: Callable[[], None]) -> None:
    """Make ``target`` a copy of ``source``, by links where possible.

    Access to a store may hang, so ``check_cancelled`` is called after each one.
    """
    manifest = _manifest_bytes(source)
    check_cancelled()
    if manifest is None:
        raise BrokenCheckpoint(f"{source.name} is missing or has no {MANIFEST_NAME}.")
    if manifest == _manifest_bytes(target):
        return
    files = _parsed(manifest, source).files
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    try:
        partial.mkdir()
        try:
            for file in files:
                _transfer_file(source, partial, file, check_cancelled)
        except BrokenCheckpoint:
            if _manifest_bytes(source) == manifest:
                raise
        if _manifest_bytes(source) != manifest:
            _remove(partial)
            return _transfer(source, target, check_cancelled)  # the run has replaced `best` in the meantime
        write_durably(partial / MANIFEST_NAME, manifest)
    except OSError:
        check_cancelled()
        _remove(partial)  # a partial checkpoint must not occupy the space that a full disk lacks
        raise
    check_cancelled()
    if target.exists():
        _remove(target)
    rename_durably(partial, target)


def _transfer_file(source: Path, partial: Path, file: ManifestFile, check_cancelled: Callable[[], None]) -> None:
    origin, copy = source / file.path, partial / file.path
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        size = origin.stat().st_size
        check_cancelled()
        if size != file.size:
            raise BrokenCheckpoint(
                f"{source.name}/{file.path} has {size} bytes instead of the {file.size} bytes in its manifest."
            )
        try:
            os.link(origin, copy)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            _copy(origin, copy, file, check_cancelled)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{source.name} lacks {file.path}, which its manifest lists.") from error


def _copy(origin: Path, copy: Path, file: ManifestFile, check_cancelled: Callable[[], None]) -> None:
    digest = hashlib.sha256()
    with origin.open("rb") as read, copy.open("wb") as written:
        while chunk := read.read(COPY_BYTES):
            check_cancelled()
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    if digest.hexdigest() != file.sha256:
        raise BrokenCheckpoint(f"{file.path} does not match the SHA-256 in its manifest and was not copied.")


def _manifest_bytes(directory: Path) -> bytes | None:
    try:
        return (directory / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parsed(manifest: bytes, directory: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(manifest)
    except ValidationError as error:
        raise BrokenCheckpoint(f"The manifest of {directory.name} cannot be read: {error}") from error


def _remove(directory: Path) -> None:
    """Remove a checkpoint so that an incomplete one never appears under its name."""
    if not directory.exists():
        return
    if directory.name.startswith("."):
        shutil.rmtree(directory)
        return
    doomed = directory.with_name(f".{directory.name}.doomed")
    if doomed.exists():
        shutil.rmtree(doomed)
    directory.rename(doomed)
    shutil.rmtree(doomed)
