"""Copying checkpoint directories on one machine, by hard links where possible.

Guarantees: a checkpoint appears under its name by one rename, with every file that its manifest lists at its size (and,
if files had to be copied, with its SHA-256). A checkpoint that is being replaced is complete except for the instant
between two renames.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.checkpoint import Manifest, ManifestFile
from zeta_core.contract.wire.run_directory import MANIFEST_NAME
from zeta_core.system.durable_files import NO_LINK, rename_durably, write_durably

COPY_BYTES = 4 * 2**20
_DOOMED = ".doomed"  # ends the name of a directory that is being removed
CancellationCheck = Callable[[], None]  # raises `TransferCancelled` to cancel


MAX_MANIFEST_BYTES = 16 << 20  # it has some 200 bytes for each file


class BrokenCheckpoint(ZetaError):
    """A checkpoint directory is missing or does not match its manifest."""

    code = "broken_checkpoint"


class TransferCancelled(Exception):
    """The transfer was cancelled."""


def never_cancelled() -> None:
    """A cancellation check that never cancels."""


def transfer(source: Path, target: Path, check_cancelled: CancellationCheck) -> None:
    """Make ``target`` a copy of ``source``, by links where possible.

    Access to a store may hang, so ``check_cancelled`` is called after each one.
    """
    manifest = local_manifest(source)
    check_cancelled()
    if manifest is None:
        raise BrokenCheckpoint(f"{source.name} is missing or has no {MANIFEST_NAME}.")
    if manifest == local_manifest(target):
        return
    files = parse_manifest(manifest, source.name).files
    partial = partial_path(target)
    remove_checkpoint(partial)
    try:
        partial.mkdir()
        try:
            for file in files:
                _transfer_file(source, partial, file, check_cancelled)
        except BrokenCheckpoint:
            if local_manifest(source) == manifest:
                raise
        if local_manifest(source) != manifest:
            remove_checkpoint(partial)
            return transfer(source, target, check_cancelled)  # the run has replaced `best` in the meantime
        write_durably(partial / MANIFEST_NAME, manifest)
        check_cancelled()
        replace_checkpoint(partial, target)
    except OSError as error:
        check_cancelled()
        if isinstance(error, FileNotFoundError) and _was_removed(partial):
            raise _removed(partial) from error
        remove_checkpoint(partial)  # a partial checkpoint must not occupy the space that a full disk lacks
        raise


def partial_path(target: Path) -> Path:
    """Where a checkpoint is prepared before it appears at ``target``."""
    return target.with_name(f".{target.name}.partial")


def replace_checkpoint(partial: Path, target: Path) -> None:
    """Make a prepared checkpoint appear at ``target``, in place of an earlier one. Raises `OSError`.

    If ``partial`` was removed, the earlier one remains, and `FileNotFoundError` is raised.
    """
    earlier = _set_aside(target) if target.exists() else None
    try:
        rename_durably(partial, target)
    except FileNotFoundError:
        if earlier is not None:
            rename_durably(earlier, target)
        raise
    if earlier is not None:
        shutil.rmtree(earlier)


def remove_checkpoint(directory: Path) -> None:
    """Remove a complete or partial checkpoint, at once for everyone who reads it or is still writing it."""
    if directory.exists():
        shutil.rmtree(directory if directory.name.endswith(_DOOMED) else _set_aside(directory))


def _set_aside(directory: Path) -> Path:
    """Rename a directory that is being removed, so that an incomplete checkpoint never appears under its name."""
    doomed = directory.with_name(f".{directory.name.removeprefix('.')}{_DOOMED}")
    if doomed.exists():
        shutil.rmtree(doomed)
    return directory.rename(doomed)


def local_manifest(directory: Path) -> bytes | None:
    """The manifest in a directory on this machine, which a run has written. Raises `BrokenCheckpoint`."""
    try:
        with (directory / MANIFEST_NAME).open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) > MAX_MANIFEST_BYTES:
        raise BrokenCheckpoint(f"{directory.name} has a {MANIFEST_NAME} of more than {MAX_MANIFEST_BYTES:,} bytes.")
    return content


def parse_manifest(content: bytes, name: str) -> Manifest:
    """The manifest of the checkpoint ``name``. Raises `BrokenCheckpoint`."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BrokenCheckpoint(f"The manifest of {name} cannot be read: {error}") from error


def _transfer_file(source: Path, partial: Path, file: ManifestFile, check_cancelled: CancellationCheck) -> None:
    origin, copy = source / file.path, partial / file.path
    try:
        for folder in reversed(PurePosixPath(file.path).parents[:-1]):
            (partial / folder).mkdir(exist_ok=True)  # not ``partial`` itself, which may have been removed
        size = origin.stat().st_size
        check_cancelled()
        if size != file.size:
            raise BrokenCheckpoint(
                f"{source.name}/{file.path} has {size} bytes instead of the {file.size} bytes in its manifest."
            )
        try:
            os.link(origin, copy)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            _copy(origin, copy, file, check_cancelled)
    except FileNotFoundError as error:
        if _was_removed(partial):
            raise _removed(partial) from error
        raise BrokenCheckpoint(f"{source.name} lacks {file.path}, which its manifest lists.") from error


def _was_removed(partial: Path) -> bool:
    """Whether someone has removed the directory; a store that is not mounted has no parent directory either."""
    return partial.parent.is_dir() and not partial.is_dir()


def _removed(partial: Path) -> BrokenCheckpoint:
    return BrokenCheckpoint(f"{partial.name} was removed before it was complete, because the job has ended.")


def _copy(origin: Path, copy: Path, file: ManifestFile, check_cancelled: CancellationCheck) -> None:
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
