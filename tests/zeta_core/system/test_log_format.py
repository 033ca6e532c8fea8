"""Logs contain one printable line per message, and no secrets."""

import logging

from zeta_core.system.log_format import OneLineFormatter


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
