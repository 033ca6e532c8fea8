"""Durations as options of commands, such as ``90d``."""

from __future__ import annotations

_UNIT_SECONDS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def seconds_of(text: str, option: str) -> int:
    """The seconds of a duration such as ``12h``. Raises `InvalidRequest`, which names the option."""
    from zeta_core.contract.errors import InvalidRequest

    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and len(number) <= 6 and unit in _UNIT_SECONDS):
        raise InvalidRequest(
            f"{option} is {text!r}; it must be hours, days or weeks such as 12h, 90d or 2w.", param=option
        )
    return int(number) * _UNIT_SECONDS[unit]
