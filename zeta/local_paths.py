"""Paths on this machine as users write them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.printable import printable


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced by the home directory, unless a file has that literal name.

    Raises `InvalidRequest` if there is no such user.
    """
    given = Path(path)
    try:
        return given.expanduser()
    except RuntimeError as error:
        if exists(given):
            return given
        raise InvalidRequest(
            f"{shown_path(given)} names the home directory of a user that does not exist here; write ./ before a name "
            "that begins with ~.",
            code="no_such_file",
        ) from error


def exists(path: Path) -> bool:
    """Whether the path exists. Text that is not a valid path does not."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
            return False
        raise InvalidRequest(f"{shown_path(path)} cannot be read: {error.strerror}.", code="unreadable_file") from error


def shown_path(path: Path) -> str:
    """A path, safe to show in a message."""
    return printable(str(path))
