"""Makes untrusted text (names, messages, logs) safe to print, with an allow-list of graphic characters.

Control characters and escape sequences can affect a terminal, and bidirectional overrides change the displayed order of
text. Such characters are replaced by visible escapes (``\\x1b``, ``\\u202e``).
"""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # parts of words in several scripts, and of emoji
_UNDECODABLE = range(0xDC80, 0xDD00)  # a byte of a file name that is not UTF-8, as Python reads it (PEP 383)


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with all characters escaped except graphic ones, spaces, joiners and those in ``keep``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if is_printable(character) or character in keep else _escaped(character) for character in text
    )


def is_printable(character: str) -> bool:
    """Whether a terminal only displays this character."""
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    code = ord(character)
    if code in _UNDECODABLE:
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
