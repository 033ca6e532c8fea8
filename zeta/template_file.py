"""Reading a chat template from a local file, for the CLI and the Trainer. The service itself only takes its text."""

from __future__ import annotations

import os
from typing import Any

from zeta.local_paths import expanded
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec.job_spec import is_template

_SUFFIXES = (".jinja", ".jinja2", ".j2")


def template_text(chat_template: Any) -> Any:
    """The text of the template in a file, if ``chat_template`` is a path; otherwise, it is returned unchanged."""
    if not isinstance(chat_template, str | os.PathLike) or is_template(os.fspath(chat_template)):
        return chat_template
    path = expanded(chat_template)
    if not (isinstance(chat_template, os.PathLike) or path.suffix in _SUFFIXES or path.is_file()):
        return chat_template
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidSpec(
            f"chat_template is {str(path)!r}, which cannot be read: {reason}; name a file with a Jinja template.",
            param="chat_template",
        ) from error
