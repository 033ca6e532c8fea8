"""Detects control characters, which are not allowed in user text because they can affect a reader's terminal.

These are the C0 and C1 controls, which start escape sequences, and the characters that override text direction.
Joiners, combining marks and all kinds of spaces are ordinary text.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

_DIRECTIONS = r"\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates (Unicode TR 9)
_UNSTORABLE = r"\ud800-\udfff"  # lone surrogates, which databases reject, as they do NUL
_NOT_IN_TEXT = rf"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_DIRECTIONS}"
_NOT_IN_LINE = rf"\x00-\x1f\x7f-\x9f\u2028\u2029{_DIRECTIONS}"
_IN_TEXT = re.compile(rf"[{_NOT_IN_TEXT}{_UNSTORABLE}]|\r(?!\n)")
_IN_LINE = re.compile(rf"[{_NOT_IN_LINE}{_UNSTORABLE}]")

# The allowed text for JSON schemas, as regular expressions for every engine. Lone surrogates are not valid Unicode, so
# most engines can't name them.
TEXT_PATTERN = rf"^([^{_NOT_IN_TEXT}\r]|\r\n)*$"
LINE_PATTERN = rf"^[^{_NOT_IN_LINE}]*$"


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


ShortLine = Annotated[
    str, Field(min_length=1, max_length=100, json_schema_extra={"pattern": LINE_PATTERN}), AfterValidator(in_one_line)
]
Line = Annotated[
    str, Field(min_length=1, max_length=200, json_schema_extra={"pattern": LINE_PATTERN}), AfterValidator(in_one_line)
]


def is_template(chat_template: str) -> bool:
    """Whether a ``chat_template`` is the text of a template, rather than the name of one."""
    return "{" in chat_template
