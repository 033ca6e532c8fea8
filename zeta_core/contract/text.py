"""Detects control characters, which are not allowed in user text because they can affect a reader's terminal.

These are the C0 and C1 controls, which start escape sequences, and the characters that override text direction.
Joiners, combining marks and all kinds of spaces are ordinary text.
"""

from __future__ import annotations

import re

_DIRECTIONS = "\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates (Unicode TR 9)
_UNSTORABLE = "\ud800-\udfff"  # lone surrogates, which databases reject, as they do NUL
_IN_TEXT = re.compile(rf"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_DIRECTIONS}{_UNSTORABLE}]|\r(?!\n)")
_IN_LINE = re.compile(rf"[\x00-\x1f\x7f-\x9f\u2028\u2029{_DIRECTIONS}{_UNSTORABLE}]")


def control_character(text: str, *, in_line: bool = False) -> str | None:
    """The first control character of ``text`` as ``U+001B``, or ``None``.

    Text of several lines may contain tabs and line ends; with ``in_line`` it may not.
    """
    match = (_IN_LINE if in_line else _IN_TEXT).search(text)
    return None if match is None else f"U+{ord(match.group()):04X}"


def in_one_line(value: str) -> str:
    """A pydantic validator. Raises `ValueError` if ``value`` contains a control character or a line break."""
    character = control_character(value, in_line=True)
    if character is not None:
        raise ValueError(f"it contains the control character {character}; remove it")
    return value


def is_template(chat_template: str) -> bool:
    """Whether a ``chat_template`` is the text of a template, rather than the name of one."""
    return "{" in chat_template
