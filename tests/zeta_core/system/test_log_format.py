"""Logs contain one printable line per message, and no secrets."""

import logging

import pytest

from zeta_core.system.log_format import OneLineFormatter, masked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("redis://:pass/word@127.0.0.1:6379/0 is unreachable", "redis://:***@127.0.0.1:6379/0 is unreachable"),
        ("postgresql://zeta:secret@db:5432/zeta", "postgresql://zeta:***@db:5432/zeta"),
        ("the key zeta_KTLmFabcdefghijklmnop-_1 is unknown", "the key *** is unknown"),
        ("the token hf_abcdefghijklmnopqrstuv", "the token ***"),
        ("Serving on http://127.0.0.1:8400.", "Serving on http://127.0.0.1:8400."),
        ("zeta_core failed in zeta_core/run/execution.py", "zeta_core failed in zeta_core/run/execution.py"),
        ("A bearer of news; see https://example.org/a@b", "A bearer of news; see https://example.org/a@b"),
    ],
)
def test_secrets_are_masked_and_other_texts_unchanged(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_a_message_is_one_printable_line_and_a_traceback_keeps_its_lines() -> None:
    formatter = OneLineFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("\x1b[2J Bearer abc")
    except ValueError as error:
        about = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("name", logging.INFO, "file", 1, "a\nb\x1b]0;title\x07", (), about)
    first, *rest = formatter.format(record).splitlines()
    assert first == "INFO a\\x0ab\\x1b]0;title\\x07"
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ValueError: \\x1b[2J Bearer ***"
