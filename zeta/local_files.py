"""Files on this machine, as users name them: paths that begin with ``~``, and chat templates in files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from zeta_core.contract.errors import InvalidRequest, InvalidSpec
from zeta_core.contract.printable import printable
from zeta_core.contract.text import is_template

_TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a leading ``~`` or ``~user`` replaced by the home directory.

    If there is no such user, an existing file with the literal name is used. Raises `InvalidRequest` if there is
    neither.
    """
    literal = Path(path)
    try:
        return literal.expanduser()
    except RuntimeError as error:
        if exists(literal):
            return literal
        raise InvalidRequest(
            f"{shown_path(literal)} names the home directory of a user that does not exist here; write ./ before a "
            "name that begins with ~.",
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


def template_text(chat_template: Any) -> Any:
    """The text of the template in a file, if ``chat_template`` is a path; otherwise, it is returned unchanged."""
    if not isinstance(chat_template, str | os.PathLike) or is_template(os.fspath(chat_template)):
        return chat_template
    path = expanded(chat_template)
    if not (isinstance(chat_template, os.PathLike) or path.suffix in _TEMPLATE_SUFFIXES or path.is_file()):
        return chat_template
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidSpec(
            f"chat_template is {str(path)!r}, which cannot be read: {reason}; name a file with a Jinja template.",
            param="chat_template",
        ) from error
