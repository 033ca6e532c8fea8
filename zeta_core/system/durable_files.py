"""Writing files that survive a crash of the process and a power failure.

Guarantees: a reader sees the old file or the complete new one, never a part of it. After a function whose name ends in
"durably", the change is on the disk. This needs a POSIX file system: a rename is atomic, and fsync of a directory
flushes its entries.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

PART_SUFFIX = ".part"  # of a file or directory that is not complete yet
# Linking fails between file systems, on some network file systems, and beyond a file system's own limit.
NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES})


def part_path(target: Path) -> Path:
    """The path next to ``target`` where its only writer prepares new content."""
    return target.with_name(target.name + PART_SUFFIX)


def flush(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a flushed file or directory, durably. Raises `OSError`.

    A file replaces an existing one; a directory replaces only an empty one.
    """
    source.replace(target)
    _flush_entries(target.parent)


def write_durably(target: Path, content: bytes, *, part: Path | None = None) -> None:
    """Create or replace a file, durably. Raises `OSError`.

    Two processes that may write the same file at the same time need different paths for ``part``.
    """
    part = part or part_path(target)
    _write(part, content)
    rename_durably(part, target)


def create_durably(target: Path, content: bytes) -> None:
    """Create a file unless it exists, durably. If several processes try it at the same time, exactly one succeeds.

    Raises `FileExistsError`, and `OSError`. On a file system without hard links, a reader may see the new file empty
    for a moment.
    """
    part = unique_part_path(target)
    try:
        _write(part, content)
        try:
            os.link(part, target)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            _write(target, content, mode="xb")
    finally:
        part.unlink(missing_ok=True)
    _flush_entries(target.parent)


def unique_part_path(target: Path) -> Path:
    """A new path next to ``target``, for a file that several processes, also on several hosts, may write."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def write_atomically(target: Path, content: bytes) -> None:
    """Create or replace a file atomically; a power failure may lose the new content. Raises `OSError`."""
    part = part_path(target)
    part.write_bytes(content)
    part.replace(target)


def write_private_durably(target: Path, content: str) -> None:
    """Create or replace a file that only this user can read, durably. Raises `OSError`."""
    with private_part_file(target, content) as part:
        rename_durably(part, target)


@contextmanager
def private_part_file(target: Path, content: str) -> Generator[Path]:
    """A flushed file next to ``target`` with this content and mode 0600, removed on exit if it is still there."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600 from the start
    part = Path(name)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def _write(path: Path, content: bytes, *, mode: Literal["wb", "xb"] = "wb") -> None:
    with path.open(mode) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())  # through this descriptor, which also receives the errors of its own writes


def _flush_entries(directory: Path) -> None:
    try:
        flush(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a directory
            raise
