"""Prefixed ids: sortable by creation time, safe in paths and URLs, and not guessable."""

from __future__ import annotations

import re
import secrets
import threading
import time
from datetime import UTC, datetime
from typing import Literal

IdPrefix = Literal["job", "file", "key", "run", "svc", "sweep", "upload", "part", "webhook", "delivery"]

ID_CHARACTERS = 24  # length of new ids after the prefix; the pattern also allows other lengths
ID_PATTERN = re.compile(r"^(job|file|key|run|svc|sweep|upload|part|webhook|delivery)_[0-9a-z]{20,32}$")
# New ids of the years 2004 to 2109 by their first two digits, for the descriptions of fields and parameters.
NEW_ID_PATTERN = r"^{prefix}_0[1-3][0-9a-hjkmnp-tv-z]{{22}}$"
_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
HUB_DATASET_PATTERN = re.compile(rf"{_HUB_NAME}/{_HUB_NAME}")
HUB_ID_PATTERN = re.compile(rf"{_HUB_NAME}(?:/{_HUB_NAME})?(?:@[A-Za-z0-9_][A-Za-z0-9_./-]*)?")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32 in lower case: no i, l, o, u
_TIME_CHARACTERS = 10
_EARLIEST_MILLISECONDS = 32**8  # 2004-11-03; `NEW_ID_PATTERN` has the same bounds
_LATEST_MILLISECONDS = 4 * 32**8  # 2109-05-15
_CLOCK_STEP_MILLISECONDS = 60_000  # if the clock was set back by more, ids follow it


class _Clock:
    """Strictly increasing milliseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next_milliseconds(self) -> int:
        now = time.time_ns() // 1_000_000
        with self._lock:
            behind = self._last - now
            self._last = self._last + 1 if 0 <= behind < _CLOCK_STEP_MILLISECONDS else now
            return self._last


_clock = _Clock()


def new_id(prefix: IdPrefix) -> str:
    """A new id such as ``job_01k9...``: 48 bits of milliseconds, then 70 random bits, 24 characters in all.

    The ids of one process sort in creation order, because no two of them contain the same millisecond.
    """
    return f"{prefix}_{_encode(_clock.next_milliseconds(), _TIME_CHARACTERS)}{_encode(secrets.randbits(70), 14)}"


def new_id_at(prefix: IdPrefix) -> tuple[str, datetime]:
    """A new id and the creation time that it contains, for a row's ``created_at``."""
    made = new_id(prefix)
    at = creation_time(made)
    assert at is not None, f"{made!r} contains no time"
    return made, at


def creation_time(id_: str) -> datetime | None:
    """The creation time in an id made by `new_id`; ``None`` for any other text."""
    digits = id_.rpartition("_")[2]
    if ID_PATTERN.fullmatch(id_) is None or len(digits) != ID_CHARACTERS or not set(digits) <= set(_ALPHABET):
        return None
    milliseconds = 0
    for digit in digits[:_TIME_CHARACTERS]:
        milliseconds = milliseconds * 32 + _ALPHABET.index(digit)
    if not _EARLIEST_MILLISECONDS <= milliseconds < _LATEST_MILLISECONDS:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)


def is_id(text: str, prefix: IdPrefix) -> bool:
    return text.startswith(f"{prefix}_") and ID_PATTERN.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether ``text`` can only mean a repository ``org/name[@revision]`` of the Hub, never a path or an address."""
    return HUB_ID_PATTERN.fullmatch(text) is not None and ".." not in text


def is_hub_dataset(text: str) -> bool:
    """Whether ``text`` can only mean a dataset ``owner/name`` of the Hub.

    A name without an owner is a packaged builder of `datasets`, such as ``text``, which reads files of this machine.
    """
    return HUB_DATASET_PATTERN.fullmatch(text) is not None and ".." not in text


def _encode(number: int, length: int) -> str:
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, 32)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
