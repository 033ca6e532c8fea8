"""The text of an error is one line that is safe to log and to report."""

import pytest

from zeta_core.system.outage import MAX_TEXT_LENGTH, error_text
from zeta_core.system.redis_access import RedisUnavailable, calling_redis


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("the disk is full."), "the disk is full"),
        (ValueError("\n\n  first \nsecond"), "first"),
        (KeyError(), "KeyError"),
        (ValueError("..."), "ValueError"),
        (Mute(), "Mute (its message could not be read)"),
        (NotText(), "NotText (its message could not be read)"),
        (ValueError("red \x1b[31m \ud800"), "red \\x1b[31m \\ud800"),
        (ValueError("x" * 10_000), "x" * MAX_TEXT_LENGTH),
    ],
)
def test_the_text_of_any_error_is_one_safe_short_line(error: BaseException, text: str) -> None:
    assert error_text(error) == text


def test_an_error_without_readable_text_is_still_an_outage_of_redis() -> None:
    with pytest.raises(RedisUnavailable, match="could not be read"), calling_redis():
        raise Mute
