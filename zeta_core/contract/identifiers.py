"""Prefixed ids: sortable by time of creation, safe in paths and URLs, never guessable from one another."""

from __future__ import annotations

import re
import secrets
import time
from typing import Literal

IdPrefix = Literal["job", "file", "key", "run"]

ID_CHARACTERS = 24  # after the prefix, of the ids that are made now; the pattern leaves room for others
ID_PATTERN = re.compile(r"^(job|file|key|run)_[0-9a-z]{20,32}$")
_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
HUB_ID_PATTERN = re.compile(rf"{_HUB_NAME}(?:/{_HUB_NAME})?(?:@[A-Za-z0-9_][A-Za-z0-9_./-]*)?")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32 in lower case: no i, l, o, u


def new_id(prefix: IdPrefix) -> str:
    """A new id such as ``job_01k9...``: 48 bits of milliseconds, then 70 random bits, 24 characters in all."""
    milliseconds = time.time_ns() // 1_000_000
    return f"{prefix}_{_encode(milliseconds, 10)}{_encode(secrets.randbits(70), 14)}"


def is_id(text: str, prefix: IdPrefix) -> bool:
    return text.startswith(f"{prefix}_") and ID_PATTERN.match(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether ``text`` can only mean a repository ``org/name[@revision]`` of the Hub, never a path or an address."""
    return HUB_ID_PATTERN.fullmatch(text) is not None and ".." not in text


def _encode(number: int, length: int) -> str:
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
