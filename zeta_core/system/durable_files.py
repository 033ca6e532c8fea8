"""Writing files that survive a crash of the process and a power failure.

Guarantees: a reader sees the old file or the complete new one, never a part of it. After a function whose name ends in
"durably", the change is on the disk. This needs a POSIX file system: a rename is atomic, and fsync of a directory
flushes its entries.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

PART_SUFFIX = ".part"  # of a file or directory that is not complete yet


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
    try:
        flush(target.parent)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a directory
            raise


def write_durably(target: Path, content: bytes, *, part: Path | None = None) -> None:
    """Create or replace a file, durably. Raises `OSError`.

    Two processes that may write the same file at the same time need different paths for ``part``.
    """
    part = part or part_path(target)
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())  # through this descriptor, which also receives the errors of its own writes
    rename_durably(part, target)


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
